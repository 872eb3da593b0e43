"""Every file in `conf/` composes, is understood, and shows every field there is."""

import importlib
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments.data_to_text import Plan
from experiments.data_to_text import read as read_plan
from experiments.ranks_protocol.settings import Protocol, Wanted
from experiments.ranks_protocol.settings import read as read_protocol
from lowrank.allocate.adaptive import Adaptive
from lowrank.allocate.catalogue import CATALOGUE as RANKS
from lowrank.core.spec import fields_of
from lowrank.data.questions import RnnlgData
from lowrank.data.tasks import CATALOGUE as DATA
from lowrank.deltas.catalogue import CATALOGUE as DELTAS
from lowrank.run import judge
from lowrank.run.door import CONF, resolve
from lowrank.run.profile import Profile
from lowrank.run.ranks_group import Ranks, chosen, filled
from lowrank.run.settings import BATCHINGS, BaseSpec, Evaluation, RunSpec, read
from lowrank.run.survey import Survey
from lowrank.run.sweep import Halving, SweepSpec
from lowrank.sharding.mesh import MeshSpec
from lowrank.sharding.processes import Processes
from lowrank.sweeps.report import ReportSpec
from lowrank.track.trackers import Track
from lowrank.train.guard import NonFinitePolicy
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import CATALOGUE as OPTIMIZERS
from lowrank.train.penalties import Penalties

GROUPS = {
    "base": BaseSpec,
    "evaluate": Evaluation,
    "mesh": MeshSpec,
    "penalty": Penalties,
    "processes": Processes,
    "profile": Profile,
    "sweep": SweepSpec,
    "track": Track,
}
CATALOGUES = {"data": DATA, "delta": DELTAS, "optim": OPTIMIZERS, "ranks": RANKS}
#: Groups of commands that train no single run: no part of `config.yaml`.
ELSEWHERE = {"size": "ranks_protocol"}
FILES = sorted(
    path.relative_to(CONF)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ELSEWHERE
)
#: What a file leaves to the user.
OWED = {
    "tfds": "data.dataset=ag_news_subset",
    **dict.fromkeys(
        ("rnnlg", "answers", "choices", "text", "values", "images"), "data.path=x"
    ),
    "given": "ranks.ranks={head: 1}",
    "manual": "processes.count=2; processes.index=1; processes.coordinator='a:1'",
    "shuffled": "ranks.ranks={head: 1}",
}


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose(name, overrides=list(overrides)))


def content(path):
    return yaml.safe_load((CONF / path).read_text())


def shown(path):
    """What a file of a group shows, with what it takes over from another file."""
    own = content(path)
    for name in own.pop("defaults", ()):
        if name != "_self_":
            own = {**shown(path.with_name(f"{name}.yaml")), **own}
    return own


def fields(path):
    """The fields that a file of a group has to show."""
    group, name = path.parent.name, path.stem
    if group in GROUPS:
        return set(fields_of(GROUPS[group]))
    if group == "delta" and name in ("head", "full"):
        return {"name"}
    own = {"name", *fields_of(CATALOGUES[group][content(path)["name"]])}
    extra = {"data": {"batching"}, "delta": {"rank", "ranks", "targets"}}
    if group == "delta" and name == "lora":
        own |= {"start"}
    if group == "ranks":
        moves = issubclass(RANKS[content(path)["name"]], Adaptive)
        own |= {"max_rank", "bounds", "tied"} if moves else set()
        own |= {"from"} if "ranks" in own else set()
    return own | extra.get(group, set())


def test_there_is_something_to_check():
    assert {path.parent.name for path in FILES} >= {*GROUPS, *CATALOGUES, "experiment"}
    assert Path(__file__).parents[1] / "conf" == CONF


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_of_a_group_is_understood(path):
    group, name = path.parent.name, path.stem
    owed = OWED[name].split("; ") if name in OWED else []
    settings = read(composed("config", f"{group}={name}", *owed))
    assert settings.trial_id
    assert settings.rules("head/**")


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name != "experiment"], ids=str
)
def test_a_file_shows_every_field_and_no_other(path):
    assert set(shown(path)) == fields(path)
    if path.parent.name == "data":
        kind = DATA[content(path)["name"]].kind
        assert set(content(path)["batching"]) == set(fields_of(BATCHINGS[kind]))
    if str(path) == "sweep/halving.yaml":
        assert set(content(path)["halving"]) == set(fields_of(Halving))


def test_every_name_of_a_catalogue_has_a_file():
    for group, catalogue in CATALOGUES.items():
        named = {content(p)["name"] for p in FILES if p.parent.name == group}
        assert set(catalogue) <= named, group


def test_the_main_file_shows_every_field_of_its_own_groups():
    config = content("config.yaml")
    for name, cls in {
        "loop": LoopSpec,
        "non_finite": NonFinitePolicy,
        "run": RunSpec,
    }.items():
        assert set(config[name]) == set(fields_of(cls)), name
    chosen = {next(iter(one)) for one in config["defaults"] if isinstance(one, dict)}
    assert chosen >= {*GROUPS, *CATALOGUES}


