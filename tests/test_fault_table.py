"""The committed table of faults is the one that the tests would write."""

from pathlib import Path

from fault_table import Outcomes, faults_in, faults_listed, write

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "faults.md"


def test_the_table_names_the_faults_that_are_tried_and_no_other():
    marked = faults_in(TESTS)
    listed = faults_listed(PAGE)
    assert len(marked) > 20
    assert sorted(listed) == sorted(marked), "make docs-faults writes it anew"
    for fault, promise in marked.items():
        assert listed[fault][0] == promise, fault


def test_nothing_in_the_table_was_silent_or_not_tried():
    for fault, (_, tries, told) in faults_listed(PAGE).items():
        counts = [int(part.split()[0]) for part in told.split(", ")]
        assert sum(counts) == tries > 0, fault
        assert "silent" not in told.lower()


def test_rows_replace_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- faults: begin -->\nold\n<!-- faults: end -->\nb\n")
    write(page, {"kill": ("as before", Outcomes(same=3, refused=2))})
    assert faults_listed(page) == {"kill": ("as before", 5, "2 refused, 3 same")}
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("\nb\n")
    assert "old" not in page.read_text()


def test_rows_that_were_not_tried_stay_while_their_tests_do(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- faults: begin --><!-- faults: end -->")
    write(page, {"a": ("p", Outcomes(same=1)), "b": ("p", Outcomes(same=1))})
    write(page, {"c": ("p", Outcomes(same=2))}, known={"a", "c"})
    assert {fault: row[1] for fault, row in faults_listed(page).items()} == {
        "a": 1,
        "c": 2,
    }


def test_marks_are_found_in_sources(tmp_path):
    source = "import pytest\n@pytest.mark.fault('x', 'y')\ndef test_a(): pass\n"
    (tmp_path / "test_a.py").write_text(source)
    assert faults_in(tmp_path) == {"x": "y"}
