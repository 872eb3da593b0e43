"""Any data set that TFDS prepared as array_record becomes a task."""

import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lowrank.core.errors import BadInput, CannotWrite, Corrupt, UnknownName
from lowrank.data.checks import check_task
from lowrank.data.tasks import TfdsData


class LowrankProbe(tfds.core.GeneratorBasedBuilder):
    """A small data set of somebody else."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "sentence": tfds.features.Text(),
                    "topic": tfds.features.ClassLabel(names=["sport", "art", "law"]),
                    "page": tfds.features.Scalar(np.int64),
                    "score": tfds.features.Scalar(np.float32),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(60, 0),
            "eval": self._generate_examples(9, 100),
            "hidden": self._generate_examples(9, 200, label=-1),
        }

    def _generate_examples(self, count, first, label=None):
        for n in range(count):
            yield (
                n,
                {
                    "sentence": f"caf\xe9 {first + n}",
                    "topic": n % 3 if label is None else label,
                    "page": first + n // 2,
                    "score": 0.5,
                },
            )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(folder / "cache"))
        spec(folder).load()
    return folder


def spec(root, **options):
    known = {"text": "sentence", "label": "topic", "test": "eval", "path": str(root)}
    return TfdsData(dataset="lowrank_probe", **{**known, **options})


def test_a_data_set_of_others_becomes_a_task(root):
    task = spec(root, prepare=False, id=None, group="page").load()
    assert task.classes == ("sport", "art", "law")
    assert task.splits["test"].texts[0] == "caf\xe9 100"
    assert task.splits["test"].labels.tolist() == [0, 1, 2] * 3
    assert task.splits["test"].groups[:3] == ("100", "100", "101")
    sizes = {name: len(split) for name, split in task.splits.items()}
    assert sizes["test"] == 9
    assert sizes["train"] + sizes["validation"] == 60
    assert task.provenance["dataset"] == "lowrank_probe/1.0.0"
    assert task.provenance["cut_validation"]["by_group"] is True
    check_task(task)


def test_text_that_comes_as_str_is_taken_as_it_is(root, monkeypatch):
    """The mock data of `tfds.testing` is str where real data is bytes."""
    real = LowrankProbe.as_data_source

    class Mock:
        def __init__(self, source):
            self.rows = [
                {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
                for row in source.__getitems__(range(len(source)))
            ]

        def __len__(self):
            return len(self.rows)

        def __getitems__(self, rows):
            return [self.rows[n] for n in rows]

    bytes_task = spec(root).load()
    monkeypatch.setattr(
        LowrankProbe, "as_data_source", lambda self, split: Mock(real(self, split))
    )
    assert spec(root).load().fingerprint == bytes_task.fingerprint


def test_hidden_labels_never_reach_a_loss(root):
    task = spec(root, test="hidden").load()
    with pytest.raises(BadInput, match="-1 often marks a hidden label"):
        check_task(task)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": "sentense"}, UnknownName, "Nearest: 'sentence'.*data.text="),
        ({"label": "page"}, BadInput, "not a ClassLabel"),
        ({"group": "score"}, BadInput, "holds a float"),
        ({"test": "evil"}, UnknownName, "no split 'evil'. Nearest: 'eval'"),
        ({"dataset": "lowrank_prob"}, UnknownName, "Nearest: 'lowrank_probe'"),
        ({"version": "9.9.9"}, BadInput, "cannot open"),
        ({"train": "nothing"}, UnknownName, "no split 'nothing'"),
    ],
)
def test_a_mistake_is_named(root, options, error, message):
    chosen = {"text": "sentence", "label": "topic", "path": str(root), **options}
    with pytest.raises(error, match=message):
        TfdsData(**{"dataset": "lowrank_probe", **chosen}).load()


def test_what_is_not_prepared_is_prepared_only_if_allowed(tmp_path):
    with pytest.raises(BadInput, match=r"data.prepare=true"):
        spec(tmp_path, prepare=False).load()
    assert not list(tmp_path.iterdir())


def test_a_killed_preparation_is_removed(tmp_path, caplog):
    left = tmp_path / "lowrank_probe" / "incomplete.ABC_1.0.0"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    assert len(spec(tmp_path).load().splits["test"]) == 9
    assert not left.exists()
    assert "killed preparation" in caplog.text


def test_a_builder_that_fails_or_cannot_write_is_told_apart(tmp_path, monkeypatch):
    def fails(self, count, first, label=None):
        raise RuntimeError("no such page")
        yield

    monkeypatch.setattr(LowrankProbe, "_generate_examples", fails)
    with pytest.raises(BadInput, match="no such page"):
        spec(tmp_path).load()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"LOWRANK_CACHE|cannot be prepared"):
        spec(tmp_path / "file" / "data").load()


def test_another_file_format_is_refused(tmp_path):
    builder = LowrankProbe(data_dir=tmp_path, file_format="parquet")
    builder.download_and_prepare()
    with pytest.raises(BadInput, match="parquet"):
        spec(tmp_path).load()


@pytest.mark.parametrize("size", [0, 65536, "all but one"])
def test_a_truncated_file_is_refused(tmp_path, size):
    spec(tmp_path).load()
    (path,) = tmp_path.rglob("*-train.array_record*")
    full = path.stat().st_size
    os.truncate(path, full - 1 if size == "all but one" else size)
    with pytest.raises(Corrupt, match="split 'train'"):
        spec(tmp_path).load()
