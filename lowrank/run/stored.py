"""A finished run, opened again: its record, its model, its predictions."""

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lowrank.adapt.attach import Adapted
from lowrank.core.arrays import Dials, Trained
from lowrank.core.errors import BadInput, Corrupt
from lowrank.core.trees import flatten, shapes_of
from lowrank.data.pipeline import eval_batches
from lowrank.data.splits import Split
from lowrank.data.tokens import tokenize
from lowrank.io.files import write_atomically
from lowrank.io.history import RankHistory, read_history
from lowrank.io.hub import Base
from lowrank.io.language import Language
from lowrank.io.safetensors import in_order
from lowrank.io.view import RecordView, load_record
from lowrank.run.answering import talk_of
from lowrank.run.forward import inputs_of
from lowrank.run.pictured import batches_of
from lowrank.run.prepare import adapt
from lowrank.run.problems import reopen_base
from lowrank.run.saying import Speaker
from lowrank.run.settings import Settings, read
from lowrank.run.texts import batching_of, max_length

#: The trained tree and the dials of a run, in the run's own layout.
TRAINED = "trained.safetensors"
TRAINED_SCHEMA = "1"


@dataclasses.dataclass(frozen=True)
class Run:
    """What `load_run` returns.

    Attributes:
      record: Config, metrics, costs and predictions.
      settings: The config, checked.
      base: The pretrained model.
      adapted: The model with its corrections.
      trained, dials: Of the run's best state.
      facts: What its result says of its data.
    """

    record: RecordView
    settings: Settings
    base: Base | Language
    adapted: Adapted
    trained: Trained
    dials: Dials
    facts: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits; none of a language model."""
        return tuple(self.facts.get("classes", ()))

    def logits(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Logits of a batch of "ids", "mask" and, of pairs, "type_ids"; or "pixels"."""
        inputs = jax.tree.map(jnp.asarray, inputs_of(batch))
        return np.asarray(self.outputs(inputs))

    def outputs(self, inputs: Any) -> Any:
        """What the adapted model makes of its inputs: logits, or scores of tokens."""
        return self._program(self.adapted.frozen(), inputs)

    @property
    def ranks(self) -> RankHistory:
        """How its ranks moved; see `lowrank.load_ranks`, which loads no base.

        Raises:
          BadInput: They were fixed.
          Corrupt: A file is damaged.
        """
        return read_history(self.record)

    @property
    def _program(self):
        # Compiled once per run object and batch shape.
        if "_jitted" not in self.__dict__:
            apply = self.adapted.apply
            jitted = jax.jit(lambda f, t, d, x: apply(f, t, x, dials=d))
            self.__dict__["_jitted"] = jitted
        jitted = self.__dict__["_jitted"]
        return lambda frozen, x: jitted(frozen, self.trained, self.dials, x)


def write_trained(
    directory: Path, trained: Trained, dials: Dials, metadata: Mapping[str, str]
) -> None:
    """Writes the trained tree and the dials of one trial, atomically."""
    leaves, _ = flatten({"trained": trained, "dials": dials})
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    text = in_order(save(arrays, {"schema": TRAINED_SCHEMA, **metadata}))
    write_atomically(directory / TRAINED, lambda file: file.write(text))


def read_trained(directory: Path, like: Mapping[str, Any], base: str):
    """Reads what `write_trained` wrote, into the structure of `like`.

    Raises:
      Corrupt: The file is damaged, belongs to another base, or holds other leaves.
    """
    path = directory / TRAINED
    wanted, structure = flatten(like)
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Corrupt(
            f"{path} cannot be read: {error}. Run the trial again."
        ) from error
    if metadata.get("schema") != TRAINED_SCHEMA:
        raise Corrupt(
            f"{path} has schema {metadata.get('schema')!r}, and this version reads "
            f"{TRAINED_SCHEMA!r}. Install the version of lowrank that wrote it."
        )
    if metadata.get("base") != base:
        raise Corrupt(
            f"{path} was trained on the base with fingerprint {metadata.get('base')}, "
            f"but this base has {base}; give the base the run was made with"
        )
    shape = lambda leaf: (tuple(leaf.shape), str(leaf.dtype))
    if {n: shape(a) for n, a in found.items()} != {
        n: shape(a) for n, a in wanted.items()
    }:
        odd = sorted(set(found) ^ set(wanted))[:5]
        raise Corrupt(
            f"{path} does not fit the config beside it: {odd or 'shapes differ'}"
        )
    return structure.unflatten({n: jnp.asarray(a) for n, a in found.items()})


