"""Calibration: what the inputs of a model's projections look like, layer by layer.

`walk` carries the hidden states of the calibration text from one layer to the next and leaves it to its caller what to
collect and when to change the layer, so only one layer's statistics are in memory at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bitnet.model.transformer import BitNetForCausalLM, DecoderLayer, RMSNorm
from bitnet.quant.gptq import HessianSum

# Projections that share an input, in the order of the computation.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class Moments:
    """Of a projection's input: the Hessian and the mean magnitude of each channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.hessian = HessianSum(in_features, device)
        self.sum = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        self.hessian.update(x)
        self.sum += x.reshape(-1, x.shape[-1]).float().abs().sum(0)

    def magnitude(self) -> Tensor:
        return (self.sum / self.hessian.tokens).float()


class Maxima:
    """Of a projection's input: the largest magnitude of each channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.absmax = torch.zeros(in_features, device=device)

    def update(self, x: Tensor) -> None:
        self.absmax = torch.maximum(self.absmax, x.reshape(-1, x.shape[-1]).float().abs().amax(0))


class MeanSquares:
    """Of a projection's input: the mean square of each channel, llama.cpp's importance."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        self.sum += rows.square().sum(0)
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        return (self.sum / self.tokens).float()


def walk(
    model: BitNetForCausalLM, ids: Tensor, title: str, batch_size: int, progress: bool, *, sequential: bool = True
) -> Iterator[tuple[DecoderLayer, Callable[..., Any]]]:
    """Each layer, and a function `run(stages, statistic)` that feeds the calibration inputs through it and returns what
    `statistic(in_features, device)` saw before each stage.

    The next layer gets the output of this one as it was left, or with `sequential=False` as it was found.
    """
    decoder = model.model
    batches = ids.to(model.device).split(batch_size)
    hidden = [decoder.embed_tokens(batch) for batch in batches]
    cos, sin = decoder.cos[: ids.shape[1]], decoder.sin[: ids.shape[1]]
    for layer in progress_bar(list(decoder.layers), title, progress):
        outputs: list[Tensor] = []

        def forward(layer: nn.Module = layer, inputs: list[Tensor] = hidden) -> list[Tensor]:
            return [layer(h, cos, sin, None) for h in inputs]

        def run(
            stages: Any, statistic: Callable[[int, torch.device], Any], layer: nn.Module = layer,
            forward: Callable[[], list[Tensor]] = forward, outputs: list[Tensor] = outputs,
        ) -> dict[tuple[str, ...], Any]:  # fmt: skip
            seen, hooks = {}, []
            for names in stages:
                first = projection(layer, names[0])
                seen[names] = statistic(first.in_features, model.device)
                update = seen[names].update
                hooks.append(first.register_forward_pre_hook(lambda _, args, update=update: update(args[0])))
            try:
                outputs[:] = forward()
            finally:
                for hook in hooks:
                    hook.remove()
            return seen

        yield layer, run
        hidden = forward() if sequential else outputs


def fold(layer: DecoderLayer, names: tuple[str, ...], scale: Tensor) -> bool:
    """Divide what produces the input of these projections by the scale; returns whether there is something that can."""
    attention, mlp = layer.self_attn, layer.mlp
    norm, before = {
        "self_attn.q_proj": (layer.input_layernorm, None),
        "self_attn.o_proj": (attention.attn_sub_norm, attention.v_proj),
        "mlp.gate_proj": (layer.post_attention_layernorm, None),
        "mlp.down_proj": (mlp.ffn_sub_norm, mlp.up_proj),
    }[names[0]]
    if isinstance(norm, RMSNorm):
        norm.weight.div_(scale)
        return True
    if before is None or before.out_features != len(scale):  # several query heads share a row of v_proj
        return False
    before.weight.div_(scale[:, None])
    if before.bias is not None:
        before.bias.div_(scale)
    return True


def progress_bar(items: list[Any], title: str, enabled: bool) -> Any:
    """The items, with a bar of this title behind which nothing stays."""
    return tqdm(items, desc=title, leave=False, disable=not enabled)


def projection(layer: nn.Module, name: str) -> Any:
    """A submodule, untyped."""
    return layer.get_submodule(name)
