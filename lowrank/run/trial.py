"""One trial from its config to its record: a pack of one."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.run.packs import check_pack, run_pack
from lowrank.run.prepare import prepare_pack
from lowrank.run.preview import preview
from lowrank.run.settings import read
from lowrank.train.guard import interruptible


def run_trial(
    config: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Runs the trial that `config` describes, continues it, or returns what it left.

    Args:
      config: Composed and resolved.
      overrides: The arguments it was composed with, for the record.

    Returns:
      The result, as in `result.json`; of a preview, what was shown.

    Raises:
      LowrankError: See `core.errors`; bad input is found before anything is compiled.
    """
    settings = read(config)
    if settings.run.preview:
        with interruptible():
            prepared = prepare_pack([settings])
            check_pack(prepared)
            return preview(prepared.trials[0])
    (outcome,) = run_pack([settings], [overrides])
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return outcome.result