def test_the_file_of_evaluate_shows_every_field():
    config = content("evaluate.yaml")
    assert set(config["run"]) == set(fields_of(judge.Where))
    assert set(fields_of(judge.What)) <= set(config)
    assert composed("evaluate", "run.directory=x")["split"] == "test"


def test_the_file_of_reports_shows_every_field():
    config = composed("report", "directory=x")
    assert {*config} == {"track", *fields_of(ReportSpec)}
    given = {name: config[name] for name in fields_of(ReportSpec)}
    assert ReportSpec(**given) == ReportSpec(directory="x")


def test_the_file_of_ranks_asks_for_a_run():
    assert composed("ranks", "directory=x") == {"directory": "x"}


def test_the_file_of_sites_shows_every_field():
    config = composed("sites")
    assert {*config} == {"base", "plugins", *fields_of(Survey)}
    given = {name: config[name] for name in fields_of(Survey)}
    assert Survey(**given) == Survey()


def test_the_file_of_data_to_text_shows_every_field():
    config = composed("data_to_text")
    assert {*config} == {*fields_of(Plan)}
    assert {*config["data"]} == {*fields_of(RnnlgData)}
    assert read_plan(config).base == "smollm2"


@pytest.mark.parametrize("path", (CONF / "size").glob("*.yaml"), ids=lambda p: p.stem)
def test_a_size_and_its_main_file_show_every_field_of_a_protocol(path):
    own, main = content(path), content("ranks_protocol.yaml")
    # A size may be another one but for some fields.
    for parent in {*own.pop("defaults", ())} - {"_self_"}:
        own = content(path.with_stem(parent)) | own
    assert {*own, *main} - {"defaults", "hydra"} == set(fields_of(Protocol))
    assert not {*own} & {*main}
    assert set(main["wanted"]) == set(fields_of(Wanted))
    assert Wanted(**main["wanted"]) == Wanted()
    assert path.read_text().startswith("# @package _global_\n# ")
    config = composed("ranks_protocol", f"size={path.stem}")
    assert read_protocol(config).records == f"runs/ranks_protocol/{path.stem}"


@pytest.mark.parametrize(
    "name", [p.stem for p in FILES if p.parent.name == "experiment"]
)
def test_an_experiment_says_what_it_asks(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    for word in ("# Question:", "# Run:", "# Cost:", "# Expect:"):
        assert word in text


def test_a_setting_that_came_later_names_no_trial_anew():
    config = composed("config")
    trial, before = read(config).trial_id, {**config, "optim": {**config["optim"]}}
    del before["optim"]["b_ratio"]
    assert read(before).trial_id == trial
    assert read(composed("config", "optim.b_ratio=1")).trial_id == trial
    assert read(composed("config", "optim.b_ratio=2")).trial_id != trial


def test_a_run_of_the_usual_ranks_is_called_as_before_there_were_others():
    config = composed("config")
    trial = read(config).trial_id
    before = {name: group for name, group in config.items() if name != "ranks"}
    assert read(before).trial_id == trial
    assert read(composed("config", "ranks=norm")).trial_id != trial
    short = {**config, "ranks": {"name": "norm"}}
    assert read(short).trial_id != trial


def test_importance_in_its_own_basis_names_trials_as_before():
    config = composed("config", "ranks=norm")
    before = {**config, "ranks": {**config["ranks"]}}
    assert before["ranks"].pop("basis") == "own"
    assert read(before).trial_id == read(config).trial_id
    singular = composed("config", "ranks=norm", "ranks.basis=singular")
    assert read(singular).trial_id != read(config).trial_id


def test_defaults_in_files_are_the_defaults_in_code():
    settings = read(composed("config"))
    assert settings.loop == LoopSpec()
    assert settings.non_finite == NonFinitePolicy()
    assert settings.run == RunSpec()
    assert settings.sweep == SweepSpec()
    halving = read(composed("config", "sweep=halving")).sweep
    assert halving == SweepSpec(halving=Halving())
    assert settings.mesh == MeshSpec()
    assert settings.evaluate == Evaluation()
    assert settings.optim == OPTIMIZERS["adamw"]()
    assert settings.penalty == Penalties()
    assert settings.ranks == Ranks()
    for name, cls in RANKS.items():
        if not OWED.get(name) and name != "eva":
            group = content(f"ranks/{name}.yaml")
            assert chosen(filled(group)) == Ranks(cls()), name
    for name, cls in DATA.items():
        if name not in OWED:
            given = {k: v for k, v in content(f"data/{name}.yaml").items()}
            given = {k: v for k, v in given.items() if k not in ("name", "batching")}
            assert cls(**given) == cls(), name


def test_doors_name_files_that_are_there():
    for door in ("train", "evaluate", "merge", "truncate", "demo", "sites", "report"):
        assert callable(importlib.import_module(f"experiments.{door}").main)
