"""What a run hands over: its trained tree, and the adapter in PEFT's layout."""

import functools
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
from lowrank.io.bert import family_of
from lowrank.io.files import write_atomically
from lowrank.io.peft import write_adapter
from lowrank.run.prepare import Prepared
from lowrank.run.ranks import final
from lowrank.run.ranks_group import RANKS
from lowrank.run.stored import write_trained

logger = logging.getLogger(__name__)

_CARD = """# {name}

LoRA adapter of `{base}` for `{task}`, {classes} classes, trained with `lowrank`.

* License of the base: {license}
* Fingerprint of the base: `{fingerprint}`
* Trial: `{trial}`; its folder holds config, metrics, costs and predictions.

With `lowrank`: `lowrank.load_run("<folder of the run>")`. With PEFT:

```python
{code}
```
"""
_POOLED = """import torch
from peft import PeftModel
from transformers import AutoModel

class Classifier(torch.nn.Module):
    def __init__(self, bert, classes):
        super().__init__()
        self.bert = bert
        self.classifier = torch.nn.Linear(bert.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        {pooled}
        return self.classifier(pooled)

bert = AutoModel.from_pretrained(BASE, add_pooling_layer=False)
model = PeftModel.from_pretrained(Classifier(bert, {classes}), ADAPTER)"""
_POOLS = {
    "mean": """mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)""",
    "cls": "pooled = hidden[:, 0]",
}
_POOLER = """from peft import PeftModel
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels={classes})
model = PeftModel.from_pretrained(model, ADAPTER)"""


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
    heads = [p for p in prepared.adapted.fully_trained if not matches(base.head, p)]
    if base.spec is None or heads or len(recipes) != 1:
        logger.info("PEFT has no layout for this run; trained.safetensors has it all")
        return
    (recipe,) = recipes
    rsqrt = isinstance(recipe, LoRA) and recipe.scaling == "rsqrt"
    if isinstance(recipe, Triplet):
        trained = _folded(trained)
    assert isinstance(recipe, LoRA | Triplet)
    family = family_of(base.hf_config or {}, base.name)
    # The card's module calls any encoder so, and BERT's own are called so.
    module = functools.partial(family.module, prefix="bert.")
    classes = len(prepared.task.classes)
    pooling = settings.base.pooling
    code = _POOLER if pooling == "pooler" else _POOLED
    code = code.replace("{pooled}", _POOLS.get(pooling, ""))
    write_adapter(
        directory / "adapter",
        collect(trained, dials, module, rsqrt=rsqrt),
        base=settings.base.source,
        card=_CARD.format(
            name=settings.trial_id,
            base=settings.base.source,
            task=prepared.task.name,
            classes=classes,
            license=base.provenance.get("license", "not stated"),
            fingerprint=base.fingerprint,
            trial=settings.trial_id,
            code=code.replace("{classes}", str(classes)),
        ),
        task_type="SEQ_CLS" if pooling == "pooler" else None,
        dropout=recipe.dropout,
        notes={
            "base_fingerprint": base.fingerprint,
            "ref_rank": prepared.adapted.ref_rank,
            "pooling": pooling,
            "classes": list(prepared.task.classes),
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
