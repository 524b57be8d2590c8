"""Models quantized after training: layers with static INT8 activations, and building a model from its description."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitnet import kernels
from bitnet.files import JsonObject
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.compound import AffineLinear, OutlierInt8Linear, ScaledBlockLinear, TritPlanesLinear
from bitnet.model.linear import PackedEmbedding, PackedLinear
from bitnet.model.weight_only import (
    BlockEmbedding,
    BlockLinear,
    FloatEmbedding,
    FloatLinear,
    GroupLinear,
    NF4Linear,
    StoredLayer,
    WeightOnlyLayer,
    empty_layer,
)
from bitnet.quant import PerChannel, integer_range, pack_codes, packed_width, quantize, quantize_symmetric, unpack_codes
from bitnet.quant.grouped import check_weight


class StaticInt8Linear(StoredLayer):
    """INT8 weights (a scale a row) times INT8 activations whose scale and zero point were calibrated and are stored.

        x_q = clamp(round(x / s_x) + z, -128, 127)        y = ((x_q @ w_q^T) - z sum_k w_q) s_x s_w + bias

    Buffers: `packed_weight` uint8 `[N, packed_width(K, 8)]`, `weight_scale` float32 `[N, 1]`, `weight_sum` int32 `[N]`,
    `activation_scale` float32 `[1]`, `activation_zero_point` int32 `[1]`.
    """

    packed_weight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    activation_scale: Tensor
    activation_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        kernels.check_columns(in_features, 8)
        self.nominal_bits = 8.0
        self.register_buffer(
            "packed_weight", torch.zeros(out_features, packed_width(in_features, 8), dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.ones(out_features, 1))
        self.register_buffer("weight_sum", torch.zeros(out_features, dtype=torch.int32))
        self.register_buffer("activation_scale", torch.ones(1))
        self.register_buffer("activation_zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scale: Tensor, zero_point: Tensor | None = None) -> "StaticInt8Linear":
        """Quantize the weight (absmax a row) and keep the activations' scale and zero point, one number each. Raises
        ValueError for a scale that is not above 0 or a zero point outside INT8."""
        scale = scale.detach().float().reshape(-1)
        zero = torch.zeros(1) if zero_point is None else zero_point.reshape(-1)
        if scale.numel() != 1 or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"the activations' scale is {scale.tolist()}; it must be one number above 0")
        if zero.numel() != 1 or not -128 <= int(zero) <= 127:
            raise ValueError(f"the activations' zero point is {zero.tolist()}; it must be one number, -128 to 127")
        layer = empty_layer(cls, linear)
        codes, layer.weight_scale = quantize_symmetric(check_weight(linear.weight), 8, PerChannel(0))
        layer.packed_weight = pack_codes(codes, 8)
        layer.weight_sum = codes.sum(1, dtype=torch.int32)
        device = linear.weight.device
        layer.activation_scale = scale.to(device, copy=True)
        layer.activation_zero_point = zero.to(device, torch.int32, copy=True)
        return layer

    def set_bias(self, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach().clone().float()

    def dequantize(self) -> Tensor:
        return unpack_codes(self.packed_weight, 8, self.in_features) * self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        zero = self.activation_zero_point
        codes = quantize(kernels.constant(x), self.activation_scale.view(shape), zero.view(shape), *integer_range(8))
        product = kernels.packed_matmul(codes, self.packed_weight, bits=8, in_features=self.in_features)
        # sum (x_q - z) w_q = sum x_q w_q - z sum w_q: the product stays an integer one of plain codes. What is left may
        # be twice as large as the product.
        if 2 * self.in_features > kernels.INT32_COLUMNS[8]:
            product = product.long()
        y = (product - zero * self.weight_sum).float() * self.activation_scale * self.weight_scale.view(-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def options(self) -> JsonObject:
        return {"bias": self.bias is not None}


_LAYERS = (
    FloatLinear, FloatEmbedding, GroupLinear, AffineLinear, NF4Linear, BlockLinear, BlockEmbedding, ScaledBlockLinear,
    TritPlanesLinear, StaticInt8Linear, OutlierInt8Linear,
)  # fmt: skip
KINDS: dict[str, type[StoredLayer]] = {layer.__name__: layer for layer in _LAYERS}


def bits_per_weight(module: nn.Module) -> tuple[float, float] | None:
    """Nominal and effective bits of a quantized module's weights, or None for any other."""
    if isinstance(module, StoredLayer):
        return module.bits_per_weight()
    if isinstance(module, PackedLinear):
        stored = module.packed_weight.nbytes + module.weight_scale.nbytes
        return float(module.bits), 8 * stored / (module.in_features * module.out_features)
    return None


def cache_weights(model: nn.Module, enabled: bool = True) -> None:
    """Let every weight-only layer of a model keep its dequantized weight between calls, or stop it."""
    for module in model.modules():
        if isinstance(module, WeightOnlyLayer):
            module.cache_weight = enabled


def describe(module: nn.Module) -> JsonObject | None:
    """Plain JSON about a quantized module, or None for any other."""
    if isinstance(module, StoredLayer):
        return module.description()
    if isinstance(module, PackedLinear):
        sizes = {"in_features": module.in_features, "out_features": module.out_features}
        return {"kind": "PackedLinear", **sizes, "bias": module.bias is not None, "quantizer": module.quantizer}
    if isinstance(module, PackedEmbedding):
        return {
            "kind": "PackedEmbedding",
            "num_embeddings": module.num_embeddings,
            "embedding_dim": module.embedding_dim,
        }
    return None


def build(description: JsonObject) -> nn.Module:
    """An empty module from its `describe`. Raises ValueError for a kind or options that do not exist."""
    options = dict(description)
    name = options.pop("kind", None)
    kinds: JsonObject = {**KINDS, "PackedLinear": PackedLinear, "PackedEmbedding": PackedEmbedding}
    if name not in kinds:
        raise ValueError(f"quantized layers of kind {name!r} are unknown; was this written by a newer version?")
    try:
        return kinds[name](**options)
    except TypeError as error:
        raise ValueError(f"a {name} cannot be built from {description}: {error}") from None


def describe_quantized(model: BitNetForCausalLM, method: str) -> JsonObject:
    """Plain JSON from which `build_quantized` makes the model's modules again: the method's name, and every quantized
    module under its name."""
    named = ((name, describe(module)) for name, module in model.named_modules())
    return {"method": method, "modules": {name: about for name, about in named if about is not None}}


def build_quantized(config: ModelConfig, description: JsonObject, tensors: Mapping[str, Tensor]) -> BitNetForCausalLM:
    """The model that `describe_quantized` described, of the state_dict that it had, which it shares. Raises ValueError
    for tensors and modules that do not fit."""
    with torch.device("meta"):
        modules = {name: build(about) for name, about in description["modules"].items()}
    return BitNetForCausalLM.from_tensors(config, tensors, modules)


def model_bits(model: nn.Module) -> tuple[float, float]:
    """Nominal and effective bits of a projection's weight, averaged over all of them; 32 where they are float32."""
    total, sums = 0, [0.0, 0.0]
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            size = module.in_features * module.out_features
            bits = bits_per_weight(module) or (8.0 * module.weight.element_size(),) * 2
            total += size
            sums = [s + b * size for s, b in zip(sums, bits, strict=True)]
    return sums[0] / total, sums[1] / total


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
