"""What is stored beside a state so that damage to it cannot go unseen.

Orbax checks its own indices but not the numbers: one flipped bit in a payload file
restores as another value without a word. So every checkpoint carries, as a second
item, a sha256 of every leaf, and one over this list itself.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import jax
import numpy as np

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput, NonFinite
from lowrank.core.trees import flatten, leaf_digest
from lowrank.sharding.processes import on_host

#: Version of what a step directory holds. It grows when an older reader would err.
LAYOUT = 1
MAX_LISTED = 20


class Unreadable(ValueError):
    """A stored list that is no list of ours, or a damaged one."""


class OtherLayout(ValueError):
    """A list written by a version with another layout."""


@dataclass(frozen=True)
class Leaf:
    """What is known of one stored array: enough to check or, if empty, rebuild it."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    key_impl: str | None = None

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Integrity:
    """The list stored beside a state.

    Attributes:
      step: The step it belongs to, so that a renamed directory is noticed.
      identity: Fingerprints of config, base, data and code.
      leaves: Joined path -> what is known of the leaf.
      extra: The caller's JSON, such as the position in the data.
    """

    step: int
    identity: Mapping[str, str]
    leaves: Mapping[str, Leaf]
    extra: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """JSON types, with a sha256 over all of it."""
        body = {
            "layout": LAYOUT,
            "step": self.step,
            "identity": dict(self.identity),
            "leaves": {path: asdict(leaf) for path, leaf in self.leaves.items()},
            "extra": dict(self.extra),
        }
        # Through text, so that what is hashed is what a reader will hash.
        body = json.loads(json.dumps(body, allow_nan=False))
        return {"sha256": _digest(body), "body": body}

    @classmethod
    def parse(cls, content: bytes) -> "Integrity":
        """Reads what `document` gave.

        Raises:
          Unreadable: It is not JSON, not ours, or its own hash does not fit.
          OtherLayout: Its layout is not `LAYOUT`.
        """
        try:
            document = json.loads(content)
            body, stored = document["body"], document["sha256"]
            layout = body["layout"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unreadable(f"not a list of this library ({error!r})") from None
        if stored != _digest(body):
            raise Unreadable("its hash does not fit its content")
        if layout != LAYOUT:
            raise OtherLayout(
                f"has layout {layout!r}, and this version reads layout {LAYOUT}. "
                "Install the version of lowrank that wrote it"
            )
        leaves = {
            path: Leaf(**{**leaf, "shape": tuple(leaf["shape"])})
            for path, leaf in body["leaves"].items()
        }
        return cls(body["step"], body["identity"], leaves, body["extra"])


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def checked_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `extra`, which must come back from JSON exactly as it went in.

    Raises:
      BadInput: It would not, as with tuples, arrays, NaN or keys that are no text.
    """
    try:
        copied = json.loads(json.dumps(dict(extra), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"extra must be JSON, and {error}. Put arrays into the state."
        ) from None
    if not _same(copied, dict(extra)):
        raise BadInput(
            "extra must come back from JSON as it went in: use text keys, lists "
            f"instead of tuples, plain numbers. It is {extra!r}"
        )
    return copied


def _same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            _same(left[key], right[key]) for key in left
        )
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right


def checked_paths(state: PyTree) -> None:
    """Refuses keys that could not be told apart, or not be restored, later.

    Raises:
      BadInput: A dict key is not text, is empty, or two joined paths are equal.
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    for keys, _ in pairs:
        if not keys:
            raise BadInput("a stored state is a dict of arrays, not a single leaf")
        for key in keys:
            if isinstance(key, jax.tree_util.DictKey) and (
                not isinstance(key.key, str) or not key.key
            ):
                raise BadInput(
                    f"a key of a stored state is non-empty text, not {key.key!r} (in "
                    f"{jax.tree_util.keystr(keys)}); integer keys come back as text. "
                    "Rename it."
                )


def describe(state: PyTree) -> tuple[dict[str, np.ndarray], dict[str, Leaf]]:
    """Copies `state` to the host and describes every leaf of it.

    The copies are ours: training may donate or overwrite its arrays at once.

    Returns:
      Joined path -> array (of typed keys: their data), and joined path -> `Leaf`.

    Raises:
      BadInput: A key is unusable (see `checked_paths`), or a leaf is no JAX array.
      NonFinite: A float leaf holds NaN or infinity.
    """
    checked_paths(state)
    flat, _ = flatten(state)
    arrays, leaves, broken = {}, {}, []
    for path, leaf in flat.items():
        if not isinstance(leaf, jax.Array):
            raise BadInput(
                f"a stored state holds JAX arrays, but {path!r} is "
                f"{type(leaf).__name__}. Use jnp.asarray, or put it into extra."
            )
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        arrays[path] = array = on_host(leaf)
        leaves[path] = Leaf(
            tuple(leaf.shape),
            str(leaf.dtype),
            leaf_digest(path, array),
            str(jax.random.key_impl(leaf)) if is_key else None,
        )
        if jax.dtypes.issubdtype(array.dtype, np.inexact):
            bad = array.size - int(np.isfinite(array).sum())
            if bad:
                broken.append(f"{path} ({bad} of {array.size})")
    if broken:
        raise NonFinite(
            f"a state with NaN or infinity is never stored, and {listed(broken)} hold "
            "some. The steps before it are still there; resume from the last one."
        )
    return arrays, leaves


def mismatch(stored: Mapping[str, Leaf], wanted: Mapping[str, Any]) -> str:
    """How the leaves asked for differ from those stored; empty if they do not.

    Args:
      stored: Joined path -> what is known of the stored leaf.
      wanted: Joined path -> anything with a shape and a dtype.
    """
    problems = []
    if missing := wanted.keys() - stored.keys():
        problems.append(f"it lacks {listed(list(missing))}")
    if surplus := stored.keys() - wanted.keys():
        problems.append(f"it has, unasked, {listed(list(surplus))}")
    different = [
        f"{path} (stored {stored[path].dtype}{list(stored[path].shape)}, asked for "
        f"{leaf.dtype}{list(leaf.shape)})"
        for path, leaf in wanted.items()
        if path in stored
        and (stored[path].shape, stored[path].dtype)
        != (tuple(leaf.shape), str(leaf.dtype))
    ]
    if different:
        problems.append(f"these differ: {listed(different)}")
    return "; ".join(problems)


def escape(path: str) -> str:
    """`path` as one segment; `urllib.parse.unquote` undoes it.

    Orbax joins keys with dots, and would mix up ``{"a.b": x}`` and ``{"a": {"b": x}}``.
    """
    return quote(path, safe="").replace(".", "%2E").replace("~", "%7E")


def listed(names: list[str]) -> str:
    """At most `MAX_LISTED` of `names` as text, and how many more there are."""
    more = len(names) - MAX_LISTED
    shown = ", ".join(sorted(names)[:MAX_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown


_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


def step_of(name: str) -> int | None:
    """The step that a directory called `name` stands for, or None if none does."""
    return int(name) if _STEP.fullmatch(name) and name.isascii() else None
