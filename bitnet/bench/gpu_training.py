"""Training on a GPU: steps beside the float twin, a short run beside the CPU's, and the loss of its packed model."""

import itertools
import json
import pydoc_data.topics
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import kernels
from bitnet.bench.gpu_gate import QUICK_CONFIG
from bitnet.bench.gpu_timing import Options, Row, in_turn, log, name_of
from bitnet.files import write_atomic
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.model import PRESETS, BitNetForCausalLM, ModelConfig
from bitnet.training.compiling import compile_model
from bitnet.training.graphs import GraphedBackward
from bitnet.training.optimizer import OptimConfig, Optimizer, clip_gradients


def training_steps(
    config: ModelConfig, backend: str, compiled: str, options: Options, optimizer: str = "adamw"
) -> Iterator[Row]:
    """Milliseconds of forward, backward, clipping and optimizer, on a GPU with forward and backward as a CUDA graph
    and kernel by kernel."""
    device = options.device
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device(device):
        model = BitNetForCausalLM(config)
    update = Optimizer(model, OptimConfig(optimizer=optimizer))
    parameters = list(model.parameters())
    shape = (2, 16) if options.quick else (8, 1024)
    ids = torch.randint(config.vocab_size, shape, device=device)

    def backward(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(ids, ids)
        loss.backward()
        return loss.detach()

    with kernels.use_backend(backend):
        started = time.perf_counter()
        done = compile_model(model, compiled)
        graphed = GraphedBackward(backward, parameters) if device.type == "cuda" else None
        for graph in (True, False) if graphed else (False,):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)

            def step(graph: bool = graph) -> None:
                if graph:
                    assert graphed
                    graphed(None, True, ids)
                else:
                    backward(ids)
                clip_gradients(parameters, 1.0)
                update.step()

            for _ in range(1 if options.quick else 5):
                step()
            first, budget = time.perf_counter() - started, 0 if options.quick else 0.5
            low, middle, high = in_turn({"step": [step]}, device, graph=False, budget=budget)["step"]
            yield {
                "quantizer": config.quantizer,
                "backend": backend,
                "compiled": done,
                "graph": graph and graphed is not None and not graphed.refused,
                "optimizer": optimizer,
                "parameters_m": model.num_parameters() / 1e6,
                "tokens": ids.numel(),
                "ms": middle * 1e3,
                "ms_quartiles": [low * 1e3, high * 1e3],
                "start_s": first,
                "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
            }


def step_config(options: Options) -> ModelConfig:
    """Of the model whose steps are timed."""
    return QUICK_CONFIG if options.quick else PRESETS["125m"]


def measure_training(options: Options) -> Iterator[Row]:
    """A step of the 125m preset: the kernels, the reference and the float twin, compiled and not."""
    config = step_config(options)
    contenders = [("reference", "none"), ("reference", "ternary"), ("triton", "ternary")]
    for compiled, (backend, quantizer) in itertools.product(("off",) if options.quick else ("auto", "off"), contenders):
        log(f"training: {quantizer}, {backend}, compiled {compiled}")
        what = "float twin" if quantizer == "none" else f"{quantizer} by {backend}"
        for row in training_steps(config.replace(quantizer=quantizer), backend, compiled, options):
            yield row | {"line": _line(what, row)}


def measure_muon(options: Options) -> Iterator[Row]:
    """The same step with Muon."""
    for optimizer in ("adamw", "muon"):
        for row in training_steps(step_config(options), "reference", "off", options, optimizer):
            yield row | {"line": _line(optimizer, row)}


def _line(what: str, row: Row) -> str:
    how = ("compiled" if row["compiled"] else "eager") + (", as a graph" if row["graph"] else "")
    line = f"{what}, {how}: {row['ms']:.1f} ms a step, {row['tokens'] / row['ms'] * 1e3:.0f} tok/s"
    return line + (f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else "")


def documentation() -> Tensor:
    """The bytes of Python's own documentation, int64: text that every machine has."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def held_out(options: Options) -> Tensor:
    """Of it, windows that no run is trained on."""
    tokens, window = (64, 16) if options.quick else (32_768, 256)
    return documentation()[-100_000:][:tokens].view(-1, window)


CURVE_FILE = "losses_of_the_cpu.json"  # `gpu_visit.py` names the rows of a step after it, in the same folder


def curve_run(options: Options) -> tuple[ModelConfig, int, tuple[int, int]]:
    """The model of the short run, its steps, and the sequences and tokens of a batch."""
    if options.quick:
        return QUICK_CONFIG.replace(vocab_size=256), 3, (2, 16)
    return PRESETS["demo"].replace(vocab_size=256), 200, (16, 128)


def train(
    config: ModelConfig, device: torch.device, backend: str, dtype: torch.dtype, steps: int, shape: tuple[int, int]
) -> tuple[BitNetForCausalLM, list[float]]:
    """A short run from the same start on the same batches wherever it runs, and its losses."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(config).to(device)
    optimizer = Optimizer(model, OptimConfig(lr=2e-3, warmup_steps=10))
    text = documentation()[:-100_000]
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
    config, steps, shape = curve_run(options)
    losses = train(config, torch.device("cpu"), "reference", torch.float32, steps, shape)[1]
    options.work.mkdir(parents=True, exist_ok=True)
    write_atomic(options.work / CURVE_FILE, json.dumps(losses))
    yield {"losses": losses, "line": f"CPU: {losses[0]:.3f} to {statistics.mean(losses[-10:]):.3f}"}


def measure_curve(options: Options) -> Iterator[Row]:
    """Loss curves of the short run beside the CPU's: kernels and reference, float32 and bfloat16. `apart` is the mean
    distance to the CPU's over the second half."""
    config, steps, shape = curve_run(options)
    expected = json.loads((options.work / CURVE_FILE).read_text())
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
            "backend": backend,
            "dtype": name_of(dtype),
            "apart": apart,
            "last": ends[0],
            "losses": losses,
            "line": f"{backend}, {name_of(dtype)}: ends at {ends[0]:.3f} (CPU {ends[1]:.3f}), {apart:.4f} apart",
        }


@torch.inference_mode()
def measure_loss(options: Options) -> Iterator[Row]:
    """Held-out loss of a model that was just trained for 200 steps, packed: torch's reference and the engine."""
    device = options.device
    config, steps, shape = curve_run(options)
    with torch.inference_mode(False):
        model = train(config, device, "triton", torch.float32, steps, shape)[0]
    model = model.eval().pack()
    ids = held_out(options).to(device)

    def loss(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))

    with kernels.use_backend("reference"):
        expected = loss(model(ids))
    for dtype in ("float32",) if device.type == "cpu" else ("float32", "bfloat16"):
        engine = GpuEngine.from_model(model, device=device, dtype=dtype)
        found = loss(engine(ids))
        yield {
            "dtype": dtype,
            "loss": found,
            "reference": expected,
            "tokens": ids.numel(),
            "line": f"engine, {dtype}: {found:.5f} nats, reference {expected:.5f} ({found - expected:+.1e})",
        }
