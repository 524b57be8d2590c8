"""The GPU engine beside its bfloat16 twin: prompts, steps of decoding, whole texts, and what a step is made of."""

import functools
import itertools
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet.bench.gpu_gate import GREEDY
from bitnet.bench.gpu_timing import Call, Options, Row, copy_rate, in_turn, log, name_of
from bitnet.bench.random_models import float_twin, random_tensors
from bitnet.bench.report import describe_machine
from bitnet.inference.generation import GenerationStats, generate
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.inference.options import DEFAULTS
from bitnet.model import BitNetForCausalLM, ModelConfig

BATCHES = (1, 4, 16, 64)
PROMPTS = (32, 128, 512, 2048)
LONG_CACHES = (None, "int8", "fp8")
"""Types of keys and values behind long texts; None: the engine's."""
BEHIND = 512
"""Filled positions behind which a decoding step is timed."""


def measure_machine(options: Options) -> Iterator[Row]:
    """Versions, and the ceilings that the rest is held against."""
    device = options.device
    from bitnet.kernels.triton.language import triton

    row: Row = {**describe_machine(), "triton": triton.__version__, "device": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit",
            "--format=csv,noheader",
        ]
        try:
            row["smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            row["smi"] = str(error)
        row |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(device)),
            "memory_gb": properties.total_memory / 1e9,
            "l2_mb": properties.L2_cache_size / 1e6,
        }
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
    copy = copy_rate(options.device, 2**20 if options.quick else 2**29)
    for name, config in options.configs.items():
        engine = GpuEngine(config, random_tensors(config), device=options.device, dtype=name_of(options.dtype))
        twin = float_twin(config, options.dtype, options.device)
        for batch in (1,) if options.quick else BATCHES:
            log(f"decode: {name}, batch {batch}")
            start, new = (4, 2) if options.quick else (BEHIND, 64)
            ids = torch.randint(config.vocab_size, (batch, start), device=options.device)
            row = {"model": name, "batch": batch, "unlike_eager": unlike_eager(engine, ids)}
            row |= step_speed(engine, twin, ids, start + new, copy) | text_speed(engine, ids, new)
            row["line"] = (
                f"{name} batch {batch}: {row['us']:.0f} us a step ({row['of_floor']:.0%} of its floor "
                f"{row['floor_us']:.0f}), bf16 twin {row['twin_us']:.0f} (floor {row['twin_floor_us']:.0f}): "
                f"{row['ratio']:.2f}x; text {row['greedy_tokens_per_s']:.0f}, top-p {row['top_p_tokens_per_s']:.0f} "
                f"tok/s {row['unlike_eager']}"
            )
            yield row
        del engine, twin


def step_speed(engine: GpuEngine, twin: BitNetForCausalLM, ids: Tensor, capacity: int, copy: float) -> Row:
    """Microseconds of a step behind the prompt ids `[B, T]`; `copy` is the limit in GB/s."""
    batch, start = ids.shape
    cache, twin_cache = engine.new_cache(batch, capacity), twin.new_cache(batch, capacity)

    def step() -> None:
        cache.length = start
        engine(ids[:, :1], cache, last_only=True)

    def twin_step() -> None:
        twin_cache.length = start
        twin(ids[:, :1], twin_cache, last_only=True)

    engine(ids, cache, last_only=True)
    twin(ids, twin_cache, last_only=True)
    step()
    graph = cache.storage.graphs.get(1)
    ours = in_turn({"step": [step if graph is None else graph.replay]}, ids.device, graph=False)["step"]
    theirs = in_turn({"step": [twin_step]}, ids.device)["step"][1]
    read, twin_read = engine.weight_bytes() + cache.nbytes, twin.weight_bytes() + twin_cache.nbytes
    return {
        "behind": start,
        "us": ours[1] * 1e6,
        "us_quartiles": [t * 1e6 for t in ours],
        "read_mb": read / 1e6,
        "floor_us": read / copy / 1e3,
        "of_floor": read / copy / 1e9 / ours[1],
        "twin_us": theirs * 1e6,
        "twin_floor_us": twin_read / copy / 1e3,
        "ratio": theirs / ours[1],
        "copy_gbs": copy,
        "launches": launches_of(engine, batch),
    }


def text_speed(engine: GpuEngine, ids: Tensor, new: int) -> Row:
    """Tokens per second of whole texts, the host's part included, greedy and drawn."""
    row: Row = {}
    for how, sampling in (("greedy", GREEDY), ("top_p", DEFAULTS)):
        for _ in range(2):  # the second one is warm
            stats = GenerationStats()
            list(generate(engine, ids, max_new_tokens=new, sampling=sampling, seed=0, stats=stats))
        row[f"{how}_tokens_per_s"] = stats.decode_rate
    return row


def launches_of(engine: GpuEngine, batch: int) -> int:
    """Kernels of one decoding step."""
    from bitnet.kernels.triton.language import record

    with record("ptx") as launches:
        cache = engine.new_cache(batch, 8)
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=engine.device)
        engine._forward(ids, cache.storage, None, None)
    return len(launches)


