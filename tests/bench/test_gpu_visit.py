"""The visit to a GPU, rehearsed without one: the driver ends in time whatever a step does, and every section runs."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests import ROOT, older, oracles
from tests.forked import Forked

# Stands in for `python -m bitnet.bench.gpu`: the first argument says what becomes of the step.
STEP = """
import json, sys, time
what, path = sys.argv[1], sys.argv[-1]
print("log of", what, flush=True)
if what == "hangs":
    time.sleep(60)
open(path, "w").write(json.dumps([{"line": f"row of {what}"}]))
sys.exit({"fails": 1, "crashes": 139}.get(what, 0))
"""
# Kernels that do nothing on tensors that hold ones: the Python of every gate and section, without a GPU and in seconds;
# and the names of those kernels that were launched and would not have been compiled beforehand.
SECTIONS = """
import torch
from pathlib import Path
from bitnet.kernels import triton
triton.require = lambda device: None
from bitnet.bench import gpu
from bitnet.bench.gpu_timing import Options
from bitnet.kernels.triton.warm import variants_of
empty = torch.empty
torch.empty = lambda *a, **k: t if (t := empty(*a, **k)).device.type == "meta" else t.fill_(1)
options = Options(torch.device("cpu"), quick=True, work=Path(), tiles=True)
def run(name, rows):
    print(name, len([*rows]), flush=True)
def calls():
    for name, gate in gpu.GATES.items():
        if name != "compile":  # whose compiler takes seconds; the kernels are those of a packed layer
            yield lambda: run(name, gate(options.device, True))
    for name, section in gpu.SECTIONS.items():
        yield lambda: run(name, (row["line"] for row in section(options)))
