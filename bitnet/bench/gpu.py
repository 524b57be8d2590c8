"""Correctness and speed of the Triton kernels, the GPU engine and training on a GPU, beside bfloat16 twins.

    python benchmarks/gpu.py                  everything, to benchmarks/results/gpu_<device>.json
    bitnet bench --device cuda      the same, to the file that --json names
    python benchmarks/gpu.py --sections gate kernels --presets 700m

    gate       every kernel and the engine against the reference on the CPU, integers bit for bit; nothing is timed
               while one of them differs
    limits     GB/s of a copy of 1 GiB, read and written bytes counted
    kernels    the packed product beside cuBLAS in bfloat16 and torch._int_mm
    models     prefill and decoding of presets with random weights, beside a bfloat16 twin whose decoding step is in a
               CUDA graph too
    training   a step of the 125m preset: kernels, reference, bfloat16 twin
    curve      a short training run from one start on the CPU and on the GPU

Kernels run from one CUDA graph over as many copies of the weights as exceed the second-level cache, so no time is a
launch's and every weight comes from memory. Without a GPU, TRITON_INTERPRET=1 and `--device cpu --quick` only show
that the script runs.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import platform
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import kernels
from bitnet.bench.random_models import float_twin, random_tensors
from bitnet.console import stage
from bitnet.files import write_atomic
from bitnet.inference.generation import GenerationStats, SamplingConfig, generate
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.kernels import reference
from bitnet.machine import compile_model, pick_device
from bitnet.model import PRESETS, BitNetForCausalLM, ModelConfig, PackedLinear
from bitnet.quant import pack_codes, packed_width, quantize_ternary
from bitnet.training.optimizer import OptimConfig, Optimizer, clip_gradients

Row = dict[str, Any]
SECTIONS = ("gate", "limits", "kernels", "models", "training", "curve")
SHAPES = [(2560, 2560, 2), (3840, 2560, 2), (13824, 2560, 2), (2560, 6912, 2), (28672, 8192, 2), (128256, 2560, 8)]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GREEDY = SamplingConfig(temperature=0)
GATE_CONFIG = ModelConfig(
    vocab_size=300, hidden_size=160, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip
QUICK_CONFIG = GATE_CONFIG.replace(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1)


@dataclass(frozen=True)
class Options:
    """Correctness and speed on a GPU, beside bfloat16 twins."""

    device: str = "cuda"
    sections: tuple[str, ...] = SECTIONS
    presets: tuple[str, ...] = ("700m", "2b-4t")
    """Shapes of the models section."""
    json: Path | None = None
    """Where the results go; benchmarks/results/gpu_<device>.json unless given."""
    quick: bool = False
    """Tiny shapes, to see that everything works: the numbers are no measurements."""


# Gates: each yields what is wrong, as text


def check_activations(device: torch.device, quick: bool) -> Iterator[str]:
    """Codes, scale and row sums of every float type."""
    from bitnet.kernels.triton.activations import quantize_activations

    generator = torch.Generator().manual_seed(0)
    for M, K in [(1, 1), (7, 131), (3, 300)] if quick else [(1, 1), (7, 131), (129, 2560), (4, 6912), (2, 16384)]:
        x = torch.randn(M, K, generator=generator)
        x[0] = 0
        if K > 1:
            x[-1] = torch.arange(K) % 255 - 126.5  # ties
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            codes, scale, total = (part.cpu() for part in quantize_activations(x.to(dtype).to(device)))
            expected, expected_scale = reference.quantize_activations(x.to(dtype))
            same = torch.equal(codes[:, :K], expected) and torch.equal(scale, expected_scale.view(-1))
            if not same or not torch.equal(total, expected.sum(1, dtype=torch.int32)):
                yield f"activations of {M} x {K}, {dtype}: codes, scale or row sums differ from the reference"


def check_weights(device: torch.device, quick: bool) -> Iterator[str]:
    """Ternary codes for the kernel's own scale, which may differ from torch's in the last bits."""
    from bitnet.kernels.triton import weights

    for N, K in [(3, 7), (40, 333)] if quick else [(3, 7), (40, 333), (2560, 6912), (1000, 5000)]:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
        packed, scale = (part.cpu() for part in weights.quantize_ternary(weight.to(device)))
        codes = (weight / scale).round().clamp(-1, 1).to(torch.int8)
        if not torch.equal(packed, pack_codes(codes, 2)):
            yield f"ternary weights of {N} x {K}: the packed codes are not those of the scale"
        if abs(float(scale) / float(quantize_ternary(weight)[1]) - 1) > 1e-5:
            yield f"ternary weights of {N} x {K}: the scale is {float(scale)}, not the mean"
        if not torch.equal(weights.unpack(packed.to(device), 2, K).cpu()[:, :K], codes):
            yield f"unpacking {N} x {K}: other codes come back"
        if not torch.equal(weights.quantize_ternary(weight.to(device))[1].cpu(), scale):
            yield f"ternary weights of {N} x {K}: a second call gives another scale"


def check_products(device: torch.device, quick: bool) -> Iterator[str]:
    """Integer sums of every algorithm, and the whole backend function, in every width."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.activations import padded

    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 33, 131), (5, 40, 131)]
    if not quick:
        shapes += [
            *((M, 130, K) for M in (1, 2, 3, 4, 5, 17, 64, 65, 300) for K in (1, 128, 515, 2560)),
            (1, 2560, 6912), (40, 2560, 6912), (1030, 640, 2560), (2048, 1000, 515),
        ]  # fmt: skip
    for (M, N, K), (bits, low, high) in itertools.product(shapes, ((2, -1, 1), (4, -8, 7), (8, -128, 127))):
        x = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
        w = torch.randint(low, high + 1, (N, K), generator=generator, dtype=torch.int8)
        x[-1], w[0], w[-1] = -128, low, high  # the largest sums there can be
        expected = reference.integer_matmul(x, w, bits=bits)
        packed = pack_codes(w, bits).to(device)
        codes = F.pad(x, (0, padded(K) - K)).to(device)
        total, ones = x.sum(1, dtype=torch.int32).to(device), torch.ones(M, device=device)
        for algorithm in product.ALGORITHMS:
            if (algorithm in ("four_lanes", "select") and bits != 2) or (algorithm == "dot4" and M > 4):
                continue
            plan = product.choose(M, N, K, bits, device, algorithm)
            y = product.product(
                codes, ones, total, packed, ones[:1], bits=bits, in_features=K, dtype=torch.int32, plan=plan
            )
            if wrong := int((y.cpu() != expected).sum()):
                yield f"{algorithm}, {bits} bits, {M} x {N} x {K}: {wrong} of {M * N} sums differ from the reference"
        scale, bias = torch.rand(N, 1, generator=generator), torch.randn(N, generator=generator)
        floats = torch.randn(M, K, generator=generator)
        want = reference.packed_linear(floats, packed.cpu(), scale, bias, bits=bits, in_features=K)
        with kernels.use_backend("triton"):
            got = kernels.packed_linear(
                floats.to(device), packed, scale.to(device), bias.to(device), bits=bits, in_features=K
            )
        if not torch.equal(got.cpu(), want):
            yield f"packed_linear, {bits} bits, {M} x {N} x {K}: float32 results differ from the reference"


