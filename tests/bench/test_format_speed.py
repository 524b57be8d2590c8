"""benchmarks/format_speed.py on a tiny shape: its gate, the file that grows, the picture."""

import json

import pytest

from benchmarks import format_speed
from bitnet.kernels.cpu import native
from tests.kernels.builders import NOT_BUILT

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(format_speed, "SHAPE", format_speed.SHAPE.replace(**small, **heads))
    monkeypatch.setattr(format_speed, "read_bandwidth", lambda threads: 10.0)
    monkeypatch.setattr(format_speed, "check_products", lambda config: iter(()))


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    words = "format_speed.py", "--layers", 2, "--steps", 1, "--rounds", 1, *words
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    return format_speed.main()


@pytest.mark.parametrize(
    "name", ["b1.58", "W8A8 static", "Q4_K", "Q8_0", "IQ4_XS", "NVFP4", "GPTQ 3", "PTQTP", "NF4", "FP8"]
)
def test_tiles_are_their_layers(name: str) -> None:
    for treatment in format_speed.treatments(name):
        assert not format_speed.wrong(name, treatment)


def test_what_is_measured_stands_beside_what_was(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, picture = tmp_path / "speeds.json", tmp_path / "speeds.png"
    assert run(monkeypatch, "--out", out, "--formats", "b1.58", "Q4_K") == 0
    assert run(monkeypatch, "--out", out, "--picture", picture, "--formats", "BF16", "Q4_K") == 0
    rows = json.loads(out.read_text())["rows"]
    found = {(row["format"], row["treatment"]): row["bits"] for row in rows}
    assert list(found) == [("b1.58", ""), ("BF16", ""), ("Q4_K", "int8"), ("Q4_K", "int16")]
    assert found["b1.58", ""] < found["Q4_K", "int8"] == found["Q4_K", "int16"] < found["BF16", ""]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="another machine or shape"):
        run(monkeypatch, "--out", out, "--layers", "1", "--formats", "b1.58")


def test_a_wrong_format_is_not_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_speed, "wrong", lambda name, treatment: [f"{name} is off"])
    out = tmp_path / "speeds.json"
    assert run(monkeypatch, "--out", out, "--formats", "Q4_K") == 1
    results = json.loads(out.read_text())
    assert results["failed"] == ["Q4_K is off"] * 2
    assert results["rows"] == []
