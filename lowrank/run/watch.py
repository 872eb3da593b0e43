"""Who watches the trials of a pack: trackers of each, from its first number on."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from lowrank.core.errors import Preempted
from lowrank.io.record import METRICS, Record
from lowrank.run.prepare import PreparedPack
from lowrank.run.settings import Settings
from lowrank.track.jsonl import JsonlTracker
from lowrank.track.trackers import Trackers, build_trackers

_PENALTY = "train/penalty/"


class Watch:
    """A trial's trackers, made at the first thing to track.

    By then a continued run has cut its metrics file back to its checkpoint, which is
    what an offline tracker replays. A process that does not write the record tracks
    nothing.

    Attributes:
      jsonl: The metrics file of the record; None where another process writes it.
      status: What trackers are told in the end.
    """

    def __init__(self, settings: Settings, record: Record):
        self._settings, self._record = settings, record
        self._trackers: Trackers | None = None
        self.jsonl = JsonlTracker(record.path(METRICS)) if record.writes else None
        self.status = "failed"

    def _trackers_at(self, step: int, jsonl: JsonlTracker) -> Trackers:
        if self._trackers is None:
            self._trackers = build_trackers(
                self._settings.track,
                jsonl,
                name=self._settings.trial_id,
                run_id=self._settings.trial_id,
                config=self._settings.config,
                directory=self._record.directory,
                first_step=step,
            )
        return self._trackers

    def log(self, position: int, row: Mapping[str, float]) -> None:
        """Logs a trial's numbers, without those of penalties only neighbors have."""
        if self.jsonl is None:
            return
        wanted = self._settings.penalty.named
        self._trackers_at(position, self.jsonl).log(
            position,
            {
                name: value
                for name, value in row.items()
                if _PENALTY not in name or name.split(_PENALTY)[1] in wanted
            },
        )

    def summary(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tells trackers what the trial came to."""
        if self.jsonl is not None:
            self._trackers_at(step, self.jsonl).summary(numbers)

    def close(self) -> None:
        if self.jsonl is not None:
            (self._trackers or self.jsonl).close(self.status)


@contextlib.contextmanager
def watching(
    prepared: PreparedPack, records: Sequence[Record]
) -> Iterator[list[Watch | None]]:
    """Trackers of every trial that has no result yet; closed however it ends."""
    watches: list[Watch | None] = []
    try:
        for trial, record in zip(prepared.trials, records, strict=True):
            todo = record.finished is None
            watches.append(Watch(trial.settings, record) if todo else None)
        yield watches
    except (Preempted, KeyboardInterrupt):
        for watch in watches:
            if watch and watch.status != "done":
                watch.status = "preempted"
        raise
    finally:
        for watch in watches:
            if watch:
                watch.close()
