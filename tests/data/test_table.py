"""The user's own files: every format gives the same task, every mistake is named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build
from lowrank.data.checks import check_task
from lowrank.data.tasks import CATALOGUE, TableData

LABELS = ["no", "yes", "it depends"]


def rows(split, count):
    return [
        {"text": f'{split}, "{n}"\nof many', "label": LABELS[n % 3], "doc": f"{n // 4}"}
        for n in range(count)
    ]


def as_csv(table):
    def quoted(value):
        return '"' + str(value).replace('"', '""') + '"'

    lines = [",".join(table[0])] + [",".join(map(quoted, r.values())) for r in table]
    return "\r\n".join(lines).encode()


def as_jsonl(table):
    return "\n".join(json.dumps(row) for row in table).encode()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    return path


def write(folder, name, content):
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(content)
    return str(folder / name)


def load(folder, content, name="train.csv", **options):
    return TableData(path=write(folder, name, content), **options).load()


def test_csv_jsonl_and_parquet_give_the_same_task(folder):
    prints = set()
    for suffix in ("csv", "jsonl", "parquet"):
        place = folder / suffix
        place.mkdir()
        for split, count in (("train", 30), ("dev", 9), ("test", 12)):
            path = place / f"{split}.{suffix}"
            if suffix == "parquet":
                pq.write_table(pa.Table.from_pylist(rows(split, count)), path)
            else:
                made = {"csv": as_csv, "jsonl": as_jsonl}[suffix](rows(split, count))
                path.write_bytes(made)
        task = TableData(path=str(place), group="doc").load()
        prints.add(task.fingerprint)
    assert len(prints) == 1
    sizes = {split: len(s) for split, s in task.splits.items()}
    assert sizes == {"train": 30, "validation": 9, "test": 12}
    assert task.classes == ("it depends", "no", "yes")
    test = task.splits["test"]
    assert test.texts[1] == 'test, "1"\nof many'
    assert [task.classes[n] for n in test.labels] == [LABELS[n % 3] for n in range(12)]
    assert test.groups == tuple(str(n // 4) for n in range(12))
    assert test.ids[3] == "test/3"


def test_lines_with_a_coarse_label_are_read_as_documented(folder):
    train = "ENTY:animal What is : a bear ?\nDESC:def Qu'est-ce qu'un caf\xe9 ?\n"
    path = write(folder, "raw.TREC.train", train.encode("latin-1"))
    test = write(folder, "raw.TREC.test", b"DESC:manner How did it end ?\n")
    task = TableData(
        train=path,
        validation=write(folder, "v", b"ENTY:x Yes ?"),
        test=test,
        format="lines",
        separator=" ",
        header=["label", "text"],
        label_pattern="^([A-Z]+):",
        encoding="latin-1",
    ).load()
    assert task.classes == ("DESC", "ENTY")
    assert task.splits["train"].texts == (
        "What is : a bear ?",
        "Qu'est-ce qu'un caf\xe9 ?",
    )
    assert task.splits["train"].labels.tolist() == [1, 0]
    assert task.splits["test"].texts == ("How did it end ?",)


def test_a_table_is_a_group_of_a_config(folder):
    write(folder, "train.csv", as_csv(rows("train", 60)))
    spec = build(
        {"name": "table", "path": str(folder), "rows_per_class": 4, "group": "doc"},
        CATALOGUE,
        "data",
    )
    task = spec.load(folder / "own")
    assert len(task.splits["train"]) == 12
    assert (folder / "own").is_dir()
    with pytest.raises(UnknownName, match="group"):
        build({"name": "table", "grup": "doc"}, CATALOGUE, "data")
    with pytest.raises(BadInput, match=r"data: TableData.encoding.*utf-7"):
        build({"name": "table", "encoding": "utf-7"}, CATALOGUE, "data")


def test_missing_splits_are_cut_and_the_record_says_so(folder):
    task = load(folder, as_csv(rows("train", 120)), group="doc")
    sizes = {split: len(s) for split, s in task.splits.items()}
    assert sum(sizes.values()) == 120
    assert 16 <= sizes["test"] <= 32
    assert 8 <= sizes["validation"] <= 22
    groups = [set(split.groups) for split in task.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 30
    for name in ("test", "validation"):
        note = task.provenance[f"cut_{name}"]
        assert note["rows"] == sizes[name]
        assert note["by_group"] is True
    check_task(task)


def test_a_split_that_is_given_is_not_cut(folder):
    write(folder, "test.csv", as_csv(rows("test", 10)))
    write(folder, "train.csv", as_csv(rows("train", 60)))
    task = TableData(path=str(folder)).load()
    assert len(task.splits["test"]) == 10
    assert "cut_test" not in task.provenance
    assert task.provenance["cut_validation"]["rows"] == len(task.splits["validation"])


def test_several_files_make_one_split(folder):
    first = write(folder, "a.csv", as_csv(rows("a", 30)))
    second = write(folder, "b.jsonl", as_jsonl(rows("b", 30)))
    task = TableData(train=[first, second]).load()
    assert sum(map(len, task.splits.values())) == 60


def test_a_changed_file_is_another_data_set_and_a_moved_one_the_same(folder, cache):
    first = load(folder, as_csv(rows("train", 60)))
    (folder / "moved").mkdir()
    moved = load(folder / "moved", as_csv(rows("train", 60)))
    assert moved.fingerprint == first.fingerprint
    assert len(list((cache / "data").glob("table-*"))) == 1
    changed = load(folder, as_csv(rows("train", 60)).replace(b'"59"', b'"60"'))
    assert changed.fingerprint != first.fingerprint
    assert len(list((cache / "data").glob("table-*"))) == 2


def test_another_way_of_reading_is_another_data_set(folder):
    table = [{"text": f"t{n}", "label": n % 2, "fine": n % 4} for n in range(80)]
    path = write(folder, "train.jsonl", as_jsonl(table))
    sizes = [
        len(TableData(path=path, label=c).load().classes) for c in ("label", "fine")
    ]
    assert sizes == [2, 4]


def test_numbers_are_ordered_as_numbers(folder):
    table = [{"text": f"t{n}", "label": n % 13 - 1} for n in range(260)]
    task = load(folder, as_jsonl(table), "train.jsonl")
    assert task.classes == tuple(str(n) for n in range(-1, 12))


def test_truth_values_are_labels(folder):
    table = [{"text": f"t{n}", "label": n % 2 == 0} for n in range(40)]
    assert load(folder, as_jsonl(table), "train.jsonl").classes == ("false", "true")


def test_a_byte_order_mark_is_no_part_of_a_name(folder):
    task = load(folder, b"\xef\xbb\xbf" + as_csv(rows("train", 60)))
    assert task.splits["train"].texts[0].startswith("train, ")


GOOD = "text,label\n" + "".join(f"t{n},{'ab'[n % 2]}\n" for n in range(40))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (GOOD.replace("text,", "Text,", 1), {}, r"no column 'text'. Nearest: 'Text'"),
        (GOOD, {"label": "lable"}, r"no column 'lable'. Nearest: 'label'"),
        (GOOD, {"id": "key"}, "no column 'key'"),
        (GOOD + " ,a\nt,b\n,a\n", {}, r"2 rows have no usable text.*:42 .*:44 "),
        (GOOD + "t,\n", {}, r"1 rows have no usable label.*train.csv:42 \(''\)"),
        (GOOD + "a,b,c\n", {}, r":42 has 3 fields and there are 2"),
        (GOOD + '"a,b\n', {}, "is no CSV"),
        (GOOD + "caf\xe9,a\n", {}, r"is not utf-8: byte \d+ \(line 42\) is 0xe9"),
        ("", {}, "train.csv is empty"),
        ("text,label\n", {}, "no rows"),
        ("text,label\nx,a\ny,a\n", {}, "one class only, 'a'"),
        ("text,label,id\nx,a,1\ny,b,2\nz,b,1\n", {"id": "id"}, r"'1' at .*:2 and .*:4"),
        ("text,label\nx,a\ny,b\n", {}, "no test split can be cut from 2 rows"),
        (GOOD, {"label_pattern": "^([A-Z])"}, "finds no label in 40 rows"),
        (GOOD, {"text": "label"}, "one column is given two parts"),
        (GOOD + f"t,{'x' * 501}\n", {}, "1 rows have no usable label.*:42"),
    ],
)
@pytest.mark.fault(
    "faults of encoding, quotes, columns, labels and ids in CSV",
    "exit 2 naming file and line",
)
def test_a_mistake_in_a_csv_file_is_named(folder, content, options, message):
    with pytest.raises(BadInput, match=message):
        load(folder, content.encode("latin-1"), **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', r"train.jsonl:41 has no column 'label'"),
        ('{"text": "x", "label": 1.5}', r"no usable label.*:41 \(1.5\)"),
        ('{"text": null, "label": "a"}', r"no usable text.*:41 \(None\)"),
        ('{"text": "\\ud800", "label": "a"}', "no usable text"),
        ('{"text": 3, "label": "a"}', "no usable text"),
        ('["x", "a"]', "is a list"),
        ('{"text": "x"', ":41 is no JSON"),
        ("[" * 100_000, ":41 is no JSON"),
    ],
)
@pytest.mark.fault(
    "faults of JSON lines: types, surrogates, nesting",
    "exit 2 naming file and line",
)
def test_a_mistake_in_a_jsonl_file_is_named(folder, line, message):
    good = as_jsonl([{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(40)])
    with pytest.raises(BadInput, match=message):
        load(folder, good + b"\n" + line.encode(), "train.jsonl")


def test_a_file_that_is_no_parquet_is_named(folder):
    with pytest.raises(BadInput, match="no Parquet file"):
        load(folder, GOOD, "train.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "lines"}, "needs data.separator and data.header"),
        ({"separator": "--"}, "csv takes one character"),
        ({"label_pattern": "a" * 201}, "at most 200"),
        ({"label_pattern": "["}, "no regular expression"),
        ({"label_pattern": "a"}, "0 groups"),
        ({"validation_share": 1.0}, "between 0 and 1"),
        ({"rows_per_class": 0}, "at least 1"),
        ({"seed": -1}, "2\\*\\*31"),
        ({"header": ["a", "a"]}, "twice"),
        ({"path": None}, "needs data.path"),
        ({"path": "nowhere.csv"}, "does not exist"),
    ],
)
def test_a_setting_that_cannot_be_is_named(folder, options, message):
    with pytest.raises(BadInput, match=message):
        TableData(**{"path": write(folder, "train.csv", GOOD), **options}).load()


def test_a_label_that_train_lacks_is_named_with_its_line(folder):
    write(folder, "train.csv", GOOD)
    write(folder, "test.csv", "text,label\nq,a\nr,ab\n")
    with pytest.raises(UnknownName, match=r"test split.*'ab' at test.csv:3.*'a'"):
        TableData(path=str(folder)).load()


def test_files_are_not_guessed(folder):
    with pytest.raises(BadInput, match="holds no train file"):
        TableData(path=str(folder)).load()
    path = write(folder, "train.csv", GOOD)
    write(folder, "train.jsonl", "")
    with pytest.raises(BadInput, match=r"2 files.*Say data.train="):
        TableData(path=str(folder)).load()
    with pytest.raises(BadInput, match="belongs to one"):
        TableData(train=path, test=path).load()
    with pytest.raises(BadInput, match="names no format"):
        TableData(path=write(folder, "data.bin", GOOD)).load()
    with pytest.raises(BadInput, match="is not a file"):
        TableData(path=str(folder), train="other.csv").load()
    with pytest.raises(BadInput, match="no train file"):
        TableData(test=path).load()


def test_nothing_is_prepared_from_bad_files(folder, cache):
    with pytest.raises(BadInput):
        load(folder, GOOD + "t,\n")
    assert not [path for path in (cache / "data").iterdir() if path.is_dir()]


def test_a_last_fit_needs_validation_rows_and_merges_cut_ones(folder):
    task = load(folder, GOOD, train_on_validation=True)
    assert set(task.splits) == {"train", "test"}
    assert sum(map(len, task.splits.values())) == 40
    assert task.provenance["train_on_validation"] is True
