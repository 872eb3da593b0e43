"""Array aliases and the legend of axis names used in every signature.

Axis names:
  batch, seq        examples of a batch, tokens of an example
  rows              all axes of an activation but the contracted ones
  d_in, d_out       axes of a weight that are contracted, and that are produced
  max_rank          components of a delta; a gate switches each of them
  stack             leading axes of a weight that no use contracts: scanned layers
  trials            configurations trained together in one program
  classes           labels of a classification task
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int, PRNGKeyArray

Key = PRNGKeyArray
Scalar = Float[Array, ""]
Matrix = Float[Array, "d_in d_out"]
TokenIds = Int[Array, "batch seq"]
PyTree = Any

#: The frozen part of a model: joined path -> weight (its shape, in a preview).
Frozen = Mapping[str, Any]
#: What is trained: joined path -> factors of a delta, or a whole weight.
Trained = Mapping[str, Any]
#: What steers a delta without being trained: joined path -> {dial: array}.
Dials = Mapping[str, Mapping[str, Any]]
#: Joined path -> {factor: the role of each of its axes, "stack", "rank", "in", "out"}.
Roles = Mapping[str, Mapping[str, tuple[str, ...]]]
