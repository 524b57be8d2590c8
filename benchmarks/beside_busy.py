"""Decoding beside another program: tokens/s with one and with all threads, alone and while processes keep cores busy.

    python3 benchmarks/beside_busy.py --busy 1 --out benchmarks/results/beside_busy.json

Random ternary weights of the 0.7B shape. A round decodes `--steps` tokens with one thread and with `--threads`, first
alone and then beside `--busy` processes that do nothing but count, which the system places as it likes; medians of
`--rounds`. The gate: every way gives the same bits. A pool whose threads wait for each other loses more than the core
that is taken away; the goal is to lose nothing against one thread: `all beside / one beside` of at least 0.95.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from format_speed import BASE, SHAPE, decode, engine_of

from bitnet.bench.report import describe_machine
from bitnet.console import progress_bar
from bitnet.files import write_atomic
from bitnet.inference.cpu_engine import Engine
from bitnet.kernels.cpu import native


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that count, while the block runs."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.3 if children else 0)
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def logits(engine: Engine) -> torch.Tensor:
    """Behind a prompt of seven tokens, and one more."""
    cache = engine.new_cache(1, 16)
    return torch.cat([engine(torch.arange(7)[None], cache), engine(torch.tensor([[9]]), cache)], 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--busy", type=int, default=1, help="processes beside it")
    parser.add_argument("--layers", type=int, default=8, help="of the 24")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if not native.instruction_sets():
        raise SystemExit("the native kernels are not built: python3 setup.py build_ext --inplace")
    engine = engine_of(BASE, "", SHAPE.replace(num_hidden_layers=given.layers))
    expected = logits(engine)
    rates: dict[str, list[float]] = {}
    for _ in progress_bar(range(given.rounds), "rounds", unit="round"):
        for processes in (0, given.busy):
            with busy(processes):
                for threads in (1, given.threads):
                    torch.set_num_threads(threads)
                    if not torch.equal(logits(engine), expected):
                        raise SystemExit(f"{threads} threads beside {processes} processes give other logits")
                    name = f"{'one' if threads == 1 else 'all'}{' beside' if processes else ''}"
                    rates.setdefault(name, []).append(decode(engine, given.steps))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:12} {rate:7.1f} tok/s")
    for one, two in (("all", "one"), ("one beside", "one"), ("all beside", "one beside")):
        print(f"{one} / {two}: {medians[one] / medians[two]:.2f}")
    if given.out:
        result = {"machine": describe_machine(), "threads": given.threads, "busy": given.busy}
        write_atomic(given.out, json.dumps(result | {"medians": medians, "rounds": rates}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
