"""The run directory, as written: one trial, one writer, every file whole or absent.

    status.json        schema, identity, running | done | failed | preempted | cut, why
    config.yaml        as resolved, without secrets
    environment.json   of the last attempt; environment-1.json of the first, and so on
    metrics.jsonl      see `lowrank.track.jsonl`
    costs.json  ranks.npz  ranks.yaml  moves.json  predictions/  checkpoints/  adapter/
    SHA256SUMS         of a finished run's files, in the form of `sha256sum`
    result.json        written last; who finds it need not run again

In a multi-host run only process 0 opens a record.
"""

import json
import logging
import os
import re
import socket
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import yaml

from lowrank.core.errors import BadInput, CannotWrite, Corrupt, Preempted
from lowrank.core.secrets import redact, redact_contents, redact_text
from lowrank.core.spec import dotted
from lowrank.io.environment import describe_environment
from lowrank.io.files import (
    Lock,
    cannot_write,
    jsonable,
    local_path,
    move_aside,
    now,
    probe,
    read_json,
    remove_unfinished,
    write_atomically,
    write_json_atomically,
)
from lowrank.io.seals import check_sum, read_sealed, write_sealed, write_sums

#: Version of the directory. It grows when an older reader would err.
SCHEMA = 1
STATUS, RESULT = "status.json", "result.json"
CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
#: Names that only a run of ours leaves behind.
_OURS = (STATUS, RESULT, CONFIG, ENVIRONMENT, METRICS, "checkpoints", "predictions")
_MAX_REASON_LENGTH = 2000
_MAX_FIELDS = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
_log = logging.getLogger(__name__)


