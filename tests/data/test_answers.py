"""Questions and answers: splits without leaks, tokens with loss on answers, packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from lowrank.core.errors import BadInput, Corrupt
from lowrank.data.answers import Answers, make_task
from lowrank.data.builders import rnnlg
from lowrank.data.packing import bins, one_by_one, packed
from lowrank.data.sequences import SequencePipeline, eval_rows
from lowrank.data.talk import Spoken, Talk

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows(count=3, start=0):
    names = [f"r{n}" for n in range(start, start + count)]
    return Answers(
        questions=tuple(f"say {name}" for name in names),
        answers=tuple((f"it is {name}", f"{name} it is") for name in names),
        groups=tuple(f"g{name}" for name in names),
        ids=tuple(names),
    )


def tokenizer():
    words = "<unk> <end> <user> <assistant> <system> say it is r0 r1 r2 r3 be brief"
    vocab = {word: n for n, word in enumerate(words.split())}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken("<end>"), AddedToken("<assistant>")])
    return made


def talk(**more):
    return Talk(tokenizer(), TEMPLATE, end=(1,), **more)


def test_a_task_knows_its_rows():
    splits = {"train": rows(), "test": rows(2, 3)}
    task = make_task("toy", splits, {})
    assert task.fingerprint == make_task("toy", splits, {"x": 1}).fingerprint
    other = {**splits, "test": rows(3, 3)}
    assert task.fingerprint != make_task("toy", other, {}).fingerprint
    assert rows().take([2, 0]).ids == ("r2", "r0")


@pytest.mark.parametrize(
    ("splits", "text"),
    [
        ({"train": rows(), "test": rows()}, "used twice"),
        ({"train": rows(), "test": rows(0)}, "test split of toy has no rows"),
        (
            {"train": rows(), "test": Answers(("q",), (("a",),), ("gr0",), ("x",))},
            "'gr0' is in the train and the test split",
        ),
        ({"train": Answers((" ",), (("a",),), ("g",), ("x",))}, "blank question"),
        ({"train": Answers(("q",), ((),), ("g",), ("x",))}, "blank question or answer"),
        ({"train": Answers(("q",), (("a", " "),), ("g",), ("x",))}, "blank question"),
    ],
)
def test_rows_that_cannot_be(splits, text):
    with pytest.raises(BadInput, match=text):
        make_task("toy", splits, {})


def test_columns_have_one_length():
    with pytest.raises(BadInput, match="different lengths"):
        Answers(("q", "r"), (("a",),), ("g",), ("x",))


def test_a_prompt_is_the_template_and_loss_counts_on_the_answer():
    own = talk(system="be brief")
    assert own.prompt("say r1") == (
        "<system> be brief <end>\n<user> say r1 <end>\n<assistant>"
    )
    spoken = own.spoken(rows(2), 50)
    ids, start = spoken.ids[0], spoken.starts[0]
    known = tokenizer()
    assert known.decode(ids[start:].tolist(), skip_special_tokens=False) == (
        "it is r0 <end>"
    )
    assert ids[:start].tolist() == own.prompt_ids("say r0")
    assert own.text(ids[start:]) == "it is r0"


def test_what_every_text_begins_with_is_there_once():
    assert talk(begin=0).prompt_ids("say r1")[:2] == [0, 2]
    with_begin = Talk(tokenizer(), "{{ bos_token }} x", end=(1,), begin=3)
    assert with_begin.prompt_ids("say") == [3, 0]


def test_without_a_template_question_and_answer_follow_each_other():
    plain = Talk(tokenizer(), None, end=(1,))
    assert plain.prompt("say r1") == "say r1\n"


@pytest.mark.parametrize(
    ("template", "end", "text"),
    [
        ("{% for %}", (1,), "cannot be read"),
        (TEMPLATE, (), "no token that ends an answer"),
    ],
)
def test_templates_that_cannot_be(template, end, text):
    with pytest.raises(BadInput, match=text):
        Talk(tokenizer(), template, end=end)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system') }}", "{{ messages[0].__class__.__mro__ }}"],
)
def test_a_template_that_refuses_or_reaches_out_is_refused(template):
    with pytest.raises(BadInput, match="cannot be filled in"):
        Talk(tokenizer(), template, end=(1,)).prompt("say")


def test_rows_that_would_be_cut_are_refused():
    with pytest.raises(BadInput, match=r"'r0' has 9 tokens, more than 8"):
        talk().spoken(rows(), 8)


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


@settings(deadline=None)
@given(LENGTHS)
def test_bins_hold_every_sequence_once_and_no_two_would_fit_in_one(lengths):
    found = bins(lengths, 12)
    assert sorted(n for row in found for n in row) == [*range(len(lengths))]
    full = [sum(lengths[n] for n in row) for row in found]
    assert max(full) <= 12
    # First fit: what opened a row fitted into no earlier one.
    for row, members in enumerate(found):
        for earlier in found[:row]:
            rank = lambda n: (-lengths[n], n)
            before = [n for n in earlier if rank(n) < rank(members[0])]
            assert sum(lengths[n] for n in before) + lengths[members[0]] > 12


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(BadInput, match=r"1 sequences .* number 1 with 9"):
        bins([3, 9], 8)


def spoken():
    ids = [[5, 6, 7, 1], [8, 9, 1], [5, 8, 9, 6, 1]]
    return Spoken(tuple(np.array(x, np.int32) for x in ids), (2, 1, 3))


def test_packed_rows():
    found = packed(spoken(), 6, pad=0, rows=[[0, 1], [2]])
    assert found["ids"].tolist() == [[5, 6, 7, 8, 9, 0], [5, 8, 9, 6, 0, 0]]
    assert found["label"].tolist() == [[6, 7, 1, 9, 1, 0], [8, 9, 6, 1, 0, 0]]
    # Each answer's first token is predicted from the place before it.
    assert found["weight"].tolist() == [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]]
    assert found["segments"].tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]]
    assert found["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert found["mask"].tolist() == (found["segments"] >= 0).tolist()


def test_packing_loses_no_label():
    def told(arrays):
        pairs = []
        for row in range(len(arrays["ids"])):
            for place in np.flatnonzero(arrays["weight"][row]):
                pairs.append((arrays["ids"][row, place], arrays["label"][row, place]))
        return sorted(pairs)

    assert told(packed(spoken(), 7, 0)) == told(one_by_one(spoken(), 0))
    assert one_by_one(spoken(), 0)["ids"].shape == (3, 4)
    assert one_by_one(spoken(), 0, 9)["ids"].shape == (3, 9)


def pipeline(count=5, size=2, seeds=(3, 4), **more):
    arrays = {
        "ids": np.arange(count * 2, dtype=np.int32).reshape(count, 2),
        "label": np.zeros((count, 2), np.int32),
        "weight": np.ones((count, 2), np.float32),
    }
    more = more or {"num_epochs": 2}
    return SequencePipeline(arrays, batch_size=size, trial_seeds=seeds, **more)


def test_every_row_once_per_epoch_in_each_trials_own_order():
    own = pipeline()
    assert (own.num_steps, own.steps_per_epoch) == (6, 3)
    for epoch in range(2):
        index = [own.batch_at(3 * epoch + n)["index"] for n in range(3)]
        for trial in range(2):
            seen = np.concatenate([one[trial] for one in index])
            assert sorted(seen[seen >= 0]) == [0, 1, 2, 3, 4]
            assert (seen < 0).sum() == 1
    first, second = (
        [own.batch_at(n)["index"][trial].tolist() for n in range(6)] for trial in (0, 1)
    )
    assert first != second
    assert first[:3] != first[3:]


def test_filling_weighs_nothing():
    for _, batch in pipeline().iterate():
        real = batch["index"] >= 0
        assert (batch["weight"].sum(axis=-1) == 2 * real).all()
        assert batch["ids"].shape == (2, 2, 2)


def test_a_position_goes_on_with_the_same_batches_and_no_others():
    own = pipeline()
    steps = dict(own.iterate(4))
    assert [*steps] == [4, 5]
    np.testing.assert_array_equal(steps[5]["ids"], own.batch_at(5)["ids"])
    own.check_state(own.state(4))
    with pytest.raises(Corrupt, match="rows was"):
        pipeline(count=6).check_state(own.state(4))
    with pytest.raises(IndexError):
        own.batch_at(6)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"size": 0}, "batch_size = 0"),
        ({"count": 0}, r"there are 0\)"),
        ({"num_epochs": 1, "num_steps": 2}, "and not both"),
        ({"num_steps": 0}, "must be at least 1"),
    ],
)
def test_pipelines_that_cannot_be(more, text):
    with pytest.raises(BadInput, match=text):
        pipeline(**more)


def test_evaluation_sees_every_row_once():
    arrays = one_by_one(spoken(), 0)
    batches = eval_rows(arrays, 2)
    index = np.concatenate([batch["index"] for batch in batches])
    assert index.tolist() == [0, 1, 2, -1]
    whole = np.concatenate([batch["weight"] for batch in batches]).sum()
    assert whole == arrays["weight"].sum()
    with pytest.raises(BadInput, match="batch_size = 0"):
        eval_rows(arrays, 0)


MEANINGS = [
    ("inform(name=a;type=laptop)", "a is a laptop"),
    ("inform(type=laptop;name=a)", "the laptop a"),
    ("goodbye()", "bye"),
    *((f"inform(name=x{n})", f"it is x{n}") for n in range(200)),
]


def test_no_meaning_is_on_two_sides_however_its_slots_are_ordered():
    found = rnnlg.cut(MEANINGS, 0)
    assert sum(map(len, found.values())) == len(MEANINGS)
    places = {}
    for split, own in found.items():
        for key, _, _ in own:
            assert places.setdefault(key, split) == split
    assert 130 < len(found["train"]) < 190
    assert rnnlg.cut(MEANINGS, 1) != found
    # A row less moves no other.
    fewer = rnnlg.cut(MEANINGS[:-1], 0)
    for split, own in found.items():
        assert [row for row in own if row[2] != "it is x199"] == fewer[split]


def test_files_of_meanings(tmp_path):
    for name in rnnlg.FILES:
        (tmp_path / name).write_text('# words\n[["inform(a=b)", "a is b", "x"]]')
    assert rnnlg.read(tmp_path) == [("inform(a=b)", "a is b")] * 3
    (tmp_path / "test.json").write_text('[["inform(a=b)", " "]]')
    with pytest.raises(BadInput, match="row 0 is no"):
        rnnlg.read(tmp_path)
    (tmp_path / "test.json").write_text("[")
    with pytest.raises(BadInput, match="not readable JSON"):
        rnnlg.read(tmp_path)
    (tmp_path / "test.json").unlink()
    with pytest.raises(BadInput, match=r"data\.path"):
        rnnlg.read(tmp_path)
    with pytest.raises(BadInput, match="no meaning of the form"):
        rnnlg.cut([("hello", "x")], 0)


@given(st.lists(st.integers(1, 12), max_size=40))
def test_bins_are_those_of_the_plain_first_fit(lengths):
    rows, room = [], []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fits = [row for row, left in enumerate(room) if left >= lengths[number]]
        if not fits:
            rows.append([])
            room.append(12)
            fits = [len(rows) - 1]
        rows[fits[0]].append(number)
        room[fits[0]] -= lengths[number]
    assert bins(lengths, 12) == rows
