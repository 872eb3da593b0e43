"""What a model wants of an image: its size, its channels, how numbers are scaled."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.models.resampling import triangle

#: Of red, green and blue in what is taken for grey; ITU-R BT.601, as in Pillow.
_GREY = (0.299, 0.587, 0.114)


@spec
class ImageInput:
    """How images become the input of a base.

    Attributes:
      size: Side in pixels of the images that it wants.
      multiple: What the side of any image must be a multiple of: the patch.
      channels: Numbers per pixel.
      mean, std: Of each channel, on a scale from 0 to 1; the model reads
        (x - mean) / std.
    """

    size: int
    multiple: int = 1
    channels: int = 3
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("size", "multiple", "channels"):
            if getattr(self, name) < 1:
                raise BadInput(
                    f"ImageInput.{name} must be at least 1, not {getattr(self, name)}"
                )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise BadInput(
                    f"ImageInput.{name} has {len(getattr(self, name))} numbers for "
                    f"{self.channels} channels"
                )
        if not all(value > 0 for value in self.std):
            raise BadInput(f"ImageInput.std must be positive, not {list(self.std)}")

    def side(self, asked: int | None, where: str) -> int:
        """The side of images: as asked for, or what the base wants.

        Args:
          asked: A side in pixels, or None.
          where: The setting that asks, for the message.

        Raises:
          BadInput: It is no multiple of the patch.
        """
        side = self.size if asked is None else asked
        if side < self.multiple or side % self.multiple:
            below = max(self.multiple, side - side % self.multiple)
            raise BadInput(
                f"{where} = {side} is not a multiple of {self.multiple}, the side of a "
                f"patch of this base: set it to {below}, or to null for the base's own "
                f"{self.size}"
            )
        return side

    def fitted(
        self, image: UInt8[np.ndarray, "height width own"], side: int
    ) -> UInt8[np.ndarray, "side side channels"]:
        """An image of this many channels, stretched or shrunk to a square.

        Every sum is exact, so that the result is the same on every machine.

        Raises:
          BadInput: Its channels cannot be turned into those.
        """
        own = image.shape[2]
        down = triangle(image.shape[0], side)
        across = triangle(image.shape[1], side)
        wide = np.tensordot(down, image.astype(np.float64), axes=(1, 0))
        wide = np.tensordot(wide, across, axes=(1, 1)).transpose(0, 2, 1)
        found = np.clip(np.rint(wide), 0, 255).astype(np.uint8)
        if own == self.channels:
            return found
        if own == 1:
            return np.repeat(found, self.channels, axis=2)
        if own == 3 and self.channels == 1:
            grey = sum(w * found[..., n] for n, w in enumerate(_GREY))
            return np.rint(grey).astype(np.uint8)[..., None]
        raise BadInput(
            f"an image has {own} channels and the base reads {self.channels}; convert "
            "the images to grey or to RGB"
        )

    def normalized(
        self, pixels: UInt8[np.ndarray, "*rows channels"]
    ) -> Float32[np.ndarray, "*rows channels"]:
        """(x / 255 - mean) / std."""
        mean = np.asarray(self.mean, np.float32)
        std = np.asarray(self.std, np.float32)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std
