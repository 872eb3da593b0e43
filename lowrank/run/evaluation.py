"""What is told of a finished run: the config group `evaluate`."""

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.models.generation import Choose, greedy, sampling

#: Kinds of data that language models read.
LANGUAGE = ("answers", "choices", "text")


@spec
class Evaluation:
    """How a finished run is judged.

    Attributes:
      batch_size: Rows per evaluation batch.
      resamples: Bootstrap resamples per interval.
      level: Confidence level of the intervals.
      latency: Whether base, unmerged and merged inference are timed.
      test: Whether the test split is scored, and whatever else is held out; False
        keeps them sealed.
      answers: The most tokens of an answer that a language model says to every
        question, to be compared with the right ones; None: it says nothing, and only
        the right answers' likelihood is told.
      known: A plain file of texts that a language model knew: how much less likely it
        finds them after training is told; None: it is not.
      temperature: Of answers that are drawn, as in `models.generation.sampling`; None:
        every token is the likeliest. A question's draws are its own, the same in every
        trial, whatever is answered beside it.
      top_k, top_p: What tokens are drawn from; None: from all.
    """

    batch_size: int = 64
    resamples: int = 1000
    level: float = 0.95
    latency: bool = True
    test: bool = True
    answers: int | None = None
    known: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "resamples", "answers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"evaluate.{name} must be at least 1, not {value}")
        if not 0 < self.level < 1:
            raise BadInput(
                f"evaluate.level = {self.level:g} is no confidence level between 0 "
                "and 1, as 0.95"
            )
        drawn = (self.temperature, self.top_k, self.top_p)
        if any(one is not None for one in drawn) and self.answers is None:
            raise BadInput(
                f"evaluate.temperature, top_k and top_p are {drawn} and nothing is "
                "said: give evaluate.answers, the most tokens of an answer"
            )
        if self.temperature is None and drawn != (None, None, None):
            raise BadInput(
                f"evaluate.top_k = {self.top_k} and evaluate.top_p = {self.top_p} are "
                "for answers that are drawn: give evaluate.temperature, as 1.0"
            )
        try:
            self.choose()
        except BadInput as error:
            raise BadInput(f"evaluate.{error}") from None

    def choose(self) -> Choose:
        """How the tokens of answers are chosen."""
        if self.temperature is None:
            return greedy
        return sampling(self.temperature, self.top_k, self.top_p)


def check_evaluation(wanted: Evaluation, kind: str) -> None:
    """Refuses to be told what a kind of data cannot tell.

    Raises:
      BadInput: Answers or known texts are asked for where there are none.
    """
    if wanted.answers is not None and kind != "answers":
        raise BadInput(
            f"evaluate.answers = {wanted.answers} is for questions and answers, and "
            f"the data are of the kind {kind!r}: set it to null"
        )
    if wanted.known is not None and kind not in LANGUAGE:
        raise BadInput(
            f"evaluate.known = {wanted.known!r} is for language models, and data of "
            f"the kind {kind!r} are for no language model: set it to null"
        )
