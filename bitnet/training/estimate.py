"""What a training run will take: tokens, memory, disk, FLOPs, and time on this machine, before anything is trained.

    FLOPs of a token     6 N + 6 L T Q        N parameters that a token is multiplied with: projections and head;
                                              attention is causal, so half of a window on average; `recompute` adds 1/3
                                              and a teacher a third of its own
    time of a step       products of the model's shapes, forward and two for the backward, timed on some rows each
                         + `TRAFFIC` times the activations kept, and 28 bytes a parameter, at the speed of a copy
                         + the products within Muon, at the speed of its step on one matrix

Memory is `bitnet/training/memory.py`'s. The time leaves out validation, checkpoints and compilation.

Letters: as there; N rows and K columns of a weight.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.console import duration, table
from bitnet.kernels import PACKED_BITS
from bitnet.machine import available_memory, has_compiler, pick_device, pick_dtype
from bitnet.model import ModelConfig, bit_linears
from bitnet.storage.safetensors import MODEL
from bitnet.storage.source import Source, open_source
from bitnet.training.config import PRESETS, TrainConfig
from bitnet.training.memory import (
    LAYER_STEP_TOKENS,
    PROCESS_PART,
    Estimate,
    adapter_parameters,
    estimate,
    head_activations,
    layer_activations,
    meta_model,
    projection_parameters,
)
from bitnet.training.optimizer import iteration_dtype, iteration_flops, orthogonalize
from bitnet.training.processes import World
from bitnet.training.sizes import SIZES
from bitnet.training.workload import Workload

ROWS, COLUMNS = 512, 8192
"""Tokens, and rows of a weight, that a timed product has at most."""
TRAFFIC = 6
"""Times that an activation kept for the backward is read or written by what stands around the products."""


@dataclass(frozen=True)
class Speed:
    """What was timed: seconds of a step in one process, by part."""

    products: float
    attention: float
    other: float
    optimizer: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.other + self.optimizer + self.teacher


def flops_per_token(config: ModelConfig, window: int, recompute: bool = False, rank: int = 0) -> int:
    """Forward and backward; what `recompute` does again is counted. With adapters of a `rank` no weight has a gradient
    but theirs."""
    if rank:
        return forward_flops(config, window) * (3 if recompute else 2) + 6 * adapter_parameters(config, rank)
    return forward_flops(config, window) * (4 if recompute else 3)


def forward_flops(config: ModelConfig, window: int) -> int:
    """Of a token."""
    model = meta_model(config)
    multiplied = sum(layer.weight.numel() for _, layer in bit_linears(model)) + model.head_weight.numel()
    queries = config.num_attention_heads * config.head_width
    return 2 * multiplied + 2 * config.num_hidden_layers * window * queries


def disk_bytes(config: ModelConfig, optimizer: str) -> int:
    """Of one checkpoint: float32 parameters and moments."""
    parts = estimate(Workload(config, 1, 1, optimizer=optimizer)).parts
    return int(parts["parameters"] + parts["optimizer moments"])


def seconds(function: Callable[[], object], device: torch.device, budget: float = 0.1) -> float:
    """The fastest of a few calls within about this much time, after one that does not count."""
    best, spent = float("inf"), 0.0
    function()
    while spent < budget:
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + max(took, 1e-4)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_seconds(
    N: int, K: int, tokens: int, work: Workload, device: torch.device, int8: bool, *, learns: bool = True
) -> float:
    """Seconds of the three products of a layer `[N, K]` and `tokens` tokens, from a few rows of each; of the forward
    one alone where the layer does not learn."""
    rows, columns = min(tokens, ROWS), min(N, COLUMNS)
    x, weight, grad = (
        torch.randn(s, dtype=work.dtype, device=device) for s in ((rows, K), (columns, K), (rows, columns))
    )

    def timed(a: Tensor, b: Tensor, of_codes: bool) -> float:
        if of_codes:
            a, b = a.to(torch.int8), b.to(torch.int8)
        return seconds(lambda: torch._int_mm(a, b) if of_codes else a @ b, device)

    forward = timed(x, weight.t(), int8)
    if not learns:
        return forward * (tokens / rows) * (N / columns)
    gradients = int8 and work.int8_gradients
    backward = timed(grad, weight, gradients)
    if not work.lora:
        backward += timed(grad.t(), x, gradients)
    return (forward * (2 if work.recompute else 1) + backward) * (tokens / rows) * (N / columns)


def attention_seconds(work: Workload, device: torch.device, *, learns: bool = True) -> float:
    """Seconds of attention over one sequence in one layer: forward, and backward where the layer learns."""
    c = work.model
    q, k, v = (
        torch.randn(1, heads, work.window, c.head_width, dtype=work.dtype, device=device, requires_grad=True)
        for heads in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    )
    # As the model calls it, so that the same kernel is timed.
    grouped = c.num_attention_heads != c.num_key_value_heads

    def run() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=work.window > 1, enable_gqa=grouped)
        if learns:
            torch.autograd.grad(out.sum(), (q, k, v))

    return seconds(run, device)


def time_shapes(work: Workload, device: torch.device) -> Speed:
    """Time products, attention and copies of this model's sizes for a few seconds; nothing is trained."""
    c, tokens = work.model, work.tokens * work.micro_batches
    model, shapes = meta_model(c), matrix_shapes(c)
    products = sum(n * product_seconds(N, K, tokens, work, device, work.int8) for (N, K), n in shapes.items())
    products += product_seconds(c.vocab_size, c.hidden_size, tokens, work, device, False)
    attention = attention_seconds(work, device) * (work.sequences * work.micro_batches * c.num_hidden_layers)

    source = torch.ones(1 << 24, device=device)  # 64 MB, beyond every cache that matters
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
    kept = c.num_hidden_layers * layer_activations(work) + head_activations(work)
    other = TRAFFIC * kept * work.micro_batches / bandwidth
    trained = adapter_parameters(c, work.lora) if work.lora else model.num_parameters()
    optimizer = 28 * trained / work.owners / bandwidth
    if work.optimizer == "muon":
        # One matrix gives the speed of the iteration; the model's own are counted in its FLOPs.
        dtype = iteration_dtype(device)
        matrix = torch.randn(512, 1024, dtype=dtype, device=device)
        took = seconds(lambda: orthogonalize(matrix), device)
        rate = iteration_flops(512, 1024, dtype) / took
        optimizer += sum(n * iteration_flops(*shape, dtype) for shape, n in shapes.items()) / rate
    return Speed(products, attention, other, optimizer, teacher_seconds(work, device))


