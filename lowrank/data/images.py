"""Images with a class each: ``data=digits``, and ``data=images`` for the user's own.

A row's text is the hash of its image, so that what is checked and counted of texts is
so of images: fingerprints, equal rows, rows that stand in two splits.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.core.spec import spec
from lowrank.data.asked import TaskSpec
from lowrank.data.builders.table import SPLITS, STEMS
from lowrank.data.splits import Split, Task, cut_missing
from lowrank.models.pixels import ImageInput

#: What is read as an image, by the end of its name.
SUFFIXES = (".png", ".jpg", ".jpeg")
#: Pixels of the largest image that is read: a small file can claim to be a huge one.
MOST_PIXELS = 2**26
_FORMATS = ("PNG", "JPEG")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_SHOWN = 5


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTask:
    """Images and their classes in splits.

    Attributes:
      task: The rows; a row's text is the hash of its image.
      images: Hash -> the image, or the file that it is in.
    """

    task: Task
    images: Mapping[str, UInt8[np.ndarray, "_ _ _"] | Path]

    def fitted(
        self, split: str, wants: ImageInput, side: int
    ) -> UInt8[np.ndarray, "rows side side channels"]:
        """All images of a split as squares of one size, for a base.

        Args:
          split: Its name.
          wants: What the base wants of images.
          side: Of the squares, in pixels.

        Raises:
          BadInput: A file has changed since it was read, or an image has channels that
            the base cannot take.
        """
        rows = self.task.splits[split].texts
        found = np.empty((len(rows), side, side, wants.channels), np.uint8)
        for row, name in enumerate(rows):
            image = self.images[name]
            if isinstance(image, Path):
                file, image = image, decoded(image)
                if hash_of(image) != name:
                    raise BadInput(
                        f"{file} changed while it was read; wait until nobody writes "
                        "there, and give the command again"
                    )
            found[row] = wants.fitted(image, side)
        return found


@spec
class ImageSpec(TaskSpec):
    """What every source of images can be asked.

    Attributes:
      size: Side in pixels of the squares that a base gets; what the base wants if None.
      validation_share: Part of train that is cut off for a missing validation split.
      test_share: Part of train that is cut off, first, for a missing test split.
      seed: Which rows are cut off.
    """

    kind: ClassVar[str] = "images"

    size: int | None = None
    validation_share: float = 0.15
    test_share: float = 0.2
    seed: int = 0

    def check(self) -> None:
        """Raises `BadInput` if a number is out of range."""
        super().check()
        if self.size is not None and self.size < 1:
            raise BadInput(f"data.size must be at least 1, or null, not {self.size}")

    def made(
        self,
        name: str,
        classes: Sequence[str],
        splits: Mapping[str, Split],
        images: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> ImageTask:
        """Cuts missing splits off, thins out the train split, and makes the task."""
        shares = self.validation_share, self.test_share, self.seed
        splits, notes = cut_missing(splits, *shares)
        task = self.finish(name, classes, splits, {**provenance, **notes})
        return ImageTask(task, images)


@spec
class DigitsData(ImageSpec):
    """1,797 handwritten digits of 8 x 8 pixels, as scikit-learn ships them.

    Source: Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49. Who wrote which
    digit is not told there, so the splits may share writers.

    Attributes:
      size: As of any source of images; 98 is a multiple of the patch of base=vit.
    """

    size: int | None = 98

    def __post_init__(self) -> None:
        self.check()

    def load(self, data_dir: Path | None = None) -> ImageTask:
        """The images, cut into splits.

        Args:
          data_dir: Not used: scikit-learn has the file.

        Raises:
          BadInput: scikit-learn is missing, or shares do not fit.
        """
        del data_dir
        sets = _package("sklearn.datasets", "scikit-learn")
        found = sets.load_digits()
        # From 0 to 16 there.
        pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]
        names = [hash_of(image) for image in pixels]
        rows = Split(
            tuple(f"digit/{number}" for number in range(len(pixels))),
            tuple(names),
            np.asarray(found.target, np.int32),
        )
        classes = [str(name) for name in found.target_names]
        images = dict(zip(names, pixels, strict=True))
        about = {"source": "scikit-learn digits", "license": "BSD-3-Clause"}
        return self.made("digits", classes, {"train": rows}, images, about)


@spec
class FolderData(ImageSpec):
    """The user's own images: a folder per class, of PNG or JPEG files.

    Attributes:
      path: A folder of such folders, which is then cut into splits; or one with folders
        train, validation (valid, val, dev) and test of these.
    """

    path: str

    def __post_init__(self) -> None:
        self.check()

    def load(self, data_dir: Path | None = None) -> ImageTask:
        """The images, each decoded once, cut into splits.

        Args:
          data_dir: Not used: what is read is read again.

        Raises:
          BadInput: The package Pillow is missing, a folder or a class is empty, a file
            is no image, or a class is in one split alone.
        """
        del data_dir
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise BadInput(
                f"data.path = {self.path!r} is no folder (looked in {Path.cwd()}); "
                "give one that holds a folder of images for each class"
            )
        found = {split: _classes(folder) for split, folder in _folders(root).items()}
        classes = _ordered(found["train"], root)
        images: dict[str, Path] = {}
        splits = {}
        for split, own in found.items():
            _check_known(split, own, classes)
            ids, texts, labels = [], [], []
            for name in (one for one in classes if one in own):
                for file in own[name]:
                    texts.append(hash_of(decoded(file)))
                    images.setdefault(texts[-1], file)
                    ids.append(f"{split}/{name}/{file.name}")
                    labels.append(classes.index(name))
            splits[split] = Split(
                tuple(ids), tuple(texts), np.asarray(labels, np.int32)
            )
        name = f"images/{root.resolve().name}"
        return self.made(name, classes, splits, images, {"source": "files"})


def hash_of(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """sha256 over size and pixels of an image."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def decoded(file: Path) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of a PNG or JPEG file as red, green and blue, turned as it says.

    Transparency is left out.

    Raises:
      BadInput: The package Pillow is missing, or the file is no such image.
    """
    pillow = _package("PIL.Image", "lowrank[vision]")
    turned = _package("PIL.ImageOps", "lowrank[vision]").exif_transpose
    try:
        with pillow.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadInput(
                    f"it has {image.width} x {image.height} pixels, and at most "
                    f"{MOST_PIXELS} are read"
                )
            if image.mode not in _MODES:
                raise BadInput(f"its pixels are of kind {image.mode!r}, not of 8 bits")
            return np.array(turned(image).convert("RGB"), np.uint8)
    # The package raises whatever its decoders meet.
    except Exception as error:
        raise BadInput(
            f"{file} is not a readable PNG or JPEG image: {error}. Repair or remove it."
        ) from error


def _folders(root: Path) -> dict[str, Path]:
    """The folder of each split."""
    inside = _inside(root)
    split_of = {stem: split for split in SPLITS for stem in STEMS[split]}
    named: dict[str, Path] = {}
    for folder in (one for one in inside if one.is_dir()):
        split = split_of.get(folder.name.lower())
        if split in named:
            raise BadInput(
                f"{root} has two folders for the {split} split, {named[split].name} "
                f"and {folder.name}; remove one"
            )
        if split is not None:
            named[split] = folder
    if "train" not in named:
        return {"train": root}
    others = [one.name for one in inside if one.is_dir()]
    others = sorted({*others} - {one.name for one in named.values()})
    if others:
        raise BadInput(
            f"{root} has folders of splits and others beside them: "
            f"{', '.join(others[:_SHOWN])}. Put classes into the splits' folders."
        )
    return {split: named[split] for split in SPLITS if split in named}


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Files of each class, in the order of their names."""
    own = [one for one in _inside(folder) if one.is_dir()]
    if not own:
        raise BadInput(
            f"{folder} holds no folder; give one folder of images for each class"
        )
    found = {}
    for one in own:
        files = _inside(one)
        odd = [
            file
            for file in files
            if not file.is_file() or file.suffix.lower() not in SUFFIXES
        ]
        if odd:
            raise BadInput(
                f"{odd[0]} is no image ({', '.join(SUFFIXES)}), and {len(odd) - 1} "
                f"others of the class {one.name!r} are none; remove or convert them"
            )
        if not files:
            raise BadInput(
                f"the class {one.name!r} has no image in {one}; add some, or remove "
                "the folder"
            )
        found[one.name] = files
    return found


def _inside(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, by name."""
    found = (one for one in folder.iterdir() if not one.name.startswith("."))
    return sorted(found, key=lambda one: one.name)


def _ordered(classes: Mapping[str, Any], root: Path) -> tuple[str, ...]:
    """Names of classes: whole numbers as numbers, others alphabetically."""
    if len(classes) < 2:
        raise BadInput(
            f"{root} has one class only, {next(iter(classes))!r}; there is nothing to "
            "tell apart. Is data.path the right folder?"
        )
    if all(name.isascii() and name.isdigit() for name in classes):
        return tuple(sorted(classes, key=lambda name: (int(name), name)))
    return tuple(sorted(classes))


def _check_known(split: str, own: Mapping[str, Any], classes: Sequence[str]) -> None:
    if odd := sorted({*own} - {*classes}):
        raise UnknownName(
            f"the {split} split has {len(odd)} classes that the train split lacks, as "
            f"{odd[0]!r}. Nearest: {nearest(odd[0], classes)}. Add images to train, or "
            "remove these."
        )


def _package(module: str, wanted: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"these images need a package: pip install '{wanted}'") from None


CATALOGUE: Mapping[str, type[Any]] = {"digits": DigitsData, "images": FolderData}
