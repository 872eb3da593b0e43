"""docs/pods.md stays true: its lines compose, its tables are those of the reports."""

import math
import re
import shlex

import pytest
import yaml
from test_readme import composed

from experiments.rehearsal_tables import PAGE, RUNS, stored, with_tables
from lowrank.cost.chips import topology_of
from lowrank.run.door import CONF, named_bases, unquoted_keys
from lowrank.run.rehearsal import Rehearsal
from lowrank.run.settings import plain, read
from lowrank.sharding.mesh import MeshSpec

TEXT = PAGE.read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
LINES = [
    shlex.split(line, comments=True)
    for line in BLOCKS.replace("\\\n", " ").splitlines()
    if line.startswith("python -m experiments.")
]
#: Of launch recipes, what a host runs, as its shell would see it.
SHELL = {
    "$SKYPILOT_NUM_NODES": "2",
    "$SKYPILOT_NODE_RANK": "1",
    '$(echo "$SKYPILOT_NODE_IPS" | head -n1)': "10.0.0.1",
}
RECIPES = [
    found.rstrip('"')
    for block in re.findall(r"```(?:bash|yaml)\n(.*?)```", TEXT, re.DOTALL)
    for found in re.findall(
        r"python -m experiments\.train [^\n]*?processes=[^\n]*",
        re.sub(r"\\\n\s*", " ", block),
    )
]
PRESETS = sorted(
    path.stem
    for path in (CONF / "mesh").glob("*.yaml")
    if "topology: " in path.read_text() and path.stem != "one"
)


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_line_composes(line):
    door = line[2].split(".")[1]
    given = [unquoted_keys(one) for one in named_bases(line[3:]) if one != "-m"]
    given = [
        one.split(",")[0] if "{" not in one and "[" not in one else one for one in given
    ]
    config = composed(door if door == "rehearse" else "config", *given)
    mesh = plain(MeshSpec, config["mesh"], "mesh")
    if door == "rehearse":
        plain(Rehearsal, config["rehearse"], "rehearse")
        assert topology_of(mesh.topology)
    else:
        assert read(config).mesh == mesh


def test_there_are_lines():
    assert len(LINES) >= 8
    assert len(RECIPES) == 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_starts_composes(recipe):
    for variable, value in SHELL.items():
        recipe = recipe.replace(variable, value)
    assert "$" not in recipe
    given = shlex.split(recipe)[3:]
    settings = read(composed("config", *given))
    assert settings.processes.count in (None, 2)
    assert math.prod(settings.mesh.asked.values()) >= 16
    assert settings.run.root is not None, "a run directory that all hosts see"


def test_the_recipe_for_skypilot_is_a_task():
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    task = yaml.safe_load(block)
    assert task["num_nodes"] * 8 == 16
    assert "processes=manual" in task["run"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_all_the_chips_of_its_topology(name):
    assert f"`{name}`" in TEXT or f"`mesh={name}`" in TEXT
    mesh = plain(MeshSpec, composed("rehearse", f"mesh={name}")["mesh"], "mesh")
    _, along = topology_of(mesh.topology)
    assert math.prod(mesh.asked.values()) == math.prod(along)


def test_the_tables_are_those_of_the_reports():
    reports = stored()
    assert [*reports] == [*RUNS], "python -m experiments.rehearsal_tables"
    assert with_tables(TEXT, reports) == TEXT
