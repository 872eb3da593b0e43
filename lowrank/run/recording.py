"""The records of a pack's trials: opened before anything is trained, by one process."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lowrank.core.errors import LowrankError, renewed
from lowrank.core.secrets import redact
from lowrank.io.files import write_atomically
from lowrank.io.onlooker import Onlooker
from lowrank.io.record import STATUS, Record
from lowrank.run.prepare import Prepared
from lowrank.sharding.processes import agree, first, told


def open_records(
    trials: Sequence[Prepared],
    overrides: Sequence[Sequence[str]],
    stack: contextlib.ExitStack,
) -> list[Record]:
    """Opens the record of every trial, in the order given.

    Of several processes the first one writes them, and the others look on: all go on,
    or none does.

    Args:
      trials: The trials of a pack.
      overrides: The arguments that each was composed with, for its record.
      stack: Closes them.

    Raises:
      BadInput, CannotWrite, Corrupt: See `Record.open`; or the directories are not
        those that the first process sees.
    """
    records: list[Record] = []
    failure: LowrankError | None = None
    if first():
        try:
            for trial in trials:
                records.append(stack.enter_context(_opened(trial)))
            for trial, record, own in zip(trials, records, overrides, strict=True):
                if record.finished is None:
                    write_hydra(record.directory, trial.settings.config, own)
        except LowrankError as error:
            failure = error
    said = told(
        {
            "failure": failure and [type(failure).__name__, str(failure)],
            "finished": [record.finished for record in records],
        }
    )
    if failure is not None:
        raise failure
    if said["failure"] is not None:
        raise renewed(*said["failure"]) or LowrankError(said["failure"][1])
    if not first():
        pairs = zip(trials, said["finished"], strict=True)
        records = [Onlooker(trial.directory, done) for trial, done in pairs]
    seen = {f"{r.directory} (that it is there)": _there(r.directory) for r in records}
    agree(
        seen,
        "The run directory must lie where all processes see it: give run.root or "
        "run.directory on a shared file system.",
    )
    return records


def _opened(trial: Prepared) -> Record:
    return Record.open(
        trial.directory,
        config=trial.settings.config,
        identity=trial.identity,
        force=trial.settings.run.force,
    )


def _there(directory: Path) -> str:
    return str((directory / STATUS).is_file())


def write_hydra(
    directory: Path, config: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Writes `.hydra/` as Hydra would, had it heard of secrets."""
    folder = directory / ".hydra"
    contents = {"config": redact(config), "overrides": redact(list(overrides))}
    for name, value in contents.items():
        text = yaml.safe_dump(value, sort_keys=False).encode()
        write_atomically(
            folder / f"{name}.yaml", lambda file, text=text: file.write(text)
        )
