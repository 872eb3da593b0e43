"""A language model on any sequences: batches, numbers and how its adapter leaves.

The loss is that of the counted tokens, in nats per token, and so are the numbers of a
validation. `run.answering` and `run.continuing` say where sequences come from.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lowrank.core.arrays import Frozen
from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten
from lowrank.data.builders.files import SUFFIXES
from lowrank.data.packing import one_by_one, packed
from lowrank.data.passages import documents, windows
from lowrank.data.sequences import SequencePipeline, Sequences, eval_rows
from lowrank.data.splits import Split
from lowrank.data.talk import Spoken
from lowrank.evaluate.tokens import TokenSums, score_tokens
from lowrank.io import language
from lowrank.io.language import Language
from lowrank.run.forward import Batch, Forward
from lowrank.run.judges import OF_TOKENS, Judge, Predict
from lowrank.run.problem import Shipping, card_of
from lowrank.run.settings import BaseSpec, Settings
from lowrank.sharding.mesh import MeshSpec
from lowrank.sharding.partition import Place, placing
from lowrank.train.losses import Loss, next_token

#: What a model of sequences reads of a batch.
INPUTS = ("ids", "label", "mask", "positions", "segments")
_OPENING = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(BASE)
model = PeftModel.from_pretrained(model, ADAPTER)"""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Sequences of a split.

    Attributes:
      spoken: Their tokens.
      ids: Names of the rows.
      groups: What makes rows dependent.
    """

    spoken: Spoken
    ids: tuple[str, ...]
    groups: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a split's counted tokens; see `problem.Scored`.

    Attributes:
      sums: Of every row.
      groups: What makes rows dependent.
    """

    sums: TokenSums
    groups: tuple[str, ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """Negative log-probability in nats, tokens, and those that were likeliest."""
        names = ("loss", "tokens", "correct")
        return {name: self.sums.terms[:, n] for n, name in enumerate(names)}

    def report(self, *, resamples: int, level: float) -> dict[str, Any]:
        """Loss, perplexity and accuracy; whole groups are resampled."""
        metrics = self.sums.report(self.groups, resamples=resamples, level=level)
        return {
            "num_rows": len(self.groups),
            "num_tokens": int(self.sums.terms[:, 1].sum()),
            "clustered": True,
            "metrics": metrics,
        }


@dataclasses.dataclass(frozen=True)
class Kept(Likelihood):
    """How likely a model still finds what its base knew; see `problem.Scored`.

    Attributes:
      base: Sums of the base on the same rows.
    """

    base: TokenSums

    def report(self, *, resamples: int, level: float) -> dict[str, Any]:
        """As of `Likelihood`, with "base_loss" and "rise": the loss minus that of the
        base, whose interval resamples both together."""
        options = {"resamples": resamples, "level": level}
        told = super().report(**options)
        told["metrics"] |= {
            "base_loss": self.base.report(self.groups, **options)["loss"],
            "rise": self.sums.rise(self.base, self.groups, **options),
        }
        return told


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageProblem:
    """Sequences for a language model; see `problem.Problem`.

    Attributes:
      settings: What was asked for.
      provenance: See `Problem`.
      splits: The sequences.
      known: Sequences that the base is to go on knowing; None if that is not looked at.
    """

    settings: Settings
    base: Language
    name: str
    fingerprint: str
    provenance: Mapping[str, Any]
    splits: Mapping[str, Windows]
    known: Windows | None = None
    judge: Judge = OF_TOKENS

    @property
    def loss(self) -> Loss:
        return next_token

    @property
    def checks(self) -> Mapping[str, Any]:
        return {
            "task": self.name,
            "fingerprint": self.fingerprint,
            "splits": {
                name: {
                    "rows": len(own.ids),
                    "groups": len({*own.groups}),
                    "longest": max(map(len, own.spoken.ids)),
                }
                for name, own in self.splits.items()
            },
        }

    @property
    def rows(self) -> Mapping[str, int]:
        return {name: len(own.ids) for name, own in self.splits.items()}

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        return {name: batch[name] for name in INPUTS}

    def full(self, rows: int, width: int) -> Any:
        shape = (rows, width)
        ones = jnp.ones(shape, jnp.int32)
        return {
            "ids": ones,
            "label": ones,
            "mask": jnp.ones(shape, bool),
            "positions": jnp.broadcast_to(jnp.arange(width), shape),
            "segments": jnp.zeros(shape, jnp.int32),
        }

    def batches(self, seeds: Sequence[int]) -> SequencePipeline:
        batching = batching_of(self.settings)
        spoken, pad = self.splits["train"].spoken, self.base.spec.pad_id
        alone = functools.partial(one_by_one, spoken, pad)
        return SequencePipeline(
            packed(spoken, batching.length, pad) if batching.together else alone(),
            batch_size=batching.batch_size,
            trial_seeds=seeds,
            num_epochs=self.settings.optim.epochs,
        )

    def evaluation(self, split: str) -> Sequence[Batch]:
        return self._one_by_one(self.splits[split])

    def ids(self, split: str) -> Sequence[str]:
        return self.splits[split].ids

    def score(self, split: str, predict: Predict, progress: bool) -> list[Likelihood]:
        return self._scored(self.splits[split], predict, progress)

    def kept(self, predict: Predict) -> list[Kept] | None:
        """How likely every trial still finds what the base knew; None: not asked."""
        if self.known is None:
            return None
        (base,) = self._scored(self.known, self._alone())
        return [
            Kept(one.sums, one.groups, base.sums)
            for one in self._scored(self.known, predict)
        ]

    def shipping(self, settings: Settings) -> Shipping | None:
        base = self.base
        return Shipping(
            module=base.family.module,
            kernel=lambda module, scan: base.family.kernel(module, scan=scan),
            card=card_of(self, settings, code=_OPENING),
            task_type="CAUSAL_LM",
            notes={},
        )

    def _alone(self) -> Predict:
        """The base without any correction, as a pack of one."""
        leaves, structure = flatten(self.base.params)
        where = [leaf.sharding for leaf in leaves.values()]
        meshes = [own.mesh for own in where if isinstance(own, NamedSharding)]
        placed = [mesh for mesh in meshes if isinstance(mesh, Mesh)]
        mesh = placed[0] if placed else MeshSpec().build(jax.local_devices())

        def model(frozen: Frozen, trained: Any, batch: Any, dials: Any, key: Any):
            return self.base.scores(structure.unflatten(frozen), self.inputs(batch))

        forward = Forward(model, leaves, mesh)
        nothing = {"": np.zeros(1, np.float32)}
        return lambda batch: forward(nothing, {}, batch)

    def _one_by_one(self, own: Windows) -> Sequence[Batch]:
        rows = one_by_one(own.spoken, self.base.spec.pad_id)
        return eval_rows(rows, self.settings.evaluate.batch_size)

    def _scored(
        self, own: Windows, predict: Predict, progress: bool = False
    ) -> list[Likelihood]:
        found = score_tokens(predict, self._one_by_one(own), progress)
        return [Likelihood(one, own.groups) for one in found]


def batching_of(settings: Settings) -> Sequences:
    """How sequences become batches."""
    assert isinstance(settings.batching, Sequences)
    return settings.batching


def check_length(settings: Settings, base: Language) -> int:
    """The tokens of a row.

    Raises:
      BadInput: They are more than the base was made for, or than `base.max_length`.
    """
    length, most = batching_of(settings).length, base.max_length
    if settings.base.max_length is not None:
        most = min(most, settings.base.max_length)
    if length > most:
        raise BadInput(
            f"data.batching.length = {length} is more than {most}, the longest input "
            f"of {base.name}"
        )
    return length


def known_texts(settings: Settings, base: Language) -> Windows | None:
    """The texts of `evaluate.known`, in windows; None if there are none.

    Raises:
      BadInput: The file cannot be read.
    """
    if settings.evaluate.known is None:
        return None
    texts = documents(Path(settings.evaluate.known), read_known(settings))
    ids = tuple(f"known/{number}" for number in range(len(texts)))
    rows = Split(ids, tuple(texts), np.zeros(len(texts), np.int32), ids)
    return windows_of(base, rows, check_length(settings, base))


def read_known(settings: Settings) -> bytes:
    """The content of `evaluate.known`.

    Raises:
      BadInput: It cannot be read, or is a table.
    """
    given = str(settings.evaluate.known)
    path = Path(given).expanduser()
    if path.suffix.lower() in SUFFIXES:
        raise BadInput(
            f"evaluate.known = {given!r} is a table, and would be read as one text: "
            "write its texts into a plain file, empty lines between them"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"evaluate.known = {given!r} cannot be read: {error.strerror or error}. "
            "Give a plain file of texts that the base knew, or null"
        ) from error


def windows_of(base: Language, rows: Split, length: int) -> Windows:
    """Documents as windows of a base's tokens."""
    return Windows(*windows(base.tokenizer, rows, length, begin=base.begin))


def load_language(settings: Settings) -> Language:
    """The language model that the settings name, to be trained."""
    mesh = settings.mesh
    return open_language(settings.base, settings.run.cache, mesh.parts(), placing(mesh))


def open_language(
    wanted: BaseSpec, cache: str | None, parts: int = 1, place: Place | None = None
) -> Language:
    """A language model as its config group describes it.

    Args:
      wanted: The group.
      cache: Folder for downloads; None: the user's.
      parts: Devices between which logits are split.
      place: Says where weights lie; see `sharding.partition.placing`.

    Raises:
      BadInput: The group asks for what only encoders have.
    """
    if wanted.source == "minilm":
        raise BadInput(
            "base=minilm is an encoder, and these data ask for a language model: give "
            "base=smollm2, or a folder of one"
        )
    if wanted.pooling != "mean":
        raise BadInput(
            f"base.pooling = {wanted.pooling!r} is for encoders, and these data ask "
            "for a language model: leave it out"
        )
    return language.load(
        wanted.source,
        scan=wanted.scan,
        remat=wanted.remat,
        dtype=wanted.dtype,
        cache=cache,
        parts=parts,
        place=place,
    )


def reopen_language(
    settings: Settings, facts: Mapping[str, Any]
) -> tuple[Language, Any]:
    """The base as a finished run had it, and an example of its inputs."""
    del facts
    return open_language(settings.base, settings.run.cache), sequence_inputs(1, 8)


def sequence_inputs(rows: int, width: int) -> Mapping[str, Any]:
    """Shapes of what a language model's scores read."""
    dtype = lambda name: jnp.bool_ if name == "mask" else jnp.int32
    return {n: jax.ShapeDtypeStruct((rows, width), dtype(n)) for n in INPUTS}