def load_run(directory: str | Path, *, cache: str | None = None) -> Run:
    """Opens a finished run.

    Args:
      directory: The run directory.
      cache: Folder of bases and prepared data; the one that the run used if None.

    Raises:
      BadInput: There is no finished run.
      Corrupt: A file of it is damaged, or the base is another one than it was.
    """
    record = load_record(directory)
    if record.result is None:
        raise BadInput(
            f"{directory} holds no finished run (status "
            f"{record.status.get('status')}); give its command again to finish it"
        )
    settings = read(record.config)
    if cache is not None:
        run = dataclasses.replace(settings.run, cache=cache)
        settings = dataclasses.replace(settings, run=run)
    facts = record.result["data"]
    base, example = reopen_base(settings, facts)
    (adapted,) = adapt(base, [settings], example).alone
    trained = jax.eval_shape(adapted.init_trained, jax.random.key(0))
    like = {"trained": trained, "dials": shapes_of(adapted.dials())}
    record.check(TRAINED)
    stored = read_trained(Path(directory), like, base.fingerprint)
    return Run(
        record,
        settings,
        base,
        adapted,
        stored["trained"],
        stored["dials"],
        facts,
    )


def predict(
    run: Run, texts: Sequence[Any], *, longest: int = 64
) -> list[dict[str, Any]]:
    """What a run's model makes of new texts.

    Args:
      run: From `load_run`.
      texts: One string per row, none of them empty: texts to label, or questions. Of
        a run on pairs, two strings per row; of a run on images, arrays of bytes, each
        (height, width) or (height, width, channels).
      longest: The most tokens of an answer.

    Returns:
      One dict per text: "label", "probability", and "logits" over `run.classes`; of
      regression "value"; of a language model "answer", what it finds likeliest token
      by token.

    Raises:
      BadInput: A row is of another form, or too long for an answer.
    """
    if run.settings.data.kind == "images":
        assert isinstance(run.base, Base)
        return _found(run, batches_of(run.settings, run.base, run.facts, texts))
    paired = getattr(run.settings.data, "pair", None) is not None
    rows = [tuple(x) if isinstance(x, tuple | list) else (x,) for x in texts]
    full = all(isinstance(text, str) and text for row in rows for text in row)
    if isinstance(texts, str) or not full or {*map(len, rows)} - {1 + paired}:
        what = "pairs of non-empty strings" if paired else "non-empty strings"
        raise BadInput(f"predict takes a list of {what}")
    firsts, *seconds = zip(*rows, strict=True) if rows else [()]
    if isinstance(run.base, Language):
        return _answers(run, firsts, longest)
    labels = np.zeros(len(rows), np.int32)
    split = Split(tuple(map(str, range(len(rows)))), firsts, labels, None, *seconds)
    limit = max_length(run.settings.base, run.base)
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenize(
            split, run.base.tokenizer, max_length=limit, data="texts", cache=folder
        )
    return _found(run, eval_batches(tokens, labels, batching_of(run.settings)))


def _found(run: Run, batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the outputs say, row by row in their own order."""
    found: dict[int, dict[str, Any]] = {}
    for batch in batches:
        outputs = run.logits(batch)
        for at, index in enumerate(batch["index"]):
            if index >= 0:
                found[int(index)] = _told(run, outputs[at])
    return [found[index] for index in sorted(found)]


def _told(run: Run, outputs: np.ndarray) -> dict[str, Any]:
    """What the outputs of a row say."""
    if run.settings.data.kind == "values":
        return {"value": float(outputs[0]) * run.facts["scale"] + run.facts["mean"]}
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(outputs)))
    best = int(probabilities.argmax())
    return {
        "label": run.classes[best],
        "probability": float(probabilities[best]),
        "logits": outputs,
    }


def _answers(run: Run, questions: Sequence[str], longest: int) -> list[dict[str, Any]]:
    assert isinstance(run.base, Language)
    speaker = Speaker(run.base, talk_of(run.base), questions, tokens=longest)
    merged = run.adapted.merge(run.adapted.frozen(), run.trained, run.dials)
    return [{"answer": text} for text in speaker.merged(merged).texts]
