"""Images: which are read, how they are cut, batched and named, and what is refused."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from lowrank.core.errors import BadInput, Corrupt
from lowrank.core.spec import build
from lowrank.data import images
from lowrank.data.checks import check_task
from lowrank.data.pictures import PictureBatches, PicturePipeline, Pictures
from lowrank.data.tasks import CATALOGUE
from lowrank.models.pixels import ImageInput

WANTS = ImageInput(size=8, multiple=4)


def write(folder, classes=("a", "b"), count=10, seed=0):
    rng = np.random.default_rng(seed)
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def loaded(path, **fields):
    config = {"name": "images", "path": str(path), **fields}
    return build(config, CATALOGUE, "data").load()


def test_digits_are_all_there_each_once_and_evenly_cut():
    found = build({"name": "digits"}, CATALOGUE, "data").load()
    splits = found.task.splits
    assert sum(map(len, splits.values())) == 1797
    assert found.task.classes == tuple("0123456789")
    ids = [one for split in splits.values() for one in split.ids]
    assert len(set(ids)) == 1797
    for split in splits.values():
        shares = np.bincount(split.labels) / len(split)
        assert abs(shares - 0.1).max() < 0.03
    report = check_task(found.task, what="images")
    assert report["overlap"]["test_in_train"]["rows"] == 0
    pixels = found.fitted("test", ImageInput(size=28, multiple=14), 28)
    assert pixels.shape == (len(splits["test"]), 28, 28, 3)
    assert pixels.min() == 0
    assert pixels.max() > 240
    again = build({"name": "digits"}, CATALOGUE, "data").load()
    assert again.task.fingerprint == found.task.fingerprint
    other = build({"name": "digits", "seed": 1}, CATALOGUE, "data").load()
    assert other.task.fingerprint != found.task.fingerprint


def test_samples_are_taken_as_of_texts():
    fields = {"rows_per_class": 5, "train_on_validation": True}
    found = build({"name": "digits", **fields}, CATALOGUE, "data").load()
    assert len(found.task.splits["train"]) == 50
    assert set(found.task.splits) == {"train", "test"}


def test_a_folder_of_classes_is_cut_and_a_folder_of_splits_is_not(tmp_path):
    whole = loaded(write(tmp_path / "whole"))
    assert set(whole.task.splits) == {"train", "validation", "test"}
    assert sum(map(len, whole.task.splits.values())) == 20
    write(tmp_path / "cut" / "Train", ("10", "9"), seed=1)
    write(tmp_path / "cut" / "val", ("9",), 3, seed=2)
    write(tmp_path / "cut" / "test", ("10", "9"), 3, seed=3)
    (tmp_path / "cut" / ".cache").mkdir()
    (tmp_path / "cut" / "readme.txt").write_text("beside the folders")
    cut = loaded(tmp_path / "cut")
    # Names that are numbers stand in their order.
    assert cut.task.classes == ("9", "10")
    sizes = {name: len(split) for name, split in cut.task.splits.items()}
    assert sizes == {"train": 20, "validation": 3, "test": 6}
    assert cut.task.splits["validation"].ids[0] == "validation/9/0.png"


def test_one_pixel_or_one_label_is_another_data_set(tmp_path):
    folder = write(tmp_path / "one")
    before = loaded(folder).task.fingerprint
    assert loaded(folder).task.fingerprint == before
    file = folder / "a" / "3.png"
    pixels = np.array(Image.open(file))
    pixels[2, 2, 1] ^= 1
    Image.fromarray(pixels).save(file)
    changed = loaded(folder).task.fingerprint
    assert changed != before
    file.rename(folder / "b" / "x.png")
    assert loaded(folder).task.fingerprint not in (before, changed)


def test_pixels_are_those_of_the_file(tmp_path):
    folder = write(tmp_path / "one")
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    Image.fromarray(grey).save(folder / "a" / "grey.png")
    Image.fromarray(grey).save(folder / "a" / "photo.jpg", quality=95)
    clear = np.dstack([grey, grey, grey, grey // 2])
    Image.fromarray(clear).save(folder / "b" / "clear.png")
    assert (images.decoded(folder / "a" / "grey.png") == grey[..., None]).all()
    assert (images.decoded(folder / "b" / "clear.png") == grey[..., None]).all()
    assert images.decoded(folder / "a" / "photo.jpg").shape == (5, 7, 3)
    turned = Image.fromarray(clear[..., :3])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "b" / "turned.jpg", exif=exif)
    assert images.decoded(folder / "b" / "turned.jpg").shape == (7, 5, 3)
    found = loaded(folder)
    for split, rows in found.task.splits.items():
        fitted = found.fitted(split, WANTS, 8)
        for row, name in enumerate(rows.ids):
            own = images.decoded(folder / name.removeprefix("train/"))
            np.testing.assert_array_equal(fitted[row], WANTS.fitted(own, 8))


def test_an_image_in_two_splits_is_found(tmp_path):
    folder = tmp_path / "both"
    write(folder / "train")
    shutil.copytree(folder / "train", folder / "test")
    with pytest.raises(BadInput, match="18 of 20 images of the test split"):
        check_task(loaded(folder).task, what="images")


def empty(folder):
    (folder / "c").mkdir()


def text(folder):
    (folder / "a" / "notes.txt").write_text("x")


def deeper(folder):
    (folder / "a" / "more").mkdir()


def no_image(folder):
    (folder / "b" / "x.png").write_text("no image")


def cut_off(folder):
    file = folder / "b" / "2.png"
    file.write_bytes(file.read_bytes()[:60])


def other_format(folder):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "b" / "x.gif")
    (folder / "b" / "x.gif").rename(folder / "b" / "x.png")


def deep(folder):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "b" / "deep.png")


def single(folder):
    shutil.rmtree(folder / "b")


def mixed(folder):
    write(folder / "train")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (empty, "class 'c' has no image"),
        (text, "notes.txt is no image"),
        (deeper, "more is no image"),
        (no_image, "x.png is not a readable PNG or JPEG"),
        (cut_off, "2.png is not a readable PNG or JPEG"),
        (other_format, "x.png is not a readable PNG or JPEG"),
        (deep, "of kind 'I;16', not of 8 bits"),
        (single, "one class only, 'a'"),
        (mixed, "others beside them: a, b"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, spoil, said):
    folder = write(tmp_path / "own")
    spoil(folder)
    with pytest.raises(BadInput, match=said):
        loaded(folder)


def test_a_class_that_training_does_not_have_is_said(tmp_path):
    write(tmp_path / "train", ("cat", "dog"))
    write(tmp_path / "test", ("cat", "dogs"), seed=1)
    with pytest.raises(BadInput, match=r"as 'dogs'\. Nearest: 'dog'"):
        loaded(tmp_path)
    write(tmp_path / "training", ("cat", "dog"))
    with pytest.raises(BadInput, match="two folders for the train split"):
        loaded(tmp_path)


def test_an_image_that_claims_to_be_huge_is_not_decoded(tmp_path, monkeypatch):
    folder = write(tmp_path / "own")
    monkeypatch.setattr(images, "MOST_PIXELS", 34)
    with pytest.raises(BadInput, match="it has 7 x 5 pixels"):
        loaded(folder)


def test_a_file_that_changes_under_the_reader_is_noticed(tmp_path):
    folder = write(tmp_path / "own")
    found = loaded(folder)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "a" / "0.png")
    (split,) = (
        name for name, rows in found.task.splits.items() if "train/a/0.png" in rows.ids
    )
    with pytest.raises(BadInput, match="changed while it was read"):
        found.fitted(split, WANTS, 8)


@pytest.mark.parametrize(
    ("name", "module", "said"),
    [
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("images", "PIL.Image", r"lowrank\[vision\]"),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, module, said):
    fields = {} if name == "digits" else {"path": str(write(tmp_path / "own"))}
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=said):
        build({"name": name, **fields}, CATALOGUE, "data").load()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"test_share": 1.0}, "test_share must lie between"),
        ({"seed": -1}, "seed must be from 0"),
        ({"rows_per_class": 0}, "rows_per_class must be"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_said(fields, said):
    with pytest.raises(BadInput, match=said):
        build({"name": "digits", **fields}, CATALOGUE, "data")
    with pytest.raises(BadInput, match="batch_size"):
        Pictures(batch_size=0)


# Batches.


def pipeline(seeds=(0, 1), rows=11, wants=WANTS, epochs=2):
    pixels = np.arange(rows * 8 * 8 * 3).reshape(rows, 8, 8, 3) % 251
    return PicturePipeline(
        pixels.astype(np.uint8), np.arange(rows), wants, batch_size=4,
        trial_seeds=list(seeds), num_epochs=epochs,
    )  # fmt: skip


def test_every_image_is_seen_once_per_epoch_in_an_order_of_the_seed():
    batches = pipeline()
    assert (len(batches), batches.steps_per_epoch) == (6, 3)
    for epoch in range(2):
        steps = [batches.batch_at(step) for step in range(epoch * 3, epoch * 3 + 3)]
        index = np.concatenate([one["index"] for one in steps], axis=1)
        weight = np.concatenate([one["weight"] for one in steps], axis=1)
        for trial in range(2):
            real = index[trial][index[trial] >= 0]
            assert sorted(real) == list(range(11))
        np.testing.assert_array_equal(weight, index >= 0)
    first = batches.batch_at(0)
    assert first["pixels"].shape == (2, 4, 8, 8, 3)
    assert first["pixels"].dtype == np.float32
    np.testing.assert_array_equal(first["label"], first["index"])
    assert not np.array_equal(first["index"][0], first["index"][1])
    alone = pipeline(seeds=[1]).batch_at(0)
    np.testing.assert_array_equal(alone["pixels"][0], first["pixels"][1])
    assert batches.shapes() == ((4, 8),)


def test_a_batch_depends_on_its_step_alone():
    batches = pipeline()
    late = dict(batches.iterate(4))
    for step in (4, 5):
        for name, value in pipeline().batch_at(step).items():
            np.testing.assert_array_equal(late[step][name], value)
    state = batches.state(4)
    pipeline().check_state(state)
    for other in (
        pipeline(seeds=(0, 2)),
        pipeline(rows=12),
        pipeline(wants=ImageInput(size=8, std=(1.0, 1.0, 1.0))),
    ):
        with pytest.raises(Corrupt, match="other data"):
            other.check_state(state)


def test_evaluation_sees_every_image_once_in_order():
    pixels = np.zeros((7, 8, 8, 3), np.uint8)
    batches = PictureBatches(pixels, np.arange(7), WANTS, 3)
    assert len(batches) == len([*batches]) == 3
    index = np.concatenate([one["index"] for one in batches])
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1]
    assert np.concatenate([one["weight"] for one in batches]).sum() == 7
    assert batches[-1]["index"].tolist() == [6, -1, -1]
    assert len(batches[:2]) == 2
    with pytest.raises(BadInput, match="there are 0"):
        PictureBatches(pixels[:0], np.arange(0), WANTS, 3)
    with pytest.raises(BadInput, match="there are 0"):
        pipeline(rows=0)
