"""Speed of every quantizer, in millions of weights a second: the block formats beside ggml, and the other methods.

    python benchmarks/quantizers.py [--rows 2048 --columns 5632] [--rounds 3] [--threads 2] [--library libggml-base.so]

Gaussian weights, on one thread and on all. Of the block formats there are ggml's own quantizer (`ggml_quantize_chunk`,
its rows dealt out to as many threads, as llama.cpp does it), ours with ggml's bytes and ours with the better search, in
C++ and in torch, each without importance and with. They take turns, so that a machine that slows down slows all of
them; rates are medians of the rounds, and every quantizer gets as many rows as fill --seconds. GPTQ and AWQ take a
matrix of their own, since their time grows faster than its size.

ggml's own build files compile its quantizers for any x86-64, whatever GGML_NATIVE says, and so are the package's. For a
harder race `--library` takes one that was built with -march=native; its sums may be rounded otherwise, so the gate does
not ask for its bytes.

Before any rate is printed, the bytes must be ggml's, the better search's error at or below ggml's, the dequantizers
alike, and the other methods as good as what they promise; otherwise the script ends with exit code 1. Needs
libggml-python. Results go to benchmarks/results/quantizers.json, and a table to stdout.
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bitnet.__main__ import read_options  # noqa: E402
from bitnet.bench.report import describe_machine  # noqa: E402
from bitnet.files import write_atomic  # noqa: E402
from bitnet.kernels import blocks, use_backend  # noqa: E402
from bitnet.kernels.cpu import blocks as native  # noqa: E402
from bitnet.model.weight_only import FloatLinear  # noqa: E402
from bitnet.quant import dequantize_nf4, quantize_nf4, quantize_ternary  # noqa: E402
from bitnet.quant.awq import awq_scale, clip_quantize  # noqa: E402
from bitnet.quant.blocks import NEEDS_IMPORTANCE  # noqa: E402
from bitnet.quant.gptq import HessianSum, gptq_quantize, layer_error  # noqa: E402
from bitnet.quant.grouped import Grid, round_to_nearest  # noqa: E402
from bitnet.quant.nf4 import nf4_codebook  # noqa: E402
from tests.oracles import ggml  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "quantizers.json"
LEAST_ROWS = 16
GATE_ROWS = 16

Quantizer = Callable[[Tensor], object]


@dataclass(frozen=True)
class Options:
    rows: int = 2048
    columns: int = 5632
    """A multiple of 256."""
    calibrated: tuple[int, int] = (1024, 1024)
    """Rows and columns for GPTQ and AWQ."""
    rounds: int = 3
    seconds: float = 0.08
    """Of one timing, about."""
    threads: int | None = None
    """All cores unless given; one thread is measured in any case."""
    kinds: tuple[str, ...] = tuple(blocks.TYPES)
    """Block types."""
    library: Path | None = None
    """A second ggml to time, a libggml-base.so."""
    out: Path = RESULTS


class Gate(Exception):
    """A number that is wrong, so that no speed counts."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Gate(what)


# The block formats


def backends() -> list[str]:
    return ["native", "reference"] if native.available() else ["reference"]


def ours(kind: str, importance: Tensor | None, backend: str, *, compatible: bool) -> Callable[[Tensor], Tensor]:
    def quantize(x: Tensor) -> Tensor:
        with use_backend(backend):
            return blocks.quantize(x, kind, importance, compatible=compatible)

    return quantize


def block_quantizers(
    kind: str, importance: Tensor | None, pool: ThreadPoolExecutor, threads: int, library: Path | None
) -> dict[str, Quantizer]:
    """Every quantizer of a type, by its column in the table."""

    def theirs(x: Tensor, path: Path | None = None) -> list[Tensor]:
        return list(pool.map(lambda rows: ggml.quantize(rows, kind, importance, path), x.chunk(threads)))

    found: dict[str, Quantizer] = {"ggml": theirs}
    if library:
        found["ggml, other build"] = lambda x: theirs(x, library)
    for backend in backends():
        name = {"native": "ours", "reference": "torch"}[backend]
        found[f"{name}, ggml's bytes"] = ours(kind, importance, backend, compatible=True)
        found[f"{name}, better"] = ours(kind, importance, backend, compatible=False)
    return found


