"""Checkpoints of a run: what can be listed is complete, what is restored is right.

Orbax writes and reads the arrays. Around it stands what it leaves to its user: a
step counts only with its commit marker and its list of hashes, every leaf is compared
with its hash after reading, a damaged step makes way for the one before it, and steps
of another configuration, base, data set or code are refused.

    <directory>/<step>/commit_success.txt      written last
    <directory>/<step>/integrity/data.json     see `lowrank.io.integrity`
    <directory>/<step>/state/                  one flat dict of arrays, Orbax's format

All hosts of a multi-host run call the same methods in the same order.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput, CannotWrite, Corrupt
from lowrank.core.trees import flatten
from lowrank.io.files import cannot_write, local_path, probe, unused
from lowrank.io.integrity import (
    Integrity,
    OtherLayout,
    Unreadable,
    checked_extra,
    checked_paths,
    describe,
    mismatch,
    step_of,
)
from lowrank.io.steps import INTEGRITY_FILE, MARKER, load, quiet_orbax, start

_log = logging.getLogger(__name__)
_REMOVED = ".removed"
_MAX_FAILURES = 2


@dataclass
class _Save:
    """A save under way, with all that is needed to try it again."""

    step: int
    arrays: dict[str, np.ndarray]
    document: dict[str, Any]
    result: Callable[[], None] | None = None


class Checkpoints:
    """The steps stored in one directory, by one writer.

    A save copies the state to the host, starts to write and returns. Its failure is
    reported by the next `save`, `wait` or `close`, which tries once more; two failures
    in a row raise. A killed process loses at most the save that was under way.

    Attributes:
      directory: Where the steps are, as an absolute path.
      identity: Fingerprints that a restored step must agree with.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        identity: Mapping[str, str],
        keep: int = 2,
    ):
        """Nothing is read or written yet.

        Args:
          directory: Where the steps are or will be.
          identity: Fingerprints by name: config, base, data, code.
          keep: How many good steps to keep; the older ones are deleted.

        Raises:
          BadInput: `keep` is below 1, or the directory is a URL.
        """
        if keep < 1:
            raise BadInput(f"keep is a number of steps, at least 1, not {keep}")
        self.directory = local_path(directory)
        self.identity = dict(identity)
        self._keep = keep
        self._pending: _Save | None = None
        self._num_failures = 0
        self._last: int | None = None
        self._damaged: set[int] = set()
        self._warned: set[tuple[str, str]] = set()
        quiet_orbax()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CannotWrite as failure:
            if error is None:
                raise
            # The error that ended the run matters more than this one.
            _log.error("%s", failure)

    def save(
        self, step: int, state: PyTree, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Starts to store `state` as `step`, after the save before it has ended.

        Args:
          step: Greater than every good step and every step saved before.
          state: Dicts (or other containers) of JAX arrays. Keys may hold "/" and ".";
            typed PRNG keys and empty arrays are allowed.
          extra: JSON to come back with the state, such as the position in the data.

        Raises:
          BadInput: The step does not increase, or `state` or `extra` cannot be stored.
          NonFinite: A float leaf holds NaN or infinity.
          CannotWrite: This is the second failure in a row.
        """
        failure = self._settle()
        if failure is not None:
            self._last = None
            self._failed(*failure)
        if self._last is None:
            self._last = max(self.good_steps(), default=-1)
        if isinstance(step, bool) or not isinstance(step, int) or step <= self._last:
            raise BadInput(
                f"steps are stored in increasing order: {step!r} does not follow "
                f"{self._last} in {self.directory}. Restore first, or use another run "
                "directory."
            )
        arrays, leaves = describe(state)
        record = Integrity(step, self.identity, leaves, checked_extra(extra or {}))
        self._clear_way(step)
        self._begin(_Save(step, arrays, record.document()))
        self._last = step

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          CannotWrite: The last save failed, and so did trying it again.
        """
        while (failure := self._settle()) is not None:
            save, _ = failure
            self._failed(*failure)
            self._begin(save)

    def close(self) -> None:
        """Waits; see `wait`. The object can be used again afterwards."""
        self.wait()

    def stored_steps(self) -> tuple[int, ...]:
        """Steps with a commit marker, ascending, be they good or damaged.

        Not empty means that something was stored here: `restore`, do not start over.
        """
        return tuple(sorted(self._candidates()))

    def good_steps(self) -> tuple[int, ...]:
        """Steps whose marker and list of hashes are whole, ascending.

        The arrays themselves are compared with the hashes by `restore` only. Whatever
        else lies in the directory is left alone and warned about once.
        """
        good = []
        for step in self._candidates():
            try:
                self._read(step)
            except (Unreadable, OtherLayout) as error:
                self._warn(str(step), f"its list of hashes: {error}")
            else:
                good.append(step)
        return tuple(sorted(good))

    def restore(
        self, like: PyTree, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """Reads the newest good step, or `step`, onto the shardings of `like`.

        A step whose arrays do not fit their hashes is reported, and the one before it
        is read, unless `step` was given. The next `save` moves such steps aside.

        Args:
          like: The tree to return, with arrays or `jax.ShapeDtypeStruct`s as leaves.
            Leaves without a sharding go to the first local device.
          step: A certain step, instead of the newest.

        Returns:
          The step read, the tree with the stored values, and `extra`.

        Raises:
          BadInput: There is no such step, or none at all.
          Corrupt: The step belongs to another run, has other leaves, shapes or dtypes
            than `like`, has another layout, or no step is undamaged.
        """
        self.wait()
        checked_paths(like)
        wanted, structure = flatten(like)
        stored = self.stored_steps()
        if not stored or (step is not None and step not in stored):
            raise BadInput(
                f"there is no checkpoint {'' if step is None else step} in "
                f"{self.directory}. Stored: {', '.join(map(str, stored)) or 'none'}."
            )
        reasons = []
        for candidate in reversed(stored) if step is None else (step,):
            try:
                record = self._read(candidate)
            except OtherLayout as error:
                raise Corrupt(f"{self.directory / str(candidate)} {error}.") from None
            except Unreadable as error:
                reason = f"its list of hashes: {error}"
            else:
                self._check_identity(candidate, record)
                if problem := mismatch(record.leaves, wanted):
                    raise Corrupt(
                        f"checkpoint {candidate} in {self.directory} does not fit the "
                        f"state asked for: {problem}. Nothing is cast or left out; "
                        "restore with the model, rules, max_rank, optimizer and dtypes "
                        "it was saved with."
                    )
                found = load(self.directory / str(candidate), record, wanted)
                if not isinstance(found, str):
                    self._last = candidate if step is None else None
                    return candidate, structure.unflatten(found), dict(record.extra)
                reason = found
            self._damaged.add(candidate)
            reasons.append(f"{candidate}: {reason}")
            if step is None:
                _log.error(
                    "checkpoint %d in %s is DAMAGED (%s); trying the one before it",
                    candidate,
                    self.directory,
                    reason,
                )
        raise Corrupt(
            f"no undamaged checkpoint in {self.directory}: {'; '.join(reasons)}. Copy "
            "one back from elsewhere, or start over with force=true."
        )

    def read(self, step: int) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The leaves of a step as they were stored, whatever their shapes, and `extra`.

        Raises:
          Corrupt: The step is damaged or gone, belongs to another run, or has another
            layout.
        """
        self.wait()
        path = self.directory / str(step)
        try:
            record = self._read(step)
        except OtherLayout as error:
            raise Corrupt(f"{path} {error}.") from None
        except Unreadable as error:
            raise Corrupt(
                f"{path} cannot be read: its list of hashes: {error}"
            ) from None
        self._check_identity(step, record)
        wanted = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                jnp.dtype(leaf.dtype)
                if leaf.key_impl is None
                else jax.random.key(0, impl=leaf.key_impl).dtype,
            )
            for name, leaf in record.leaves.items()
        }
        found = load(path, record, wanted)
        if isinstance(found, str):
            raise Corrupt(
                f"{path} is damaged: {found}. Copy it back from elsewhere, or start "
                "over with force=true."
            )
        return found, dict(record.extra)

    def _begin(self, save: _Save) -> None:
        directory = self.directory / str(save.step)
        while True:
            try:
                # Orbax would make the directory in the background, and where it
                # cannot, its threads hold up the end of the process for minutes.
                probe(self.directory)
                save.result = start(directory, save.arrays, save.document)
            except Exception as error:
                # Orbax documents no class for what a file system may answer.
                self._failed(save, error)
            else:
                self._pending = save
                return

    def _settle(self) -> tuple[_Save, Exception] | None:
        """Waits for the save under way; returns it, and its error, if it failed."""
        save, self._pending = self._pending, None
        if save is None or save.result is None:
            return None
        try:
            save.result()
        except Exception as error:
            return save, error
        self._num_failures = 0
        self._prune()
        return None

    def _failed(self, save: _Save, error: Exception) -> None:
        self._num_failures += 1
        message = (
            f"checkpoint {save.step} could not be written to {self.directory}: {error}"
        )
        # Of several processes, the others wait at another place.
        if self._num_failures >= (_MAX_FAILURES if jax.process_count() == 1 else 1):
            raise CannotWrite(
                f"{message}. It is failure {self._num_failures} in a row; good steps "
                f"are {list(self.good_steps())}. Free space there and start again."
            ) from error
        _log.error("%s. One more attempt follows.", message)

    def _clear_way(self, step: int) -> None:
        """Moves damaged and half-removed steps aside, so that `step` can be stored."""
        if jax.process_index() != 0 or not self.directory.is_dir():
            return
        for leftover in self.directory.glob(f"*{_REMOVED}"):
            if not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        for bad in sorted(self._damaged | {step}):
            path = self.directory / str(bad)
            if os.path.lexists(path):
                aside = unused(f"{path}.damaged")
                try:
                    path.rename(aside)
                except OSError as error:
                    raise cannot_write(path, error) from error
                _log.warning("moved %s, which is no good step, to %s", path, aside)
        self._damaged.clear()

    def _prune(self) -> None:
        if jax.process_index() != 0:
            return
        for step in self.good_steps()[: -self._keep]:
            path = self.directory / str(step)
            removed = path.with_name(f"{step}{_REMOVED}")
            try:
                # Renamed first: a kill must not leave half a step under its name.
                path.rename(removed)
                shutil.rmtree(removed)
            except OSError as error:
                _log.warning("old checkpoint %s could not be deleted: %s", path, error)

    def _candidates(self) -> list[int]:
        steps = []
        entries = sorted(self.directory.iterdir()) if self.directory.is_dir() else []
        for path in entries:
            step = step_of(path.name)
            if step is None:
                self._warn(path.name, "it is not named after a step")
            elif path.is_symlink() or not path.is_dir():
                self._warn(path.name, "it is not a directory of its own")
            elif not (path / MARKER).is_file():
                self._warn(path.name, f"it has no {MARKER}, so it was never finished")
            else:
                steps.append(step)
        return steps

    def _warn(self, name: str, reason: str) -> None:
        if (name, reason) not in self._warned:
            self._warned.add((name, reason))
            _log.warning("ignoring %s: %s", self.directory / name, reason)

    def _read(self, step: int) -> Integrity:
        path = self.directory / str(step) / INTEGRITY_FILE
        try:
            record = Integrity.parse(path.read_bytes())
        except OSError as error:
            raise Unreadable(f"{error.strerror}: {error.filename}") from None
        if record.step != step:
            raise Unreadable(f"it belongs to step {record.step}")
        return record

    def _check_identity(self, step: int, record: Integrity) -> None:
        for field in sorted(self.identity.keys() | record.identity.keys()):
            ours, theirs = self.identity.get(field), record.identity.get(field)
            if ours != theirs:
                raise Corrupt(
                    f"checkpoint {step} in {self.directory} belongs to another run: "
                    f"its {field} fingerprint is {theirs!r}, this run's is {ours!r}. "
                    "Undo that change, choose another run directory, or pass "
                    "force=true to start over."
                )
