"""benchmarks/beside_busy.py on a tiny shape: its gate, its file, and the processes that it ends."""

import json
import sys

import pytest
import torch

from bitnet.kernels.cpu import native
from tests import ROOT
from tests.kernels.builders import NOT_BUILT

sys.path.insert(0, str(ROOT / "benchmarks"))

import beside_busy

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(beside_busy, "SHAPE", beside_busy.SHAPE.replace(**small, **heads))
    words = "beside_busy.py", "--layers", "1", "--steps", "1", "--rounds", "1", "--threads", "2"
    monkeypatch.setattr(sys, "argv", list(words))


def test_every_way_is_measured_and_its_processes_end(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = beside_busy.subprocess.Popen
    monkeypatch.setattr(beside_busy.subprocess, "Popen", lambda *a: started.append(popen(*a)) or started[-1])
    sys.argv += ["--out", str(tmp_path / "x.json")]
    assert beside_busy.main() == 0
    assert set(json.loads((tmp_path / "x.json").read_text())["medians"]) == {"one", "all", "one beside", "all beside"}
    assert [child.returncode for child in started] == [-9]


def test_other_logits_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter(torch.arange(9.0))
    monkeypatch.setattr(beside_busy, "logits", lambda engine: next(found)[None])
    with pytest.raises(SystemExit, match="other logits"):
        beside_busy.main()
