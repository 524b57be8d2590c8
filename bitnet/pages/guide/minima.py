"""Wide against narrow minima, measured: the loss of a float model and of one that was trained quantized, along the line
between them, and along the way that rounding takes each."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet import kernels
from bitnet.console import progress_bar
from bitnet.evaluation.texts import held_out_windows, open_text
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.pages.guide.subject import own_text
from bitnet.storage.source import open_source

TINY = ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, quantizer="none",
)  # fmt: skip
QUANTIZER = "int4"
BATCH = 16
WINDOWS = 8
"""Of held-out text, that losses are measured on."""

Tensors = dict[str, Tensor]
Windows = Sequence[tuple[Tensor, Tensor]]
"""Pairs of ids and labels, int64 `[1, T]`."""


@dataclass(frozen=True)
class Curve:
    """Losses (nats a token) at positions."""

    at: list[float]
    plain: list[float]
    """Of the weights as they are."""
    rounded: list[float]
    """Of the weights after rounding; empty where the position is on the way to it."""


@dataclass(frozen=True)
class Minima:
    """What was measured; `what` says on which models."""

    what: str
    quantizer: str
    line: Curve
    """From the float weights (0) to those of quantization-aware training (1), and beyond both."""
    ways: dict[str, Curve]
    """Of each of the two: from its weights (0) to their rounded values (1), and as far to the other side."""

    def cost(self, name: str) -> float:
        """What rounding adds to the loss of one of the two, nats a token."""
        way = self.ways[name]
        return way.plain[way.at.index(1.0)] - way.plain[way.at.index(0.0)]


def measure_runs(model: Path, quantized: Path, points: int = 13) -> Minima:
    """Of two runs of one shape, on the held-out text of the first. Raises ValueError where the shapes differ, or the
    second was not trained quantized."""
    source, other = open_source(model), open_source(quantized)
    quantizer = other.config.quantizer
    if quantizer == "none":
        raise ValueError(f"{quantized} was trained in floats; give a run with --model.quantizer int4 as --qat")
    a, b = source.latent(), other.latent()
    if a.state_dict().keys() != b.state_dict().keys() or a.config.tensor_shapes() != b.config.tensor_shapes():
        raise ValueError(
            f"{quantized} has another shape than {model}; give two runs that differ in how they were trained"
        )
    feed = open_text(source)
    windows = held_out_windows(feed.mixture, feed.window, WINDOWS)
    return measure(a, b, windows, quantizer, f"{model} and {quantized}", points)


def measure_tiny(steps: int = 200, points: int = 21) -> Minima:
    """Of two tiny models that are trained here on the text of this package: one in floats for `steps` steps, from which
    two go on for as many, in floats and with 4-bit weights."""
    data = torch.tensor(list(own_text(400_000).encode("utf-8")))
    size = TINY.max_position_embeddings
    split = len(data) - WINDOWS * (size + 1) * 2
    held = data[split:]
    windows = [(part[None, :-1], part[None, 1:]) for part in held.split(size + 1) if len(part) == size + 1]
    torch.manual_seed(0)
    start = BitNetForCausalLM(TINY)
    with progress_bar(total=3 * steps, title="two tiny models", unit="step") as bar:

        def trained(model: BitNetForCausalLM, seed: int) -> BitNetForCausalLM:
            for loss in _losses(model, data[:split], steps, seed):
                loss.backward()
                bar.update(1)
            return model.eval()

        start = trained(start, 0)
        plain = trained(copy.deepcopy(start), 1)
        quantized = BitNetForCausalLM.from_tensors(TINY.replace(quantizer=QUANTIZER), _tensors(start))
        quantized = trained(quantized, 1)
    parameters = sum(parameter.numel() for parameter in start.parameters())
    what = f"two models of {parameters:,} parameters, trained here for {steps} + {steps} steps"
    return measure(plain, quantized, windows, QUANTIZER, what, points)


def _tensors(model: BitNetForCausalLM) -> Tensors:
    names = model.config.tensor_shapes()
    return {name: value.clone() for name, value in model.state_dict().items() if name in names}


def _losses(model: BitNetForCausalLM, data: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """The loss of each step, whose gradient the caller takes, and which then is applied."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator = torch.Generator().manual_seed(seed)
    size = model.config.max_position_embeddings
    for _ in range(steps):
        starts = torch.randint(len(data) - size - 1, (BATCH,), generator=generator)
        batch = torch.stack([data[i : i + size + 1] for i in starts.tolist()])
        optimizer.zero_grad()
        yield F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def measure(
    a: BitNetForCausalLM, b: BitNetForCausalLM, windows: Windows, quantizer: str, what: str, points: int = 21
) -> Minima:
    """The curves of a float model and one that was trained with this weight quantizer. Weights are rounded by it here;
    activations stay floats on both sides, so that the weights alone make the difference."""
    model = BitNetForCausalLM.from_tensors(a.config.replace(quantizer="none"), _tensors(a)).eval()
    projections = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "proj" in name]
    names = {f"{name}.weight" for name in projections}
    ends = [_tensors(a), _tensors(b)]
    ids, labels = (torch.cat(parts) for parts in zip(*windows, strict=True))

    def rounded(tensors: Tensors) -> Tensors:
        found = dict(tensors)
        for name in names:
            codes, scale = kernels.quantize_weight(tensors[name], quantizer)
            found[name] = codes * scale
        return found

    def loss(tensors: Tensors) -> float:
        model.load_state_dict(tensors, strict=False)
        return float(F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()))

    def between(first: Tensors, last: Tensors, t: float) -> Tensors:
        return {name: first[name] + t * (last[name] - first[name]) for name in first}

    positions = [round(-0.5 + 2 * i / (points - 1), 6) for i in range(points)]
    there_and_back = [round(-2 + 4 * i / (2 * ((points - 1) // 2)), 6) for i in range(2 * ((points - 1) // 2) + 1)]
    there_and_back = sorted({*there_and_back, 0.0, 1.0})
    with progress_bar(
        total=2 * (len(positions) + len(there_and_back)), title="losses along lines", unit="point"
    ) as bar:

        def counted(tensors: Callable[[float], Tensors], t: float) -> float:
            bar.update(1)
            return loss(tensors(t))

        along = functools.partial(between, ends[0], ends[1])
        line = Curve(
            positions,
            [counted(along, t) for t in positions],
            [counted(lambda t: rounded(along(t)), t) for t in positions],
        )
        ways = {}
        for name, end in zip(("float", "QAT"), ends, strict=True):
            way = functools.partial(between, end, rounded(end))
            ways[name] = Curve(there_and_back, [counted(way, t) for t in there_and_back], [])
    return Minima(what, quantizer, line, ways)
