"""The page of a comparison: from its JSON alone, old or new, with every row, and nothing from elsewhere."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitnet.__main__ import main
from bitnet.evaluation.pictures import distribution
from bitnet.evaluation.table import Row, Table, write
from bitnet.pages.report import read_table, report
from tests.pages.builders import TABLE, self_contained

ROW = Row("float32", "float", 32, 32, 1.5, 12.345, 0.1, 0, 0, 0, 1, "float")
ROWS = [
    ROW,
    replace(ROW, name="a<b>&'\"", family="gguf", file_mb=0.5, perplexity=13.0, gap=0.05, layer_errors=[0.1, 0.2]),
    replace(ROW, name="broken", family="gguf", file_mb=0.2, perplexity=2e4, gap=0.5, layer_errors=[0.0, 1e3]),
]


@pytest.fixture(autouse=True)
def few_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sections of the perplexities instead of four; each is drawn four times."""
    monkeypatch.setattr("bitnet.pages.report.CEILINGS", (1.2, math.inf))


def test_a_measured_comparison_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(TABLE.read_text())
    table["rows"] = rows = table["rows"][::3]  # of 41, whose names are placed beside each other
    (tmp_path / TABLE.name).write_text(json.dumps(table))
    assert main(["report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    self_contained(page)
    for row in rows:
        assert f'<th scope="row">{row["name"]}</th>' in page
    held = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [row["perplexity"] for row in held["rows"]] == [row["perplexity"] for row in rows]
    for column in ("file_mb", "decode"):
        assert held["charts"][column] == [i for i, row in enumerate(rows) if row[column]]


def test_names_are_names_and_what_was_not_measured_is_left_out() -> None:
    page = report(Table("abc", 16, 64, ROWS))
    assert page == report(Table("abc", 16, 64, ROWS)), "the same table gives the same bytes"
    assert "<b>" not in page
    assert "a&lt;b&gt;&amp;" in page
    assert 'id="decode"' not in page, "no speed was measured"
    assert 'id="speed"' not in page
    assert 'id="distributions"' not in page
    assert 'id="layers"' in page
    with pytest.raises(ValueError, match="no rows yet"):
        report(Table("abc", 16, 64, []))


def test_a_folder_that_is_no_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "table.json does not exist" in capsys.readouterr().err


def test_distributions_are_counted_stored_and_drawn(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 1001)
    after = {"three": x.round(), "many": (x * 100).round() / 100}
    found = distribution("weights", x, after, {"three": "3 levels a scale"})
    three, many = found.after
    assert [level for level, _ in three.levels] == [-1.0, 0.0, 1.0]
    assert sum(share for _, share in three.levels) == pytest.approx(1)
    assert three.zeros == pytest.approx(float((x.round() == 0).float().mean()))
    assert not many.levels
    assert sum(many.counts) == sum(found.counts) == 1001
    write(tmp_path, Table("abc", 16, 64, ROWS, [found]))
    assert read_table(tmp_path).distributions == [found]
    page = report(read_table(tmp_path))
    self_contained(page)
    assert "three: 3 levels a scale" in page
    assert f"many: {many.zeros:.1%} zeros" in page
