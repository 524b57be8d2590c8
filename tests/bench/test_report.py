"""A benchmark's report: tables for people, and the same numbers in a file."""

import datetime
import json
import re
from pathlib import Path

from bitnet.bench.report import Report, describe_machine, headings, same_machine, share, spread
from bitnet.kernels.cpu import native


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


def test_a_machine_is_described_in_one_way():
    about = describe_machine()
    assert list(about) == [
        "cpu", "gpu", "cores", "affinity", "threads", "instruction_sets", "system", "python", "torch", "date"
    ]  # fmt: skip
    assert json.loads(json.dumps(about)) == about
    assert datetime.datetime.fromisoformat(about["date"]).tzinfo is not None
    assert about["instruction_sets"] == native.instruction_sets()
    # What earlier files say, in each of their forms.
    isa = next(iter(native.instruction_sets()), None)
    for old in (
        {
            "cpu": about["cpu"],
            "cores": about["cores"],
            "threads": about["threads"],
            "isa": isa,
            "torch": about["torch"],
        },
        {"cpu": about["cpu"], "cores": about["cores"], "instruction_sets": about["instruction_sets"], "date": "then"},
        {"cpu": about["cpu"], "isa": isa},
        about | {"date": "then"},
    ):
        assert same_machine(old, about)
        assert same_machine(about, old)
        assert not same_machine(old | {"cpu": "another"}, about)
    assert not same_machine(about, about | {"threads": 99})
    assert not same_machine(about, {"isa": "another"})


def test_nobody_describes_a_machine_anew():
    """Each benchmark had a dictionary of its own, a little different."""
    root = Path(__file__).parents[2]
    telling = re.compile(r"cpu_name|platform\.(platform|machine|processor|node|python_version)\(|torch\.__version__")
    files = [*root.glob("benchmarks/*.py"), *root.glob("bitnet/bench/*.py")]
    assert len(files) > 20
    assert [file.name for file in files if telling.search(file.read_text())] == ["report.py"]