launched = {repr(variant): variant[1] for variant in variants_of(calls(), "none")}
warmed = set(map(repr, variants_of(gpu.calls_to_warm(options), "none")))
print("missed:", *(name for variant, name in launched.items() if variant not in warmed))
print("found:", len(warmed & set(launched)))
"""


@pytest.fixture
def visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_visit", ROOT / "benchmarks" / "gpu_visit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    script = tmp_path / "step.py"
    script.write_text(STEP)
    log = tmp_path / "work" / "hangs.log"

    def clock() -> float:
        """Stands still until the step that hangs has begun, however long that takes."""
        return 2.0 if log.exists() and log.read_text() else 0.0

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "COMMAND", [sys.executable, str(script)])
    return module


def run(visit: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> tuple[int, dict]:
    arguments = ["gpu_visit.py", "check", "--out", str(folder / "out"), "--seconds", str(seconds)]
    monkeypatch.setattr(sys, "argv", arguments)
    status = visit.main()
    return status, json.loads((folder / "out" / "check.json").read_text())


def test_one_bad_step_costs_that_step_alone(visit, tmp_path, monkeypatch, capsys) -> None:
    steps = [("good", 20.0, ["good"]), ("hangs", 1.0, ["hangs"]), ("crashes", 20.0, ["crashes"])]
    monkeypatch.setattr(visit, "STAGES", {"check": [steps, [("later", 20.0, ["later"])]]})
    status, done = run(visit, tmp_path, monkeypatch)
    assert status == 1
    assert {name: row["status"] for name, row in done.items()} == {
        "good": 0, "hangs": "time is up", "crashes": 139, "later": 0
    }  # fmt: skip
    assert done["good"]["rows"] == [{"line": "row of good"}]
    assert done["hangs"]["rows"] == []
    assert "log of hangs" in (tmp_path / "out" / "check.log").read_text()
    assert "row of later" in capsys.readouterr().out


def test_what_stands_on_a_red_gate_is_left_out(visit, tmp_path, monkeypatch) -> None:
    rows = [[("gate_engine", 20.0, ["fails"]), ("gate_products", 20.0, ["good"])]]
    rows.append([("decode_first", 20.0, ["good"]), ("long", 20.0, ["good"]), ("kernels", 20.0, ["good"])])
    monkeypatch.setattr(visit, "STAGES", {"check": rows})
    _, done = run(visit, tmp_path, monkeypatch)
    assert done["decode_first"]["status"] == done["long"]["status"] == "left out, its gate is red"
    assert done["kernels"]["status"] == 0


def test_without_time_nothing_is_started(visit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(visit, "STAGES", {"check": [[("good", 20.0, ["good"])]]})
    status, done = run(visit, tmp_path, monkeypatch, seconds=5)
    assert status == 1
    assert done == {"good": {"status": "left out, no time"}}


def test_steps_are_sections_and_gates_that_exist(visit) -> None:
    oracles.folder_of("triton")
    from bitnet.bench import gpu
    from bitnet.bench.gpu_gate import GATES
    from bitnet.bench.gpu_training import CURVE_FILE

    assert set(visit.GATES) == set(GATES)
    steps = [step for stage in visit.STAGES.values() for row in stage for step in row]
    assert CURVE_FILE not in {f"{name}.json" for name, *_ in steps}  # one would write over the other
    for name, _, arguments in steps:
        known = {"--section": gpu.SECTIONS, "--gate": GATES}.get(arguments[0])
        assert known is None or arguments[1] in known
        assert name.removesuffix("_first") in visit.NEEDS or name in {"machine", "warm", "curve_cpu", "muon"} | {
            f"gate_{gate}" for gate in GATES
        }
    assert set().union(*visit.NEEDS.values()) <= set(GATES)


def test_every_section_runs_without_a_gpu_and_finds_its_kernels_compiled(tmp_path) -> None:
    oracles.folder_of("triton")
    done = Forked(tmp_path, code=SECTIONS).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    check_sections(done.stdout)


def check_sections(stdout: str) -> None:
    """Raise AssertionError unless SECTIONS ran all, and missed no kernel."""
    lines = stdout.splitlines()
    counts = dict(line.split() for line in lines if len(line.split()) == 2 and ":" not in line)
    assert {"machine", "decode", "kernels", "training", "curve", "loss", "long"} <= set(counts)
    assert {"engine", "caches", "sampling", "groups"} <= set(counts)
    assert all(int(counts[section]) >= 1 for section in ("machine", "decode", "kernels", "training", "loss", "long"))
    assert "missed:" in lines, stdout
    assert int(lines[-1].removeprefix("found: ")) >= 30


def rehearse(python: older.Python, folder: Path, *steps: str) -> dict:
    """Steps of `check` by the driver itself, in the interpreter."""
    arguments = ["check", "--out", str(folder), "--seconds", "36000", "--patience", "100", "--work", str(folder / "w")]
    python.run("benchmarks/gpu_visit.py", *arguments, "--steps", *steps, "--extra", "--device", "cpu", "--quick")
    done = json.loads((folder / "check.json").read_text())
    assert done.keys() == set(steps)
    assert {row["status"] for row in done.values()} == {0}
    return done


def test_older_python_torch_and_triton_run_the_visit(older_python, tmp_path) -> None:
    check_sections(older_python.run("-c", SECTIONS, cwd=tmp_path, interpret=False))
    assert rehearse(older_python, tmp_path, "gate_weights")["gate_weights"]["rows"][-1]["green"]


@pytest.mark.skipif(os.environ.get("BITNET_LONG") != "1", reason="BITNET_LONG=1 runs all gates and kernels there")
def test_they_run_all_of_it(older_python, visit, tmp_path) -> None:
    rehearse(older_python, tmp_path, *(f"gate_{gate}" for gate in visit.GATES), "machine", "warm", "curve_cpu")
    older_python.test(*(f"tests/kernels/triton_{name}.py" for name in ("kernels", "products", "model")))
    older_python.test("tests/kernels/triton_compiled.py", "-k", "sm_90", interpret=False)