def unlike_eager(engine: GpuEngine, ids: Tensor, steps: int = 9) -> str:
    """What is wrong with the graphs of a step and of a prompt. Behind the prompt `ids` the step's logits must be the
    eager ones bit for bit and, at the median of its last `steps` positions, within 5 % of those of one prefill: a
    single one may lie on a rounding border. So must those that a prompt's graph gives for the same positions. Empty
    where nothing is. A speed is shown beside it."""
    steps = min(steps, ids.shape[1] - 1)
    ends = range(ids.shape[1] - steps, ids.shape[1])
    logits = []
    for graphs in (True, False):
        allowed, engine.graphs = engine.graphs, engine.graphs and graphs
        cache = engine.new_cache(len(ids), ids.shape[1])
        engine(ids[:, :-steps], cache, last_only=True)
        logits.append(torch.cat([engine(ids[:, i : i + 1], cache) for i in ends], 1))
        engine.graphs = allowed
    if not torch.equal(*logits):
        return "WRONG: the graph's logits are not the eager ones"
    whole = engine(ids)[:, -steps:]
    del cache
    prompts = [engine(ids[:, : i + 1], engine.new_cache(*ids.shape), last_only=True) for i in ends]
    for what, found in (("steps", logits[0]), ("prompts", torch.cat(prompts, 1))):
        error = float(((found - whole).norm(dim=(0, 2)) / whole.norm(dim=(0, 2))).median())
        if not error < 0.05:
            return f"WRONG: logits of {what} are {error:.0%} off those of one prefill"
    return ""


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
                engine = GpuEngine(config, random_tensors(config), device=options.device, dtype=name_of(options.dtype))
                cache = engine.new_cache(1, 4 if options.quick else BEHIND + 64)
                cache.length = 3 if options.quick else BEHIND
                engine(torch.ones(1, 1, dtype=torch.int64, device=options.device), cache)
            graph = cache.storage.graphs.get(1)
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
        graph = cache.storage.graphs[1]
        assert graph is not None
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
        models: dict[str, Any] = {
            "engine": GpuEngine(config, random_tensors(config), device=device, dtype=name_of(options.dtype)),
            "twin": float_twin(config, options.dtype, device),
        }
        for tokens in (8,) if options.quick else PROMPTS:
            if tokens > config.max_position_embeddings:
                continue
            log(f"prefill: {name}, {tokens} tokens")
            ids = torch.randint(config.vocab_size, (1, tokens), device=device)
            prompts = {which: [functools.partial(prompt, model, ids)] * 3 for which, model in models.items()}
            times = in_turn(prompts, device, graph=False, budget=0.1)
            row: Row = {
                "model": name,
                "tokens": tokens,
                "ms": times["engine"][1] * 1e3,
                "twin_ms": times["twin"][1] * 1e3,
            }
            row["ratio"] = row["twin_ms"] / row["ms"]
            row["line"] = (
                f"{name}, {tokens} tokens: {row['ms']:.2f} ms, bf16 twin {row['twin_ms']:.2f}: {row['ratio']:.2f}x"
            )
            yield row
        models.clear()


def prompt(model: Any, ids: Tensor) -> Tensor:
    """The logits behind a whole prompt, in a cache of its length."""
    logits: Tensor = model(ids, model.new_cache(*ids.shape), last_only=True)
    return logits


@torch.inference_mode()
def measure_long(options: Options) -> Iterator[Row]:
    """A decoding step behind many positions, cache filled with random numbers."""
    device = options.device
    name, config = next(iter(options.configs)), long_config(options)
    engines = [
        GpuEngine(config, random_tensors(config), device=device, dtype=name_of(options.dtype), cache_dtype=kind)
        for kind in LONG_CACHES
    ]
    for length, engine in itertools.product(_lengths(options), engines):
        cache = engine.new_cache(1, length)
        for part in (cache.storage.keys, cache.storage.values):
            part.copy_(torch.randn(part.shape, device=device))
        cache.length = length - 1
        engine(torch.ones(1, 1, dtype=torch.int64, device=device), cache)
        graph = cache.storage.graphs.get(1)
        step = in_turn({"step": [graph.replay if graph else (lambda: None)]}, device, graph=False)["step"][1]
        kind = name_of(engine.cache_dtype)
        row = {"model": name, "length": length, "cache": kind, "us": step * 1e6, "cache_mb": cache.nbytes / 1e6}
        yield row | {"line": f"{name} behind {length}: {step * 1e6:.0f} us, {row['cache_mb']:.0f} MB in {kind}"}


def _lengths(options: Options) -> tuple[int, ...]:
    return (16,) if options.quick else (4096, 16_384, 32_768)


def long_config(options: Options) -> ModelConfig:
    """The first preset, with as many positions as `measure_long` fills."""
    return next(iter(options.configs.values())).replace(max_position_embeddings=_lengths(options)[-1])
