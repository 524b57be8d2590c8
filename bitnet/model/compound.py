"""Layers of weights whose parts are stored apart, for inference on models that were quantized after training.

AffineLinear       codes in groups, each with a scale and a minimum that is no code (`bitnet/quant/hqq.py`)
ScaledBlockLinear  blocks of a GGUF type and one scale for the whole matrix: NVFP4 (`bitnet/quant/float4.py`)
TritPlanesLinear   the sum of two ternary planes (`bitnet/quant/trit_planes.py`)
OutlierInt8Linear  INT8 weights and activations, but for some input channels in 16 bits: LLM.int8()
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet import kernels
from bitnet.files import JsonObject
from bitnet.kernels import blocks
from bitnet.model.weight_only import BlockLinear, StoredLayer, WeightOnlyLayer, empty_layer
from bitnet.quant import PerChannel, pack_codes, packed_width, quantize_symmetric, unpack_codes
from bitnet.quant.gptq_layout import pack_words, unpack_words
from bitnet.quant.grouped import GPTQ_BITS, check_weight
from bitnet.quant.hqq import AffineWeight
from bitnet.quant.trit_planes import TritPlanes


class AffineLinear(WeightOnlyLayer):
    """A weight of `codes * scale + minimum` in groups of neighbours; the codes lie as in GPTQ checkpoints."""

    qweight: Tensor
    scale: Tensor
    minimum: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, bits: int = 4, group_size: int = 64
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if bits not in GPTQ_BITS:
            raise ValueError(f"bits is {bits}; choose one of {', '.join(map(str, GPTQ_BITS))}")
        self.bits, self.group_size = bits, group_size
        self.nominal_bits = float(bits)
        groups = 1 if group_size == -1 else in_features // group_size
        self.register_buffer("qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32))
        self.register_buffer("scale", torch.zeros(out_features, groups, dtype=torch.float16))
        self.register_buffer("minimum", torch.zeros(out_features, groups, dtype=torch.float16))

    @classmethod
    def from_quantized(cls, quantized: AffineWeight, bias: Tensor | None = None) -> "AffineLinear":
        """Raises ValueError for codes that do not fill 32-bit words."""
        (rows, columns), groups = quantized.codes.shape, quantized.scale.shape[1]
        with torch.device("meta"):
            layer = cls(columns, rows, bits=quantized.bits, group_size=-1 if groups == 1 else columns // groups)
        layer.qweight = pack_words(quantized.codes.t(), quantized.bits)
        layer.scale, layer.minimum = quantized.scale, quantized.minimum
        layer.set_bias(bias)
        return layer

    def quantized(self) -> AffineWeight:
        """Codes, scales and minima."""
        codes = unpack_words(self.qweight, self.bits).t().contiguous()
        return AffineWeight(codes, self.scale, self.minimum, self.bits)

    def dequantize(self) -> Tensor:
        return self.quantized().dequantize()

    def options(self) -> JsonObject:
        return {**super().options(), "bits": self.bits, "group_size": self.group_size}


class ScaledBlockLinear(BlockLinear):
    """GGUF blocks, and `tensor_scale` float32 `[1]` that multiplies all of them."""

    tensor_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, block_type: str = "NVFP4") -> None:
        super().__init__(in_features, out_features, bias, block_type=block_type)
        self.register_buffer("tensor_scale", torch.ones(1))

    def dequantize(self) -> Tensor:
        return blocks.dequantize(self.data, self.block_type) * self.tensor_scale

    def rows(self, ids: Tensor) -> Tensor:
        return super().rows(ids) * self.tensor_scale


class TritPlanesLinear(WeightOnlyLayer):
    """Two ternary planes: `qweight` int32 `[2, K / 16, N]`, trits plus 1 as codes of a GPTQ checkpoint; `scale` float16
    `[2, N, G]`."""

    qweight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, group_size: int = 128) -> None:
        super().__init__(in_features, out_features, bias)
        self.group_size = group_size
        self.nominal_bits = 4.0  # of two planes
        groups = 1 if group_size == -1 else in_features // group_size
        self.register_buffer("qweight", torch.zeros(2, in_features // 16, out_features, dtype=torch.int32))
        self.register_buffer("scale", torch.zeros(2, out_features, groups, dtype=torch.float16))

    @classmethod
    def from_quantized(cls, quantized: TritPlanes, bias: Tensor | None = None) -> "TritPlanesLinear":
        """Raises ValueError for a K that is no multiple of 16."""
        _, rows, columns = quantized.planes.shape
        groups = quantized.scale.shape[2]
        with torch.device("meta"):
            layer = cls(columns, rows, group_size=-1 if groups == 1 else columns // groups)
        layer.qweight = torch.stack([pack_words(plane.t() + 1, 2) for plane in quantized.planes])
        layer.scale = quantized.scale
        layer.set_bias(bias)
        return layer

    def quantized(self) -> TritPlanes:
        """Planes and scales."""
        planes = [unpack_words(plane, 2).t().to(torch.int8) - 1 for plane in self.qweight]
        return TritPlanes(torch.stack(planes), self.scale)

    def dequantize(self) -> Tensor:
        return self.quantized().dequantize()

    def options(self) -> JsonObject:
        return {**super().options(), "group_size": self.group_size}


class OutlierInt8Linear(StoredLayer):
    """LLM.int8() (arXiv 2208.07339): input channels with large values in 16 bits, all others in INT8.

        y = (x_q @ w_q^T) s_x s_w + x[outliers] @ W[:, outliers]^T + bias

    Activations have a scale a token, weights a scale a row, both by the absmax of the channels that are no outliers.
    The paper looks for outliers (values above 6) in each input anew; here they are chosen at calibration, so that their
    weights alone are kept in 16 bits. Buffers: `packed_weight` uint8 `[N, packed_width(K, 8)]`, 0 in the columns of
    outliers; `weight_scale` float32 `[N, 1]`; `outliers` int32 `[O]`, `outlier_weight` float16 `[N, O]`.
    """

    packed_weight: Tensor
    weight_scale: Tensor
    outliers: Tensor
    outlier_weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, outliers: int = 0) -> None:
        super().__init__(in_features, out_features)
        kernels.check_columns(in_features, 8)
        self.nominal_bits = 8.0
        width = packed_width(in_features, 8)
        self.register_buffer("packed_weight", torch.zeros(out_features, width, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(out_features, 1))
        self.register_buffer("outliers", torch.zeros(outliers, dtype=torch.int32))
        self.register_buffer("outlier_weight", torch.zeros(out_features, outliers, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, outliers: Tensor) -> "OutlierInt8Linear":
        """Quantize the weight but for the columns `outliers` (int64 `[O]`). Raises ValueError for NaN or infinite
        weights, and ones that float16 cannot hold."""
        layer = empty_layer(cls, linear, outliers=len(outliers))
        weight = check_weight(linear.weight).clone()
        layer.outliers, layer.outlier_weight = outliers.to(torch.int32), weight[:, outliers].half()
        if layer.outlier_weight.isinf().any():
            raise ValueError("a weight of an outlier channel overflows float16; use another method for this model")
        weight[:, outliers] = 0
        codes, layer.weight_scale = quantize_symmetric(weight, 8, PerChannel(0))
        layer.packed_weight = pack_codes(codes, 8)
        return layer

    def set_bias(self, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach().clone().float()

    def dequantize(self) -> Tensor:
        weight = unpack_codes(self.packed_weight, 8, self.in_features) * self.weight_scale
        weight[:, self.outliers.long()] = self.outlier_weight.float()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        outliers = self.outliers.long()
        rest = x.index_fill(-1, outliers, 0.0)
        y = kernels.packed_linear(
            rest, self.packed_weight, self.weight_scale, None, bits=8, in_features=self.in_features
        )
        y = y + F.linear(x[..., outliers], self.outlier_weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def options(self) -> JsonObject:
        return {"bias": self.bias is not None, "outliers": len(self.outliers)}