class Record:
    """The run directory of one trial while it is written.

    A context manager: an exception makes the status failed (or preempted), with the
    reason; so does leaving it without a result.

    Attributes:
      directory: The absolute path.
      attempt: 1 for a fresh directory, one more for every time it was continued.
      writes: Whether it is written here; see `io.onlooker`.
    """

    writes = True

    def __init__(self, directory: Path, lock: Lock, status: dict[str, Any]):
        """For `open` only."""
        self.directory = directory
        self._lock = lock
        self._status = status
        self._was_finished = self.finished is not None

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        identity: Mapping[str, str],
        force: bool = False,
    ) -> "Record":
        """Makes or continues the run directory of one trial.

        A directory of the same identity is continued, whatever `force` says, so that
        a preempted command may simply be given again. A finished one stays as it is.

        Args:
          directory: Where; made if it is not there.
          config: As resolved.
          identity: Fingerprints by name: config, base, data, code.
          force: Whether to move the content of another trial to ``<directory>.old-<n>``
            and start over, instead of refusing.

        Raises:
          CannotWrite: It cannot be written, or another process writes it.
          Corrupt: It holds another trial, another schema or no readable status.
        """
        path = local_path(directory)
        probe(path)
        lock = Lock(path)
        try:
            status = _previous(path, dict(identity), config, force)
            remove_unfinished(path)
            fresh = {
                "schema": SCHEMA,
                "identity": dict(identity),
                "attempt": 1,
                "started": now(),
            }
            record = cls(path, lock, status or fresh)
            if record.finished is None:
                record._begin(config, continued=status is not None)
            elif record._status["status"] != "done":
                # Killed between the result and the status, which comes after it.
                record.set_status("done")
        except BaseException:
            lock.release()
            raise
        return record

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.close()
            elif not self._was_finished:
                stopped = isinstance(error, Preempted | KeyboardInterrupt)
                name = "preempted" if stopped else "failed"
                self.set_status(name, f"{type(error).__name__}: {error}")
        except CannotWrite as failure:
            if error is None:
                raise
            # The error that ended the run matters more than this one.
            _log.error("%s", failure)
        finally:
            self._lock.release()

    @property
    def attempt(self) -> int:
        """How many times the directory was opened for writing."""
        return self._status["attempt"]

    @property
    def finished(self) -> dict[str, Any] | None:
        """The result if there is one, which makes running again unnecessary."""
        return read_result(self.directory)

    def path(self, name: str) -> Path:
        """Where `name` is or will be, such as ``checkpoints`` or ``metrics.jsonl``."""
        return self.directory / _checked(name)

    def write_json(self, name: str, value: Any) -> None:
        """Writes ``<name>`` (which ends in .json), replacing what was there.

        A mapping is sealed, see `read_json`. Text in `value` is redacted. NumPy
        scalars become numbers; NaN and infinities become text, see
        `lowrank.track.jsonl.encode_number`.

        Raises:
          BadInput: The name is taken or no plain name, or JSON cannot hold `value`.
          CannotWrite: The file system refused; the old content is still there.
        """
        taken = (STATUS, RESULT, ENVIRONMENT)
        if not _checked(name).endswith(".json") or name in taken:
            raise BadInput(
                f"{name!r} is no name for a JSON file here: it ends in .json and is "
                f"none of {', '.join(taken)}."
            )
        write = write_sealed if isinstance(value, Mapping) else write_json_atomically
        write(self.directory / name, redact_contents(value))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What an earlier attempt wrote with `write_json`, or None.

        Raises:
          Corrupt: It is damaged.
        """
        path = self.path(name)
        return read_sealed(path) if path.exists() else None

    def save_arrays(self, name: str, **arrays: Any) -> None:
        """Writes arrays to ``<name>.npz``, without pickle.

        Raises:
          BadInput: An array holds objects, or a dtype that only JAX knows.
          CannotWrite: The file system refused; the old content is still there.
        """
        self._write_npz(self.directory / f"{_checked(name)}.npz", arrays)

    def save_predictions(self, split: str, **arrays: Any) -> None:
        """Writes arrays, one row per example, to ``predictions/<split>.npz``.

        Raises:
          BadInput: They differ in length, hold objects, or a dtype that only JAX knows.
          CannotWrite: The file system refused; the old content is still there.
        """
        lengths = {name: np.shape(array)[:1] for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or () in lengths.values():
            raise BadInput(
                f"predictions of {split!r} need one row per example in every array; "
                f"they have {lengths}"
            )
        path = self.directory / "predictions" / f"{_checked(split)}.npz"
        self._write_npz(path, arrays)

    def result(self, value: Mapping[str, Any]) -> None:
        """Writes result.json and makes the status done. The last thing a run does.

        Raises:
          BadInput: The record has its result already, or JSON cannot hold `value`.
          CannotWrite: The file system refused.
        """
        if self.finished is not None:
            raise BadInput(
                f"{self.directory} is finished: its result is never replaced. Move the "
                "directory away to run again."
            )
        safe = jsonable(redact_contents(dict(value)), RESULT)
        content = (json.dumps(safe, indent=2, allow_nan=False) + "\n").encode()
        write_sums(self.directory, RESULT, content)
        write_atomically(self.directory / RESULT, lambda file: file.write(content))
        self.set_status("done", None)

    def set_status(self, status: str, reason: str | None = None) -> None:
        """Writes status.json; `reason` is redacted and cut to a readable length.

        Raises:
          CannotWrite: The file system refused.
        """
        if status not in ("running", "done", "failed", "preempted"):
            raise BadInput(
                f"a status is running, done, failed or preempted, not {status!r}"
            )
        if reason is not None:
            reason = redact_text(reason)[:_MAX_REASON_LENGTH]
        self._status |= {
            "status": status,
            "reason": reason,
            "updated": now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        write_sealed(self.directory / STATUS, self._status)

    def close(self) -> None:
        """Ends the record; a run without a result has failed. Safe to call twice."""
        if self.finished is None and self._status.get("status") == "running":
            self.set_status("failed", "the run ended without a result")
        self._lock.release()

    def _begin(self, config: Mapping[str, Any], continued: bool) -> None:
        environment = self.directory / ENVIRONMENT
        if continued:
            if environment.exists():
                earlier = f"environment-{self.attempt}.json"
                try:
                    environment.rename(environment.with_name(earlier))
                except OSError as error:
                    raise cannot_write(environment, error) from error
            self._status["attempt"] = self.attempt + 1
        # First, so that a directory with anything in it says whose it is.
        self.set_status("running")
        safe = jsonable(redact(config), "config")
        text = yaml.safe_dump(safe, sort_keys=False).encode()
        write_atomically(self.directory / CONFIG, lambda file: file.write(text))
        write_json_atomically(environment, describe_environment())

    def _write_npz(self, path: Path, arrays: Mapping[str, Any]) -> None:
        ready = {name: np.asarray(array) for name, array in arrays.items()}
        for name, array in ready.items():
            if array.dtype.kind not in "biufcSU":
                raise BadInput(
                    f"{name!r} has dtype {array.dtype}, which no .npz can hold without "
                    "pickle. Cast it, as from bfloat16 to float32."
                )

        def write(file: IO[bytes]) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, array in ready.items():
                    # A fixed date: equal arrays give equal files.
                    entry = zipfile.ZipInfo(f"{name}.npy")
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    with archive.open(entry, "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)

        write_atomically(path, write)


def _previous(
    path: Path, identity: Mapping[str, str], config: Mapping[str, Any], force: bool
) -> dict[str, Any] | None:
    """The status to continue from; None if the directory starts fresh.

    Raises:
      Corrupt: It holds another trial, another schema or no status, and not `force`.
    """
    ours = [name for name in _OURS if os.path.lexists(path / name)]
    if not ours:
        return None
    try:
        status = read_status(path)
        for field in sorted(identity.keys() | status["identity"].keys()):
            old, new = status["identity"].get(field), identity.get(field)
            if old != new:
                raise Corrupt(
                    f"{path} holds another run: its {field} fingerprint is {old!r}, "
                    f"this run's is {new!r}{_config_changes(path, config)}. Choose "
                    "another run directory, undo the change, or pass force=true to "
                    "move the old content aside and start over."
                )
        read_result(path)
    except Corrupt as refusal:
        if not force:
            raise
        aside = move_aside(path, last=STATUS)
        _log.warning("force=true: moved the content to %s, because %s", aside, refusal)
        return None
    return status


def stored_result(path: Path, *, config: Mapping, identity: Mapping) -> dict | None:
    """The result of this very trial, or None where it has none yet; see `Record.open`.

    Raises:
      Corrupt: The directory is damaged, or holds another trial.
    """
    known = _previous(path, identity, config, force=False)
    return None if known is None else read_result(path)


def read_status(path: Path) -> dict[str, Any]:
    """The content of status.json, which says whose a run directory is.

    Raises:
      Corrupt: It is missing, damaged, or of another schema.
    """
    status = read_json(path / STATUS)
    schema = status.get("schema") if isinstance(status, dict) else None
    if schema != SCHEMA:
        raise Corrupt(
            f"{path / STATUS} has schema {schema!r}, and this version reads schema "
            f"{SCHEMA}. Install the version of lowrank that wrote it."
        )
    status = read_sealed(path / STATUS)
    if not isinstance(status.get("identity"), dict) or "status" not in status:
        raise Corrupt(f"{path / STATUS} lacks its identity or status; it was edited.")
    return status


def read_result(path: Path) -> dict[str, Any] | None:
    """The content of result.json, or None of a run that has none yet.

    Raises:
      Corrupt: It differs from what was written.
    """
    if not (path / RESULT).exists():
        return None
    check_sum(path, RESULT)
    return read_json(path / RESULT)


def _config_changes(path: Path, config: Mapping[str, Any]) -> str:
    """Names the first settings that differ from the stored config, for a message."""
    try:
        old = dotted(yaml.safe_load((path / CONFIG).read_bytes()))
    except (OSError, yaml.YAMLError):
        return ""
    new = dotted(jsonable(redact(config), "config"))
    names = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    shown = [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names[:_MAX_FIELDS]]
    more = f", and {len(names) - _MAX_FIELDS} more" if len(names) > _MAX_FIELDS else ""
    return f" (config: {'; '.join(shown)}{more})" if shown else ""


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BadInput(
            "a name in a run directory has letters, digits, '.', '_' and '-' and "
            f"begins with a letter or digit, unlike {name!r}"
        )
    return name
