"""What a run hands over: its trained tree, and the adapter in PEFT's layout."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import yaml

from lowrank.core.arrays import Dials, Trained
from lowrank.core.paths import matches
from lowrank.deltas.base import Delta
from lowrank.deltas.lora import LoRA
from lowrank.deltas.triplet import Triplet
from lowrank.io.adapter import collect
from lowrank.io.files import write_atomically
from lowrank.io.peft import write_adapter
from lowrank.run.prepare import Prepared
from lowrank.run.ranks import final
from lowrank.run.ranks_group import RANKS
from lowrank.run.stored import write_trained

logger = logging.getLogger(__name__)


def ship(directory: Path, prepared: Prepared, trained: Trained, dials: Dials) -> None:
    """Writes `trained.safetensors`, the ranks, and `adapter/` where PEFT has a word.

    PEFT knows LoRA on a model whose modules have Hugging Face names, with the head
    beside it; full fine-tuning, a head alone, or a base of another kind have none.
    """
    base, settings = prepared.base, prepared.settings
    write_trained(directory, trained, dials, {"base": base.fingerprint})
    ranks = yaml.safe_dump(final(prepared.adapted, dials), sort_keys=False).encode()
    write_atomically(directory / RANKS, lambda file: file.write(ranks))
    recipes: list[Delta] = []
    for path in prepared.adapted.sites:
        if prepared.adapted.recipe(path) not in recipes:
            recipes.append(prepared.adapted.recipe(path))
    whole = [
        path
        for path in prepared.adapted.fully_trained
        if base.head is None or not matches(base.head, path)
    ]
    shipping = prepared.problem.shipping(settings)
    unnamed = shipping is not None and any(
        matches(pattern, path)
        for pattern in shipping.unnamed
        for path in prepared.adapted.sites
    )
    if shipping is None or whole or unnamed or len(recipes) != 1:
        logger.info("PEFT has no layout for this run; trained.safetensors has it all")
        return
    (recipe,) = recipes
    rsqrt = isinstance(recipe, LoRA) and recipe.scaling == "rsqrt"
    if isinstance(recipe, Triplet):
        trained = _folded(trained)
    assert isinstance(recipe, LoRA | Triplet)
    write_adapter(
        directory / "adapter",
        collect(trained, dials, shipping.module, rsqrt=rsqrt),
        base=settings.base.source,
        card=shipping.card,
        task_type=shipping.task_type,
        dropout=recipe.dropout,
        notes={
            "base_fingerprint": base.fingerprint,
            "ref_rank": prepared.adapted.ref_rank,
            **shipping.notes,
        },
    )


def _folded(trained: Trained) -> dict[str, Any]:
    """Triplets as LoRA, which is what they are: the diagonal goes into b."""
    found: dict[str, Any] = dict(trained)
    for path, own in trained.items():
        if isinstance(own, Mapping):
            b, diagonal = own["b"], jnp.asarray(own["diagonal"])
            wide = diagonal.reshape(*diagonal.shape, *[1] * (b.ndim - diagonal.ndim))
            found[path] = {"a": own["a"], "b": b * wide}
    return found
