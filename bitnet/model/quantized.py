"""Layers for inference on weights that were quantized after training.

    FloatLinear       float16, bfloat16, or FP8 E4M3 with a scale a row
    GroupLinear       2 to 8 bits a weight, in the layout of GPTQ checkpoints (`bitnet/quant/gptq_layout.py`)
    BlockLinear       the blocks of a GGUF type (`bitnet/quant/blocks`)
    NF4Linear         4-bit NormalFloat (`bitnet/quant/nf4.py`)
    StaticInt8Linear  INT8 weights and activations, the activations' scale stored: an integer product

All but the last quantize the weight only: the product is `F.linear` with the dequantized weight in x's dtype. Each has
`weight_bytes()` and `bits_per_weight()`, and a `description()` of plain JSON from which `build()` makes an empty one to
load a state_dict into. W8A8 and W4A8 with a scale a token are `PackedLinear`.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet import kernels
from bitnet.kernels import blocks
from bitnet.model.linear import PackedEmbedding, PackedLinear
from bitnet.quant import PerChannel, integer_range, pack_codes, packed_width, quantize, quantize_symmetric, unpack_codes
from bitnet.quant.blocks import row_bytes
from bitnet.quant.gptq_layout import GPTQ_BITS, QuantizedWeight, check_weight, pack_gptq, unpack_gptq
from bitnet.quant.nf4 import SCALES_PER_BLOCK, DoubleQuantized, NF4Weight, dequantize_nf4, quantize_nf4

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
FP8_MAX = 448.0


class _Stored(nn.Module):
    """A weight `[N, K]` in buffers whose dtypes are a format, so they stay when the model is cast."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.nominal_bits = 32.0

    def _apply(self, fn: Any, recurse: bool = True) -> "_Stored":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def dequantize(self) -> Tensor:
        """The weight as it is stored, in float32 `[N, K]`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """`dequantize()`, for code that reads a Linear's or an Embedding's weight."""
        return self.dequantize()

    def options(self) -> dict[str, Any]:
        """Arguments of `__init__` behind the two sizes."""
        return {}

    def description(self) -> dict[str, Any]:
        """Plain JSON that `build` takes."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {"kind": type(self).__name__, **sizes, **self.options()}

    def weight_bytes(self) -> int:
        """Bytes of the weight as it is stored: codes, scales, everything but a bias."""
        return sum(buffer.nbytes for name, buffer in self.named_buffers() if name != "bias")

    def bits_per_weight(self) -> tuple[float, float]:
        """Nominal (of a code) and effective (with its scales, zero points and padding)."""
        return self.nominal_bits, 8 * self.weight_bytes() / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.description().items() if name != "kind")


