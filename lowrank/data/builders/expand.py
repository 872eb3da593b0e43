"""Sentence templates of home-assistant-intents, expanded into labeled utterances.

A template is a small grammar ("(turn|switch) on [the] {name}"). Enumerating it
explodes, so a few random walks are taken through each. What a walk draws depends on
the seed and on the template's own text only: no other template, no hash seed and no
version of Python's `random.choice` changes it.
"""

import dataclasses
import hashlib
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hassil import expression as ex
from hassil.intents import (
    IntentData,
    Intents,
    RangeSlotList,
    TextSlotList,
    WildcardSlotList,
)
from hassil.parse_expression import parse_sentence
from hassil.util import normalize_whitespace

from lowrank.core.errors import BadInput
from lowrank.data.builders.pools import SPLITS, Pools, pools_of

MIN_TEMPLATES = 4
TEST_SHARE = 0.3
VALIDATION_SHARE = 0.18
#: Walks taken per utterance wanted, before a template counts as exhausted.
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One example.

    Attributes:
      text: What is said.
      label: ``intent|domain|slot_combination``.
      template: Identifies the template, across splits and runs.
      slots: (slot, value) for each open slot that was filled.
    """

    text: str
    label: str
    template: str
    slots: tuple[tuple[str, str], ...]


def generate(
    language: str, *, seed: int, per_template: int
) -> dict[str, list[Utterance]]:
    """Utterances of every split.

    Templates are split inside each class, so that a test utterance was made from a
    template, and with slot values, that training has never seen. An utterance that
    two classes share is dropped everywhere; one that two templates share is kept
    once, in train rather than in test rather than in validation.

    Args:
      language: A language of the package.
      seed: Which templates go where, and which walks are taken.
      per_template: Utterances wanted of each template.

    Returns:
      {split: utterances}, in a fixed order.
    """
    grammar = Grammar(language)
    drawn: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    owners: dict[str, set[str]] = defaultdict(set)
    for label, templates in sorted(classes_of(grammar).items()):
        for split, text in assign(label, sorted(templates), f"{seed}/{language}"):
            data = templates[text]
            for row in grammar.utterances(label, text, data, split, seed, per_template):
                drawn[split].append(row)
                owners[row.text].add(label)
    kept: dict[str, list[Utterance]] = {}
    seen: set[str] = set()
    for split in ("train", "test", "validation"):
        kept[split] = []
        for row in drawn[split]:
            if row.text not in seen and len(owners[row.text]) == 1:
                kept[split].append(row)
                seen.add(row.text)
    known = {row.label for row in kept["train"]}
    return {split: [r for r in kept[split] if r.label in known] for split in SPLITS}


def classes_of(grammar: "Grammar") -> dict[str, dict[str, IntentData]]:
    """{label: {template text: its block}} of the classes with enough templates.

    A template that belongs to several classes says nothing about any and is left out.
    """
    found: dict[str, dict[str, IntentData]] = defaultdict(dict)
    owners: dict[str, set[str]] = defaultdict(set)
    for name, intent in grammar.intents.items():
        for data in intent.data:
            label = label_of(name, data.slots, data.metadata)
            for text in data.sentence_texts:
                found[label].setdefault(text, data)
                owners[text].add(label)
    unique = {
        label: {t: d for t, d in templates.items() if len(owners[t]) == 1}
        for label, templates in found.items()
    }
    return {k: v for k, v in unique.items() if len(v) >= MIN_TEMPLATES}


def label_of(intent: str, slots: Any, metadata: Any) -> str:
    """The fine label of a block: ``intent|domain|slot_combination``."""
    domain = (slots or {}).get("domain", "-")
    domain = domain if isinstance(domain, str) else ",".join(domain)
    return f"{intent}|{domain}|{(metadata or {}).get('slot_combination', '-')}"


def assign(label: str, texts: Sequence[str], salt: str) -> list[tuple[str, str]]:
    """Gives each template of a class to a split; train always gets some.

    The validation share of a class is rounded up or down by chance, in proportion:
    most classes have three or four templates to share out, and rounding them all
    alike would take a third of them, or none.
    """
    order = sorted(texts, key=lambda text: _hash(salt, "split", label, text))
    num_test = max(1, int(len(order) * TEST_SHARE))
    rest = len(order) - num_test
    chance = int(_hash(salt, "round", label)[:8], 16) / 2**32
    num_validation = int(rest * VALIDATION_SHARE + chance)
    names = ["test"] * num_test + ["validation"] * num_validation
    names += ["train"] * (len(order) - len(names))
    return list(zip(names, order, strict=True))


class Grammar:
    """The templates, rules and slot lists of one language."""

    def __init__(self, language: str):
        content = json.loads((package_data() / f"{language}.json").read_bytes())
        parsed = Intents.from_dict(content)
        self.language = language
        self.intents = parsed.intents
        self._rules = parsed.expansion_rules
        self._lists = parsed.slot_lists
        self._pools: Pools = pools_of(language)

    def utterances(
        self,
        label: str,
        text: str,
        data: IntentData,
        split: str,
        seed: int,
        per_template: int,
    ) -> list[Utterance]:
        """Up to `per_template` different utterances of one template."""
        template = _hash("template", self.language, label, text)[:12]
        tree = parse_sentence(text).expression
        rng = random.Random(int(_hash(str(seed), self.language, label, text), 16))
        found: dict[str, Utterance] = {}
        for _ in range(per_template * ATTEMPTS):
            walk = _Walk(self, data, SPLITS.index(split), rng)
            said = normalize_whitespace(walk.say(tree)).strip().lower()
            if said:
                found[said] = Utterance(said, label, template, tuple(walk.slots))
            if len(found) == per_template:
                break
        return [found[said] for said in sorted(found)]

    def rule(self, data: IntentData, name: str) -> ex.Expression:
        """What a rule stands for: the block's own, else the language's."""
        rule = (data.expansion_rules or {}).get(name) or self._rules.get(name)
        if rule is None:
            raise BadInput(f"{self.language}: the package has no rule {name!r}")
        return rule.expression

    def choices(self, data: IntentData, name: str, part: int) -> tuple[bool, Sequence]:
        """(whether the slot is open, what may fill it)."""
        values = (data.slot_lists or {}).get(name) or self._lists.get(name)
        if isinstance(values, TextSlotList):
            return False, [value.text_in for value in values.values]
        if isinstance(values, RangeSlotList):
            return False, [str(number) for number in values.get_numbers()]
        open_slot = values is None or isinstance(values, WildcardSlotList)
        if open_slot and name in self._pools:
            return True, self._pools[name][part]
        raise BadInput(f"{self.language}: nothing to fill the slot {name!r} with")


class _Walk:
    """One random walk through a template."""

    def __init__(
        self, grammar: Grammar, data: IntentData, part: int, rng: random.Random
    ):
        self._grammar = grammar
        self._data = data
        self._part = part
        self._rng = rng
        self.slots: list[tuple[str, str]] = []

    def say(self, node: ex.Expression) -> str:
        if isinstance(node, ex.TextChunk):
            return node.original_text
        if isinstance(node, ex.Alternative):
            return self.say(self._pick(node.items))
        if isinstance(node, ex.Permutation):
            order = sorted((self._rng.random(), i) for i in range(len(node.items)))
            return " ".join(self.say(node.items[i]).strip() for _, i in order)
        if isinstance(node, ex.Group):
            return "".join(self.say(item) for item in node.items)
        if isinstance(node, ex.RuleReference):
            return self.say(self._grammar.rule(self._data, node.rule_name))
        if isinstance(node, ex.ListReference):
            return self._fill(node)
        raise BadInput(f"a template holds a {type(node).__name__}, which is unknown")

    def _fill(self, node: ex.ListReference) -> str:
        if inline := node.get_inline_range():
            first, last, step = inline
            return str(self._pick(range(first, last + 1, step)))
        name = node.list_name
        is_open, values = self._grammar.choices(self._data, name, self._part)
        value = self._pick(values)
        if isinstance(value, ex.Expression):
            return self.say(value)
        if is_open:
            self.slots.append((name, value))
        return value

    def _pick(self, values: Sequence[Any]) -> Any:
        # Only `random()` is promised to draw the same in every Python version.
        return values[int(self._rng.random() * len(values))]


def package_data() -> Path:
    """The folder with one JSON file of templates per language."""
    spec = importlib.util.find_spec("home_assistant_intents")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("home-assistant-intents is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"


def count_classes(content: Mapping[str, Any]) -> int:
    """Classes with enough templates in a language file, without parsing them."""
    found: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, set[str]] = defaultdict(set)
    for name, intent in content["intents"].items():
        for data in intent["data"]:
            label = label_of(name, data.get("slots"), data.get("metadata"))
            found[label].update(data["sentences"])
            for text in data["sentences"]:
                owners[text].add(label)
    return sum(
        sum(len(owners[text]) == 1 for text in texts) >= MIN_TEMPLATES
        for texts in found.values()
    )


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
