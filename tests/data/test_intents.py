"""The demonstration task keeps templates and slot values of the splits apart."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.data.builders import expand, intents, pools
from lowrank.data.tasks import IntentsData


@pytest.fixture(scope="module")
def generated():
    return expand.generate("en", seed=0, per_template=4)


def test_english_has_the_size_that_results_are_compared_on(english):
    rows = {name: len(split) for name, split in english.splits.items()}
    assert len(english.classes) == 120
    assert 1950 <= rows["train"] + rows["validation"] <= 2150
    assert 600 <= rows["test"] <= 710
    assert 0.14 <= rows["validation"] / (rows["train"] + rows["validation"]) <= 0.22


def test_every_class_can_be_learned_and_is_tested(english):
    for name in ("train", "test"):
        assert set(english.splits[name].labels) == set(range(120))


def test_no_template_is_in_two_splits(english):
    groups = [set(english.splits[s].groups) for s in pools.SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert len(groups[2]) > 120


def test_no_slot_value_is_in_two_splits(generated):
    values = {
        split: {value for row in rows for _, value in row.slots}
        for split, rows in generated.items()
    }
    assert min(map(len, values.values())) > 10
    for first, second in (
        ("train", "test"),
        ("train", "validation"),
        ("validation", "test"),
    ):
        assert values[first].isdisjoint(values[second])


def test_recorded_slots_are_those_in_the_text(generated):
    filled = [row for row in generated["test"] if row.slots]
    assert len(filled) > 300
    for row in filled:
        assert all(value in row.text for _, value in row.slots)


@pytest.mark.parametrize("language", ["en", *pools.OTHERS])
def test_pools_share_no_word_that_carries_meaning(language):
    known = pools.pools_of(language)
    words = defaultdict(set)
    for name, parts in known.items():
        own = name in pools.OTHERS.get(language, pools.ENGLISH)
        assert len(parts) == len(pools.SPLITS)
        for split, values in zip(pools.SPLITS, parts, strict=True):
            assert len(set(values)) == len(values) > 0
            if own:
                words[split] |= {w for v in values for w in v.split() if len(w) > 3}
    assert words["train"].isdisjoint(words["test"])
    assert words["train"].isdisjoint(words["validation"])
    assert words["validation"].isdisjoint(words["test"])


def test_no_text_occurs_twice_or_under_two_labels(monkeypatch):
    """With many utterances per template, some of them coincide."""
    made = defaultdict(list)
    real = expand.Grammar.utterances

    def utterances(self, label, text, data, split, *rest):
        rows = real(self, label, text, data, split, *rest)
        for row in rows:
            made[row.text].append((split, label))
        return rows

    monkeypatch.setattr(expand.Grammar, "utterances", utterances)
    kept = expand.generate("en", seed=0, per_template=12)
    where = {row.text: split for split, rows in kept.items() for row in rows}
    assert len(where) == sum(map(len, kept.values()))
    ambiguous = {
        t for t, found in made.items() if len({label for _, label in found}) > 1
    }
    double = {t for t, found in made.items() if len(found) > 1} - ambiguous
    assert ambiguous
    assert ambiguous.isdisjoint(where)
    assert double
    rank = ["train", "test", "validation"].index
    for text in double:
        assert where[text] == min((split for split, _ in made[text]), key=rank)


def test_utterances_of_one_template_are_one_group_of_at_most_four(generated):
    for rows in generated.values():
        assert max(Counter(row.template for row in rows).values()) == 4


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What another process, with another hash seed, makes."""
    code = (
        "import json, pathlib, sys; from lowrank.data.tasks import IntentsData;"
        "task = IntentsData().load(pathlib.Path(sys.argv[1]));"
        "print(json.dumps([task.fingerprint, 'tensorflow' in sys.modules]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path_factory.mktemp("elsewhere"))],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout)


def test_the_same_seed_gives_the_same_task_in_another_process(elsewhere, english):
    assert elsewhere[0] == english.fingerprint


def test_a_data_set_is_prepared_and_read_without_tensorflow(elsewhere):
    assert elsewhere[1] is False


def test_another_seed_gives_another_split(tmp_path, english):
    other = IntentsData(seed=1, utterances=2).load(tmp_path)
    assert other.fingerprint != english.fingerprint
    mine, theirs = (set(t.splits["test"].groups) for t in (english, other))
    assert mine != theirs
    assert mine & theirs
    assert set(other.splits["train"].labels) == set(range(len(other.classes)))


def test_validation_rows_can_be_trained_on_in_a_last_fit(prepared, english):
    refit = IntentsData(train_on_validation=True).load(prepared)
    rows = {name: len(split) for name, split in english.splits.items()}
    assert set(refit.splits) == {"train", "test"}
    assert len(refit.splits["train"]) == rows["train"] + rows["validation"]
    same = refit.splits["test"].fingerprint() == english.splits["test"].fingerprint()
    assert same
    assert refit.fingerprint != english.fingerprint


def test_the_record_names_the_packages(english):
    assert english.provenance["packages"] == {
        "home-assistant-intents": intents.INTENTS_VERSION,
        "hassil": intents.HASSIL_VERSION,
    }
    assert english.provenance["license"] == "Apache-2.0"


@pytest.mark.parametrize("found", [None, "3.11.0"])
def test_a_missing_or_other_package_is_refused_with_the_remedy(
    monkeypatch, tmp_path, found
):
    genuine = intents.package_version

    def version(package):
        if found is None:
            raise __import__("importlib.metadata").metadata.PackageNotFoundError
        return found

    monkeypatch.setattr("importlib.metadata.version", version)
    assert genuine is intents.package_version
    with pytest.raises(BadInput, match=r"pip install 'lowrank\[demo\]'"):
        IntentsData().load(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_unknown_language_names_the_nearest():
    with pytest.raises(UnknownName, match="'pt-BR'"):
        IntentsData(language="pt_BR")


def test_the_languages_are_those_with_ten_classes():
    found = {
        path.stem
        for path in expand.package_data().glob("*.json")
        if expand.count_classes(json.loads(path.read_bytes())) >= 10
    }
    assert set(intents.LANGUAGES) == found


@pytest.mark.parametrize("language", ["kn", "pt-BR", "sr-Latn", "zh-CN"])
def test_other_languages_make_a_task(tmp_path, language):
    task = IntentsData(language=language).load(tmp_path)
    assert len(task.classes) >= 10
    assert set(task.splits["train"].labels) == set(range(len(task.classes)))
    assert set(task.splits) == set(pools.SPLITS)


@pytest.mark.slow
@pytest.mark.parametrize("language", intents.LANGUAGES)
def test_every_language_is_generated(language):
    rows = expand.generate(language, seed=0, per_template=4)
    assert len({row.label for row in rows["train"]}) >= 9
    assert rows["test"]
