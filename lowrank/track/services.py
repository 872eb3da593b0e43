"""Services that show the numbers of a run: Weights & Biases and TensorBoard.

Both packages are imported only when they are used; W&B takes seconds to load.
"""

import contextlib
import hashlib
import logging
import netrc
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.core.secrets import redact, redact_text
from lowrank.track.jsonl import RESERVED, Values, decode_number

if TYPE_CHECKING:
    # Half a second, which a run that is only trained need not wait for.
    import pandas

_log = logging.getLogger(__name__)
_MAX_ID_LENGTH = 64
_INIT_SECONDS = 10.0
_FINISH_SECONDS = 20.0

Mode = Literal["auto", "online", "offline", "disabled"]
Resolved = Literal["online", "offline", "disabled"]


class WandbTracker:
    """Sends the numbers to Weights & Biases, or keeps them for a later ``wandb sync``.

    Nothing about W&B raises or waits for long: the first error is a warning and the
    last thing heard of this tracker. No console output, source, git state, command
    line or machine statistics are collected, and the config is redacted.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        project: str,
        name: str,
        run_id: str,
        config: Mapping[str, Any],
        directory: str | os.PathLike[str],
        group: str | None = None,
        job_type: str = "train",
    ):
        """Starts the run.

        Args:
          mode: ``auto`` is what WANDB_MODE says, else online if there is a key
            (WANDB_API_KEY or netrc), else offline.
          project: Where the run appears.
          name: What it is called there.
          run_id: Its identity. The same id continues an online run; offline, it moves
            the folder of an earlier attempt aside, for `replay` to fill a new one.
          config: The resolved config.
          directory: Where W&B may write.
          group: The sweep that the run belongs to.
          job_type: What it does there: train, or summary of the group.
        """
        self._run: Any = None
        self.mode: Resolved = "disabled" if mode == "auto" else mode
        if mode == "auto":
            with self._harmless():
                self.mode = _automatic_mode()
        if self.mode == "disabled":
            return
        run_id = wandb_id(run_id)
        directory = Path(directory).absolute()
        with self._harmless():
            import wandb

            directory.mkdir(parents=True, exist_ok=True)
            if self.mode == "offline":
                _set_aside(directory / "wandb", run_id)
            self._run = wandb.init(
                project=redact_text(project),
                group=None if group is None else redact_text(group),
                job_type=job_type,
                name=redact_text(name),
                id=run_id,
                config=_dotless(redact(config)),
                dir=str(directory),
                mode=self.mode,
                resume="allow" if self.mode == "online" else None,
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    disable_code=True,
                    save_code=False,
                    disable_job_creation=True,
                    init_timeout=_INIT_SECONDS,
                    login_timeout=_INIT_SECONDS,
                    finish_timeout=_FINISH_SECONDS,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                    x_save_requirements=False,
                ),
            )

    @property
    def alive(self) -> bool:
        """Whether numbers still go anywhere."""
        return self._run is not None

    def log(self, step: int, values: Values) -> None:
        """Sends `values`; steps that a resumed run has seen already are left out."""
        if self._run is not None:
            with self._harmless():
                if step >= self._run.step:
                    self._run.log(_floats(values), step=step)

    def summary(self, values: Values) -> None:
        """Sets the numbers shown for the whole run."""
        if self._run is not None:
            with self._harmless():
                self._run.summary.update(_floats(values))

    def table(self, name: str, frame: "pandas.DataFrame") -> None:
        """Sends a frame as a table; its texts are redacted, its gaps stay gaps."""
        if self._run is not None:
            with self._harmless():
                import wandb

                columns: list[Any] = [redact_text(str(name)) for name in frame]
                rows = frame.astype(object).where(frame.notna(), None)
                cells: list[Any] = [
                    list(map(_cell, row)) for row in rows.itertuples(index=False)
                ]
                # One type per column would refuse one that has numbers and text.
                table = wandb.Table(columns, cells, allow_mixed_types=True)
                self._run.log({name: table})

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Logs lines of a `JsonlTracker` again: W&B cannot resume an offline run."""
        for line in lines:
            numbers = {
                name: decode_number(value)
                for name, value in line.items()
                if name not in RESERVED
            }
            if "step" in line:
                self.log(line["step"], numbers)

    def close(self, status: str) -> None:
        """Marks the run as finished, preempted or failed, by its `status`.

        What is cut from a sweep, or waits in it, was stopped and has not failed.
        """
        if self._run is not None:
            with self._harmless():
                if status == "preempted":
                    self._run.mark_preempting()
                self._run.finish(exit_code=0 if status == "done" else 1)
            self._run = None

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            _log.warning(
                "W&B is left out from here on: %s",
                redact_text(f"{type(error).__name__}: {error}"),
            )


class TensorboardTracker:
    """Writes event files for TensorBoard."""

    def __init__(self, directory: str | os.PathLike[str], first_step: int = 0):
        """Opens a new event file.

        Args:
          directory: Where the event files are.
          first_step: Steps from here on that earlier files hold are hidden.

        Raises:
          BadInput: The package tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise BadInput(
                "track.tensorboard=true needs the package tensorboardX, which is not "
                "installed. Install lowrank[tensorboard], or set it to false."
            ) from None
        self._writer = SummaryWriter(
            logdir=os.fspath(directory), purge_step=first_step or None
        )

    def log(self, step: int, values: Values) -> None:
        """Adds one point per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def summary(self, values: Values) -> None:
        """Adds one point per value, as ``summary/<name>``."""
        for name, value in values.items():
            self._writer.add_scalar(f"summary/{name}", float(value), 0)

    def close(self, status: str) -> None:
        """Flushes and closes the file."""
        self._writer.close()


def wandb_id(text: str) -> str:
    """`text` as an id that W&B takes; a hash keeps apart what cleaning would unite."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "-", text)[:_MAX_ID_LENGTH]
    if clean == text and clean:
        return clean
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{clean[: _MAX_ID_LENGTH - 9]}-{digest}"


def _floats(values: Values) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _cell(value: Any) -> Any:
    """A cell of a table as JSON has it."""
    if isinstance(value, np.generic):
        value = value.item()
    return redact_text(value) if isinstance(value, str) else value


def _dotless(config: Any) -> Any:
    """W&B flattens a config with dots, so its own keys may not contain any."""
    if isinstance(config, Mapping):
        return {str(k).replace(".", "/"): _dotless(v) for k, v in config.items()}
    return [_dotless(v) for v in config] if isinstance(config, list) else config


def _automatic_mode() -> Resolved:
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if wanted in ("online", "offline", "disabled"):
        return wanted  # type: ignore[return-value]
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_key() else "offline"


def _netrc_key() -> bool:
    import wandb

    # The host differs between versions and installations, so W&B is asked for it.
    url = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    host = urlparse(url).hostname or ""
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _set_aside(directory: Path, run_id: str) -> None:
    """Renames folders of earlier offline attempts, so that no sync sends them twice."""
    for folder in sorted(directory.glob(f"offline-run-*-{run_id}")):
        folder.rename(folder.with_name(f"superseded-{folder.name}"))
