"""What is wrong is said before anything is compiled, and nothing is left behind."""

import json

import pytest
from tiny_run import counting_compilations, write_base, write_table

from lowrank.core.errors import BAD_INPUT, CANNOT_WRITE, BadInput, LowrankError
from lowrank.run.trial import run_trial

PROGRAMS = ("packed", "infer", "init_trained")


def refused(world, tmp_path, *overrides, code=BAD_INPUT):
    """The message of a run that is refused; asserts that it left no trace."""
    directory = tmp_path / "refused"
    config = world.config(f"run.directory={directory}", *overrides)
    with counting_compilations() as compiled, pytest.raises(LowrankError) as caught:
        run_trial(config)
    assert caught.value.exit_code == code, caught.value
    assert not directory.exists()
    assert not [name for name in compiled if any(p in name for p in PROGRAMS)]
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["base.source=./nowhere"], "./nowhere"),
        (["base.source='pypi:unheard-of==1.0'"], "not pinned"),
        (["base.source=python:no_such_module:load"], "cannot be imported"),
        (["base.source=python:builtins:dict"], "must return a lowrank.io.hub.Base"),
        (["base.pooling=max"], "BaseSpec.pooling"),
        (["base.max_length=99"], "base.max_length = 99"),
        (["delta.targets='**/nothing/kernel'"], "nothing"),
        (["delta.targets=['**/query/kernel','**/query/*']"], "encoder/layer/attention"),
        (["delta.targets=[]"], "delta.targets"),
        (["delta.targets='**/bias'"], "bias"),
        (["delta.rank=0"], "rank must be a whole number of at least 1, not 0"),
        (["delta.rank=-3"], "not -3"),
        (["delta.rank=2.5"], "delta.rank must be a whole number, not 2.5"),
        (["delta.rank=25"], "rank 25"),
        (["delta.ranks=4"], "delta.ranks maps patterns to ranks"),
        (["delta.ranks={a:-1}"], "delta.ranks['a'] must be a whole number of at least"),
        (["delta.ranks={a:true}"], "not True"),
        ([r"delta.ranks={**/layer\[9\]/**:2}"], "beyond a stack of 3 layers"),
        ([r"delta.ranks={head\[0\]/**:2}"], "but none that"),
        ([r"delta.ranks={**/layer\[\:\]/**:0}"], "nothing is corrected"),
        (["delta.ranks={**/nothing:2}"], "nothing"),
        (["delta.alpha=many"], "LoRA.alpha must be float, not 'many'"),
        (["delta.name=lroa"], "'lora'"),
        (["+delta.aplha=3"], "'alpha'"),
        (["delta=head", "+delta.rank=3"], "delta=head takes no rank"),
        (["delta=head", "penalty.drift=1"], "penalty.drift weighs corrections, and"),
        (["delta=full", "optim.b_ratio=16"], "optim.b_ratio = 16 is for the factors"),
        (["ranks=norm", "ranks.budget=100000"], "budget = 100000 components is out"),
        (["ranks=norm", "ranks.end=100000"], "run of 18"),
        (
            ["ranks=norm", "ranks.budget=1", "ranks.bounds={**/value/**:[2,4]}"],
            "take 6",
        ),
        (["ranks=norm", "ranks.bounds={**/nothing:[1,2]}"], "nothing"),
        (["ranks=given", "+ranks.ranks={nowhere:1}"], "nowhere"),
        (["delta=triplet", "ranks=squeeze"], "ranks.mode=squeezed"),
        (["delta=head", "ranks=fisher"], "delta=head makes none"),
        (["penalty.drift=-1"], "penalty.drift = -1 is out of range"),
        (["penalty.frobenius=much"], "penalty: Penalties.frobenius must be float"),
        (["optim.lr=abc"], "AdamW.lr must be float, not 'abc'"),
        (["optim.lr=-1"], "optim.lr = -1"),
        (["optim.lr=true"], "AdamW.lr must be float"),
        (["optim.accumulate=3"], "optim.accumulate = 3 does not divide"),
        (["optim.epochs=0"], "optim.epochs"),
        (["seed=-1"], "seed must be a whole number"),
        (["seed=1.5"], "not 1.5"),
        (["seed=2147483648"], "2147483648"),
        (["+foo=1"], "no group 'foo'"),
        (["+sede=1"], "'seed'"),
        (["loop=3"], "loop is a group of fields"),
        (["+loop.evry=3"], "'evaluate_every'"),
        (["loop.log_every=0"], "loop.log_every must be at least 1"),
        (["loop.select=acuracy"], "loop.select = 'acuracy'"),
        (["loop.select=worst_class_recall"], "validation split of 11 rows"),
        (["non_finite.action=ignore"], "NonFinitePolicy.action"),
        (["mesh.data=9"], "8 cpu devices"),
        (["mesh.data=0"], "mesh.data = 0"),
        (["mesh.data=3"], "data.batching.batch_size = 8 cannot be shared"),
        (["mesh.data=8", "evaluate.batch_size=12"], "evaluate.batch_size = 12"),
        (["track.wandb=maybe"], "Track.wandb"),
        (["plugins=[no.such.package]"], "cannot import 'no.such.package'"),
        (["plugins=json"], "plugins is a list"),
        (["data.path=null"], "data.path"),
        (["data.path=missing.csv"], "missing.csv"),
        (["data.text=body"], "'body'"),
        (["data.label=class"], "'class'"),
        (["data.format=xls"], "TableData.format"),
        (["data.batching.batch_size=0"], "batch_size must be at least 1"),
        (["data.batching.buckets=[16,8]"], "increasing"),
        (["data.batching=3"], "data.batching is a group"),
        (["data.validation_share=1.5"], "validation_share"),
        (["run.directory=gs://bucket/run"], "path on a file system"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.fault(
    "wrong settings: rank, targets, rates, names, types, devices",
    "exit 2 before anything compiles, nothing left behind",
)
def test_a_wrong_setting_is_refused(world, tmp_path, overrides, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(world, tmp_path, *overrides)


def test_tensorboard_is_asked_for_only_where_it_is_installed(
    world, tmp_path, monkeypatch
):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "tensorboardX" in refused(world, tmp_path, "track.tensorboard=true")


def edited(path, change):
    path.write_text(change(path.read_text()))
    return path


ROWS = {
    "no label": (lambda text: text.replace(",color", ",", 1), "label"),
    "no text": (lambda text: text + ",color\n", "text"),
    "ragged": (lambda text: text + "word1 red,color,more\n", "table.csv"),
    "one class": (lambda text: text.replace(",weather", ",x").replace(
        ",color", ",x").replace(",animal", ",x"), "one class only"),
    "nothing": (lambda text: "", "table.csv"),
    "a header only": (lambda text: "text,label\n", "row"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.fault(
    "wrong tables: no label, no text, ragged, empty, one class",
    "exit 2 before anything compiles, nothing left behind",
)
def test_a_wrong_table_is_refused(world, tmp_path, case):
    change, said = ROWS[case]
    table = edited(write_table(tmp_path / "table.csv"), change)
    assert said in refused(world, tmp_path, f"data.path={table}")


@pytest.mark.fault(
    "empty split, unknown label, test rows in train",
    "exit 2 naming split and row",
)
def test_a_split_without_rows_or_with_a_label_of_its_own_is_refused(world, tmp_path):
    folder = tmp_path / "folder"
    train = write_table(folder / "train.csv")
    write_table(folder / "validation.csv", 5, seed=1)
    test = folder / "test.csv"
    test.write_text("text,label\n")
    assert "test" in refused(world, tmp_path, f"data.path={folder}")
    test.write_text("text,label\nword1 drum,sound\nword2 cat,animal\n")
    assert "'sound'" in refused(world, tmp_path, f"data.path={folder}")
    test.write_text(train.read_text())
    assert "also stand in train" in refused(world, tmp_path, f"data.path={folder}")


def shorten(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def vanish(name):
    return lambda folder: (folder / name).unlink()


def strange(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "strange"
    (folder / "config.json").write_text(json.dumps(config))


def wider(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 44
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorten, "model.safetensors"),
        (vanish("model.safetensors"), "safetensors"),
        (vanish("config.json"), "config.json"),
        (vanish("tokenizer.json"), "tokenizer.json"),
        (strange, "strange"),
        (wider, "44"),
    ],
    ids=["truncated", "no weights", "no config", "no tokenizer", "strange", "wider"],
)
@pytest.mark.fault(
    "base with missing, cut or mismatched files",
    "exit 2 naming the file",
)
def test_a_damaged_base_is_refused(world, tmp_path, damage, said):
    base = write_base(tmp_path / "base")
    damage(base)
    assert said in refused(world, tmp_path, f"base.source={base}")


@pytest.mark.parametrize(
    "place",
    ["+optim", "+base", "+data", "+data.batching", "+loop", "+run", "+delta", "+new"],
)
@pytest.mark.fault(
    "`_target_` in a config",
    "refused; no code of the config runs",
)
def test_no_config_runs_code(world, tmp_path, place):
    canary = tmp_path / "canary"
    overrides = [f"{place}._target_=builtins.open", f"{place}._args_=['{canary}',w]"]
    assert "_target_ is refused" in refused(world, tmp_path, *overrides)
    assert not canary.exists()


def test_a_directory_that_cannot_be_written_is_said_first(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    given = [f"run.directory={tmp_path / 'file' / 'run'}"]
    said = refused(world, tmp_path, *given, code=CANNOT_WRITE)
    assert str(tmp_path / "file" / "run") in said
    said = refused(world, tmp_path, f"run.cache={tmp_path / 'file'}", code=CANNOT_WRITE)
    assert "file" in said
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_foreign_directory_is_left_alone(world, tmp_path):
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "result.json").write_text("{}")
    with pytest.raises(LowrankError) as caught:
        run_trial(world.config(f"run.directory={directory}"))
    assert caught.value.exit_code == 78
    assert (directory / "result.json").read_text() == "{}"


def test_an_interpolation_that_leads_nowhere_is_bad_input(world):
    with pytest.raises(BadInput, match="does not resolve"):
        world.config("seed='${nothing.here}'")
