"""A comparison's table as text and as files."""

import csv
import json
from dataclasses import replace
from pathlib import Path

from bitnet.evaluation.table import Row, Table, markdown, terminal, write

ROW = Row("float32", "float", 32, 32, 1.5, 12.345, 0.1, 0, 0, 0, 1, "float")
ROWS = [ROW, replace(ROW, name="gptq-4", perplexity=2e4, gap=0.5, kernel="dequantizes", decode=12.34, seconds=3.0)]


def test_columns_are_aligned_and_what_was_not_measured_is_empty() -> None:
    heading, first, second = terminal(ROWS).splitlines()
    ends = {heading.index(name) + len(name) for name in ("bits", "perplexity", "kernel")}
    assert ends <= {i for i in range(1, len(first) + 1) if first[i - 1] != " " and first[i : i + 1] in ("", " ")}
    assert ends <= {i for i in range(1, len(second) + 1) if second[i - 1] != " " and second[i : i + 1] in ("", " ")}
    assert first.split() == ["float32", "32.00", "32.00", "1.50", "12.35", "±", "0.10", "+0.0000", "±", "0.0000",
                             "0.0000", "100.0%", "float"]  # fmt: skip
    assert second.split()[4] == ">10000"
    assert second.endswith("12.3  dequantizes         3.0 s")


def test_markdown_has_a_cell_for_every_heading() -> None:
    lines = markdown(ROWS).splitlines()
    assert {line.count("|") for line in lines} == {14}
    assert lines[1] == "|" + " --- |" * 13
    assert lines[3].startswith("| gptq-4 | 32.00 |")


def test_files_hold_every_number(tmp_path: Path) -> None:
    write(tmp_path, Table("abc", 16, 64, ROWS))
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["settings"] == "abc"
    assert [Row(**row) for row in stored["rows"]] == ROWS
    with open(tmp_path / "table.csv", newline="") as file:
        assert [line["gap"] for line in csv.DictReader(file)] == ["0", "0.5"]
    assert (tmp_path / "table.md").read_text() == markdown(ROWS)
