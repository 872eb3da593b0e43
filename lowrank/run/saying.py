"""What a language model says: questions read, answers token by token, many at once.

One program serves all questions of a speaker: prompts have the width of the longest.
The weights may be merged, or the corrections beside them, of one trial or of a pack.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapt.attach import Adapted
from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.core.errors import BadInput
from lowrank.data.talk import Talk
from lowrank.evaluate.progress import bar
from lowrank.io.language import Language
from lowrank.models.generation import Choose, generate, greedy
from lowrank.sharding.processes import on_host


@dataclasses.dataclass(frozen=True)
class Said:
    """Answers of one model.

    Attributes:
      texts: One per question.
      tokens_per_second: Of all trials that answered together, without compiling; None
        if one call answered everything.
    """

    texts: tuple[str, ...]
    tokens_per_second: float | None


class Speaker:
    """Questions that are put to a language model, whatever its weights."""

    def __init__(
        self,
        base: Language,
        talk: Talk,
        questions: Sequence[str],
        *,
        tokens: int,
        together: int = 32,
        choose: Choose = greedy,
        seed: int = 0,
        progress: bool = False,
        alive: Callable[[], None] = lambda: None,
    ):
        """Reads the questions.

        Args:
          base: The model.
          talk: How it is spoken to.
          questions: At least one.
          tokens: The most tokens of an answer.
          together: Questions that are answered at once.
          choose: How tokens are chosen; see `models.generation`.
          seed: Of choices that draw.
          progress: Whether to show a bar; see `evaluate.progress`.
          alive: Told of every batch of answers.

        Raises:
          BadInput: There is nothing to say, or no room for it.
        """
        if not questions or tokens < 1 or together < 1:
            raise BadInput(
                f"{len(questions)} questions, {tokens} tokens of an answer and "
                f"{together} answers at once: each must be at least 1"
            )
        self._base, self._talk, self._tokens = base, talk, tokens
        self._prompts = [talk.prompt_ids(question) for question in questions]
        self._together = min(together, len(questions))
        self._width = max(map(len, self._prompts))
        if self._width + tokens > base.max_length:
            raise BadInput(
                f"a question of {self._width} tokens and an answer of {tokens} are "
                f"more than {base.max_length}, the longest that {base.name} was made "
                "for; leave the question out, or allow shorter answers"
            )
        self._choose, self._seed = choose, seed
        self._progress, self._alive = progress, alive

    def merged(self, params: Any) -> Said:
        """The answers of one model, given by its weights."""
        own = lambda params, x, rows: self._generate(
            lambda batch, cache: self._base.read(params, batch, cache), x, rows
        )
        program = jax.jit(lambda params, x, rows: _of_one(own(params, x, rows)))
        (said,) = self._say(functools.partial(program, params))
        return said

    def unmerged(
        self, adapted: Adapted, frozen: Frozen, trained: Trained, dials: Dials
    ) -> list[Said]:
        """The answers of every trial of a pack, with corrections beside the weights.

        Args:
          adapted: The model in the common shape, whatever of it was trained by.
          frozen: The base.
          trained: Trained trees, trials first.
          dials: Their dials, trials first.
        """
        base = self._base
        places = self._width + self._tokens
        shapes = (self._together, self._width)
        example = {
            "ids": jax.ShapeDtypeStruct(shapes, jnp.int32),
            "mask": jax.ShapeDtypeStruct(shapes, jnp.bool_),
        }
        empty = jax.eval_shape(lambda: base.cache(self._together, places))
        reads = adapted.around(base.read, example, empty)

        def one(
            trained: Trained, dials: Dials, frozen: Frozen, x: Any, rows: Any
        ) -> Any:
            read = lambda batch, cache: reads.apply(
                frozen, trained, batch, cache, dials=dials
            )
            return self._generate(read, x, rows)

        each = jax.vmap(one, in_axes=(0, 0, None, None, None))
        program = jax.jit(lambda f, t, d, x, rows: each(t, d, f, x, rows))
        return self._say(functools.partial(program, frozen, trained, dials))

    def _generate(self, read: Callable, prompts: Mapping[str, Any], rows: Any) -> tuple:
        base, root = self._base, jax.random.key(self._seed)
        return generate(
            read,
            prompts,
            base.cache(self._together, self._width + self._tokens),
            steps=self._tokens,
            end=jnp.array(base.end, jnp.int32),
            pad=base.spec.pad_id,
            choose=self._choose,
            key=jax.vmap(jax.random.fold_in, (None, 0))(root, rows),
        )

    def _say(self, answer: Callable[..., tuple]) -> list[Said]:
        texts: list[list[str]] = []
        tokens, seconds = 0, 0.0
        firsts = range(0, len(self._prompts), self._together)
        with bar(self._progress, "Answers", len(firsts)) as advance:
            for first in firsts:
                own = self._prompts[first : first + self._together]
                began = time.perf_counter()
                numbers = np.arange(first, first + self._together, dtype=np.int32)
                found = answer(self._padded(own), numbers)
                ids, real = (on_host(x)[:, : len(own)] for x in found)
                if first:
                    # The first one compiles.
                    seconds += time.perf_counter() - began
                    tokens += int(real.sum())
                texts = texts or [[] for _ in ids]
                for trial, said in enumerate(texts):
                    rows = zip(ids[trial], real[trial], strict=True)
                    said += [self._talk.text(row[kept]) for row, kept in rows]
                self._alive()
                advance()
        speed = tokens / seconds if seconds else None
        return [Said(tuple(said), speed) for said in texts]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> Mapping[str, np.ndarray]:
        ids = np.full((self._together, self._width), self._base.spec.pad_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
        return {"ids": ids, "mask": mask}


def _of_one(found: tuple) -> tuple:
    """As of a pack of one."""
    return tuple(x[None] for x in found)
