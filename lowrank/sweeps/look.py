"""What is in the directory of a trial before a sweep runs it."""

from collections.abc import Mapping

from lowrank.core.errors import CannotWrite, Corrupt
from lowrank.core.spec import digest
from lowrank.io.files import LOCK_NAME
from lowrank.io.record import Record, stored_result
from lowrank.run.packs import Outcome
from lowrank.run.prepare import identity_of, marks_of
from lowrank.run.problems import load_problem
from lowrank.run.settings import Settings
from lowrank.sweeps.group import Trial


class Look:
    """Sees what a trial's directory holds; loads base and data only if it must.

    Trials of a sweep mostly share them, so their fingerprints are taken once.

    Attributes:
      forced: Ids of trials that start over, because run.force=true.
    """

    def __init__(self) -> None:
        self.forced: set[str] = set()
        self._identities: dict[str, Mapping[str, str]] = {}

    def __call__(self, trial: Trial) -> Outcome | None:
        """The outcome that is there already; None if the trial is to be run.

        A directory that holds something else is an outcome, too, an error; with
        run.force=true it is left to `Record.open`, which moves the content aside.
        """
        directory, settings = trial.directory, trial.settings
        # What a sweep writes before it runs says nothing of what became of the trial.
        written = set(directory.iterdir()) if directory.is_dir() else set()
        if not written - {directory / ".hydra", directory / LOCK_NAME}:
            return None
        try:
            facts = {"config": settings.config, "identity": self._identity(settings)}
            result = stored_result(directory, **facts)
            if result is None:
                return None
            # Killed between its result and its status, it still says "running".
            with Record.open(directory, **facts):
                return Outcome(result, None)
        except (Corrupt, CannotWrite) as error:
            if not settings.run.force:
                return Outcome(None, error)
            self.forced.add(trial.id)
            return None

    def _identity(self, settings: Settings) -> Mapping[str, str]:
        parts = [settings.config[name] for name in ("base", "data")]
        key = digest([*parts, settings.run.cache])
        if key not in self._identities:
            self._identities[key] = identity_of(settings, load_problem(settings))
        own = {"config": settings.trial_id, **marks_of(settings)}
        # What another trial with the same data names is not this one's.
        shared = ("base", "data", "code")
        return {name: self._identities[key][name] for name in shared} | own