class _WeightOnly(_Stored):
    """The product with the dequantized weight. `cache_weight` keeps that one in memory, for speed; it is not saved."""

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.cache_weight = False
        self._cached: tuple[tuple[Any, ...], Tensor] | None = None
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def set_bias(self, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach().clone().float()

    def options(self) -> dict[str, Any]:
        return {"bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self._scaled(x), self._weight_in(x.dtype), bias)

    def _scaled(self, x: Tensor) -> Tensor:
        return x

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        if not self.cache_weight:
            self._cached = None
            return self.dequantize().to(dtype)
        buffers = [buffer for buffer in self._buffers.values() if buffer is not None]
        key = (dtype, *((id(b), 0 if b.is_inference() else b._version, b.device) for b in buffers))
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self.dequantize().to(dtype))
        return self._cached[1]


class FloatLinear(_WeightOnly):
    """A weight in a shorter float. FP8 (E4M3) has a float32 scale a row, which maps the row's absmax to 448."""

    stored: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, dtype: str = "float16") -> None:
        super().__init__(in_features, out_features, bias)
        if dtype not in FLOATS:
            raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(FLOATS)}")
        self.dtype = dtype
        self.nominal_bits = 8.0 * FLOATS[dtype].itemsize
        self.register_buffer("stored", torch.zeros(out_features, in_features, dtype=FLOATS[dtype]))
        if dtype == "float8":
            self.register_buffer("scale", torch.ones(out_features, 1))

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: str) -> "FloatLinear":
        """Raises ValueError for NaN or infinite weights, and ones that float16 cannot hold."""
        layer = _empty(cls, linear, dtype=dtype)
        weight = check_weight(linear.weight)
        if dtype == "float8":
            # float16's smallest normal: an all-zero row gets a scale too.
            layer.scale = (weight.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=2.0**-14)
            weight = weight / layer.scale
        layer.stored = weight.to(FLOATS[dtype])
        if layer.stored.float().isinf().any():
            raise ValueError(f"a weight of {float(weight.abs().max()):.3g} overflows {dtype}; use bfloat16")
        return layer

    def dequantize(self) -> Tensor:
        weight = self.stored.float()
        return weight * self.scale if self.dtype == "float8" else weight

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, float32 `[.., K]`."""
        values = self.stored[ids].float()
        return values * self.scale[ids] if self.dtype == "float8" else values

    def options(self) -> dict[str, Any]:
        return {**super().options(), "dtype": self.dtype}


class GroupLinear(_WeightOnly):
    """A group-quantized weight in the buffers of a GPTQ checkpoint: qweight, qzeros, scales, g_idx.

    `version` is the convention for zero points. `input_scale` float32 `[K]`, where there is one, divides the input
    first: AWQ's factor for a layer behind which nothing can take it.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    input_scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, bits: int = 4, group_size: int = 128,
        version: int = 1, input_scale: bool = False, ternary: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias)
        if bits not in GPTQ_BITS:
            raise ValueError(f"bits is {bits}; choose one of {', '.join(map(str, GPTQ_BITS))}")
        self.bits, self.group_size, self.version, self.ternary = bits, group_size, version, ternary
        self.nominal_bits = float(bits)
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        self.register_buffer("qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
        self.register_buffer("input_scale", torch.ones(in_features) if input_scale else None)

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedWeight, bias: Tensor | None = None, *, version: int = 1,
        input_scale: Tensor | None = None, ternary: bool = False,
    ) -> "GroupLinear":  # fmt: skip
        """Pack a quantized weight. Raises ValueError as `pack_gptq` does."""
        rows, columns = quantized.codes.shape
        groups = quantized.scale.shape[1]
        with torch.device("meta"):
            layer = cls(
                columns, rows, bits=quantized.bits, group_size=-1 if groups == 1 else columns // groups,
                version=version, ternary=ternary,
            )  # fmt: skip
        for name, tensor in pack_gptq(quantized, version).items():
            setattr(layer, name, tensor)
        layer.input_scale = None if input_scale is None else input_scale.detach().float()
        layer.set_bias(bias)
        return layer

    def quantized(self) -> QuantizedWeight:
        """Codes, scales, zero points and groups."""
        tensors = {name: getattr(self, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        return unpack_gptq(tensors, self.bits, self.version)

    def dequantize(self) -> Tensor:
        """The weight without `input_scale`, which the input takes."""
        return self.quantized().dequantize()

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.input_scale is None else (x / self.input_scale).to(x.dtype)

    def options(self) -> dict[str, Any]:
        return {
            **super().options(), "bits": self.bits, "group_size": self.group_size, "version": self.version,
            "input_scale": self.input_scale is not None, "ternary": self.ternary,
        }  # fmt: skip


class NF4Linear(_WeightOnly):
    """A weight in NF4 (`bitnet/quant/nf4.py`); with `double_quant` its scales are int8."""

    packed_weight: Tensor
    scale: Tensor
    scale_codes: Tensor
    scale_offset: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, block_size: int = 64,
        double_quant: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.block_size, self.double_quant = block_size, double_quant
        self.nominal_bits = 4.0
        blocks = (out_features, in_features // block_size)
        self.register_buffer(
            "packed_weight", torch.zeros(out_features, packed_width(in_features, 4), dtype=torch.uint8)
        )
        if double_quant:
            self.register_buffer("scale_codes", torch.zeros(blocks, dtype=torch.int8))
            self.register_buffer("scale_offset", torch.zeros(()))
            self.register_buffer("scale", torch.zeros(-(-blocks[0] * blocks[1] // SCALES_PER_BLOCK)))
        else:
            self.register_buffer("scale", torch.zeros(blocks))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, block_size: int = 64, double_quant: bool = True) -> "NF4Linear":
        """Raises ValueError as `quantize_nf4` does."""
        quantized = quantize_nf4(linear.weight, block_size=block_size, double_quant=double_quant)
        layer = _empty(cls, linear, block_size=block_size, double_quant=double_quant)
        layer.packed_weight, scale = quantized.packed, quantized.scale
        if isinstance(scale, DoubleQuantized):
            layer.scale_codes, layer.scale, layer.scale_offset = scale.codes, scale.scale, scale.offset
        else:
            layer.scale = scale
        return layer

    def dequantize(self) -> Tensor:
        double = self.double_quant
        scale = DoubleQuantized(self.scale_codes, self.scale, self.scale_offset) if double else self.scale
        return dequantize_nf4(NF4Weight(self.packed_weight, scale, self.in_features, self.block_size))

    def options(self) -> dict[str, Any]:
        return {**super().options(), "block_size": self.block_size, "double_quant": self.double_quant}


class BlockLinear(_WeightOnly):
    """The rows of a GGUF tensor: `data` uint8 `[N, row_bytes]` of blocks of a type of `bitnet/quant/blocks`."""

    data: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, block_type: str = "Q4_0") -> None:
        super().__init__(in_features, out_features, bias)
        self.block_type = block_type
        width = row_bytes(in_features, block_type)
        self.nominal_bits = nominal_bits(block_type)
        self.register_buffer("data", torch.zeros(out_features, width, dtype=torch.uint8))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block_type: str, importance: Tensor | None = None, *, compatible: bool = False
    ) -> "BlockLinear":
        """Quantize, weighing the error of each column by `importance` `[K]` where it is given; `compatible` as ggml
        does. Raises ValueError as `bitnet.kernels.blocks.quantize` does."""
        layer = _empty(cls, linear, block_type=block_type)
        layer.data = blocks.quantize(linear.weight.detach(), block_type, importance, compatible=compatible)
        return layer

    def dequantize(self) -> Tensor:
        return blocks.dequantize(self.data, self.block_type)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, float32 `[.., K]`."""
        return blocks.dequantize(self.data[ids.flatten()], self.block_type).view(*ids.shape, self.in_features)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "block_type": self.block_type}


class BlockEmbedding(BlockLinear):
    """An embedding table in GGUF blocks; `weight` serves as the output head."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


class FloatEmbedding(FloatLinear):
    """An embedding table in a shorter float; `weight` serves as the output head."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


class StaticInt8Linear(_Stored):
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
        layer = _empty(cls, linear)
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
        codes = quantize(
            x.detach(), self.activation_scale.view(shape), zero.view(shape), *integer_range(8)
        )  # fmt: skip
        product = kernels.packed_matmul(codes, self.packed_weight, bits=8, in_features=self.in_features)
        y = (product - zero * self.weight_sum).float() * self.activation_scale * self.weight_scale.view(-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def options(self) -> dict[str, Any]:
        return {"bias": self.bias is not None}


_LAYERS = (FloatLinear, FloatEmbedding, GroupLinear, NF4Linear, BlockLinear, BlockEmbedding, StaticInt8Linear)
KINDS: dict[str, type[_Stored]] = {layer.__name__: layer for layer in _LAYERS}


def nominal_bits(kind: str) -> float:
    """Bits of a code in a GGUF type or mixture: the first digit of its name."""
    return float(re.findall(r"\d", kind)[0])


def bits_per_weight(module: nn.Module) -> tuple[float, float] | None:
    """Nominal and effective bits of a quantized module's weights, or None for any other."""
    if isinstance(module, _Stored):
        return module.bits_per_weight()
    if isinstance(module, PackedLinear):
        stored = module.packed_weight.nbytes + module.weight_scale.nbytes
        return float(module.bits), 8 * stored / (module.in_features * module.out_features)
    return None


def cache_weights(model: nn.Module, enabled: bool = True) -> None:
    """Let every weight-only layer of a model keep its dequantized weight between calls, or stop it."""
    for module in model.modules():
        if isinstance(module, _WeightOnly):
            module.cache_weight = enabled


def describe(module: nn.Module) -> dict[str, Any] | None:
    """Plain JSON about a quantized module, or None for any other."""
    if isinstance(module, _Stored):
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


def build(description: dict[str, Any]) -> nn.Module:
    """An empty module from its `describe`. Raises ValueError for a kind or options that do not exist."""
    options = dict(description)
    name = options.pop("kind", None)
    kinds: dict[str, Any] = {**KINDS, "PackedLinear": PackedLinear, "PackedEmbedding": PackedEmbedding}
    if name not in kinds:
        raise ValueError(f"quantized layers of kind {name!r} are unknown; was this written by a newer version?")
    try:
        return kinds[name](**options)
    except TypeError as error:
        raise ValueError(f"a {name} cannot be built from {description}: {error}") from None


def _empty(cls: Any, linear: nn.Linear, **options: Any) -> Any:
    with torch.device("meta"):
        layer = cls(linear.in_features, linear.out_features, **options)
    layer.set_bias(linear.bias)
    return layer.train(linear.training)
