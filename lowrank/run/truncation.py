"""A finished adapter cut to fewer components, by the singular values of its modules.

LoRA-Squeeze (arXiv:2602.10993), after training: train wide, cut, and train on from the
cut with `delta.start`. Of all corrections with so many components the cut one is the
nearest (Eckart & Young 1936). Exact where theirs is randomised; with a budget for all
modules together, one threshold decides for all, as PARA's.

Any folder of PEFT's LoRA will do, whoever has written it; no base is loaded.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from lowrank.core.errors import BadInput
from lowrank.core.spec import refuse_targets, spec
from lowrank.io.adapter import Adapter, Correction
from lowrank.io.folders import check_free
from lowrank.io.peft import read_adapter, write_adapter
from lowrank.io.seals import SEAL
from lowrank.run.settings import check_groups, plain

_CARD = """# {name}

The adapter `{source}`, cut by singular values to {components} components of {before}:
{kept:.4%} of its squared norm is left. Made with `lowrank`; facts of the adapter that
it was cut from are those of its own folder.
"""


@spec
class Truncation:
    """What is cut, and to what.

    Attributes:
      adapter: A folder of PEFT's, or of a finished run.
      directory: Where the cut one goes: a new folder, or an empty one.
      budget: Components of all modules together, the largest ones of all; or
      rank: those of every module.
    """

    adapter: str
    directory: str
    budget: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.rank is None):
            raise BadInput(
                f"truncate.budget = {self.budget} and truncate.rank = {self.rank}: "
                "give one of them, components of all modules together or of each"
            )
        for name in ("budget", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"truncate.{name} = {value} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Split:
    """A module's correction by its singular values.

    Attributes:
      a, b: Orthonormal rows, (components, d_in) and (components, d_out).
      values: Singular values of the correction, falling.
    """

    a: Float64[np.ndarray, "components d_in"]
    b: Float64[np.ndarray, "components d_out"]
    values: Float64[np.ndarray, " components"]

    def cut(self, count: int, old: Correction) -> Correction:
        """The largest components as balanced factors with the old scale."""
        root = np.sqrt(self.values[:count] / abs(old.scale))[:, None]
        a, b = root * self.a[:count], root * self.b[:count]
        return dataclasses.replace(old, a=a.astype(np.float32), b=b.astype(np.float32))


def truncate_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the cut adapter.

    Args:
      config: Composed from `conf/truncate.yaml`.

    Returns:
      "directory", "ranks" by module, "components" before and after, and "kept", the
      share of the squared norm that is left.

    Raises:
      BadInput: There is no adapter, there is nothing to cut, or the folder has
        something in it.
    """
    refuse_targets(config)
    check_groups(config, ("truncate",))
    asked = plain(Truncation, config.get("truncate"), "truncate")
    out = Path(asked.directory).absolute()
    check_free(out)
    source = Path(asked.adapter).expanduser()
    source = source / "adapter" if (source / "adapter").is_dir() else source
    adapter = read_adapter(source)
    cut, kept = truncated(adapter, budget=asked.budget, rank=asked.rank)
    before, after = (
        sum(one.rank for one in x.corrections.values()) for x in (adapter, cut)
    )
    facts = {"directory": str(out), "components": {"before": before, "after": after}}
    settings = adapter.config
    own = ("schema", "weights_sha256", "config_sha256", SEAL)
    write_adapter(
        out,
        cut,
        base=str(settings.get("base_model_name_or_path") or ""),
        card=_CARD.format(
            name=out.name, source=source, components=after, before=before, kept=kept
        ),
        task_type=settings.get("task_type"),
        dropout=float(settings.get("lora_dropout") or 0.0),
        notes={key: value for key, value in adapter.notes.items() if key not in own},
    )
    ranks = {module: one.rank for module, one in cut.corrections.items()}
    return {**facts, "ranks": ranks, "kept": kept}


def truncated(
    adapter: Adapter, *, budget: int | None = None, rank: int | None = None
) -> tuple[Adapter, float]:
    r"""The nearest adapter with fewer components, and the share of norm that is left.

    .. math:: \sum_{kept} s^2 / \sum s^2

    over the singular values s of all modules' corrections. Weights that were trained
    whole are left alone. Of equal values the earlier module keeps its own.

    Args:
      adapter: What is cut.
      budget: Components of all modules together; or
      rank: those of every module.

    Raises:
      BadInput: There are no more components than are asked for.
    """
    splits = {module: _split(one) for module, one in adapter.corrections.items()}
    sizes = {module: len(one.values) for module, one in splits.items()}
    there, what = sum(sizes.values()), "truncate.budget"
    if rank is not None:
        there, what = max(sizes.values()), "truncate.rank"
    if (wanted := budget if rank is None else rank) is None or wanted >= there:
        raise BadInput(
            f"{what} = {wanted} cuts nothing: there are {there} components; give fewer"
        )
    counts = {module: min(size, wanted) for module, size in sizes.items()}
    if rank is None:
        owner = np.repeat(np.arange(len(sizes)), list(sizes.values()))
        every = np.concatenate([one.values for one in splits.values()])
        largest = np.argsort(-every, kind="stable")[:wanted]
        each = np.bincount(owner[largest], minlength=len(sizes))
        counts = dict(zip(sizes, each.tolist(), strict=True))
    energy = lambda one, count=None: float(np.square(one.values[:count]).sum())
    left = sum(energy(one, counts[module]) for module, one in splits.items())
    whole = sum(energy(one) for one in splits.values())
    corrections = {
        module: splits[module].cut(counts[module], one)
        for module, one in adapter.corrections.items()
        if counts[module]
    }
    cut = dataclasses.replace(adapter, corrections=corrections)
    return cut, left / whole if whole else 1.0


def _split(one: Correction) -> Split:
    """scale a^T b through two small QRs; nothing of its size is formed."""
    q_a, r_a = np.linalg.qr(one.a.T.astype(np.float64))
    q_b, r_b = np.linalg.qr(one.b.T.astype(np.float64))
    u, values, v = np.linalg.svd(abs(one.scale) * (r_a @ r_b.T))
    return Split((q_a @ u).T, (q_b @ v.T).T, values)