def check_training(device: torch.device, quick: bool) -> Iterator[str]:
    """Forward and gradients in two types: at most twice the error of the reference in the same type, plus 1e-5 or
    1e-2, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    for M, N, K in [(9, 11, 70)] if quick else [(9, 11, 70), (300, 640, 515), (2048, 512, 1536)]:
        for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            x, weight, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((M, K), (N, K), (M, N)))
            results: list[list[Tensor]] = []
            for where, kind, name in ((torch.device("cpu"), torch.float64, "reference"), (device, dtype, "reference"),
                                      (device, dtype, "triton")):  # fmt: skip
                mine = [tensor.to(where, kind, copy=True).requires_grad_() for tensor in (x, weight)]
                with kernels.use_backend(name):
                    y = kernels.fake_quant_linear(mine[0], mine[1], None, "ternary")
                y.backward(grad.to(where, kind))
                results.append(
                    [y.detach().cpu().double(), *(t.grad.cpu().double() for t in mine if t.grad is not None)]
                )
            for part, exact, theirs, ours in zip(("y", "grad_x", "grad_w"), *results, strict=True):
                largest = float(exact.abs().max())
                error, allowed = float((ours - exact).abs().max()), 2 * float((theirs - exact).abs().max())
                if not error <= allowed + atol * largest:
                    yield f"training, {dtype}, {M} x {N} x {K}: {part} is off by {error:.2e}, allowed {allowed:.2e}"


def check_engine(device: torch.device, quick: bool) -> Iterator[str]:
    """Logits of a prompt and of single tokens behind it, and greedy text. Engine and reference may round a value on a
    border to neighbouring codes, which moves logits by 0.5 %: of four models one must be free of that."""
    best, T = 1.0, 4 if quick else 71
    config = QUICK_CONFIG if quick else GATE_CONFIG
    for seed in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BitNetForCausalLM(config).eval().pack()
            ids = torch.randint(config.vocab_size, (2, T))
        with kernels.use_backend("reference"), torch.no_grad():
            expected = model(ids)
        engine = GpuEngine.from_model(model, device=device, dtype="float32")
        cache = engine.new_cache(2, T)
        pieces = [engine(piece.to(device), cache) for piece in ids.split([T - 2, 1, 1], 1)]
        errors = [float((y.cpu() - expected).norm() / expected.norm()) for y in (torch.cat(pieces, 1), engine(ids))]
        best = min(best, max(errors))
        if best < 1e-4:
            break
    else:
        yield f"engine, float32: logits are off by {best:.1e} (relative)"
    half = GpuEngine.from_model(model, device=device, dtype="bfloat16" if device.type == "cuda" else "float16")
    if not (error := float((half(ids).cpu() - expected).norm() / expected.norm())) < 0.05:
        yield f"engine, bfloat16: logits are off by {error:.1e} (relative)"
    arguments: dict[str, Any] = {"max_new_tokens": 2 if quick else 20, "sampling": GREEDY, "seed": 0}
    eager = GpuEngine.from_model(model, device=device, dtype="float32", graphs=False)
    texts = [torch.stack(list(generate(e, ids[:, :4], **arguments))) for e in (engine, eager)]
    if not torch.equal(*texts):
        yield "engine: the text from CUDA graphs is not the eager one"


def check_compile(device: torch.device, quick: bool) -> Iterator[str]:
    """A packed layer in one graph of torch.compile."""
    torch.manual_seed(0)
    layer = PackedLinear.from_linear(torch.nn.Linear(300, 40), "ternary").to(device)
    x = torch.randn(3, 300, device=device)
    with kernels.use_backend("triton"), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
        if not torch.equal(compiled(x), layer(x)):
            yield "torch.compile: a packed layer gives other numbers"


GATES = (check_activations, check_weights, check_products, check_training, check_engine, check_compile)


# Measurements


def seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, *, graph: bool = True, rounds: int = 7
) -> float:
    """Median seconds of one of the calls, which run one behind the other; on a GPU from a CUDA graph, unless told."""
    for call in calls:
        call()
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    torch.cuda.synchronize(device)
    captured = torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(captured):
            for call in calls:
                call()
    times = []
    for _ in range(rounds + 1):  # the first replay uploads the graph
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if graph:
            captured.replay()
        else:
            for call in calls:
                call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def measure_limits(device: torch.device, options: Options) -> list[Row]:
    size = 2**20 if options.quick else 2**30
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return [{"copy_gbs": 2 * size / seconds([lambda: target.copy_(source)] * 4, device) / 1e9}]


def measure_kernels(device: torch.device, options: Options, copy: float) -> Iterator[Row]:
    """Microseconds of products of M tokens, one row of results for every shape and M."""
    shapes = [(64, 256, 2)] if options.quick else SHAPES
    for (N, K, bits), M in itertools.product(shapes, (1, 5) if options.quick else TOKENS):
        if N > 100_000 and M > 16:
            continue  # a head is asked for the last position only
        stage(f"kernels: {N} x {K}, {bits} bits, {M} tokens")
        yield product_speed(M, N, K, bits, device, 1e3 if options.quick else 2.5e8, copy)


def product_speed(M: int, N: int, K: int, bits: int, device: torch.device, cold: float, copy: float) -> Row:
    """One row of results. The weights take at least `cold` bytes, in up to 128 copies; `copy` is the limit in GB/s."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.activations import quantize_activations

    def copies(make: Callable[[], Tensor]) -> list[Tensor]:
        first = make()
        return [first, *(first.clone() for _ in range(min(127, int(cold // first.nbytes))))]

    def time_of(function: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
        return seconds([functools.partial(function, w) for w in weights], device)

    x = torch.randn(M, K, dtype=torch.bfloat16 if device.type == "cuda" else torch.float16, device=device)
    width = packed_width(K, bits)
    packed = copies(lambda: torch.randint(0, 256, (N, width), dtype=torch.uint8, device=device))
    scale = torch.ones(1, device=device)
    codes, x_scale, total = quantize_activations(x)
    shared: dict[str, Any] = {"bits": bits, "in_features": K, "dtype": x.dtype}
    plan = product.choose(M, N, K, bits, device)
    ours = time_of(lambda p: product.product(codes, x_scale, total, p, scale, **shared), packed)
    quantized = time_of(lambda p: product.product(*quantize_activations(x), p, scale, **shared), packed)
    row: Row = {
        "rows": N, "columns": K, "bits": bits, "tokens": M, "algorithm": plan.algorithm, "us": ours * 1e6,
        "gbs": N * width / ours / 1e9, "of_copy": N * width / ours / 1e9 / copy,
        "tops": 2 * M * N * K / ours / 1e12, "quantized_us": quantized * 1e6,
    }  # fmt: skip
    for algorithm in ("four_lanes", "select") if M == 1 and bits == 2 else ():
        other = product.choose(M, N, K, bits, device, algorithm)
        call = functools.partial(product.product, codes, x_scale, total, w_scale=scale, plan=other, **shared)
        row[f"{algorithm}_us"] = time_of(lambda p: call(packed=p), packed) * 1e6  # noqa: B023
    del packed
    row["bf16_us"] = (
        time_of(lambda w: F.linear(x, w), copies(lambda: torch.randn(N, K, device=device).to(x.dtype))) * 1e6
    )
    row["bf16_ratio"] = row["bf16_us"] / row["us"]
    if M > 16 and device.type == "cuda":  # torch._int_mm takes no fewer
        x8 = codes[:, :K].contiguous()
        int8 = copies(lambda: torch.zeros(N, K, dtype=torch.int8, device=device))
        row["int_mm_us"] = time_of(lambda w: torch._int_mm(x8, w.t()), int8) * 1e6
    return row


def measure_models(device: torch.device, options: Options) -> Iterator[Row]:
    """Prefill and decoding of the engine and of its bfloat16 twin, batch 1."""
    for name in ("quick",) if options.quick else options.presets:
        config = QUICK_CONFIG if options.quick else PRESETS[name]
        new = 2 if options.quick else 64
        prompt = 8 if options.quick else min(2048, config.max_position_embeddings - new)
        ids = torch.randint(config.vocab_size, (1, prompt), device=device)
        stage(f"models: {name}, engine")
        row = {"model": name, "prompt": prompt, **engine_speed(config, ids, min(512, prompt), new)}
        stage(f"models: {name}, bfloat16 twin")
        row |= twin_speed(config, ids, min(512, prompt), new)
        row["decode_ratio"] = row["twin_decode_graph_us"] / row.get("decode_graph_us", row["decode_us"])
        row["prefill_ratio"] = row["twin_prefill_ms"] / row["prefill_ms"]
        yield row


def prefill_and_decode(model: Any, ids: Tensor, start: int, new: int) -> tuple[float, float, Any]:
    """Seconds of a prefill of ids `[1, T]` and of a step behind `start` tokens, and the cache of the latter."""
    full, cache = model.new_cache(1, ids.shape[1]), model.new_cache(1, start + new)

    def prefill() -> None:
        full.length = 0
        model(ids, full, last_only=True)

    def decode() -> None:
        cache.length = start
        for _ in range(new):
            model(ids[:, :1], cache, last_only=True)

    model(ids[:, :start], cache, last_only=True)
    times = [seconds([call], ids.device, graph=False) for call in (prefill, decode)]
    cache.length = start
    return times[0], times[1] / new, cache


@torch.inference_mode()
def engine_speed(config: ModelConfig, ids: Tensor, start: int, new: int) -> Row:
    dtype = "bfloat16" if ids.device.type == "cuda" else "float32"
    engine = GpuEngine(config, random_tensors(config), device=ids.device, dtype=dtype)
    prefill, decode, cache = prefill_and_decode(engine, ids, start, new)
    row: Row = {
        "weights_mb": engine.weight_bytes() / 1e6, "behind": start, "prefill_ms": prefill * 1e3,
        "decode_us": decode * 1e6,
    }  # fmt: skip
    if cache.storage.graph is not None:
        row["decode_graph_us"] = seconds([cache.storage.graph.replay] * 8, ids.device, graph=False) * 1e6
        row["gbs"] = (engine.weight_bytes() + cache.nbytes) / row["decode_graph_us"] / 1e3
    for _ in range(2):  # the second one is warm
        stats = GenerationStats()
        list(generate(engine, ids[:, :start], max_new_tokens=new, sampling=GREEDY, seed=0, stats=stats))
        row["generate_tokens_per_s"] = stats.decode_rate
    return row


@torch.inference_mode()
def twin_speed(config: ModelConfig, ids: Tensor, start: int, new: int) -> Row:
    twin = float_twin(config, torch.bfloat16).to(ids.device)
    prefill, decode, cache = prefill_and_decode(twin, ids, start, new)

    def step() -> None:
        cache.length = start
        twin(ids[:, :1], cache, last_only=True)

    graph = seconds([step], ids.device)
    return {"twin_prefill_ms": prefill * 1e3, "twin_decode_us": decode * 1e6, "twin_decode_graph_us": graph * 1e6}


def training_step(config: ModelConfig, backend: str, compiled: str, device: torch.device, options: Options) -> Row:
    """Milliseconds of forward, backward, clipping and optimizer."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device(device):
        model = BitNetForCausalLM(config)
    optimizer = Optimizer(model, OptimConfig())
    shape = (2, 16) if options.quick else (8, 1024)
    ids = torch.randint(config.vocab_size, shape, device=device)
    with kernels.use_backend(backend):
        done = compile_model(model, compiled)

        def step() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = model.loss(ids, ids)
            loss.backward()
            clip_gradients(list(model.parameters()), 1.0)
            optimizer.step()

        for _ in range(1 if options.quick else 3):
            step()
        elapsed = seconds([step], device, graph=False, rounds=1 if options.quick else 15)
    return {
        "quantizer": config.quantizer, "backend": backend, "compiled": done,
        "parameters_m": model.num_parameters() / 1e6, "tokens": ids.numel(), "ms": elapsed * 1e3,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }  # fmt: skip


def measure_training(device: torch.device, options: Options) -> Iterator[Row]:
    config = QUICK_CONFIG if options.quick else PRESETS["125m"]
    contenders = [("triton", "ternary"), ("reference", "ternary"), ("reference", "none")]
    for compiled, (backend, quantizer) in itertools.product(("off",) if options.quick else ("auto", "off"), contenders):
        stage(f"training: {quantizer}, {backend}, compiled {compiled}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield training_step(config.replace(quantizer=quantizer), backend, compiled, device, options)


def training_losses(
    config: ModelConfig, device: torch.device, backend: str, dtype: torch.dtype, steps: int, shape: tuple[int, int]
) -> list[float]:
    """Losses of a run on the bytes of Python's own documentation, the same start and batches wherever it runs."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(config).to(device)
    optimizer = Optimizer(model, OptimConfig(lr=2e-3, warmup_steps=10))
    text = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()), "utf-8"), dtype=torch.uint8).long()
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
        losses.append(float(loss.detach()))
    return losses


def measure_curve(device: torch.device, options: Options) -> Iterator[Row]:
    """Loss curves of one run: CPU reference, and kernels and reference on the GPU in float32 and bfloat16. `apart` is
    the mean distance to the CPU's curve over the second half."""
    config = (QUICK_CONFIG if options.quick else PRESETS["demo"]).replace(vocab_size=256)
    steps, shape = (3, (2, 16)) if options.quick else (200, (16, 128))
    runs = [("cpu", "reference", torch.float32), (device.type, "triton", torch.float32)]
    if device.type == "cuda":
        runs += [
            ("cuda", "reference", torch.float32),
            ("cuda", "triton", torch.bfloat16),
            ("cuda", "reference", torch.bfloat16),
        ]
    first: list[float] = []
    for where, backend, dtype in runs:
        stage(f"curve: {where}, {backend}, {dtype}")
        place = device if where == device.type else torch.device(where)
        losses = training_losses(config, place, backend, dtype, steps, shape)
        first = first or losses
        apart = statistics.mean(abs(a - b) for a, b in zip(losses[steps // 2 :], first[steps // 2 :], strict=True))
        yield {
            "device": where, "backend": backend, "dtype": str(dtype).removeprefix("torch."), "apart": apart,
            "last": statistics.mean(losses[-10:]), "losses": losses,
        }  # fmt: skip


def run(options: Options) -> int:
    """All sections, each written as soon as it is done; returns 1 where the gate is red."""
    device = pick_device(options.device)
    kernels.triton.require(device)
    for option, known in (("sections", SECTIONS), ("presets", tuple(PRESETS))):
        if unknown := set(getattr(options, option)) - set(known):
            raise ValueError(f"--{option} {' '.join(sorted(unknown))} is unknown; choose from {', '.join(known)}")
    from bitnet.kernels.triton.language import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    results: dict[str, Any] = {
        "device": name, "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "options": dataclasses.asdict(options),
    }  # fmt: skip
    path = options.json or Path("benchmarks") / "results" / f"gpu_{name.replace(' ', '_').replace('/', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(section: str, rows: Any) -> None:
        results[section] = rows
        text = json.dumps(results, default=str)
        rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
        write_atomic(path, json.dumps(rounded, indent=1) + "\n")

    wrong: list[str] = []
    for gate in GATES:  # always: a speed without correct numbers is none
        stage(f"gate: {gate.__name__}")
        wrong += gate(device, options.quick)
    keep("gate", wrong or "green")
    print("\n".join([f"gate {'RED, so no speed is measured' if wrong else 'green'}", *wrong]))
    if wrong:
        return 1
    limits = measure_limits(device, options)
    keep("limits", limits)
    print(f"copy {limits[0]['copy_gbs']:.0f} GB/s")
    sections: dict[str, Callable[[], Iterator[Row]]] = {
        "kernels": lambda: measure_kernels(device, options, limits[0]["copy_gbs"]),
        "models": lambda: measure_models(device, options),
        "training": lambda: measure_training(device, options),
        "curve": lambda: measure_curve(device, options),
    }
    for section, measure in sections.items():
        if section in options.sections:
            rows: list[Row] = []
            for row in measure():
                rows.append(row)
                keep(section, rows)
                print(section, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "losses"})
    print(f"written to {path}")
    return 0
