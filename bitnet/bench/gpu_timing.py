"""Timing on a GPU: contenders take turns as CUDA graphs, on a warm chip, medians and quartiles."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet.bench.gpu_gate import QUICK_CONFIG
from bitnet.model import PRESETS, ModelConfig

Row = dict[str, Any]
"""One row of results; "line" is its text for the table."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Options:
    device: torch.device
    presets: tuple[str, ...] = ("2b-4t", "700m")
    quick: bool = False
    """Tiny shapes, to see that everything works: the numbers are no measurements."""
    work: Path = Path("build") / "visit"
    """Where `curve_cpu` leaves the losses that `curve` compares with."""
    tiles: bool = False
    """Warm the candidates of the tiles section too."""

    @property
    def configs(self) -> dict[str, ModelConfig]:
        return {"quick": QUICK_CONFIG} if self.quick else {name: PRESETS[name] for name in self.presets}

    @property
    def dtype(self) -> torch.dtype:
        """Of the twins and of activations; Triton's interpreter has no bfloat16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def spin(device: torch.device, seconds: float = 0.3) -> None:
    """Work that brings an idle GPU's clock up, which falls while the CPU compiles."""
    if device.type == "cuda":
        a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            a @ a
            torch.cuda.synchronize(device)


def in_turn(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, *, graph: bool = True, budget: float = 0.05
) -> dict[str, tuple[float, float, float]]:
    """Seconds of one call of each contender: lower quartile, median, upper quartile. Its calls run one behind the
    other, on a GPU from a CUDA graph unless told; contenders take turns until each has run for `budget` seconds."""
    for calls in contenders.values():
        for call in calls[:1] if graph else calls:
            call()
    if device.type != "cuda":
        times = {}
        for name, calls in contenders.items():
            started = time.perf_counter()
            for call in calls:
                call()
            times[name] = (time.perf_counter() - started) / len(calls)
        return {name: (value,) * 3 for name, value in times.items()}
    torch.cuda.synchronize(device)
    runs: dict[str, tuple[Call, int]] = {}
    for name, calls in contenders.items():
        if not graph:
            runs[name] = functools.partial(_run_all, calls), len(calls)
            continue
        repeats = -(-20 // len(calls))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(repeats):
                _run_all(calls)
        captured.replay()  # the first one uploads the graph
        runs[name] = captured.replay, repeats * len(calls)
    spin(device, 0.1)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    while any(sum(values) < budget for values in samples.values()):
        for name, (run, _) in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            samples[name].append(start.elapsed_time(end) / 1e3)
        if min(map(len, samples.values())) >= 200:
            break
    return {
        name: tuple(v / runs[name][1] for v in quartiles(values))  # type: ignore[misc]
        for name, values in samples.items()
    }


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def copy_rate(device: torch.device, size: int) -> float:
    """GB/s of a copy of `size` bytes of random data inside the device, read and written bytes counted: the faster of
    the driver's copy and of a kernel's."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    ways = {"driver": [lambda: target.copy_(source)], "kernel": [lambda: torch.neg(source, out=target)]}
    return 2 * size / min(t[1] for t in in_turn(ways, device).values()) / 1e9


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