def weighted_error(x: Tensor, data: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    """Squared error of each block, float64."""
    difference = (blocks.dequantize(data, kind).double() - x.double()) ** 2
    weighted = difference if importance is None else difference * importance.double()
    return weighted.view(-1, blocks.TYPES[kind].block_size).sum(1)


def check_blocks(kind: str, importance: Tensor | None, x: Tensor) -> float:
    """The better search's error over ggml's, on some rows. Raises Gate where anything differs that must not."""
    what = f"{kind} {'without' if importance is None else 'with'} importance"
    theirs = ggml.quantize(x, kind, importance)
    better = {}
    for backend in backends():
        same = ours(kind, importance, backend, compatible=True)(x)
        require(torch.equal(same, theirs), f"{what}: the {backend} bytes are not ggml's")
        better[backend] = ours(kind, importance, backend, compatible=False)(x)
        for data in (theirs, better[backend]):
            with use_backend(backend):
                floats = blocks.dequantize(data, kind)
            require(torch.equal(floats, ggml.dequantize(data, kind)), f"{what}: the {backend} dequantizer differs")
    first, *others = better.values()
    require(all(torch.equal(first, other) for other in others), f"{what}: native and torch find different blocks")
    error, limit = weighted_error(x, first, kind, importance), weighted_error(x, theirs, kind, importance)
    require(bool((error <= limit * (1 + 1e-6)).all()), f"{what}: the better search is worse than ggml's")
    return float(error.sum() / limit.sum())


# The other methods


def linear_of(x: Tensor) -> nn.Linear:
    linear = nn.Linear(x.shape[1], x.shape[0], bias=False, device="meta").eval()
    linear.weight = nn.Parameter(x, requires_grad=False)
    return linear


LINEAR: dict[str, Quantizer] = {
    "absmean ternary": quantize_ternary,
    "INT8, groups of 128": lambda x: round_to_nearest(x, Grid(8), 128),
    "INT4, groups of 128": lambda x: round_to_nearest(x, Grid(4), 128),
    "NF4, blocks of 64": lambda x: quantize_nf4(x, double_quant=True),
    "FP8, a scale a row": lambda x: FloatLinear.from_linear(linear_of(x), "float8"),
}


def check_linear(x: Tensor) -> None:
    """Every weight must have become the nearest of the values that its method offers at the scale that it chose.
    Raises Gate."""
    codes, scale = quantize_ternary(x)
    found = {"absmean ternary": (codes * scale, torch.tensor([-1.0, 0.0, 1.0]).mul(scale).expand(len(x), 1, 3))}
    for bits in (8, 4):
        quantized = round_to_nearest(x, Grid(bits), 128)
        steps = torch.arange(2**bits) - quantized.zero_point.unsqueeze(2)
        found[f"INT{bits}, groups of 128"] = quantized.dequantize(), steps * quantized.scale.float().unsqueeze(2)
    nf4 = quantize_nf4(x, double_quant=True)
    assert not isinstance(nf4.scale, Tensor)
    found["NF4, blocks of 64"] = dequantize_nf4(nf4), nf4_codebook() * nf4.scale.dequantize().unsqueeze(2)
    fp8 = FloatLinear.from_linear(linear_of(x), "float8")
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    found["FP8, a scale a row"] = fp8.dequantize(), (every[every.isfinite()] * fp8.scale).unsqueeze(1)
    for name, (result, offered) in found.items():
        groups = x.view(len(x), offered.shape[1], -1, 1)
        nearest = (groups - offered.unsqueeze(2)).abs().amin(-1).view_as(x)
        # A weight on a border goes to either side, and its distance is rounded.
        good = (result - x).abs() <= nearest * (1 + 1e-5) + 1e-6 * x.abs().max()
        require(bool(good.all()), f"{name}: {int((~good).sum())} weights are not at their nearest values")


@dataclass(frozen=True)
class Calibrated:
    """A weight and its inputs, correlated and of very different size as activations are."""

    weight: Tensor
    hessian: Tensor
    magnitude: Tensor

    @classmethod
    def random(cls, rows: int, columns: int) -> "Calibrated":
        x = torch.randn(4 * columns, columns // 4) @ torch.randn(columns // 4, columns) / (columns // 4) ** 0.5
        x = (x + torch.randn_like(x)) * torch.randn(columns).exp()
        hessian = HessianSum(columns)
        hessian.update(x)
        return cls(0.02 * torch.randn(rows, columns), hessian.matrix(), x.abs().mean(0))

    def quantizers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Each gives the dequantized weight."""
        group = 128 if self.weight.shape[1] % 128 == 0 else 32

        def awq(weight: Tensor) -> Tensor:
            scale, _ = awq_scale([weight], self.magnitude, self.hessian, Grid(4), group)
            hessian = self.hessian / torch.outer(scale, scale)
            return clip_quantize(weight * scale, hessian, Grid(4), group).dequantize() / scale

        return {
            "INT4, rounded": lambda weight: round_to_nearest(weight, Grid(4), group).dequantize(),
            "GPTQ, 4 bits": lambda weight: gptq_quantize(weight, self.hessian, Grid(4), group_size=group).dequantize(),
            "GPTQ, 4 bits, as published": lambda weight: gptq_quantize(
                weight, self.hessian, Grid(4), group_size=group, algorithm="original"
            ).dequantize(),
            "AWQ, 4 bits": awq,
        }

    def check(self) -> dict[str, float]:
        """Error of each method over rounding's. Raises Gate where one is above it, or the better GPTQ above the
        published one."""
        errors = {
            name: float(layer_error(self.weight, quantize(self.weight), self.hessian).double().sum())
            for name, quantize in self.quantizers().items()
        }
        nearest = errors.pop("INT4, rounded")
        for name, error in errors.items():
            require(error <= nearest, f"{name}: the error is {error:g}, and rounding has {nearest:g}")
        require(errors["GPTQ, 4 bits"] <= errors["GPTQ, 4 bits, as published"], "the refined GPTQ is worse than GPTQ")
        return {name: error / nearest for name, error in errors.items()}


# Time


def fitting_rows(quantize: Quantizer, x: Tensor, seconds: float) -> int:
    """How many rows take about so long, at least LEAST_ROWS: found by doubling, which warms up too."""
    quantize(x[:LEAST_ROWS])
    rows = min(LEAST_ROWS, len(x))
    while True:
        start = time.perf_counter()
        quantize(x[:rows])
        spent = time.perf_counter() - start
        if spent > seconds / 2 or rows == len(x):
            return max(min(len(x), LEAST_ROWS), min(len(x), round(rows * seconds / spent)))
        rows = min(2 * rows, len(x))


def rates(quantizers: dict[str, Quantizer], x: Tensor, rounds: int, seconds: float | None) -> dict[str, float]:
    """Millions of weights a second of each, the median of the rounds, in which they take turns."""
    parts = {
        name: x if seconds is None else x[: fitting_rows(quantize, x, seconds)] for name, quantize in quantizers.items()
    }
    measured: dict[str, list[float]] = {name: [] for name in quantizers}
    for _ in range(rounds):
        for name, quantize in quantizers.items():
            start = time.perf_counter()
            quantize(parts[name])
            measured[name].append(parts[name].numel() / (time.perf_counter() - start) / 1e6)
    return {name: round(statistics.median(values), 3) for name, values in measured.items()}


def weights_of(kind: str, importance: Tensor) -> list[tuple[str, Tensor | None]]:
    """Without importance, where the type is made without, and with."""
    return [("none", None)] * (kind not in NEEDS_IMPORTANCE) + [("yes", importance)]


def measure(options: Options, x: Tensor, importance: Tensor, calibrated: Calibrated, threads: int) -> Iterator[dict]:
    """A row of results for each type, without importance and with, then one for each other method."""
    torch.set_num_threads(threads)
    with ThreadPoolExecutor(threads) as pool:
        for kind in options.kinds:
            for name, weight in weights_of(kind, importance):
                found = block_quantizers(kind, weight, pool, threads, options.library)
                yield {"type": kind, "importance": name, "threads": threads,
                       "mweights_per_s": rates(found, x, options.rounds, options.seconds)}  # fmt: skip
    for name, rate in rates(LINEAR, x, options.rounds, options.seconds).items():
        yield {"type": name, "threads": threads, "mweights_per_s": {"torch": rate}}
    for name, quantize in calibrated.quantizers().items():
        if name != "INT4, rounded":
            rate = rates({name: quantize}, calibrated.weight, min(options.rounds, 2), None)[name]
            yield {"type": name, "threads": threads, "mweights_per_s": {"torch": rate}}


def gate(options: Options, x: Tensor, importance: Tensor, calibrated: Calibrated) -> dict[str, float]:
    """Errors over ggml's, or over rounding's, by row of the table. Raises Gate."""
    found = {}
    for kind in options.kinds:
        for name, weight in weights_of(kind, importance):
            found[f"{kind} {name}"] = round(check_blocks(kind, weight, x[:GATE_ROWS]), 4)
    check_linear(x[:GATE_ROWS])
    return found | {name: round(error, 4) for name, error in calibrated.check().items()}


def table(rows: list[dict], errors: dict[str, float]) -> str:
    """Two Markdown tables for each number of threads."""
    lines = []
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        formats = [row for row in mine if "importance" in row]
        columns = list(formats[0]["mweights_per_s"]) if formats else []
        title = "1 thread" if threads == 1 else f"{threads} threads"
        if columns:
            lines += [f"| Mweights/s, {title} | importance | {' | '.join(columns)} | error / ggml's |"]
            lines += ["|---|---|" + "---|" * (len(columns) + 1)]
        for row in formats:
            speeds, error = row["mweights_per_s"], errors[f"{row['type']} {row['importance']}"]
            cells = [
                f"{speeds[name]:.3g}" + (f" ({speeds[name] / speeds['ggml']:.2f}x)" if name.startswith("ours") else "")
                for name in columns
            ]
            lines += [f"| {row['type']} | {row['importance']} | {' | '.join(cells)} | {error:.3f} |"]
        lines += ["", f"| Mweights/s, {title} | torch | error / rounding's |", "|---|---|---|"]
        for row in mine:
            if "importance" not in row:
                against = f"{errors[row['type']]:.3f}" if row["type"] in errors else ""
                lines += [f"| {row['type']} | {row['mweights_per_s']['torch']:.3g} | {against} |"]
        lines += [""]
    return "\n".join(lines)


def run(options: Options) -> int:
    """Everything; the exit code."""
    if options.columns % 256 or options.rows < 1:
        raise ValueError(f"the matrix is {options.rows} x {options.columns}; its rows must be multiples of 256")
    if importlib.util.find_spec("libggml") is None:
        raise ValueError("libggml-python is not installed, and ggml is what the rest is compared with; pip install it")
    if unknown := sorted(set(options.kinds) - set(blocks.TYPES)):
        raise ValueError(f"block type {unknown[0]!r} is unknown; choose of {', '.join(blocks.TYPES)}")
    torch.manual_seed(0)
    x = 0.02 * torch.randn(options.rows, options.columns)
    importance = torch.randn(options.columns).exp()
    calibrated = Calibrated.random(*options.calibrated)
    try:
        errors = gate(options, x, importance, calibrated)
    except Gate as wrong:
        print(f"no speed, since a number is wrong: {wrong}", file=sys.stderr)
        return 1
    print("everything agrees; measuring", file=sys.stderr)
    threads = options.threads or os.cpu_count() or 1
    rows = []
    start = time.perf_counter()
    for count in sorted({1, threads}):
        for row in measure(options, x, importance, calibrated, count):
            rows.append(row)
            speeds = ", ".join(f"{name} {rate:.3g}" for name, rate in row["mweights_per_s"].items())
            about = f"{row['type']}, importance {row['importance']}" if "importance" in row else row["type"]
            print(f"{time.perf_counter() - start:4.0f} s  {count} threads  {about}: {speeds}", file=sys.stderr)
    result = {
        **dataclasses.asdict(options), "threads": threads, "machine": describe_machine(), "native": native.available(),
        "error_ratio": errors, "rates": rows,
    }  # fmt: skip
    del result["out"], result["library"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(result, indent=1) + "\n")
    print(table(rows, errors))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(read_options(sys.modules[__name__], "benchmarks/quantizers.py", sys.argv[1:])))
    except ValueError as error:
        sys.exit(f"error: {error}")
