"""A stand-in for reasoning-gym in the words of `tiny_language`, and what installs it.

Rows of its tasks come from seed + number, as those of the package do.
"""

import dataclasses
import importlib.metadata
import random
import sys
import types

WORDS = ("x", "y", "z", "the", "a", "one", "two", "this")
SIZES = ("big", "small")
VERSION = "9.9"


@dataclasses.dataclass
class Config:
    min_words: int = 3
    max_words: int = 3
    seed: int | None = None
    size: int = 500

    def validate(self):
        assert self.max_words >= self.min_words, "max_words must be >= min_words"


class Sizes:
    """Say of which size the last word is."""

    def __init__(self, config):
        self.config, self.seed, self.size = config, config.seed, config.size
        self.scored = 0

    def __getitem__(self, number):
        rng = random.Random(self.seed + number)
        count = rng.randint(self.config.min_words, self.config.max_words)
        words = [rng.choice(WORDS) for _ in range(count)]
        question = f"name {' '.join(words)} as"
        last, size = words[-1], SIZES[len(words[-1]) % 2]
        return {
            "question": question,
            "answer": self.told(words, f"{last} is {size}"),
            "metadata": {"right": (last, size), "count": count},
        }

    def told(self, words, answer):
        return f" {answer}\n"

    def score_answer(self, answer, entry):
        """A half for the first word and one for the last; the empty one is an error."""
        # A verifier that leaves marks must not meet them again.
        last, size = entry["metadata"].pop("right")
        return 0.5 * (answer.split()[0] == last) + 0.5 * (answer.split()[-1] == size)


class Gaps(Sizes):
    """Nobody knows of the word x, and its own answer to y is wrong."""

    def told(self, words, answer):
        return None if words[-1] == "x" else answer.replace("y is", "z is")


class Silent(Sizes):
    def told(self, words, answer):
        return None


class NotNumbers(Sizes):
    """Worth what was said, as a number."""

    def told(self, words, answer):
        return "1"

    def score_answer(self, answer, entry):
        return float(answer)


class Evaluates(Sizes):
    def score_answer(self, answer, entry):
        return float(self.inner(answer) == entry["answer"])

    def inner(self, answer):
        return [eval(one) for one in [answer]][0]


TABLE = {"say": eval}


class ByTable(Sizes):
    def score_answer(self, answer, entry):
        return float(TABLE["say"](answer))


class Imports(Sizes):
    def score_answer(self, answer, entry):
        import subprocess

        return float(subprocess.call(answer))


class Foreign(Sizes):
    def score_answer(self, answer, entry):
        return float(importlib.metadata.version(answer) == "1")


class Programs(Sizes):
    def told(self, words, answer):
        exec("x = 1")
        return answer


DATASETS = {
    "sizes": (Sizes, Config),
    "gaps": (Gaps, Config),
    "silent": (Silent, Config),
    "not_numbers": (NotNumbers, Config),
    "evaluates": (Evaluates, Config),
    "by_table": (ByTable, Config),
    "imports": (Imports, Config),
    "foreign": (Foreign, Config),
    "programs": (Programs, Config),
    "composite": (Sizes, Config),
    "ransom_note": (Sizes, Config),
}


def create_dataset(name, **config):
    made = DATASETS[name][1](**config)
    made.validate()
    return DATASETS[name][0](made)


def install(monkeypatch, version=VERSION):
    """Makes it the package that is installed, until the patch is undone."""
    package = types.ModuleType("reasoning_gym")
    factory = types.ModuleType("reasoning_gym.factory")
    package.create_dataset, factory.DATASETS = create_dataset, DATASETS
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: version if name == "reasoning-gym" else real(name),
    )