def matrix_shapes(c: ModelConfig) -> Counter[tuple[int, int]]:
    """How many projections there are of each shape `(N, K)`."""
    return Counter({shape: n * c.num_hidden_layers for shape, n in Counter(c.projections().values()).items()})


def teacher_seconds(work: Workload, device: torch.device) -> float:
    """Seconds of a step in which the teacher runs forward, in float products."""
    if work.teacher is None:
        return 0.0
    c, tokens = work.teacher, work.tokens * work.micro_batches
    shapes = matrix_shapes(c) + Counter([(c.vocab_size, c.hidden_size)])
    products = sum(n * product_seconds(N, K, tokens, work, device, False, learns=False) for (N, K), n in shapes.items())
    attention = attention_seconds(replace(work, model=c), device, learns=False)
    return products + attention * work.sequences * work.micro_batches * c.num_hidden_layers


def start_seconds(work: Workload, device: torch.device) -> float:
    """Seconds of the layer-wise start: its steps, and its tokens four times forward, in float products."""
    step = replace(work, recompute=False)
    tokens = max(LAYER_STEP_TOKENS, work.window)
    seconds = 0.0
    for (N, K), n in matrix_shapes(work.model).items():
        learning = product_seconds(N, K, tokens, step, device, False)
        forward = product_seconds(N, K, work.layer_tokens, step, device, False, learns=False)
        seconds += n * (work.layer_steps * learning + 4 * forward)
    return seconds


def memory_warning(found: Estimate, work: Workload, device: torch.device, *, in_use: bool = False) -> str | None:
    """What to change where a process wants more memory than there is; None where it fits. `in_use` says that this
    process has its parameters already."""
    weights = found.parts["adapters"] + found.parts["frozen model"] if work.lora else found.parts["parameters"]
    held = weights + found.parts[PROCESS_PART] if in_use else 0.0
    if device.type == "cuda":
        free, name = float(torch.cuda.mem_get_info(device)[0]), "GPU memory"
    else:
        free, name = available_memory() / local_processes(work), "memory"
    wanted = found.total - held
    if wanted <= free:
        return None
    remedies = ["more --micro-batches"] if work.sequences > 1 else []
    remedies += [] if work.recompute else ["--recompute"]
    remedies += [] if work.loss_chunk else ["--loss-chunk 1024"]
    remedies += [] if work.strategy == "fsdp" else ["--parallel fsdp on several machines or GPUs"]
    advice = f"; {', '.join(remedies)} would lower it" if remedies else ""
    return f"a step needs about {found.total / 1e9:.1f} GB and {(free + held) / 1e9:.1f} GB of {name} are free{advice}"


