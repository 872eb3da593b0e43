"""The same adapted classifier twice: ours, and PEFT's on torch, of equal factors."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel

from lowrank.adapt.attach import Adapted, attach
from lowrank.adapt.rules import Rule, Train
from lowrank.core.trees import flatten
from lowrank.deltas.lora import LoRA
from lowrank.io import hub
from lowrank.io.adapter import collect
from lowrank.io.bert import BERT
from lowrank.io.keymaps import stacked_path
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step

CLASSES = 5
TARGETS = "**/{query,key,value,output,up,down}/kernel"
TINY = BertConfig(
    vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=32, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, initializer_range=0.2,
)  # fmt: skip


class Pooled(torch.nn.Module):
    """BERT, the mean over real tokens, a linear head: our classifier in torch."""

    def __init__(self, bert, classes=CLASSES):
        super().__init__()
        self.bert = bert
        self.classifier = torch.nn.Linear(bert.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def tiny_folder(folder: Path) -> Path:
    """A tiny random BERT as transformers writes it."""
    torch.manual_seed(0)
    BertModel(TINY, add_pooling_layer=False).eval().save_pretrained(folder)
    words = {f"w{index}": index for index in range(TINY.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    return folder


def module_of(path, layer):
    stacked, own = stacked_path(path)
    return BERT.module(stacked, own if layer is None else layer)


@dataclasses.dataclass
class Pair:
    """Both models, and what maps a trained tree of ours onto torch's names."""

    base: hub.Base
    adapted: Adapted
    frozen: dict
    trained: dict
    dials: dict
    theirs: torch.nn.Module
    rsqrt: bool

    def named(self, tree):
        """A tree shaped like `trained` by torch parameter name, in torch's layout."""
        units = {
            path: {"gate": np.ones(own["gate"].shape), "scale": 1.0}
            for path, own in self.dials.items()
        }
        adapter = collect(tree, units, module_of)
        found = {}
        for module, one in adapter.corrections.items():
            found[f"base_model.model.{module}.lora_A.default.weight"] = one.a
            found[f"base_model.model.{module}.lora_B.default.weight"] = one.b.T
        for tensor, array in adapter.whole.items():
            module, _, name = tensor.rpartition(".")
            full = f"base_model.model.{module}.modules_to_save.default.{name}"
            found[full] = array
        return found

    def logits(self, batch):
        inputs = {"ids": batch["ids"], "mask": batch["mask"]}
        return self.adapted.apply(self.frozen, self.trained, inputs, dials=self.dials)


def make_pair(
    folder, *, scan=True, rank=4, alpha=12.0, scaling="linear", dtype="float32"
):
    """Ours and PEFT's over the same base, with the same random factors and head."""
    base = hub.load(str(folder), num_classes=CLASSES, scan=scan, dtype=dtype)
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, wide), tree)
    example = {"ids": np.ones((2, 8), np.int32), "mask": np.ones((2, 8), bool)}
    rules = [
        Train("head/**", init="dense"),
        Rule(TARGETS, LoRA(alpha=alpha, scaling=scaling), rank=rank),
    ]
    adapted = attach(base.apply, cast(base.params), example, rules=rules)
    frozen, trained = adapted.init(jax.random.key(3))
    leaves, structure = flatten(trained)
    # Values that float32 holds, since adapter files are in float32.
    moved = {
        path: x.astype(jnp.float32)
        + 0.05 * jax.random.normal(jax.random.key(n), x.shape, jnp.float32)
        for n, (path, x) in enumerate(leaves.items())
    }
    trained = cast(structure.unflatten(moved))
    dials = cast(adapted.dials())
    bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
    modules = sorted(collect(trained, dials, module_of).corrections)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=scaling == "rsqrt", target_modules=modules,
        modules_to_save=["classifier"],
    )  # fmt: skip
    theirs = get_peft_model(Pooled(bert), config).eval()
    if dtype == "float64":
        theirs = theirs.double()
    pair = Pair(base, adapted, frozen, trained, dials, theirs, scaling == "rsqrt")
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in pair.named(trained).items():
            parameters[name].copy_(torch.tensor(np.array(value)))
    return pair


