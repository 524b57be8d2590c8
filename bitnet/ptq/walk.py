"""Calibration: what the inputs of a model's projections look like, layer by layer.

`walk` carries the hidden states of the calibration text from one layer to the next and leaves it to its caller what to
collect and when to change the layer, so only one layer's statistics are in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from bitnet.console import progress_bar
from bitnet.model.transformer import BitNetForCausalLM, DecoderLayer, RMSNorm
from bitnet.quant.gptq import HessianSum

Stage = tuple[str, ...]
"""Names, inside a layer, of projections that share an input."""
STAGES: tuple[Stage, ...] = (  # in the order of the computation
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class Statistic(Protocol):
    """What is collected of a projection's input."""

    def update(self, x: Tensor) -> object:
        """Add inputs float `[.., K]`."""


S = TypeVar("S", bound=Statistic)


class Moments:
    """Of a projection's input: the Hessian and the mean magnitude of each channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.hessian = HessianSum(in_features, device)
        self.sum = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        self.hessian.update(x)
        self.sum += x.reshape(-1, x.shape[-1]).float().abs().sum(0)

    def magnitude(self) -> Tensor:
        """float32 `[K]`."""
        return (self.sum / self.hessian.tokens).float()


class SplitHessian:
    """Of a projection's input: the Hessian of the first four fifths of every sequence, and of the rest, held out."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.fitted, self.held_out = HessianSum(in_features, device), HessianSum(in_features, device)

    def update(self, x: Tensor) -> None:
        cut = x.shape[-2] - x.shape[-2] // 5
        self.fitted.update(x[..., :cut, :])
        if cut < x.shape[-2]:
            self.held_out.update(x[..., cut:, :])

    def matrix(self) -> Tensor:
        """Of all inputs, float32 `[K, K]`."""
        tokens = self.fitted.tokens + self.held_out.tokens
        return ((self.fitted.total + self.held_out.total) * (2 / tokens)).float()


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
        """float32 `[K]`."""
        return (self.sum / self.tokens).float()


class CalibratedLayer:
    """One layer, and the calibration inputs that reach it: hidden states float `[B, T, C]`, a batch each."""

    def __init__(self, layer: DecoderLayer, inputs: list[Tensor], cos: Tensor, sin: Tensor) -> None:
        self.layer, self.inputs = layer, inputs
        self.outputs: list[Tensor] = []
        self._cos, self._sin = cos, sin

    def forward(self, inputs: list[Tensor] | None = None) -> list[Tensor]:
        """What the layer, as it now is, makes of its inputs, or of others like them."""
        return [self.layer(hidden, self._cos, self._sin, None) for hidden in inputs or self.inputs]

    def forward_with(self, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """What the layer makes of hidden states with these weights in the place of its own, by their names."""
        return torch.func.functional_call(self.layer, weights, (hidden, self._cos, self._sin, None))

    def observe(self, stages: Sequence[Stage], statistic: Callable[[int, torch.device], S]) -> dict[Stage, S]:
        """Send the inputs through the layer; returns what `statistic(in_features, device)` saw before each stage."""
        seen: dict[Stage, S] = {}
        hooks = []
        for names in stages:
            # The projections of a stage share their input: one of them is watched.
            first = projection(self.layer, names[0])
            seen[names] = statistic(first.in_features, self.inputs[0].device)
            update = seen[names].update
            hooks.append(first.register_forward_pre_hook(lambda _, args, update=update: update(args[0])))
        try:
            self.outputs = self.forward()
        finally:
            for hook in hooks:
                hook.remove()
        return seen


def walk(
    model: BitNetForCausalLM, ids: Tensor, title: str, batch_size: int, progress: bool, *, sequential: bool = True
) -> Iterator[CalibratedLayer]:
    """Each layer with its calibration inputs, from token ids int64 `[B, T]`.

    The next layer gets the output of this one as it was left, or with `sequential=False` as it was last observed.
    """
    decoder = model.model
    batches = ids.to(model.device).split(batch_size)
    hidden = [decoder.embed_tokens(batch) for batch in batches]
    cos, sin = decoder.cos[: ids.shape[1]], decoder.sin[: ids.shape[1]]
    for module in progress_bar(list(decoder.layers), title, enabled=progress, leave=False):
        assert isinstance(module, DecoderLayer)
        calibrated = CalibratedLayer(module, hidden, cos, sin)
        yield calibrated
        hidden = calibrated.forward() if sequential else calibrated.outputs


def fold(layer: DecoderLayer, names: Stage, scale: Tensor) -> bool:
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


def projection(root: nn.Module, name: str) -> nn.Linear:
    """The float layer of this name."""
    module = root.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is quantized already"
    return module
