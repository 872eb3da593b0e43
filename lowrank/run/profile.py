"""Where the time of steps goes: the group `profile`.

    python -m experiments.train profile=steps

Some steps are traced, and every instruction of the compiled step is booked on the part
of the model that it comes from: by the names that Flax gives modules and JAX gives its
transformations. What one instruction starts (a loop its body) counts for what is
started. The trace itself can be opened in Perfetto or XProf.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from rich.console import Console
from rich.table import Table

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.io.files import write_atomically, write_json_atomically
from lowrank.train.pack import Pack
from lowrank.train.state import TrainState

logger = logging.getLogger(__name__)

#: Inside the run directory: the trace, and beside it `table.md` and `table.json`.
FOLDER = "profile"
_ROWS = 15
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", re.M)
#: Parts of a name that say how, not where.
_WRAPPED = re.compile(r"^(?:transpose|jvp|vmap|jit|remat|checkpoint|\w+_call)\(.*\)$")
_PLUMBING = frozenset(
    {"while", "body", "cond", "closed_call", "branch_0_fun", "branch_1_fun", "scan"}
    | {"checkpoint", "rematted_computation", "shard_map", "custom_vjp_call", ""}
)


@spec
class Profile:
    """The group `profile`.

    Attributes:
      steps: Steps to trace; 0: none.
      first: Steps before them, counted from where the command begins or goes on: the
        first ones fill caches.
    """

    steps: int = 0
    first: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "first"):
            if getattr(self, name) < 0:
                raise BadInput(
                    f"profile.{name} counts steps, and is {getattr(self, name)}; give "
                    "0 or more"
                )

    def check(self, num_steps: int) -> None:
        """Raises BadInput if a run is too short for it."""
        if self.steps and self.first + self.steps > num_steps:
            raise BadInput(
                f"profile.first + profile.steps = {self.first + self.steps}, and the "
                f"run has {num_steps} steps; lower them, or train for longer"
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """A part of the step.

    Attributes:
      pass_: "forward", "backward", or "update" for all that is neither: optimizer,
        penalties, ranks and bookkeeping.
      place: The modules that it belongs to, or the kind of instruction.
      milliseconds: Per step, of all threads or streams together.
      share: Of all that was booked.
    """

    pass_: str
    place: str
    milliseconds: float
    share: float


@contextlib.contextmanager
def watched(
    pack: Pack, profile: Profile, directory: Path
) -> Iterator[Callable[[TrainState, Mapping[str, Any]], Any]]:
    """The pack, some of whose steps are traced; a table is written when they are done.

    Args:
      pack: The compiled steps.
      profile: Which of them.
      directory: Of the run.
    """
    folder = directory / FOLDER
    count, tracing = 0, False

    def run(state: TrainState, batch: Mapping[str, Any]) -> Any:
        nonlocal count, tracing
        if count == profile.first:
            # Nothing of the steps before it.
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(folder)
            tracing = True
        found = pack(state, batch)
        count += 1
        if count == profile.first + profile.steps:
            jax.block_until_ready(found)
            jax.profiler.stop_trace()
            tracing = False
            texts = [one.as_text() for one in pack.compiled.values()]
            tell(folder, rows(folder, texts, profile.steps), profile.steps)
        return found

    try:
        yield run
    finally:
        if tracing:
            jax.profiler.stop_trace()
        if count < profile.first + profile.steps:
            logger.warning(
                "%d steps were left, fewer than profile.first + profile.steps = %d: "
                "there is no table", count, profile.first + profile.steps,
            )  # fmt: skip


def rows(folder: Path, texts: Sequence[str], num_steps: int) -> list[Row]:
    """Books the newest trace in a folder, the longest first.

    Args:
      folder: Where it was written.
      texts: Compiled programs, which know what their instructions come from.
      num_steps: Steps that were traced.
    """
    told: dict[str, str] = {}
    for text in texts:
        told |= dict(_INSTRUCTION.findall(text))
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    data = ProfileData.from_file(str(files[-1]))
    spent: dict[tuple[str, str], float] = {}
    for plane in data.planes:
        for line in plane.lines:
            for name, nanoseconds in _own_times(line.events):
                place = _place(told.get(name, ""), name)
                spent[place] = spent.get(place, 0) + nanoseconds
    total = sum(spent.values()) or 1.0
    found = [
        Row(*place, milliseconds=ns / 1e6 / num_steps, share=ns / total)
        for place, ns in spent.items()
    ]
    return sorted(found, key=lambda row: -row.milliseconds)


def _own_times(events: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """Instructions of one thread, each with its time less that of what it started."""
    known = [
        (one.start_ns, -one.duration_ns, str(dict(one.stats)["hlo_op"]))
        for one in events
        if "hlo_op" in dict(one.stats)
    ]
    opened: list[list[Any]] = []
    for start, less, name in sorted(known):
        while opened and opened[-1][0] <= start:
            _, own, done = opened.pop()
            yield done, max(own, 0.0)
        if opened:
            opened[-1][1] += less
        opened.append([start - less, -less, name])
    for _, own, done in opened:
        yield done, max(own, 0.0)


def _place(op_name: str, instruction: str) -> tuple[str, str]:
    """Pass and place of an instruction, by the name of what it was compiled from."""
    # Of instructions made of several, the first name stands for all.
    parts = op_name.split(";")[0].split("/")
    pass_ = "update"
    if any("transpose(jvp(" in part for part in parts):
        pass_ = "backward"
    elif any("jvp(" in part for part in parts):
        pass_ = "forward"
    kept = [p for p in parts[:-1] if p not in _PLUMBING and not _WRAPPED.match(p)]
    if kept:
        return pass_, "/".join(kept)
    return pass_, re.sub(r"[.\d]+$", "", instruction)


def tell(folder: Path, found: Sequence[Row], num_steps: int) -> None:
    """Shows the table and writes it, `table.md` and `table.json`."""
    shown = [*found[:_ROWS]]
    if rest := found[_ROWS:]:
        left = sum(row.milliseconds for row in rest)
        share = sum(row.share for row in rest)
        shown.append(Row("", f"{len(rest)} more", left, share))
    headings = ("pass", "part of the model", "ms", "%")
    cells = [
        (row.pass_, row.place, f"{row.milliseconds:.2f}", f"{100 * row.share:.1f}")
        for row in shown
    ]
    title = f"Where the time of a step goes (mean of {num_steps})"
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("ms", "%") else "left")
    for row in cells:
        table.add_row(*row)
    Console(stderr=True).print(table)
    line = lambda row: f"| {' | '.join(row)} |"
    text = [f"# {title}", "", line(headings), "|---|---|---:|---:|", *map(line, cells)]
    content = ("\n".join(text) + "\n").encode()
    write_atomically(folder / "table.md", lambda file: file.write(content))
    told = [
        {"pass": row.pass_, "place": row.place, "ms": row.milliseconds,
         "share": row.share}
        for row in found
    ]  # fmt: skip
    write_json_atomically(folder / "table.json", {"steps": num_steps, "rows": told})
