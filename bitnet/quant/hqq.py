"""HQQ: half-quadratic quantization, without calibration (Badri and Shaji, Mobius Labs, 2023).

    minimize over z   |W - s (round(W / s + z) - z)|_p^p        p = 0.7, for each group of input channels

A norm below 1 lets few weights be far off, the outliers, and fits all others. The problem is split in two by E, which
stands for the error (half-quadratic splitting), with a penalty beta that grows by each turn:

    E = shrink(W - s (Q - z))       shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z = mean over the group of (Q - (W - E) / s)

The scale is that of the group's range, as published. z is real: what is stored is `minimum = -s z` in float16, and the
turn of least error of each group counts, so no group is worse than its range alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.quant.grouped import GPTQ_BITS, check_weight, group_index, round_scale

NORM, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20


@dataclass(frozen=True)
class AffineWeight:
    """A weight `[N, K]` in G groups of neighbours along K: `codes * scale + minimum`.

    codes uint8 `[N, K]` below 2^bits; scale, minimum float16 `[N, G]`.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        rows, groups = self.scale.shape
        codes = self.codes.view(rows, groups, -1).float()
        return (codes * self.scale.float()[..., None] + self.minimum.float()[..., None]).view(rows, -1)


def hqq_quantize(weight: Tensor, bits: int = 4, group_size: int = 64) -> AffineWeight:
    """Quantize a float weight `[N, K]`; group_size -1 is one group a row.

    Raises ValueError for other bits than 2, 3, 4 or 8, a group size that does not divide K, NaN or infinite weights and
    ones beyond float16.
    """
    if bits not in GPTQ_BITS:
        raise ValueError(f"bits is {bits}; HQQ takes {', '.join(map(str, GPTQ_BITS))}")
    weight = check_weight(weight)
    count = int(group_index(weight.shape[1], group_size)[-1]) + 1
    groups = weight.view(len(weight), count, weight.shape[1] // count)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    quant_max = 2**bits - 1
    scale = round_scale((high - low) / quant_max)
    best, least, beta = -low / scale, torch.full_like(scale, torch.inf), BETA
    zero = best
    for turn in range(TURNS + 1):
        error = groups - _round(groups, scale, zero, quant_max)
        size = error.abs().pow(NORM).sum(-1, keepdim=True)
        best, least = torch.where(size < least, zero, best), torch.minimum(size, least)
        if turn < TURNS:
            zero = step(groups, scale, zero, quant_max, beta)
            beta *= GROWTH
    minimum = (-best * scale).half()
    if minimum.isinf().any():
        raise ValueError(f"weights of {float(low.min()):.3g} are too large for float16; rescale the weight")
    codes = ((groups - minimum.float()) / scale).round().clamp(0, quant_max)
    return AffineWeight(codes.view_as(weight).to(torch.uint8), scale.half()[..., 0], minimum[..., 0], bits)


def step(groups: Tensor, scale: Tensor, zero: Tensor, quant_max: int, beta: float) -> Tensor:
    """One turn: the next zero point, float32 `[.., 1]`, of groups `[.., S]` with scale and zero point `[.., 1]`."""
    codes = (groups / scale + zero).round().clamp(0, quant_max)
    error = groups - (codes - zero) * scale
    size = error.abs()
    outliers = error.sign() * (size - size.pow(NORM - 1) / beta).clamp(min=0)
    return (codes - (groups - outliers) / scale).mean(-1, keepdim=True)


def _round(groups: Tensor, scale: Tensor, zero: Tensor, quant_max: int) -> Tensor:
    return ((groups / scale + zero).round().clamp(0, quant_max) - zero) * scale
