"""Which trials were begun together: written before a pack runs, read when it goes on.

A pack's checkpoint holds its trials in one order, so whoever continues it needs the
same trials in the same order, though a plan made afresh would now be another: finished
trials are left out of it, memory or `sweep.width` may have changed.

    packs/<pack id>.json   the trials of a pack that was begun, sealed
    packs/<pack id>/       its checkpoints

A pack without a checkpoint binds nobody: nothing is lost by planning its trials anew,
and what was killed for being too wide is not tried again just because it is on record.
"""

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from lowrank.core.errors import Corrupt
from lowrank.io.files import cannot_write, unused
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.run.packs import Origin
from lowrank.sweeps.group import Trial, pack_id

logger = logging.getLogger(__name__)

SCHEMA = 1


class Compositions:
    """The packs that a sweep has begun.

    Attributes:
      folder: `packs` in the sweep's directory.
    """

    def __init__(self, folder: Path):
        """Takes the folder, which need not be there."""
        self.folder = folder

    def begin(self, trials: Sequence[Trial], continued: bool) -> tuple[str, Path]:
        """Records a pack; its id and the folder of its checkpoints.

        A pack that is not continued finds no checkpoint: one that is there, of a pack
        whose trials were forced to start over, is moved aside.

        Raises:
          CannotWrite: The file system refused.
        """
        name = pack_id(trials)
        path = self.folder / f"{name}.json"
        if not continued and saved(self.folder / name):
            try:
                (self.folder / name).rename(unused(f"{self.folder / name}.old"))
            except OSError as error:
                raise cannot_write(self.folder / name, error) from error
        if not path.exists():
            ids = [trial.id for trial in trials]
            write_sealed(path, {"schema": SCHEMA, "pack": name, "trials": ids})
        return name, self.folder / name

    def reached(self, trials: Sequence[Trial]) -> int:
        """The last checkpoint of the pack of just these trials; -1 if it has none."""
        return max(_steps(self.folder / pack_id(trials)), default=-1)

    def origins(self, trials: Sequence[Trial], step: int) -> list[Origin] | None:
        """For each trial a pack that has a checkpoint at `step`, the narrowest.

        None if there is none for one of them, as when somebody has removed it.

        Raises:
          Corrupt: The record of a pack is damaged.
        """
        stored = sorted(self._stored(), key=lambda one: (len(one[1]), one[0]))
        there = [(n, ids) for n, ids in stored if step in _steps(self.folder / n)]
        found = []
        for trial in trials:
            home = next(((n, ids) for n, ids in there if trial.id in ids), None)
            if home is None:
                return None
            name, ids = home
            row = ids.index(trial.id)
            found.append(Origin(self.folder / name, tuple(ids), step, row))
        return found

    def begun(
        self,
        trials: Sequence[Trial],
        anew: Collection[str] = (),
        since: int | None = None,
    ) -> list[list[Trial]]:
        """Compositions of the packs to continue, those that have a checkpoint.

        A pack with a trial that is not in `trials` is not continued: the others have a
        start of their own again. A trial of several packs, because a wide one was
        halved, belongs to the narrowest.

        Args:
          trials: Of the sweep, finished or not.
          anew: Ids of trials that start over, and their packs with them.
          since: Only packs that have come beyond this step, of these trials alone.

        Raises:
          Corrupt: A file is damaged.
        """
        known = {trial.id: trial for trial in trials}
        found: list[list[Trial]] = []
        taken: set[str] = set()
        for name, ids in sorted(self._stored(), key=lambda one: len(one[1])):
            if {*taken, *anew} & set(ids) or not saved(self.folder / name):
                continue
            if since is not None and max(_steps(self.folder / name)) <= since:
                continue
            if strangers := [one for one in ids if one not in known]:
                if since is None and any(one in known for one in ids):
                    logger.warning(
                        "pack %s was begun with %s, which this line does not ask for: "
                        "its other trials start over",
                        name,
                        ", ".join(strangers),
                    )
                continue
            taken |= set(ids)
            found.append([known[one] for one in ids])
        return found

    def _stored(self) -> list[tuple[str, list[str]]]:
        found = []
        for path in sorted(self.folder.glob("*.json")):
            stored = read_sealed(path)
            if stored.get("schema") != SCHEMA:
                raise Corrupt(
                    f"{path} has schema {stored.get('schema')!r}, and this version "
                    f"reads {SCHEMA}. Install the version of lowrank that wrote it."
                )
            found.append((stored["pack"], stored["trials"]))
        return found


def saved(folder: Path) -> bool:
    """Whether a pack's folder holds a checkpoint: a folder named by its step."""
    return bool(_steps(folder))


def _steps(folder: Path) -> set[int]:
    # `os.walk` does not mind folders that go away meanwhile.
    names = [name for _, names, _ in os.walk(folder) for name in names]
    return {int(name) for name in names if name.isdigit()}