def random_batch(seed, rows=6, width=12, vocab=97):
    """Token ids with padding on the right, and labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, width + 1, rows)
    lengths[0] = width
    mask = np.arange(width)[None] < lengths[:, None]
    ids = np.where(mask, rng.integers(1, vocab, (rows, width)), 0).astype(np.int32)
    return {
        "ids": ids,
        "mask": mask,
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def to_torch(batch):
    """The inputs of the torch model."""
    ids = torch.tensor(batch["ids"], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.tensor(batch["mask"]).long()}


def distance(ours, theirs):
    """|a - b| / |b| in the Frobenius norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def gaps(pair, batch):
    """Distances of the logits, and of the gradient of every trained parameter."""
    theirs = pair.theirs(**to_torch(batch))
    labels = torch.tensor(batch["label"]).long()
    torch.nn.functional.cross_entropy(theirs, labels).backward()
    wide = jax.tree.leaves(pair.trained)[0].dtype
    constants = {"label_smoothing": jnp.zeros((), wide)}
    arrays = jax.tree.map(jnp.asarray, batch)

    def objective(trained):
        inputs = {"ids": arrays["ids"], "mask": arrays["mask"]}
        y = pair.adapted.apply(pair.frozen, trained, inputs, dials=pair.dials)
        sums = cross_entropy(y, arrays, constants)
        return sums.loss / sums.weight

    with jax.default_matmul_precision("highest"):
        ours = pair.named(jax.jit(jax.grad(objective))(pair.trained))
    parameters = dict(_trained(pair))
    assert set(ours) == set(parameters)
    found = {name: distance(ours[name], p.grad) for name, p in parameters.items()}
    return {"logits": distance(pair.logits(batch), theirs.detach()), **found}


def our_losses(pair, batches, optim):
    """Losses of our own training step, one trial, over the batches given."""
    model = lambda f, t, batch, dials, key: pair.adapted.apply(
        f, t, {"ids": batch["ids"], "mask": batch["mask"]}, dials=dials, key=key
    )
    state = states.start(pair.adapted.init_trained, pair.dials, [optim], [0])
    one = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
    wide = jax.tree.leaves(pair.trained)[0].dtype
    constants = {k: jnp.asarray([v], wide) for k, v in optim.constants().items()}
    widen = lambda x: x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x
    state = state.replace(
        trained=one(pair.trained),
        constants=constants,
        opt=jax.tree.map(widen, state.opt),
    )
    step = make_step(model, cross_entropy, optim, len(batches), draws=False)
    packed = jax.jit(over_trials(step, 1))
    losses = []
    for batch in batches:
        state, metrics = packed(pair.frozen, state, one(batch))
        losses.append(float(metrics["loss"][0]))
    return losses


def their_losses(pair, batches, optim: AdamW):
    """Losses of the same training in torch, with PEFT's parameters."""
    trained = [p for p in pair.theirs.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim > 1],
            "weight_decay": optim.weight_decay,
        },
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=optim.lr, eps=optim.eps)
    total, warm = len(batches), int(optim.warmup * len(batches))
    rate = lambda t: (t + 1) / warm if t < warm else 1 - (t - warm) / (total - warm)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    losses = []
    for batch in batches:
        logits = pair.theirs(**to_torch(batch))
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(batch["label"]).long()
        )
        adam.zero_grad()
        loss.backward()
        clip(trained, optim.clip)
        adam.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def clip(parameters, most):
    """Clips the global norm. torch's own adds 1e-6 to it, which float64 would show."""
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
    if norm > most:
        for parameter in parameters:
            parameter.grad.mul_(most / norm)


def _trained(pair):
    return [(n, p) for n, p in pair.theirs.named_parameters() if p.requires_grad]


def worst_loss_gap(folder, *, steps, dtype):
    """Largest relative difference of the losses of both trainings."""
    pair = make_pair(Path(folder), dtype=dtype)
    batches = [random_batch(seed) for seed in range(steps)]
    optim = AdamW(lr=2e-3, warmup=0.2, clip=1.0, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in _trained(pair)}
    ours, theirs = our_losses(pair, batches, optim), their_losses(pair, batches, optim)
    # Both stood still, were the losses equal for that reason.
    moved = [distance(p.detach(), start[n]) for n, p in _trained(pair)]
    assert min(moved) > 1e-3
    return float(np.max(np.abs(np.subtract(ours, theirs)) / np.abs(theirs)))
