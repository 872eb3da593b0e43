"""What accelerators can do at most, as their makers publish it; for estimates only.

No program reaches these figures, so that a time made of them is a bound from below. Of
memory, a part is the runtime's own: see `Chip.usable`.

Sources: https://docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e; NVIDIA's data
sheets of A100, H100 and H200 (SXM). Bandwidth between chips is of one chip to all its
neighbors in one direction, half of what is published for both.
"""

import dataclasses
import re
from collections.abc import Mapping

from lowrank.core.errors import BadInput, UnknownName, nearest

#: Of a chip's memory, what programs may take: the rest is the runtime's.
_USABLE = 0.95
_FORM = re.compile(r"([a-z][a-z0-9]*):([0-9]+(?:x[0-9]+){0,2})")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: As topologies have it.
      flops: Dense products in bfloat16, per second.
      memory: Bytes.
      bandwidth: Bytes per second from and to memory.
      links: Bytes per second to all other chips of its host or slice.
      platform: What a program is compiled for: "tpu", by libtpu without a TPU; or
        "cpu", since the compilers of other chips need one.
      dims: Axes of its topologies, as 2 in 16x16.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    platform: str
    dims: int

    @property
    def usable(self) -> float:
        """Bytes that a program may take."""
        return _USABLE * self.memory


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, "tpu", 2),
        Chip("v5p", 459e12, 95 * 2**30, 2765e9, 600e9, "tpu", 3),
        Chip("v6e", 918e12, 32 * 2**30, 1638e9, 400e9, "tpu", 2),
        Chip("a100", 312e12, 80 * 2**30, 2039e9, 300e9, "cpu", 1),
        Chip("h100", 989e12, 80 * 2**30, 3350e9, 450e9, "cpu", 1),
        Chip("h200", 989e12, 141 * 2**30, 4800e9, 450e9, "cpu", 1),
        # What is at hand, to try a rehearsal: no figures that a laptop would have.
        Chip("cpu", 1e12, 16 * 2**30, 50e9, 10e9, "cpu", 1),
    )
}


def topology_of(text: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip of a topology, and how many there are along each of its axes.

    Args:
      text: As "v5e:16x16", "v5p:4x4x8", "h100:8".

    Raises:
      BadInput: It is not of that form, or has another number of axes.
      UnknownName: There is no such chip here.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise BadInput(
            f"mesh.topology = {text!r} names a chip and how many there are, as "
            "v5e:16x16, v5p:4x4x8 or h100:8"
        )
    name, sizes = found[1], tuple(map(int, found[2].split("x")))
    if name not in CHIPS:
        raise UnknownName(
            f"mesh.topology = {text!r} names the chip {name!r}. Nearest: "
            f"{nearest(name, CHIPS)}. There are {', '.join(CHIPS)}."
        )
    chip = CHIPS[name]
    if len(sizes) != chip.dims or not all(sizes):
        raise BadInput(
            f"mesh.topology = {text!r}: topologies of {name} have {chip.dims} "
            f"{'axis' if chip.dims == 1 else 'axes'}, as "
            f"{name}:{'x'.join(['4'] * chip.dims)}"
        )
    return chip, sizes
