"""A benchmark's report: tables for people, and the same numbers in a file."""

import json

from bitnet.bench.report import Report, headings, share, spread


def test_numbers_have_three_digits_and_columns_are_aligned(capsys):
    report = Report(None, {})
    rows = [
        {"name": "a", "rate": {"median": 94.71, "min": 9.0, "max": 1234.5}, "x_share": 0.305},
        {"name": "bcd", "rate": {"median": 0.01234, "min": 0.01234, "max": 0.01234}, "x_share": None},
    ]
    report.section("s", "Title", rows, {"name": "name", "rate": "tok/s", "x_share": "of peak"})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Title",
        "  name              tok/s  of peak",
        "  a     94.7 (9.00..1234)      30%",
        "  bcd              0.0123        -",
    ]


def test_the_file_is_written_anew_after_every_section_in_five_digits(tmp_path, capsys):
    path = tmp_path / "result.json"
    report = Report(path, {"machine": {"cores": 2}})
    report.section("empty", "Nothing", [], {"a": "a"})
    assert capsys.readouterr().out == ""
    assert json.loads(path.read_text()) == {"machine": {"cores": 2}, "empty": [], "notes": []}
    report.notes.append("short")
    report.section("one", "One", [{"a": 1.23456789}], {"a": "a"})
    assert json.loads(path.read_text())["one"] == [{"a": 1.2346}]
    assert json.loads(path.read_text())["notes"] == ["short"]


def test_headings_are_fields_or_names_of_their_own():
    assert headings("isa, gbs: GB/s, x: of limit") == {"isa": "isa", "gbs": "GB/s", "x": "of limit"}


def test_spreads_and_shares():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert share(3.0, 4.0) == 0.75
    assert share(3.0, None) is None
