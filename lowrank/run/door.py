"""What every command does around its work: arguments, logging, exit codes."""

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from lowrank.core.errors import (
    BAD_INPUT,
    BadInput,
    LowrankError,
    Preempted,
    exit_code,
)
from lowrank.core.secrets import redact_text
from lowrank.train.guard import end_at_next_signal

_QUOTED_KEY = re.compile(r"""(?:"([^"]+)"|'([^']+)')\s*:""")
CONF = Path(__file__).parents[2] / "conf"


def command(
    task: Callable[[Mapping[str, Any], Sequence[str]], Any],
    config_name: str = "config",
) -> Callable[[], None]:
    """Turns `task(config, overrides)` into a command line with Hydra's overrides.

    Errors of ours end the process with their exit code and one message, without a
    stack trace; a config that does not compose ends it with 2.
    """
    started = False

    @hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")
    def run(config: DictConfig) -> Any:
        nonlocal started
        started = True
        _log_to_stderr()
        try:
            overrides = HydraConfig.get().overrides.task
            return task(resolve(config), list(overrides))
        except LowrankError as error:
            if isinstance(error, Preempted):
                end_at_next_signal()
            _tell(f"{type(error).__name__}: {error}")
            sys.exit(exit_code(error))

    def main() -> None:
        nonlocal started
        started = False
        sys.argv[1:] = list(map(unquoted_keys, named_bases(sys.argv[1:])))
        try:
            run()
        except SystemExit as stop:
            # Hydra exits with 1 for a config that does not compose: bad input.
            sys.exit(BAD_INPUT if stop.code == 1 and not started else stop.code)

    return main


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


def _log_to_stderr() -> None:
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
