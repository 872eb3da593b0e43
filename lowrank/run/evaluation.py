"""What is told of a finished run: the config group `evaluate`."""

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec

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
    """

    batch_size: int = 64
    resamples: int = 1000
    level: float = 0.95
    latency: bool = True
    test: bool = True
    answers: int | None = None
    known: str | None = None

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