def local_processes(work: Workload) -> int:
    """Processes that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", work.processes))


def report(work: Workload, device: torch.device, *, steps: int, minutes: float | None, checkpoints: int) -> str:
    """The estimate in lines. With `minutes`, the steps are those that fit into them."""
    c, found, speed = work.model, estimate(work), time_shapes(work, device)
    adapters = adapter_parameters(c, work.lora) if work.lora else 0
    parameters = adapters or meta_model(c).num_parameters()
    projections = c.num_hidden_layers * projection_parameters(c)
    if minutes:
        steps = max(1, int(minutes * 60 / speed.total))
    tokens_per_step = work.tokens * work.micro_batches * work.processes
    tokens = steps * tokens_per_step
    flops = flops_per_token(c, work.window, work.recompute, work.lora)
    flops += forward_flops(work.teacher, work.window) if work.teacher else 0
    disk = 12 * adapters or disk_bytes(c, work.optimizer)
    shares = ", ".join(
        f"{value / speed.total:.0%} {part}" for part, value in asdict(speed).items() if part != "teacher" or value
    )
    rate = flops * tokens_per_step / speed.total / work.processes
    lines = [
        f"parameters  {parameters:,} of adapters, on {projections:,} in frozen projections ({c.quantizer})"
        if adapters
        else f"parameters  {parameters:,}, of which {projections:,} in the projections ({c.quantizer})",
        f"tokens      {steps:,} steps of {tokens_per_step:,} = {tokens:,}, {tokens / parameters:.3g} a parameter",
        f"compute     {flops * tokens:.3g} FLOPs, {flops / 1e9:.3g} GFLOPs a token",
        f"memory      {found.total / 1e9:.2f} GB a process at its peak, which is at {found.moment}",
        found.table(),
        f"disk        {disk / 1e9:.2f} GB a checkpoint, up to {checkpoints} at once",
        f"time        about {duration(speed.total * steps)}: {speed.total:.3g} s a step, "
        f"{tokens_per_step / speed.total:,.0f} tokens/s, {rate / 1e9:,.0f} GFLOP/s a process ({shares}).",
        f"            An estimate from products timed alone on {device} ({torch.get_num_threads()} threads), without "
        f"validation, compilation{' and communication' if work.processes > 1 else ''}.",
    ]
    if work.layer_steps:
        lines.append(
            f"layers      about {duration(start_seconds(work, device))} before it, for {work.layer_steps} steps of "
            "each layer alone; finding codes is not counted."
        )
    warning = memory_warning(found, work, device)
    return "\n".join([*lines, *([f"warning: {warning}"] if warning else [])])


def estimate_run(config: TrainConfig, processes: int) -> str:
    """What a run would take, in lines; nothing is trained or written, and of a teacher the headers alone are read.
    Raises ValueError for no processes."""
    if processes < 1:
        raise ValueError(f"--estimate {processes}: give the number of processes, at least 1")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    strategy = "none" if processes == 1 else "ddp" if config.parallel == "auto" else config.parallel
    compiled = config.compile != "off" and has_compiler(device)
    teacher = open_source(config.teacher).config if config.teacher else None
    frozen = 0
    if config.init:
        source = open_source(config.init)
        if config.lora:
            config, frozen = replace(config, model=source.config), frozen_bytes(source)
        else:
            config = replace(config, model=source.config.replace(quantizer=config.model.quantizer))
    elif config.data.tokenizer or config.teacher:  # which decide on the vocabulary
        tokenizer = config.data.given_tokenizer() or open_source(str(config.teacher)).tokenizer
        config = replace(config, model=config.model.replace(vocab_size=tokenizer.vocab_size))
    config.check_window()
    world = World(0, processes, strategy)
    work = config.workload(device, dtype, world, compiled=compiled, teacher=teacher, frozen=frozen)
    return report(work, device, steps=config.steps, minutes=config.minutes, checkpoints=config.keep_last + 2)


def frozen_bytes(source: Source) -> int:
    """Bytes of a model as adapters stand on it: as it is stored, and latent floats of a few bits as their codes."""
    if source.kind in ("gguf", "packed", "quantized"):
        file = source.path if source.path.is_file() else source.path / MODEL
        return file.stat().st_size
    c = source.config
    projections = c.num_hidden_layers * projection_parameters(c)
    others = meta_model(c).num_parameters() - projections
    return 4 * others + projections * PACKED_BITS.get(c.quantizer, 32) // 8


def preset_table() -> str:
    """The presets in a table: what they train and what it takes. Time is that of the products alone, at the speed of
    one product here; nothing else is computed."""
    device = pick_device("auto")
    rows = [("preset", "parameters", "tokens", "memory", "time", "corpus")]
    rates: dict[tuple[torch.dtype, bool], float] = {}
    for name, config in (PRESETS | {f"--size {name}": each for name, each in SIZES.items()}).items():
        if config.model.replace(quantizer="ternary") == ModelConfig():
            rows.append(
                (name, "of --init", "", "", "", "of --data.chat" if name == "chat" else str(config.data.corpus))
            )
            continue
        dtype, compiled = pick_dtype(config.dtype, device), has_compiler(device)
        work = config.workload(device, dtype, World(), compiled=compiled)
        if (dtype, work.int8) not in rates:
            square = 2048
            took = product_seconds(square, square, ROWS, work, device, work.int8)
            rates[dtype, work.int8] = 6 * square * square * ROWS / took
        tokens = config.steps * config.tokens_per_step
        flops = tokens * flops_per_token(config.model, config.window, config.recompute)
        rows.append(
            (
                name,
                _rounded(meta_model(config.model).num_parameters()),
                _rounded(tokens),
                f"{estimate(work).total / 1e9:.1f} GB",
                duration(flops / rates[dtype, work.int8]),
                str(config.data.corpus),
            )
        )
    return (
        f"{table(rows, right=(1, 2, 3, 4))}\n\n"
        f"memory and time: of one process on {device} here, time of the matrix products alone; "
        "--preset NAME --estimate tells more"
    )


def _rounded(number: float) -> str:
    """4.5 M for 4,462,848."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
