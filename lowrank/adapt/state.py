"""What a model updates by itself: state, which no rule may train."""

from collections.abc import Mapping
from typing import Any

from lowrank.adapt.rules import AnyRule
from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten


def refuse_state(rules: Mapping[str, AnyRule], outputs: Any) -> None:
    """Refuses to train what the model itself updates, as Linen's `mutable` returns it.

    Such a model returns (y, updates); a correction of statistics that the model
    overwrites at every step would be lost, or count twice.

    Args:
      rules: The rule each adapted or trained path falls under.
      outputs: What the model returns, as shapes.

    Raises:
      BadInput: A rule selects a leaf that is among the updates.
    """
    if not (isinstance(outputs, tuple) and len(outputs) == 2):
        return
    if not isinstance(outputs[1], Mapping):
        return
    updated = flatten(outputs[1])[0]
    if clash := [path for path in rules if path in updated]:
        raise BadInput(
            f"rule {rules[clash[0]].pattern!r} selects {clash[0]!r}, which the model "
            "itself updates: it returns a new value among its mutable collections. It "
            "is state, not a weight: Freeze it, and keep its updates outside"
        )
