"""Speed of the Triton kernels, the GPU engine and training on a GPU, beside bfloat16 twins.

    python3 -m bitnet.gpu_bench --section decode --presets 2b-4t --json decode.json
    python3 -m bitnet.gpu_bench --gate engine                     a gate of `bitnet/gpu_gate.py`: exit code 1 if red
    python3 -m bitnet.gpu_bench --warm 13 --json warm.json        compile what all of them need, in 13 processes

`benchmarks/gpu_visit.py` runs all of them in the order of their worth and measures nothing behind a red gate. Every
section writes its rows to the JSON file as they come, so one that is cut off keeps what it has.

Contenders take turns. Each is a CUDA graph of at least 20 calls, over as many copies of the weights as exceed the
second-level cache, so no time is a launch's and weights come from memory; the chip is warmed up before, and the
median and quartiles of at least 50 ms of replays count. Without a GPU, TRITON_INTERPRET=1 and `--device cpu --quick`
only show that the script runs.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import platform
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import kernels
from bitnet.files import write_atomic
from bitnet.generation import GenerationStats, SamplingConfig, generate
from bitnet.gpu_engine import GpuEngine
from bitnet.gpu_gate import CONFIGS, GATES, GREEDY, QUICK_CONFIG
from bitnet.model import PRESETS, BitNetForCausalLM, ModelConfig
from bitnet.optim import OptimConfig, Optimizer, clip_gradients
from bitnet.quant import packed_width
from bitnet.random_models import float_twin, random_tensors
from bitnet.runtime import compile_model, pick_device

Row = dict[str, Any]
Call = Callable[[], object]
PRODUCTS = [(2560, 2560, 2), (3840, 2560, 2), (13824, 2560, 2), (2560, 6912, 2), (28672, 8192, 2), (128256, 2560, 8)]
"""Rows, columns and bits of the matrices in 2B-4T, of a 70B model's widest, and of 2B-4T's head."""
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)
BATCHES = (1, 4, 16, 64)
PROMPTS = (32, 128, 512, 2048)
BEHIND = 512
"""Filled positions behind which a decoding step is timed."""


@dataclass(frozen=True)
class Options:
    device: torch.device
    presets: tuple[str, ...] = ("2b-4t", "700m")
    quick: bool = False
    """Tiny shapes, to see that everything works: the numbers are no measurements."""
    tiles: bool = False
    """Warm the candidates of the tiles section too."""

    @property
    def configs(self) -> dict[str, ModelConfig]:
        return {"quick": QUICK_CONFIG} if self.quick else {name: PRESETS[name] for name in self.presets}

    @property
    def dtype(self) -> torch.dtype:
        """Of the twins and of activations; Triton's interpreter has no bfloat16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


# Timing


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


# Sections: each yields rows of results; "line" of a row is its text for the table


