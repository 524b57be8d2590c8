"""A short visit to a GPU machine: three commands, each of which ends in time and leaves its results, whatever happens.

    python3 benchmarks/gpu_visit.py check   --out DIR --seconds 230      is it right?
    python3 benchmarks/gpu_visit.py measure --out DIR --seconds 400      how fast?
    python3 benchmarks/gpu_visit.py rest    --out DIR --seconds 160      training curve, losses, long texts

Every step is a process of its own (`python3 -m bitnet.bench.gpu`), so a crash, a hang or a wrong number costs that step
alone; what stands on a red gate is left out. DIR gets STAGE.json and STAGE.log, rewritten after every step. Triton's
and Inductor's caches go where their variables say. `--steps` runs some steps alone. The exit code is 1 where a step
failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "visit"
COMMAND = [sys.executable, "-m", "bitnet.bench.gpu"]
GATES = (
    "activations", "weights", "products", "projections", "groups", "sampling", "training", "steps", "engine", "caches",
    "compile",
)  # fmt: skip
Step = tuple[str, float, list[str]]
"""Name, limit in seconds, arguments of COMMAND."""


def section(name: str, limit: float, *arguments: str) -> Step:
    return name, limit, ["--section", name, *arguments]


# Steps of one row run beside each other; a row waits for the one before.
STAGES: dict[str, list[list[Step]]] = {
    "check": [
        [section("machine", 45)],
        [("warm", 130, ["--warm", "13"]), section("curve_cpu", 130, "--threads", "3")],
        [(f"gate_{name}", 75, ["--gate", name]) for name in GATES],
        [("decode_first", 60, ["--section", "decode", "--presets", "2b-4t"])],
    ],
    "measure": [
        [section("decode", 100, "--presets", "2b-4t", "700m")],
        [section("launching", 40, "--presets", "2b-4t")],
        [section("profile", 40, "--presets", "2b-4t")],
        [section("prefill", 60, "--presets", "2b-4t", "700m")],
        [section("kernels", 100)],
        [section("training", 130)],
        [section("tiles", 100)],
    ],
    "rest": [
        [section("curve", 80)],
        [section("loss", 40)],
        [section("long", 40, "--presets", "2b-4t")],
        [section("muon", 40)],
    ],
}
NEEDS = {
    "decode": {"engine", "sampling"},
    "launching": {"engine"},
    "profile": {"engine"},
    "prefill": {"engine"},
    "long": {"engine", "caches"},
    "loss": {"engine", "training"},
    "kernels": {"products"},
    "tiles": {"products", "projections"},
    "training": {"training", "steps"},
    "muon": {"steps"},
    "curve": {"training"},
}
"""The gates that a step stands on."""


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a step and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_row(steps: list[Step], deadline: float, work: Path, extra: list[str]) -> dict[str, dict[str, Any]]:
    """Run steps beside each other until they end or their time is up; status, seconds and rows of each."""
    started = time.monotonic()
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    done: dict[str, dict[str, Any]] = {}
    for name, limit, arguments in steps:
        (work / f"{name}.json").unlink(missing_ok=True)
        command = [*COMMAND, *arguments, *extra, "--work", str(work), "--json", str(work / f"{name}.json")]
        with open(work / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
        running[name] = process, min(started + limit, deadline)
    while running:
        for name, (process, until) in list(running.items()):
            status: int | str | None = process.poll()
            if status is None and time.monotonic() > until:
                stop(process)
                status = "time is up"
            if status is not None:
                del running[name]
                path = work / f"{name}.json"
                rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
                done[name] = {"status": status, "seconds": round(time.monotonic() - started, 1), "rows": rows}
        time.sleep(0.05)
    return done


def write_results(folder: Path, stage: str, work: Path, done: dict[str, dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stage}.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    logs = []
    for name in done:
        if (work / f"{name}.log").exists():
            logs.append(f"== {name}\n{(work / f'{name}.log').read_text(errors='replace')[-12_000:]}")
    (folder / f"{stage}.log").write_text("\n".join(logs), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--seconds", type=float, required=True, help="the whole stage ends within this time")
    parser.add_argument("--steps", nargs="+", help="these steps alone")
    parser.add_argument("--patience", type=float, default=1, help="times the limit of every step, for a rehearsal")
    parser.add_argument("--work", type=Path, default=WORK, help="where steps leave what others need")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further arguments for every step")
    given = parser.parse_args()
    deadline, work = time.monotonic() + given.seconds, given.work.resolve()  # steps run in another folder
    work.mkdir(parents=True, exist_ok=True)
    gates = work / "red_gates.json"
    red = set(json.loads(gates.read_text())) if gates.exists() else set()
    done: dict[str, dict[str, Any]] = {}
    for row in STAGES[given.stage]:
        steps = [step for step in row if not given.steps or step[0] in given.steps]
        wanted = [step for step in steps if red.isdisjoint(NEEDS.get(step[0].removesuffix("_first"), ()))]
        for name, *_ in steps:
            if name not in {step[0] for step in wanted}:
                done[name] = {"status": "left out, its gate is red"}
        if wanted and deadline - time.monotonic() < 10:
            done |= {step[0]: {"status": "left out, no time"} for step in wanted}
        elif wanted:
            patient = [(name, given.patience * limit, arguments) for name, limit, arguments in wanted]
            done |= run_row(patient, deadline, work, given.extra)
        for name, result in done.items():
            if name.startswith("gate_"):
                (red.discard if result["status"] == 0 else red.add)(name.removeprefix("gate_"))
        gates.write_text(json.dumps(sorted(red)))
        write_results(given.out, given.stage, work, done)
    for name, result in done.items():
        print(f"{name:18} {result['status']!s:>12} {result.get('seconds', 0):>6} s")
        for found in result.get("rows", []):
            print("    " + found["line"])
        if result["status"] != 0 and (work / f"{name}.log").exists():
            print("    | " + "\n    | ".join((work / f"{name}.log").read_text(errors="replace").splitlines()[-8:]))
    return int(any(result["status"] != 0 for result in done.values()))


if __name__ == "__main__":
    sys.exit(main())
