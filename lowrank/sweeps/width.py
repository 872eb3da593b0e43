"""How many trials fit into one pack: the compiler's estimate against the memory."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from lowrank.core.errors import BadInput
from lowrank.cost.room import GIB, room
from lowrank.run.settings import Settings
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.group import Trial

logger = logging.getLogger(__name__)

#: Bytes by width, for a pack with these settings; None where nothing is known.
Memory = Callable[[Settings, Sequence[int]], Mapping[int, int | None]]
#: Without `sweep.width`, no device has more trials of a pack: a lost pack loses the
#: work of all its trials, and a device is full long before.
WIDEST = 32


def remembered(needs: Memory) -> Memory:
    """`needs`, asked once for every trial and width: each question is a compile."""
    known: dict[tuple[str, int], int | None] = {}

    def asked(settings: Settings, widths: Sequence[int]) -> Mapping[int, int | None]:
        name = settings.trial_id
        if new := [count for count in widths if (name, count) not in known]:
            found = needs(settings, new)
            known.update({(name, count): found[count] for count in new})
        return {count: known[name, count] for count in widths}

    return asked


def memory_limit(spec: SweepSpec, num_devices: int = 1) -> tuple[int | None, str]:
    """Bytes that one device's part of a pack may need, and who says so."""
    if spec.memory_gib is not None:
        return int(spec.memory_gib * GIB), "sweep.memory_gib"
    return room(num_devices)


def width(trials: Sequence[Trial], spec: SweepSpec, needs: Memory) -> int:
    """The largest number of these trials that one pack may hold.

    A width that was asked for and does not fit is refused rather than reduced: on a CPU
    nothing but the kernel's killer would say so later.

    Args:
      trials: With one static key, and so with one mesh.
      spec: May set the width and the memory.
      needs: Compiles a pack's step and reads its memory.

    Returns:
      A multiple of the devices that share a pack's trials; where there are fewer trials
      than devices, all of them.

    Raises:
      BadInput: `sweep.width` trials need more memory than there is, or do not come out
        even on the mesh.
    """
    largest = max(trials, key=lambda trial: trial.rank).settings
    share = share_of(largest)
    if spec.engine != "local":
        _check_elsewhere(largest, spec)
    if spec.width is not None and spec.width % share:
        raise BadInput(
            f"sweep.width = {spec.width} does not come out even on the {share} devices "
            "of mesh.trial; make it a multiple"
        )
    if len(trials) < share:
        return len(trials)
    wanted = min(spec.width or WIDEST * share, len(trials)) // share
    if wanted == 1 or (spec.engine != "local" and spec.memory_gib is None):
        return wanted * share
    sizes = largest.mesh.sizes()
    limit, source = memory_limit(spec, math.prod(sizes.values()))
    if limit is None:
        logger.warning(
            "this system tells no memory limit: packs of %d are taken to fit; set "
            "sweep.width or sweep.memory_gib",
            wanted * share,
        )
        return wanted * share

    # From here on in trials per device: `asked` has what so many need.
    def ask(each: int) -> int | None:
        return needs(largest, [each * share])[each * share]

    asked = {wanted: ask(wanted)}
    if (whole := asked[wanted]) is None or whole <= limit:
        return wanted * share
    asked[1] = ask(1)
    fits = _interpolate(asked, wanted, limit)
    # All but linear in the width; where it is not, the compiler has the last word.
    while fits > 1:
        asked[fits] = ask(fits)
        if (found := asked[fits]) is None or found <= limit:
            break
        fits = min(fits - 1, _interpolate(asked, fits, limit))
    if spec.width is not None:
        raise BadInput(
            f"sweep.width = {spec.width}: {wanted * share} trials need "
            f"{(asked[wanted] or 0) / GIB:.2f} GiB and there are {limit / GIB:.2f} GiB "
            f"({source}). Give at most {fits * share}, or null for as many as fit, a "
            "smaller data.batching.batch_size, or more with sweep.memory_gib."
        )
    if fits == 1 and (asked[1] or 0) > limit:
        logger.warning(
            "one trial alone needs %.2f GiB of %.2f GiB (%s) by the compiler's "
            "estimate; it is tried all the same",
            (asked[1] or 0) / GIB,
            limit / GIB,
            source,
        )
    return fits * share


def _check_elsewhere(settings: Settings, spec: SweepSpec) -> None:
    """Refuses to guess what machines have that this process does not see."""
    if settings.mesh.trial == -1:
        raise BadInput(
            f"mesh.trial = -1 with sweep.engine={spec.engine}: this machine does not "
            "know how many devices a worker has; give their number"
        )
    if spec.width is None and spec.memory_gib is None:
        raise BadInput(
            f"sweep.engine={spec.engine}: this machine does not know how much memory a "
            "worker has; give sweep.width or sweep.memory_gib"
        )


def share_of(settings: Settings) -> int:
    """Devices along the trial axis of these settings' mesh."""
    mesh = settings.mesh
    return mesh.trial if mesh.trial > 0 else mesh.sizes()["trial"]


def _interpolate(asked: Mapping[int, int | None], wide: int, limit: int) -> int:
    """The width on the line through one trial and `wide` ones that meets the limit."""
    one, many = asked[1] or 0, asked[wide] or 0
    each = max((many - one) / (wide - 1), 1)
    return max(1, min(wide - 1, 1 + int((limit - one) // each)))
