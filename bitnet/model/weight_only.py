"""Layers for inference on weights that were quantized after training.

    FloatLinear       float16, bfloat16, or FP8 E4M3 with a scale a row
    GroupLinear       2 to 8 bits a weight, in the layout of GPTQ checkpoints (`bitnet/quant/grouped.py`)
    BlockLinear       the blocks of a GGUF type (`bitnet/quant/blocks`)
    NF4Linear         4-bit NormalFloat (`bitnet/quant/nf4.py`)
    StaticInt8Linear  INT8 weights and activations, the activations' scale stored: an integer product

All but the last quantize the weight only: the product is `F.linear` with the dequantized weight in x's dtype. Each has
`weight_bytes()` and `bits_per_weight()`, and a `description()` of plain JSON from which `build()` makes an empty one to
load a state_dict into. W8A8 and W4A8 with a scale a token are `PackedLinear`.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet.files import JsonObject
from bitnet.kernels import blocks
from bitnet.model.linear import stray_dtypes
from bitnet.quant import packed_width
from bitnet.quant.blocks import row_bytes
from bitnet.quant.gptq_layout import pack_gptq, unpack_gptq
from bitnet.quant.grouped import GPTQ_BITS, QuantizedWeight, check_weight
from bitnet.quant.nf4 import SCALES_PER_BLOCK, DoubleQuantized, NF4Weight, dequantize_nf4, quantize_nf4

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
FP8_MAX = 448.0


class StoredLayer(nn.Module):
    """A weight `[N, K]` in buffers whose dtypes are a format, so they stay when the model is cast."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.nominal_bits = 32.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredLayer":
        # model.half() casts every float buffer. Here a dtype is part of the format, so such a cast is undone; the
        # device stays.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        args[-1].extend(stray_dtypes(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dequantize(self) -> Tensor:
        """The weight as it is stored, in float32 `[N, K]`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """`dequantize()`, for code that reads a Linear's or an Embedding's weight."""
        return self.dequantize()

    def options(self) -> JsonObject:
        """Arguments of `__init__` behind the two sizes."""
        return {}

    def description(self) -> JsonObject:
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


class WeightOnlyLayer(StoredLayer):
    """The product with the dequantized weight. `cache_weight` keeps that one in memory, for speed; it is not saved."""

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.cache_weight = False
        self._cached: tuple[tuple[object, ...], Tensor] | None = None
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def set_bias(self, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach().clone().float()

    def options(self) -> JsonObject:
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
        # A buffer may have been replaced, moved, or written in place. Inference tensors count no writes.
        key = (dtype, *((id(b), 0 if b.is_inference() else b._version, b.device) for b in buffers))
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self.dequantize().to(dtype))
        return self._cached[1]


class FloatLinear(WeightOnlyLayer):
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
        layer = empty_layer(cls, linear, dtype=dtype)
        weight = check_weight(linear.weight)
        if dtype == "float8":
            # float16's smallest normal: an all-zero row gets a scale too, and one without columns.
            layer.scale = (F.pad(weight.abs(), (0, 1)).amax(1, keepdim=True) / FP8_MAX).clamp(min=2.0**-14)
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

    def options(self) -> JsonObject:
        return {**super().options(), "dtype": self.dtype}


class GroupLinear(WeightOnlyLayer):
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
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        bits: int = 4,
        group_size: int = 128,
        version: int = 1,
        input_scale: bool = False,
        ternary: bool = False,
    ) -> None:
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
        cls,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        version: int = 1,
        input_scale: Tensor | None = None,
        ternary: bool = False,
    ) -> "GroupLinear":
        """Pack a quantized weight. Raises ValueError as `pack_gptq` does."""
        rows, columns = quantized.codes.shape
        groups = quantized.scale.shape[1]
        with torch.device("meta"):
            layer = cls(
                columns,
                rows,
                bits=quantized.bits,
                group_size=-1 if groups == 1 else columns // groups,
                version=version,
                ternary=ternary,
            )
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

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies its input by, float32 `[N, K]`."""
        return self.dequantize() if self.input_scale is None else self.dequantize() / self.input_scale

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.input_scale is None else (x / self.input_scale).to(x.dtype)

    def options(self) -> JsonObject:
        return {
            **super().options(),
            "bits": self.bits,
            "group_size": self.group_size,
            "version": self.version,
            "input_scale": self.input_scale is not None,
            "ternary": self.ternary,
        }


class NF4Linear(WeightOnlyLayer):
    """A weight in NF4 (`bitnet/quant/nf4.py`); with `double_quant` its scales are int8."""

    packed_weight: Tensor
    scale: Tensor
    scale_codes: Tensor
    scale_offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        block_size: int = 64,
        double_quant: bool = True,
    ) -> None:
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
        layer = empty_layer(cls, linear, block_size=block_size, double_quant=double_quant)
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

    def options(self) -> JsonObject:
        return {**super().options(), "block_size": self.block_size, "double_quant": self.double_quant}


class BlockLinear(WeightOnlyLayer):
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
        layer = empty_layer(cls, linear, block_type=block_type)
        layer.data = blocks.quantize(linear.weight.detach(), block_type, importance, compatible=compatible)
        return layer

    def dequantize(self) -> Tensor:
        return blocks.dequantize(self.data, self.block_type)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, float32 `[.., K]`."""
        return blocks.dequantize(self.data[ids.flatten()], self.block_type).view(*ids.shape, self.in_features)

    def options(self) -> JsonObject:
        return {**super().options(), "block_type": self.block_type}


class BlockEmbedding(BlockLinear):
    """An embedding table in GGUF blocks; `weight` serves as the output head."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


class FloatEmbedding(FloatLinear):
    """An embedding table in a shorter float; `weight` serves as the output head."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


def nominal_bits(kind: str) -> float:
    """Bits of a code in a GGUF type or mixture: the first digit of its name."""
    return float(re.findall(r"\d", kind)[0])


def empty_layer(cls: Any, linear: nn.Linear, **options: Any) -> Any:
    with torch.device("meta"):
        layer = cls(linear.in_features, linear.out_features, **options)
    layer.set_bias(linear.bias)
    return layer.train(linear.training)
