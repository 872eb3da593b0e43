"""Questions of reasoning-gym: a task with a verifier, and a harder one held out.

``data=reasoning_gym`` draws as many questions as are wanted from a seed. No question is
in two splits. What a model says is judged by the package's own verifier, beside the
metrics of texts; "harder" is a further split of other parameters, on which nothing is
trained or chosen, and which stays sealed as long as the test split.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.core.errors import BadInput
from lowrank.core.spec import digest, spec
from lowrank.data.answers import Answers, AnswerTask, make_task
from lowrank.data.builders import reasoning
from lowrank.data.questions import AnswerSpec

#: The split of the held-out difficulty.
HARDER = "harder"
#: Who has a question first: fewer training rows change no other split.
_ORDER = ("test", HARDER, "validation", "train")


@spec
class GymData(AnswerSpec):
    """Questions of one task of reasoning-gym.

    Attributes:
      task: Its name there, as "chain_sum".
      config: Its parameters; None: the package's own.
      harder: Parameters of the held-out difficulty, over those of `config`; None: there
        is no such split.
      train_rows, validation_rows, test_rows, harder_rows: Questions of each split.
      seed: Which questions.
    """

    task: str = "chain_sum"
    config: Mapping[str, Any] | None = None
    harder: Mapping[str, Any] | None = None
    train_rows: int = 1000
    validation_rows: int = 200
    test_rows: int = 200
    harder_rows: int = 200

    def __post_init__(self) -> None:
        self.check()
        if self.harder_rows < 1:
            raise BadInput(
                f"data.harder_rows must be at least 1, not {self.harder_rows}"
            )
        own = dict(self.config or {})
        if self.harder is not None and own | dict(self.harder) == own:
            raise BadInput(
                f"data.harder = {dict(self.harder)} changes nothing of data.config: "
                "name harder parameters, or set it to null"
            )

    def load(self, data_dir: Path | None = None) -> AnswerTask:
        """Draws the questions; the same seed draws the same ones.

        Args:
          data_dir: Not used: what is drawn is drawn again.

        Raises:
          BadInput: The package is missing, or does not allow this; see
            `builders.reasoning`.
        """
        del data_dir
        reasoning.usable(self.task)
        configs = {name: dict(self.config or {}) for name in _ORDER}
        if self.harder is None:
            del configs[HARDER]
        else:
            configs[HARDER] |= self.harder
        taken: set[str] = set()
        drawn = {
            name: reasoning.draw(
                self.task,
                config,
                seed=seed_of(self.seed, name),
                rows=getattr(self, f"{name}_rows"),
                taken=taken,
                what=name,
            )
            for name, config in configs.items()
        }
        splits = {
            name: Answers(
                questions=tuple(entry["question"].strip() for entry in own.entries),
                answers=tuple((entry["answer"].strip(),) for entry in own.entries),
                groups=own.keys,
                ids=tuple(_id(name, number) for number in range(len(own.keys))),
            )
            for name, own in reversed(drawn.items())
        }
        made_from = {
            "source": reasoning.PACKAGE,
            "license": "Apache-2.0",
            "version": reasoning.version(),
            "task": self.task,
            "configs": configs,
            "seed": self.seed,
        }
        left_out = {name: own.left_out for name, own in drawn.items()}
        task = make_task(
            f"{reasoning.PACKAGE}/{self.task}",
            splits,
            {**made_from, "left_out": left_out},
        )
        return dataclasses.replace(
            task,
            # What an answer is worth depends on more than the rows.
            fingerprint=digest({"rows": task.fingerprint, **made_from}),
            verify=Verifier(
                {
                    _id(name, number): (own, entry)
                    for name, own in drawn.items()
                    for number, entry in enumerate(own.entries)
                }
            ),
        )


@dataclasses.dataclass(frozen=True)
class Verifier:
    """What the package makes of an answer; see `answers.AnswerTask`."""

    rows: Mapping[str, tuple[reasoning.Drawn, Mapping[str, Any]]]

    def __call__(self, row: str, said: str) -> float:
        own, entry = self.rows[row]
        return own.score(said, entry)


def _id(split: str, number: int) -> str:
    return f"{split}-{number}"


def seed_of(seed: int, split: str) -> int:
    """Far from that of every other split: the package draws row n from seed + n."""
    drawn = hashlib.sha256(f"{seed}:{split}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") % 2**31


CATALOGUE: dict[str, type[AnswerSpec]] = {"reasoning_gym": GymData}
