"""TFDS builder of the demonstration task: what is asked of a home assistant.

Sentence templates of home-assistant-intents (Apache-2.0) are expanded with hassil
into utterances with a fine label, ``intent|domain|slot_combination``. Fine labels need
word order and prepositions, so a linear probe on a frozen encoder gets about half of
them right and an adapted one most: the task shows what adaptation is worth.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lowrank.core.errors import UnknownName, nearest
from lowrank.data.store import package_version

INTENTS_VERSION = "2026.10.27"
HASSIL_VERSION = "3.12.1"
REMEDY = "pip install 'lowrank[demo]'"

#: Languages of the package with at least ten classes of four templates or more.
LANGUAGES = (
    *("af", "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "de-CH", "el", "en", "es"),
    *("eu", "fi", "fr", "ga", "gl", "gu", "hi", "hr", "hu", "hy", "is", "it", "kn"),
    *("ko", "kw", "lb", "ml", "nb", "ne", "nl", "pl", "pt", "pt-BR", "ro", "ru", "sk"),
    *("sl", "sr", "sr-Latn", "sv", "th", "uk", "vi", "zh-CN", "zh-HK", "zh-TW"),
)
DEFAULT_UTTERANCES = 4


@dataclasses.dataclass
class IntentsConfig(tfds.core.BuilderConfig):
    """One language.

    Attributes:
      language: Its code in the package.
      seed: Which templates go to which split, and how they are expanded.
      utterances: Examples wanted of each template.
    """

    language: str = "en"
    seed: int = 0
    utterances: int = DEFAULT_UTTERANCES


class Intents(tfds.core.GeneratorBasedBuilder):
    """Utterances to a home assistant, with the fine label of what is asked.

    Features: `id`, `text`, `label` and `group`, the template that an utterance was
    made from; utterances of one template are not independent.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    # Where TFDS looks for checksums of downloads; nothing is downloaded here.
    code_path = None
    BUILDER_CONFIGS = [
        IntentsConfig(name=language, language=language) for language in LANGUAGES
    ]
    DEFAULT_BUILDER_CONFIG_NAME = "en"

    _generated: dict[str, list[Any]] | None = None

    @property
    def utterances(self) -> dict[str, list[Any]]:
        """Utterances by split, generated on first use.

        Raises:
          BadInput: A package is missing or has another version than the pinned one.
        """
        if self._generated is None:
            check_packages()
            # Imports hassil, which only this data set needs.
            from lowrank.data.builders.expand import generate

            config: Any = self.builder_config
            self._generated = generate(
                config.language, seed=config.seed, per_template=config.utterances
            )
        return self._generated

    def _info(self) -> tfds.core.DatasetInfo:
        config: Any = self.builder_config
        labels = sorted({row.label for row in self.utterances["train"]})
        return tfds.core.DatasetInfo(
            builder=self,
            description="Expanded sentence templates of home-assistant-intents.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=labels),
                    "group": tfds.features.Text(),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="https://github.com/home-assistant/intents-package",
            license="Apache-2.0",
            # Keeps the order, which is part of the fingerprint of the data.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                {**check_packages(), "seed": config.seed, "per": config.utterances}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {
            split: self._generate_examples(rows)
            for split, rows in self.utterances.items()
            if rows
        }

    def _generate_examples(self, rows: list[Any]) -> Iterator[Any]:
        numbers: dict[str, int] = {}
        for position, row in enumerate(rows):
            number = numbers.get(row.template, 0)
            numbers[row.template] = number + 1
            yield (
                position,
                {
                    "id": f"{row.template}/{number}",
                    "text": row.text,
                    "label": row.label,
                    "group": row.template,
                },
            )


def check_packages() -> dict[str, str]:
    """Versions of the packages that the data set is made from.

    Raises:
      BadInput: One is missing, or has another version than the pinned one.
    """
    return {
        package: package_version(package, version, REMEDY)
        for package, version in (
            ("home-assistant-intents", INTENTS_VERSION),
            ("hassil", HASSIL_VERSION),
        )
    }


def config_for(language: str, seed: int, utterances: int) -> str | IntentsConfig:
    """The config of a language: a registered one, or a new one for other settings.

    Raises:
      UnknownName: The language has too few templates, or is none.
    """
    if language not in LANGUAGES:
        raise UnknownName(
            f"data.language = {language!r} is not a language with enough templates. "
            f"Nearest: {nearest(language, LANGUAGES)}. All: {', '.join(LANGUAGES)}."
        )
    if (seed, utterances) == (0, DEFAULT_UTTERANCES):
        return language
    return IntentsConfig(
        name=f"{language}-seed{seed}-per{utterances}",
        language=language,
        seed=seed,
        utterances=utterances,
    )


def generator_fingerprint() -> str:
    """sha256 over the files that decide what is generated."""
    digest = hashlib.sha256()
    for name in ("expand.py", "intents.py", "pools.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()
