"""A profile books every instruction once, on the part of the model it comes from."""

import dataclasses
import json

import pytest
from tiny_run import counting_compilations

from lowrank.core.errors import BadInput
from lowrank.run.profile import _own_times, _place
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

STEPS = 4


@dataclasses.dataclass
class Event:
    start_ns: float
    duration_ns: float
    name: str | None

    @property
    def stats(self):
        return {} if self.name is None else {"hlo_op": self.name}


def test_what_an_instruction_starts_is_not_counted_twice():
    events = [
        Event(0, 100, None),
        Event(1, 60, "while"),
        Event(2, 20, "dot"),
        Event(25, 30, "call"),
        Event(26, 10, "dot"),
        Event(70, 5, "add"),
    ]
    found = sorted(_own_times(events))
    assert found == [("add", 5), ("call", 20), ("dot", 10), ("dot", 20), ("while", 10)]
    assert sum(own for _, own in found) == 60 + 5


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("jit(packed)/jvp()/while/body/closed_call/layer/mlp/mul",
         ("forward", "layer/mlp")),
        ("jit(packed)/transpose(jvp())/while/body/closed_call/LoRA.use/LoRA/mul",
         ("backward", "LoRA.use/LoRA")),
        ("jit(packed)/vmap(jvp(Classifier))/head/dot_general", ("forward", "head")),
        ("jit(packed)/mul;jit(packed)", ("update", "fusion")),
        ("", ("update", "fusion")),
    ],
)  # fmt: skip
def test_a_name_tells_pass_and_place(name, place):
    assert _place(name, "fusion.12") == place


@pytest.fixture(scope="module")
def profiled(world):
    """A run with a profile, and the same without."""
    found = []
    for name, steps in (("with", STEPS), ("without", 0)):
        directory = world.runs / "profile" / name
        more = (f"run.directory={directory}", f"profile.steps={steps}")
        run_trial(world.config(*more, "profile.first=2"))
        found.append(directory)
    return found


@pytest.mark.slow
def test_a_table_says_where_the_time_goes(profiled):
    folder = profiled[0] / "profile"
    told = json.loads((folder / "table.json").read_text())
    assert told["steps"] == STEPS
    rows = told["rows"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert {row["pass"] for row in rows} == {"forward", "backward", "update"}
    times = [row["ms"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0
    places = {(row["pass"], row["place"]) for row in rows}
    assert {("forward", "layer/attention"), ("backward", "layer/mlp")} <= places
    assert any("LoRA" in place for _, place in places)
    text = (folder / "table.md").read_text()
    assert f"mean of {STEPS}" in text
    assert f"{len(rows) - 15} more" in text
    assert [*folder.rglob("*.xplane.pb")]


@pytest.mark.slow
def test_it_changes_no_number_and_only_adds_a_folder(profiled):
    for name in ("trained.safetensors", "metrics.jsonl"):
        one, other = ((folder / name).read_bytes() for folder in profiled)
        if name == "metrics.jsonl":
            one, other = (
                [{k: v for k, v in json.loads(line).items() if k == "loss"}
                 for line in text.splitlines()]
                for text in (one, other)
            )  # fmt: skip
        assert one == other
    assert not (profiled[1] / "profile").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["profile.steps=900"], r"905, and the run has \d+ steps"),
        (["profile.steps=-1"], "profile.steps counts steps"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_compiles(world, more, said):
    with counting_compilations() as compiled, pytest.raises(BadInput, match=said):
        run_trial(world.config(f"run.directory={world.runs / 'bad'}", *more))
    assert not compiled
