"""Questions and answers as tokens, in the words of a model's chat template.

Loss counts on the answer and on what ends it, nowhere else: those are the tokens that
the model is to say by itself.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int32
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowrank.core.errors import BadInput
from lowrank.data.answers import Answers

#: Where a base has no chat template.
PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
_ANSWER = "\x00answer\x00"


@dataclasses.dataclass(frozen=True)
class Spoken:
    """The rows of a split as tokens.

    Attributes:
      ids: Of each row: question, answer and its end.
      starts: The place of each answer's first token.
    """

    ids: tuple[Int32[np.ndarray, " _"], ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Talk:
    """How a question becomes a prompt, and an answer what follows it."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        *,
        end: Sequence[int],
        begin: int | None = None,
        system: str | None = None,
    ):
        """Prepares the template.

        Args:
          tokenizer: A `tokenizers.Tokenizer`.
          template: A chat template of Hugging Face's kind, in Jinja; None: question,
            line break, answer.
          end: Tokens that end an answer, the first of which is taught.
          begin: The token that every text begins with, where the template has none.
          system: What the model is told before all questions; None: nothing.

        Raises:
          BadInput: The template cannot be read, or there is no token to end with.
        """
        if not end:
            raise BadInput(
                "the base names no token that ends an answer, so none can be taught; "
                "set eos_token_id in its config.json"
            )
        self._tokenizer = tokenizer
        self._end = tuple(end)
        self._begin = begin
        self._system = system
        self._plain = template is None
        # A template is a program out of a file: it runs in a sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["raise_exception"] = _refuse
        tokens = {"bos_token": "", "eos_token": tokenizer.id_to_token(end[0]) or ""}
        if begin is not None:
            tokens["bos_token"] = tokenizer.id_to_token(begin)
        try:
            compiled = environment.from_string(PLAIN if template is None else template)
        except jinja2.TemplateError as error:
            raise BadInput(f"the chat template cannot be read: {error}") from error
        self._render: Callable[..., str] = lambda **more: compiled.render(
            **tokens, **more
        )

    def prompt(self, question: str) -> str:
        """The text that the model is to go on from."""
        messages = [{"role": "user", "content": question}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        try:
            return self._render(messages=messages, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadInput(
                f"the chat template cannot be filled in: {error}. Leave out what it "
                "does not know, as a system message."
            ) from error

    def prompt_ids(self, question: str) -> list[int]:
        """The tokens of a prompt."""
        text = self.prompt(question)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._begin is not None and ids[:1] != [self._begin]:
            ids = [self._begin, *ids]
        return ids

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer, with the one that ends it."""
        ids = self._tokenizer.encode(answer, add_special_tokens=False).ids
        return [*ids, self._end[0]]

    def text(self, ids: Int32[np.ndarray, " tokens"]) -> str:
        """What tokens say, without those that end or are special."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()

    def spoken(self, rows: Answers, max_length: int) -> Spoken:
        """A split as tokens; the first of a row's answers is taught.

        Raises:
          BadInput: A row is longer than `max_length`: an answer that is cut off
            teaches never to end.
        """
        ids, starts = [], []
        for name, question, answers in zip(
            rows.ids, rows.questions, rows.answers, strict=True
        ):
            prompt, answer = self.prompt_ids(question), self.answer_ids(answers[0])
            if len(prompt) + len(answer) > max_length:
                raise BadInput(
                    f"row {name!r} has {len(prompt) + len(answer)} tokens, more than "
                    f"{max_length}; leave it out, or allow longer rows with "
                    "data.batching.length"
                )
            ids.append(np.array([*prompt, *answer], np.int32))
            starts.append(len(prompt))
        return Spoken(tuple(ids), tuple(starts))


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