def measure_machine(options: Options) -> Iterator[Row]:
    """Versions, and the ceilings that the rest is held against."""
    device = options.device
    from bitnet.kernels.triton.language import triton

    row: Row = {
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(), "device": "cpu",
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        try:
            row["smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            row["smi"] = str(error)
        row |= {
            "device": properties.name, "processors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(device)), "memory_gb": properties.total_memory / 1e9,
            "l2_mb": properties.L2_cache_size / 1e6,
        }  # fmt: skip
        n = 8192
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        row["bf16_tflops"] = 2 * n**3 / in_turn({"mm": [lambda: a @ b]}, device)["mm"][1] / 1e12
        del a, b
    row["copy_gbs"] = copy_rate(device, 2**20 if options.quick else 2**30)
    row["line"] = f"{row['device']}, torch {row['torch']}, Triton {row['triton']}: copy {row['copy_gbs']:.0f} GB/s"
    if "bf16_tflops" in row:
        row["line"] += f", bf16 {row['bf16_tflops']:.0f} TFLOP/s"
    yield row


@torch.inference_mode()
def measure_decode(options: Options) -> Iterator[Row]:
    """A step of decoding behind 512 positions in a CUDA graph, the engine and its bfloat16 twin; whole texts."""
    device = options.device
    copy = copy_rate(device, 2**20 if options.quick else 2**29)
    for name, config in options.configs.items():
        start, new = (4, 2) if options.quick else (BEHIND, 64)
        engine = GpuEngine(config, random_tensors(config), device=device, dtype=_name(options.dtype))
        twin = float_twin(config, options.dtype, device)
        for batch in (1,) if options.quick else BATCHES:
            log(f"decode: {name}, batch {batch}")
            ids = torch.randint(config.vocab_size, (batch, start), device=device)
            cache, twin_cache = engine.new_cache(batch, start + new), twin.new_cache(batch, start + new)
            engine(ids, cache, last_only=True)
            twin(ids, twin_cache, last_only=True)
            problem = unlike_eager(engine, ids)

            def step(cache: Any = twin_cache) -> None:
                cache.length = start
                twin(ids[:, :1], cache, last_only=True)

            def ours(cache: Any = cache) -> None:
                cache.length = start
                engine(ids[:, :1], cache, last_only=True)

            ours()
            row: Row = {"model": name, "batch": batch, "behind": start, "unlike_eager": problem}
            graph = cache.storage.graph
            replay = graph.replay if graph is not None else ours
            times = in_turn({"engine": [replay]}, device, graph=False)
            times |= in_turn({"twin": [step]}, device)
            read, twin_read = engine.weight_bytes() + cache.nbytes, twin.weight_bytes() + twin_cache.nbytes
            row |= {
                "us": times["engine"][1] * 1e6, "us_quartiles": [t * 1e6 for t in times["engine"]],
                "read_mb": read / 1e6, "floor_us": read / copy / 1e3, "of_floor": read / copy / 1e9 / times["engine"][1],
                "twin_us": times["twin"][1] * 1e6, "twin_floor_us": twin_read / copy / 1e3,
                "ratio": times["twin"][1] / times["engine"][1], "copy_gbs": copy,
            }  # fmt: skip
            if graph is not None:
                row["launches"] = launches_of(engine, batch)
            for how, sampling in (("greedy", GREEDY), ("top_p", SamplingConfig(temperature=0.8, top_p=0.95))):
                for _ in range(2):  # the second one is warm
                    stats = GenerationStats()
                    list(generate(engine, ids, max_new_tokens=new, sampling=sampling, seed=0, stats=stats))
                row[f"{how}_tokens_per_s"] = stats.decode_rate
            row["line"] = (
                f"{name} batch {batch}: {row['us']:.0f} us a step ({row['of_floor']:.0%} of its floor "
                f"{row['floor_us']:.0f}), bf16 twin {row['twin_us']:.0f} (floor {row['twin_floor_us']:.0f}): "
                f"{row['ratio']:.2f}x; text {row['greedy_tokens_per_s']:.0f}, top-p {row['top_p_tokens_per_s']:.0f} tok/s"
                + (f"; {problem}" if problem else "")
            )
            yield row
        del engine, twin


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launches_of(engine: GpuEngine, batch: int) -> int:
    """Kernels of one decoding step."""
    from bitnet.kernels.triton.language import record

    with record("ptx") as launches:
        cache = engine.new_cache(batch, 8)
        engine._forward(cache.storage.ids, cache.storage, None, True)
    return len(launches)


def unlike_eager(engine: GpuEngine, ids: Tensor) -> str:
    """What is wrong with the graph of a step behind the prompt `ids`, whose logits must be the eager ones bit for bit
    and within 5 % of those of one prefill; empty where nothing is. A speed is shown beside it."""
    logits = []
    for graphs in (True, False):
        allowed, engine.graphs = engine.graphs, engine.graphs and graphs
        cache = engine.new_cache(len(ids), ids.shape[1])
        engine(ids[:, :-1], cache, last_only=True)
        logits.append(engine(ids[:, -1:], cache, last_only=True))
        engine.graphs = allowed
    if not torch.equal(*logits):
        return "WRONG: the graph's logits are not the eager ones"
    whole = engine(ids, last_only=True)
    error = float((logits[0] - whole).norm() / whole.norm())
    return "" if error < 0.05 else f"WRONG: logits of a step are {error:.0%} off those of a prefill"


@torch.inference_mode()
def measure_launching(options: Options) -> Iterator[Row]:
    """The step of batch 1 with and without dependent launch."""
    from bitnet.kernels.triton.language import dependent_launches

    for name, config in options.configs.items():
        row: Row = {"model": name}
        steps: dict[str, Sequence[Call]] = {}
        engines = []
        for how, dependent in (("dependent", None), ("plain", False)):
            with dependent_launches(dependent):
                engine = GpuEngine(config, random_tensors(config), device=options.device, dtype=_name(options.dtype))
                cache = engine.new_cache(1, 4 if options.quick else BEHIND + 64)
                cache.length = 3 if options.quick else BEHIND
                engine(torch.ones(1, 1, dtype=torch.int64, device=options.device), cache)
            graph = cache.storage.graph
            engines.append((engine, cache))
            steps[how] = [graph.replay if graph is not None else (lambda: None)]
        times = in_turn(steps, options.device, graph=False)
        row |= {f"{how}_us": t[1] * 1e6 for how, t in times.items()}
        row["line"] = f"{name}: dependent launch {row['dependent_us']:.0f} us a step, plain {row['plain_us']:.0f}"
        yield row


@torch.inference_mode()
def measure_profile(options: Options) -> Iterator[Row]:
    """The kernels of one replay of the decoding graph by total time; they overlap, so the sum exceeds the step."""
    if options.device.type != "cuda":
        yield {"line": "no profile without a GPU"}
        return
    from torch.profiler import ProfilerActivity, profile

    for name, config in options.configs.items():
        engine = GpuEngine(config, random_tensors(config), device=options.device)
        cache = engine.new_cache(1, BEHIND + 64)
        ids = torch.randint(config.vocab_size, (1, BEHIND), device=options.device)
        engine(ids, cache, last_only=True)
        engine(ids[:, :1], cache)
        graph = cache.storage.graph
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        rounds = 10
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(rounds):
                graph.replay()
            torch.cuda.synchronize()
        rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:20]
        table = [
            {"kernel": e.key[:80], "calls": e.count / rounds, "us": e.self_device_time_total / e.count} for e in rows
        ]
        events = sorted((e for e in found.events() if "kernel" in e.name), key=lambda e: e.time_range.start)
        if events:  # the order and gaps of one layer's kernels
            first = events[0].time_range.start
            cut = events[: len(events) // rounds]
            table_of_times = [[e.name[:40], e.time_range.start - first, e.time_range.end - first] for e in cut[:40]]
        else:
            table_of_times = []
        lines = [f"{name}:"] + [f"{r['calls']:5.0f} x {r['us']:7.2f} us  {r['kernel']}" for r in table]
        yield {"model": name, "kernels": table, "timeline": table_of_times, "line": "\n    ".join(lines)}


@torch.inference_mode()
def measure_prefill(options: Options) -> Iterator[Row]:
    """Milliseconds of a prompt, launches by the CPU included, the engine and its bfloat16 twin."""
    device = options.device
    for name, config in options.configs.items():
        engine = GpuEngine(config, random_tensors(config), device=device, dtype=_name(options.dtype))
        twin = float_twin(config, options.dtype, device)
        for tokens in (8,) if options.quick else PROMPTS:
            if tokens > config.max_position_embeddings:
                continue
            log(f"prefill: {name}, {tokens} tokens")
            ids = torch.randint(config.vocab_size, (1, tokens), device=device)
            caches = {"engine": engine.new_cache(1, tokens), "twin": twin.new_cache(1, tokens)}

            def run(which: str, ids: Tensor = ids, caches: Any = caches) -> None:
                caches[which].length = 0
                (engine if which == "engine" else twin)(ids, caches[which], last_only=True)

            times = in_turn(
                {which: [functools.partial(run, which)] * 3 for which in caches}, device, graph=False, budget=0.1
            )
            row: Row = {"model": name, "tokens": tokens, "ms": times["engine"][1] * 1e3, "twin_ms": times["twin"][1] * 1e3}
            row["ratio"] = row["twin_ms"] / row["ms"]
            row["line"] = f"{name}, {tokens} tokens: {row['ms']:.2f} ms, bf16 twin {row['twin_ms']:.2f}: {row['ratio']:.2f}x"
            yield row
        del engine, twin


def product_shapes(options: Options) -> Iterator[tuple[int, int, int, int]]:
    """Tokens, rows, columns and bits."""
    if options.quick:
        yield from ((1, 64, 256, 2), (5, 64, 256, 2))
        return
    for (N, K, bits), M in itertools.product(PRODUCTS, TOKENS):
        if not (N > 100_000 and M > 64):  # a head is asked for the last position only
            yield M, N, K, bits


def algorithms_for(M: int, bits: int) -> tuple[str, ...]:
    if M > 4:
        return ("tensor_core", "dense") if M >= 32 else ("tensor_core",)
    return ("dot4", "tensor_core", "four_lanes", "select") if M == 1 and bits == 2 else ("dot4", "tensor_core")


def measure_kernels(options: Options) -> Iterator[Row]:
    """The product alone: every algorithm beside cuBLAS in bfloat16 and torch._int_mm, cold weights."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.activations import quantize_activations

    device, cold = options.device, 1e3 if options.quick else 2.5e8
    copy = copy_rate(device, 2**20 if options.quick else 2**29)
    for M, N, K, bits in product_shapes(options):

        def copies(make: Callable[[], Tensor], limit: float = cold) -> list[Tensor]:
            first = make()
            return [first, *(first.clone() for _ in range(min(63, int(limit // first.nbytes))))]

        x = torch.randn(M, K, dtype=options.dtype, device=device)
        packed = copies(lambda: torch.randint(0, 256, (N, packed_width(K, bits)), dtype=torch.uint8, device=device))  # noqa: B023
        scale = torch.ones(1, device=device)
        codes, x_scale, total = quantize_activations(x)
        contenders: dict[str, Sequence[Call]] = {}
        for algorithm in algorithms_for(M, bits):
            plan = product.choose(M, N, K, bits, device, algorithm)
            call = functools.partial(
                product.product, codes, x_scale, total, w_scale=scale, plan=plan, bits=bits, in_features=K,
                dtype=x.dtype, constant=True,
            )  # fmt: skip
            contenders[algorithm] = [functools.partial(call, packed=p) for p in packed]
        floats = copies(lambda: torch.randn(N, K, device=device, dtype=x.dtype))  # noqa: B023
        contenders["bf16"] = [functools.partial(F.linear, x, w) for w in floats]
        if M > 16 and device.type == "cuda":  # torch._int_mm takes no fewer
            x8 = codes[:, :K].contiguous()
            int8 = copies(lambda: torch.randint(-1, 2, (N, K), dtype=torch.int8, device=device))  # noqa: B023
            contenders["int_mm"] = [functools.partial(torch._int_mm, x8, w.t()) for w in int8]
        times = in_turn(contenders, device, budget=0.02)
        chosen = product.choose(M, N, K, bits, device).algorithm
        ours = times[chosen][1]
        row: Row = {
            "rows": N, "columns": K, "bits": bits, "tokens": M, "chosen": chosen, "us": ours * 1e6,
            **{f"{name}_us": t[1] * 1e6 for name, t in times.items()},
            "gbs": packed[0].nbytes / ours / 1e9, "of_copy": packed[0].nbytes / ours / 1e9 / copy,
            "tops": 2 * M * N * K / ours / 1e12, "ratio": times["bf16"][1] / ours,
        }  # fmt: skip
        rest = ", ".join(f"{name} {t[1] * 1e6:.1f}" for name, t in times.items() if name != chosen)
        row["line"] = (
            f"{N} x {K}, {bits} bits, {M} tokens: {chosen} {row['us']:.1f} us, {row['of_copy']:.0%} of copy, "
            f"{row['tops']:.0f} TOPS, {row['ratio']:.2f}x bf16 ({rest})"
        )
        yield row


def tile_candidates(options: Options) -> Iterator[tuple[int, int, int, int, str, Any]]:
    """Tokens, rows, columns, bits, a name, and a plan of a product or the (rows, warps) of a one-token projection."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.product import Plan

    if options.quick:
        yield 1, 64, 256, 2, "project 16 rows, 4 warps", (16, 4)
        return
    for K, gate, warps in itertools.product((2560, 6912), ("none", "relu2"), (4, 8, 16, 32)):
        yield 1, 1, K, 2, f"quantize {gate}, {warps} warps", (gate, warps)
    for N, K in ((3840, 2560), (13824, 2560), (2560, 6912), (2560, 2560)):
        for rows, warps in itertools.product((8, 16, 32, 64), (2, 4, 8, 16)):
            if 512 <= rows * power_of_two(packed_width(K, 2) // 4) // warps <= 2048:
                yield 1, N, K, 2, f"project {rows} rows, {warps} warps", (rows, warps)
    for (N, K), M in itertools.product(((13824, 2560), (2560, 6912)), (1, 2, 4)):
        base = product.choose(M, N, K, 2, options.device, "dot4")
        for rows in (2, 4, 8, 16):
            yield M, N, K, 2, f"dot4 {rows} rows", dataclasses.replace(base, rows=rows)
        yield M, N, K, 2, "tensor_core", product.choose(M, N, K, 2, options.device, "tensor_core")
    for (N, K), M in itertools.product(((13824, 2560), (2560, 6912)), (16, 64, 512)):
        base = product.choose(M, N, K, 2, options.device, "tensor_core")
        for rows, columns, stages, warps in itertools.product((64, 128), (32, 64, 128), (2, 3), (4, 8)):
            for split in sorted({1, base.split, 2 * base.split}):
                plan = dataclasses.replace(
                    base, rows=rows, columns=columns, stages=stages, warps=warps, split=split
                )
                yield M, N, K, 2, f"tensor_core {rows}x{columns}, split {split}, {stages} stages, {warps} warps", plan
    for (N, K), M in itertools.product(((13824, 2560), (2560, 6912)), (512, 2048)):
        for (rows, tokens), depth, stages, warps in itertools.product(
            ((128, 128), (128, 256), (256, 128), (64, 128), (128, 64)), (64, 128), (3, 4), (4, 8)
        ):
            if (rows + tokens) * depth * stages <= 227_000:
                plan = Plan("dense", rows, tokens, depth, warps=warps, stages=stages)
                yield M, N, K, 2, f"dense {rows}x{tokens}x{depth}, {stages} stages, {warps} warps", plan


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tile_call(M: int, N: int, K: int, bits: int, plan: Any, options: Options) -> Callable[[Tensor], object]:
    """What takes packed weights to the result of a candidate, on random activations."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.activations import quantize_activations
    from bitnet.kernels.triton.project import project

    device, dtype = options.device, options.dtype
    x, norm, scale = torch.randn(M, K, dtype=dtype, device=device), torch.ones(K, device=device), torch.ones(N, device=device)
    if isinstance(plan, tuple) and isinstance(plan[0], str):
        gate, warps = plan
        x = torch.randn(1, K if gate == "none" else 2 * K, dtype=dtype, device=device)
        return lambda p: quantize_activations(x, norm, 1e-5, gate, constant=True, warps=warps)
    if isinstance(plan, tuple):
        return lambda p: project(
            x, norm, p, scale, bits=bits, in_features=K, eps=1e-5, dtype=dtype, rows_and_warps=plan
        )
    codes = quantize_activations(x)
    return lambda p: product.product(
        *codes, p, scale, bits=bits, in_features=K, dtype=dtype, plan=plan, constant=True
    )


def measure_tiles(options: Options) -> Iterator[Row]:
    """Candidates for the tiles of `product.choose` and `project.tile`, fastest first."""
    device = options.device
    groups = itertools.groupby(tile_candidates(options), key=lambda c: (*c[:4], c[4].split()[0]))
    for (M, N, K, bits, _), candidates in groups:
        packed = [
            torch.randint(0, 256, (N, packed_width(K, bits)), dtype=torch.uint8, device=device)
            for _ in range(1 if options.quick else max(1, min(24, int(1.5e8 // (N * packed_width(K, bits))))))
        ]
        contenders: dict[str, Sequence[Call]] = {}
        refused = []
        for *_, name, plan in candidates:
            call = tile_call(M, N, K, bits, plan, options)
            try:
                call(packed[0])
            except Exception as error:  # what the device cannot hold
                refused.append(f"{name}: {type(error).__name__}")
                continue
            contenders[name] = [functools.partial(call, p) for p in packed]
        times = in_turn(contenders, device, budget=0.004)
        ranked = sorted((t[1] * 1e6, name) for name, t in times.items())
        best = "; ".join(f"{us:.1f} {name}" for us, name in ranked[:6])
        yield {
            "tokens": M, "rows": N, "columns": K, "bits": bits, "ranked": ranked, "refused": refused,
            "line": f"{M} tokens, {N} x {K}: {best}; slowest {ranked[-1][0]:.1f}",
        }  # fmt: skip


def training_step(
    config: ModelConfig, backend: str, compiled: str, options: Options, optimizer: str = "adamw"
) -> Row:
    """Milliseconds of forward, backward, clipping and optimizer."""
    device = options.device
    torch.manual_seed(0)
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with torch.device(device):
        model = BitNetForCausalLM(config)
    update = Optimizer(model, OptimConfig(optimizer=optimizer))
    shape = (2, 16) if options.quick else (8, 1024)
    ids = torch.randint(config.vocab_size, shape, device=device)
    with kernels.use_backend(backend):
        started = time.perf_counter()
        done = compile_model(model, compiled)

        def step() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = model.loss(ids, ids)
            loss.backward()
            clip_gradients(list(model.parameters()), 1.0)
            update.step()

        for _ in range(1 if options.quick else 3):
            step()
        first = time.perf_counter() - started
        low, middle, high = in_turn({"step": [step]}, device, graph=False, budget=0 if options.quick else 0.5)["step"]
    return {
        "quantizer": config.quantizer, "backend": backend, "compiled": done, "optimizer": optimizer,
        "parameters_m": model.num_parameters() / 1e6, "tokens": ids.numel(), "ms": middle * 1e3,
        "ms_quartiles": [low * 1e3, high * 1e3], "first_three_s": first,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }  # fmt: skip


def measure_training(options: Options) -> Iterator[Row]:
    """A step of the 125m preset: the kernels, the reference and the float twin, compiled and not."""
    config = QUICK_CONFIG if options.quick else PRESETS["125m"]
    contenders = [("reference", "none"), ("reference", "ternary"), ("triton", "ternary")]
    for compiled, (backend, quantizer) in itertools.product(("off",) if options.quick else ("auto", "off"), contenders):
        log(f"training: {quantizer}, {backend}, compiled {compiled}")
        row = training_step(config.replace(quantizer=quantizer), backend, compiled, options)
        what = "float twin" if quantizer == "none" else f"{quantizer} by {backend}"
        row["line"] = f"{what}, {'compiled' if row['compiled'] else 'eager'}: {row['ms']:.1f} ms a step"
        if row["peak_gb"]:
            row["line"] += f", {row['tokens'] / row['ms'] * 1e3:.0f} tok/s, {row['peak_gb']:.1f} GB"
        yield row


def measure_muon(options: Options) -> Iterator[Row]:
    """The same step with Muon."""
    config = QUICK_CONFIG if options.quick else PRESETS["125m"]
    for optimizer in ("adamw", "muon"):
        row = training_step(config, "reference", "off", options, optimizer)
        yield row | {"line": f"{optimizer}, eager: {row['ms']:.1f} ms a step"}


def documentation() -> Tensor:
    """The bytes of Python's own documentation, int64: text that every machine has."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


CURVE = PRESETS["demo"].replace(vocab_size=256)
CURVE_STEPS, CURVE_SHAPE = 200, (16, 128)
CURVE_FILE = Path("build") / "visit" / "curve_cpu.json"


def train(
    config: ModelConfig, device: torch.device, backend: str, dtype: torch.dtype, steps: int, shape: tuple[int, int]
) -> tuple[BitNetForCausalLM, list[float]]:
    """A short run from the same start on the same batches wherever it runs, and its losses."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(config).to(device)
    optimizer = Optimizer(model, OptimConfig(lr=2e-3, warmup_steps=10))
    text = documentation()[: -100_000]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - shape[1] - 1, (shape[0],), generator=generator)
        batch = torch.stack([text[s : s + shape[1] + 1] for s in starts]).to(device)
        optimizer.set_schedule(step, steps)
        with kernels.use_backend(backend), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        clip_gradients(list(model.parameters()), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return model, [float(loss) for loss in losses]


def measure_curve_cpu(options: Options) -> Iterator[Row]:
    """Losses of the short run on the CPU, kept for `curve`."""
    config, steps, shape = (QUICK_CONFIG.replace(vocab_size=256), 3, (2, 16)) if options.quick else (
        CURVE, CURVE_STEPS, CURVE_SHAPE)  # fmt: skip
    losses = train(config, torch.device("cpu"), "reference", torch.float32, steps, shape)[1]
    CURVE_FILE.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(CURVE_FILE, json.dumps(losses))
    yield {"losses": losses, "line": f"CPU: {losses[0]:.3f} to {statistics.mean(losses[-10:]):.3f}"}


def measure_curve(options: Options) -> Iterator[Row]:
    """Loss curves of the short run beside the CPU's: kernels and reference, float32 and bfloat16. `apart` is the mean
    distance to the CPU's over the second half."""
    config, steps, shape = (QUICK_CONFIG.replace(vocab_size=256), 3, (2, 16)) if options.quick else (
        CURVE, CURVE_STEPS, CURVE_SHAPE)  # fmt: skip
    expected = json.loads(CURVE_FILE.read_text())
    device = options.device
    runs = [("triton", torch.float32)]
    if device.type == "cuda":
        runs += [("reference", torch.float32), ("triton", torch.bfloat16), ("reference", torch.bfloat16)]
    for backend, dtype in runs:
        log(f"curve: {backend}, {dtype}")
        losses = train(config, device, backend, dtype, steps, shape)[1]
        half = slice(steps // 2, None)
        apart = statistics.mean(abs(a - b) for a, b in zip(losses[half], expected[half], strict=True))
        ends = statistics.mean(losses[-10:]), statistics.mean(expected[-10:])
        yield {
            "backend": backend, "dtype": _name(dtype), "apart": apart, "last": ends[0], "losses": losses,
            "line": f"{backend}, {_name(dtype)}: ends at {ends[0]:.3f} (CPU {ends[1]:.3f}), {apart:.4f} apart",
        }  # fmt: skip


@torch.inference_mode()
def measure_loss(options: Options) -> Iterator[Row]:
    """Held-out loss of a model that was just trained for 200 steps, packed: torch's reference and the engine."""
    device = options.device
    if options.quick:
        config, steps, shape, tokens = QUICK_CONFIG.replace(vocab_size=256), 3, (2, 16), 64
    else:
        config, steps, shape, tokens = CURVE, CURVE_STEPS, CURVE_SHAPE, 32_768
    with torch.inference_mode(False):
        model = train(config, device, "triton", torch.float32, steps, shape)[0]
    model = model.eval().pack()
    ids = documentation()[-100_000:][:tokens].view(-1, 16 if options.quick else 256).to(device)

    def loss(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))

    with kernels.use_backend("reference"):
        expected = loss(model(ids))
    for dtype in ("float32",) if device.type == "cpu" else ("float32", "bfloat16"):
        engine = GpuEngine.from_model(model, device=device, dtype=dtype)
        found = loss(engine(ids))
        yield {
            "dtype": dtype, "loss": found, "reference": expected, "tokens": ids.numel(),
            "line": f"engine, {dtype}: {found:.5f} nats, reference {expected:.5f} ({found - expected:+.1e})",
        }  # fmt: skip


@torch.inference_mode()
def measure_long(options: Options) -> Iterator[Row]:
    """A decoding step behind many positions, cache filled with random numbers."""
    device = options.device
    for name, config in list(options.configs.items())[:1]:
        lengths = (16,) if options.quick else (4096, 16_384, 32_768)
        config = config.replace(max_position_embeddings=lengths[-1])
        engine = GpuEngine(config, random_tensors(config), device=device, dtype=_name(options.dtype))
        for length in lengths:
            cache = engine.new_cache(1, length)
            cache.storage.keys.normal_()
            cache.storage.values.normal_()
            cache.length = length - 1
            engine(torch.ones(1, 1, dtype=torch.int64, device=device), cache)
            graph = cache.storage.graph
            step = in_turn({"step": [graph.replay if graph else (lambda: None)]}, device, graph=False)["step"][1]
            row = {"model": name, "length": length, "us": step * 1e6, "cache_mb": cache.nbytes / 1e6}
            yield row | {"line": f"{name} behind {length}: {step * 1e6:.0f} us, cache {row['cache_mb']:.0f} MB"}


SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "machine": measure_machine, "decode": measure_decode, "launching": measure_launching, "profile": measure_profile,
    "prefill": measure_prefill, "kernels": measure_kernels, "tiles": measure_tiles, "training": measure_training, "muon": measure_muon,
    "curve_cpu": measure_curve_cpu, "curve": measure_curve, "loss": measure_loss, "long": measure_long,
}  # fmt: skip


# What all of it launches


def calls_to_warm(options: Options) -> Iterator[Call]:
    """Calls that launch, between them, the kernels of all gates and sections; run while launches are recorded."""
    from bitnet.kernels.triton import product, weights
    from bitnet.kernels.triton.activations import padded, quantize_activations
    from bitnet.kernels.triton.training import ternary_linear

    device = options.device
    for name in ("activations", "weights", "products", "projections", "training"):
        yield functools.partial(_exhaust, GATES[name](device, options.quick))
    engines: list[tuple[ModelConfig, str]] = []
    for config in [QUICK_CONFIG] if options.quick else [*CONFIGS.values(), CURVE]:
        engines += [(config, "float32"), (config, _name(options.dtype))]
    for config in options.configs.values():
        engines.append((config, _name(options.dtype)))
    for config, dtype in engines:
        engine = GpuEngine(config, random_tensors(config), device=device, dtype=dtype, graphs=False)
        big = config.hidden_size >= 1024
        yield from engine.calls(BATCHES if big else (1, 2, 8), PROMPTS if big else (4, 71))
        del engine
    for M, N, K, bits in product_shapes(options):
        for algorithm in algorithms_for(M, bits):

            def call(M: int = M, N: int = N, K: int = K, bits: int = bits, algorithm: str = algorithm) -> None:
                quantize_activations(torch.empty(M, K, dtype=options.dtype, device=device))
                product.product(
                    torch.empty(M, padded(K), dtype=torch.int8, device=device), torch.empty(M, device=device),
                    torch.empty(M, dtype=torch.int32, device=device),
                    torch.empty(N, packed_width(K, bits), dtype=torch.uint8, device=device),
                    torch.empty(1, device=device), bits=bits, in_features=K, dtype=options.dtype, constant=True,
                    plan=product.choose(M, N, K, bits, device, algorithm),
                )  # fmt: skip

            yield call
    for M, N, K, bits, _, plan in tile_candidates(options) if options.tiles else ():
        yield functools.partial(_one_tile, M, N, K, bits, plan, options)
    trainings = [] if options.quick else [(PRESETS["125m"], 8192, torch.bfloat16), (CURVE, 2048, torch.float32),
                                          (CURVE, 2048, torch.bfloat16)]  # fmt: skip
    for config, tokens, dtype in trainings:
        for N, K in sorted(set(config_shapes(config))):

            def product_and_back(N: int = N, K: int = K, tokens: int = tokens, dtype: torch.dtype = dtype) -> None:
                x, w = torch.empty(tokens, K, device=device), torch.empty(N, K, device=device)
                _, codes, scale, w_codes, w_scale = ternary_linear(x, w, None, dtype)
                weights.dequantize(w_codes, w_scale, K, dtype)
                weights.dequantize(codes, scale, K, dtype)

            yield product_and_back


def config_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    from bitnet.random_models import projections

    return list(projections(config).values())


def _one_tile(M: int, N: int, K: int, bits: int, plan: Any, options: Options) -> None:
    packed = torch.empty(N, packed_width(K, bits), dtype=torch.uint8, device=options.device)
    tile_call(M, N, K, bits, plan, options)(packed)


def _exhaust(rows: Iterator[object]) -> None:
    for _ in rows:
        pass


def warm(options: Options, processes: int) -> Iterator[Row]:
    """Compile everything in a pool of processes; one row for each variant, then one with counts."""
    from bitnet.kernels.triton.warm import compile_all, variants_of

    started = time.perf_counter()
    variants = variants_of(calls_to_warm(options), "ptx" if options.device.type == "cuda" else "none")
    recorded = time.perf_counter() - started
    log(f"{len(variants)} kernel variants, found in {recorded:.1f} s")
    failed, spilled, done = [], [], 0
    if options.device.type == "cuda":
        for row in compile_all(variants, processes):
            done += 1
            if "error" in row:
                failed.append(row)
                log(f"{row['kernel']}: {row['error']}")
            elif row["spills"]:
                spilled.append(row)
            if done % 50 == 0:
                log(f"{done} of {len(variants)}, {time.perf_counter() - started:.0f} s")
    seconds = time.perf_counter() - started
    yield {
        "variants": len(variants), "compiled": done, "failed": failed, "spilled": spilled, "seconds": seconds,
        "recorded_s": recorded, "line": f"{done} of {len(variants)} variants in {seconds:.0f} s, {len(failed)} failed, "
        f"{len(spilled)} spill registers",
    }  # fmt: skip


# Command line


class Results:
    """Rows of one section, on disk after each of them."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, list[Row]()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row["line"], flush=True)
        if self.path is not None:
            rounded = json.loads(json.dumps(self.rows, default=str), parse_float=lambda text: float(f"{float(text):.5g}"))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(rounded, indent=1) + "\n")


def run_gate(name: str, options: Options) -> Iterator[Row]:
    """Each thing that is wrong, and a last row "green" or "RED"."""
    wrong = 0
    for text in GATES[name](options.device, options.quick):
        wrong += 1
        yield {"wrong": text, "line": text}
    yield {"green": not wrong, "line": f"{name}: {f'RED, {wrong} wrong' if wrong else 'green'}"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bitnet.gpu_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gate", choices=GATES)
    what.add_argument("--section", choices=SECTIONS)
    what.add_argument("--warm", type=int, metavar="PROCESSES", help="compile all kernels beforehand")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["2b-4t", "700m"], help="shapes of models")
    parser.add_argument("--json", type=Path, help="where the rows go, as they are ready")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: see that it runs")
    parser.add_argument("--tiles", action="store_true", help="with --warm: the candidates of the tiles section too")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        device = pick_device(given.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        options = Options(device, tuple(given.presets), given.quick, given.tiles)
        if given.section != "curve_cpu":
            kernels.triton.require(device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = Results(given.json)
    if given.gate:
        rows = run_gate(given.gate, options)
    elif given.section:
        rows = SECTIONS[given.section](options)
    else:
        rows = warm(options, given.warm)
    for row in rows:
        results.add(row)
    return int(not results.rows[-1].get("green", True) or bool(results.rows[-1].get("failed")))


if __name__ == "__main__":
    sys.exit(main())
