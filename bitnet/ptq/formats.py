"""Drivers of weights in other forms than integers of one group each: real minima, 4-bit floats, planes, 16-bit columns.

HQQ      integers with a scale and a real minimum        FP4        MXFP4 and NVFP4, by rounding to nearest
PTQTP    the sum of two ternary planes                   FP4GPTQ    the same by their effect on the output
OutlierInt8   LLM.int8(): INT8, outlier channels in 16 bits
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM
from bitnet.model.compound import AffineLinear, OutlierInt8Linear, ScaledBlockLinear, TritPlanesLinear
from bitnet.model.quantized import replace_module
from bitnet.model.weight_only import BlockLinear, empty_layer
from bitnet.ptq.drivers import GPTQ, Driver, Grouped, NamedLinears, Options
from bitnet.ptq.walk import STAGES, Maxima, SplitHessian, projection, walk
from bitnet.quant import float4
from bitnet.quant.blocks import READ_ONLY, dequantize_blocks
from bitnet.quant.gptq_levels import best_damping, fit_levels, sensitivity
from bitnet.quant.grouped import check_weight
from bitnet.quant.hqq import hqq_quantize
from bitnet.quant.trit_planes import quantize_planes


@dataclass(frozen=True)
class HQQ(Grouped):
    """Half-quadratic quantization."""

    def check(self, linears: NamedLinears, options: Options) -> None:
        refuse_symmetric("HQQ", options)
        super().check(linears, options)

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        return AffineLinear.from_quantized(hqq_quantize(linear.weight, self.bits, options.group_size), linear.bias)


@dataclass(frozen=True)
class PTQTP(Grouped):
    """Two ternary planes."""

    def check(self, linears: NamedLinears, options: Options) -> None:
        refuse_symmetric("PTQTP", options)
        super().check(linears, options)

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        return TritPlanesLinear.from_quantized(quantize_planes(linear.weight, options.group_size), linear.bias)


@dataclass(frozen=True)
class FP4(Driver):
    """MXFP4 or NVFP4, each value to the nearest."""

    kind: str

    def check(self, linears: NamedLinears, options: Options) -> None:
        check_float4(self.kind, linears)

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        return _float4_linear(linear, self.kind, *float4.quantize_float4(linear.weight, self.kind))


@dataclass(frozen=True)
class FP4GPTQ(GPTQ):
    """MXFP4 or NVFP4 by GPTQ. `bits` is that of a code."""

    heeds = frozenset[str]()
    kind: str = "MXFP4"

    def check(self, linears: NamedLinears, options: Options) -> None:
        check_float4(self.kind, linears)

    def settle(self, linears: list[nn.Linear], seen: SplitHessian, options: Options) -> tuple[Tensor | None, Any]:
        damping = options.damping
        if damping is None and seen.held_out.tokens:
            weight = torch.cat([linear.weight for linear in linears]).float()
            quantize = functools.partial(self._rounded, of_tensor=float4.tensor_scale(weight, self.kind))
            damping = best_damping(weight, seen.fitted.matrix(), seen.held_out.matrix(), quantize)
            return (None if damping is None else seen.matrix()), damping
        return seen.matrix(), 0.01 if damping is None else damping

    def fit(self, linear: nn.Linear, hessian: Tensor | None, damping: float | None, options: Options) -> nn.Module:
        weight = check_weight(linear.weight)
        of_tensor = float4.tensor_scale(weight, self.kind)
        if hessian is None or damping is None:
            return _float4_linear(linear, self.kind, *float4.quantize_float4(weight, self.kind))
        scales = float4.choose_scales(weight, self.kind, of_tensor, sensitivity(hessian, damping))
        rounded = _fit(weight, hessian, scales, self.kind, damping)
        return _float4_linear(linear, self.kind, float4.encode(rounded, scales, self.kind), of_tensor)

    def _rounded(self, rows: Tensor, hessian: Tensor, damping: float | None, of_tensor: float) -> Tensor:
        weighs = None if damping is None else sensitivity(hessian, damping)
        scales = float4.choose_scales(rows, self.kind, of_tensor, weighs)
        if damping is not None:
            return _fit(rows, hessian, scales, self.kind, damping)
        return dequantize_blocks(float4.encode(rows, scales, self.kind), self.kind) * of_tensor


@dataclass(frozen=True)
class OutlierInt8(Driver):
    """LLM.int8(), its outliers chosen on the float model."""

    family = "weights and activations"
    calibration = "required"
    heeds = frozenset({"outlier_threshold"})

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        assert ids is not None
        for step in walk(model, ids, title, options.batch_size, options.progress, sequential=False):
            for names, seen in step.observe(STAGES, Maxima).items():
                outliers = (seen.absmax > options.outlier_threshold).nonzero()[:, 0]
                for name in names:
                    linear = projection(step.layer, name)
                    replace_module(step.layer, name, OutlierInt8Linear.from_linear(linear, outliers))


def refuse_symmetric(what: str, options: Options) -> None:
    """Raise ValueError where no zero points are asked of a method that has nothing like it to leave out."""
    if options.symmetric:
        raise ValueError(f"{what} has no zero points to do without; leave --symmetric out, or take another method")


def check_float4(kind: str, linears: NamedLinears) -> None:
    """Raise ValueError for a projection that the blocks do not divide."""
    size = READ_ONLY[kind].block_size
    if odd := [name for name, linear in linears if linear.in_features % size]:
        raise ValueError(f"{kind} has blocks of {size}, which do not divide the input channels of {odd[0]}")


def _fit(weight: Tensor, hessian: Tensor, scales: float4.Scales, kind: str, damping: float) -> Tensor:
    values, group = scales.values.t().contiguous(), float4.GROUP[kind]

    def nearest(column: int, target: Tensor) -> Tensor:
        scale = values[column // group]
        return float4.round_e2m1(target / torch.where(scale > 0, scale, 1.0)) * scale

    return fit_levels(weight, hessian, nearest, damping)


def _float4_linear(linear: nn.Linear, kind: str, data: Tensor, of_tensor: float) -> BlockLinear:
    layer: BlockLinear
    if kind == "NVFP4":
        layer = scaled = empty_layer(ScaledBlockLinear, linear, block_type=kind)
        scaled.tensor_scale = torch.tensor([of_tensor], device=data.device)
    else:
        layer = empty_layer(BlockLinear, linear, block_type=kind)
    layer.data = data
    return layer
