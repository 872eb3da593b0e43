"""What every command does around its work: arguments, logging, exit codes."""

import dataclasses
import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from lowrank.core.errors import (
    BAD_INPUT,
    BUG,
    BadInput,
    LowrankError,
    Preempted,
    exit_code,
)
from lowrank.core.secrets import redact_text
from lowrank.core.spec import digest
from lowrank.run.meeting import meet
from lowrank.run.settings import ASIDE
from lowrank.sharding.processes import leave, together
from lowrank.train.guard import end_at_next_signal

_QUOTED_KEY = re.compile(r"""(?:"([^"]+)"|'([^']+)')\s*:""")
#: Arguments of the group sweep that change what becomes of trials.
_HALVES = re.compile(r"\+*sweep(=halving$|\.halving)")
CONF = Path(__file__).parents[2] / "conf"


@dataclasses.dataclass
class Course:
    """How far a command has come, which Hydra's own exit code does not tell.

    Attributes:
      started: Whether a config was composed and handed on.
      code: Of the trials of a sweep that have failed, the gravest exit code.
    """

    started: bool = False
    code: int = 0


def command(
    task: Callable[[Mapping[str, Any], Sequence[str]], Any],
    config_name: str = "config",
    packing: object | None = None,
) -> Callable[[], None]:
    """Turns `task(config, overrides)` into a command line with Hydra's overrides.

    Errors of ours end the process with their exit code and one message, without a
    stack trace; a config that does not compose ends it with 2; a sweep ends with the
    gravest code of its trials.

    Args:
      task: What one job does.
      config_name: A file in `conf/`.
      packing: How many jobs are done together, for a launcher that can: see
        `sweeps.plan.Packing`. Launchers get nothing but the function that Hydra was
        given, so this rides on it as an attribute.
    """
    course = Course()

    def run(config: DictConfig) -> Any:
        course.started = True
        log_to_stderr()
        try:
            given = resolve(config)
            meet(given)
            sweep = given.get("sweep") or {}
            if sweep.get("dry_run"):
                raise BadInput(
                    "sweep.dry_run=true shows what a packed sweep would do: give "
                    "-m hydra/launcher=packed with it, or run.preview=true for one run"
                )
            if sweep.get("halving"):
                raise BadInput(
                    "sweep=halving cuts trials of a packed sweep: give "
                    "-m hydra/launcher=packed with it, or sweep=default for one run"
                )
            if (engine := sweep.get("engine", "local")) != "local":
                raise BadInput(
                    f"sweep.engine={engine} says where a sweep's packs run: give -m "
                    "hydra/launcher=packed with it"
                )
            return task(given, list(HydraConfig.get().overrides.task))
        except LowrankError as error:
            end(error)

    vars(run).update(packing=packing, course=course)
    hydra_main = hydra.main(
        config_path=str(CONF), config_name=config_name, version_base="1.3"
    )(run)

    def main() -> None:
        course.started, course.code = False, 0
        sys.argv[1:] = list(map(unquoted_keys, named_bases(sys.argv[1:])))
        name_sweep(sys.argv[1:])
        try:
            hydra_main()
        except SystemExit as stop:
            if stop.code != 1:
                leave(int(stop.code or 0))
            # Hydra's answer to a failed trial, to a bug, and to a config that does not
            # compose, which is bad input.
            leave(course.code or (BUG if course.started else BAD_INPUT))
        except BaseException:
            if not together():
                raise
            # In JAX's own farewell it would wait for processes that wait for it.
            traceback.print_exc()
            leave(BUG)
        if course.code or together():
            leave(course.code)

    return main


def end(error: LowrankError) -> NoReturn:
    """Ends the process with one message and the error's exit code."""
    if isinstance(error, Preempted):
        end_at_next_signal()
    _tell(f"{type(error).__name__}: {error}")
    sys.exit(exit_code(error))


def name_sweep(arguments: Sequence[str]) -> None:
    """Makes `${sweep_name:name}` the name of this line's sweep.

    Where no name is given it is a hash of the arguments that say what is done, in any
    order: the same line finds the same directory, also with sweep.dry_run=true, another
    launcher or another tracker. Halving is part of what is done.
    """
    asks = []
    for argument in arguments:
        group = re.split(r"[./=@:]", argument.lstrip("+~"), maxsplit=1)[0]
        aside = group in ("hydra", *ASIDE) and not _HALVES.match(argument)
        if not argument.startswith("-") and not aside:
            asks.append(argument)
    name = digest(sorted(asks), 12)
    OmegaConf.register_new_resolver(
        "sweep_name", lambda given=None: given or name, replace=True
    )


def resolve(config: DictConfig) -> Mapping[str, Any]:
    """The composed config as plain containers, interpolations filled in.

    Raises:
      BadInput: An interpolation cannot be resolved, or a value is missing (`???`).
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise BadInput(f"the config does not resolve: {error}") from None
    assert isinstance(plain, dict)
    plain = {str(key): value for key, value in plain.items()}
    plain.pop("experiment", None)
    return plain


def named_bases(arguments: Sequence[str]) -> list[str]:
    """Lets `base=` name a base by one string as well as by a config.

    A value that is no file in `conf/base` becomes `base.source`, quoted, since `:` and
    `=` mean something to Hydra.
    """
    known = {path.stem for path in (CONF / "base").glob("*.yaml")}
    changed = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        named = key == "base" and not set(value) & set(",'\"")
        if named and value not in known and set(value) & set(":/."):
            short = "".join(c if c.isalnum() or c in "-._" else "-" for c in value)
            short = short.strip("-.")
            changed += [f"base.source='{value}'", f"base.name='{short}'"]
        else:
            changed.append(argument)
    return changed


def unquoted_keys(argument: str) -> str:
    """Lets an argument have patterns for keys: `delta.ranks={"**/layer[0:3]/**": 4}`.

    Hydra's grammar has no quoted keys; it has escaped ones.
    """
    name, equals, value = argument.partition("=")
    if not value.lstrip().startswith("{"):
        return argument
    escaped = lambda key: re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key[1] or key[2])
    return name + equals + re.sub(_QUOTED_KEY, lambda k: escaped(k) + ":", value)


def log_to_stderr() -> None:
    """Our messages from INFO on; those of other packages from WARNING on."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    # absl leaves one while Orbax is imported, which would print every line twice.
    for plain in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(plain)
    # Of a second command in this process, the root has the handler already.
    if not any(isinstance(one, RichHandler) for one in root.handlers):
        root.addHandler(handler)
    logging.getLogger("lowrank").setLevel(logging.INFO)


def _tell(message: str) -> None:
    Console(stderr=True).print(redact_text(message), style="bold red", markup=False)
