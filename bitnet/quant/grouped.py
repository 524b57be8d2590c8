"""Group-quantized weights: grids, codes with scales and zero points, and rounding to nearest."""

from dataclasses import dataclass

import torch
from torch import Tensor

GPTQ_BITS = (2, 3, 4, 8)
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class Grid:
    """The integers that a weight may become: codes 0 to `quant_max`, evenly spaced.

    `symmetric` fixes the zero point in the middle (2^(bits-1)); otherwise each group has its own, at least 1. `ternary`
    is {-1, 0, 1}: three codes of a 2-bit grid with zero point 1.
    """

    bits: int = 4
    symmetric: bool = False
    ternary: bool = False

    def __post_init__(self) -> None:
        if self.bits not in GPTQ_BITS:
            raise ValueError(f"bits is {self.bits}; a group-quantized weight has {', '.join(map(str, GPTQ_BITS))}")
        if self.ternary and (self.bits != 2 or not self.symmetric):
            raise ValueError("a ternary grid is stored in 2 bits and is symmetric; use TERNARY")

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return 2 if self.ternary else 2**self.bits - 1

    @property
    def middle(self) -> int:
        """Zero point of a symmetric grid."""
        return 1 if self.ternary else 2 ** (self.bits - 1)


TERNARY = Grid(2, symmetric=True, ternary=True)


@dataclass
class QuantizedWeight:
    """A weight `[N, K]` in G groups of input channels; `dequantize` is what it stands for.

    codes uint8 `[N, K]`, scale float16 or float32 `[N, G]`, zero_point int32 `[N, G]`, g_idx int32 `[K]`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    g_idx: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """The weight, float32 `[N, K]`."""
        group = self.g_idx.long()
        return (self.codes - self.zero_point[:, group]) * self.scale.float()[:, group]


def group_index(columns: int, group_size: int) -> Tensor:
    """g_idx of groups of neighbours: int32 `[columns]`; -1 puts all columns into one group. Raises ValueError for a
    size that does not divide them."""
    if columns < 1:
        raise ValueError("a weight without input channels has no groups; leave this layer as it is")
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise ValueError(f"group_size {group_size} does not divide {columns} input channels; choose a divisor or -1")
    return torch.arange(columns, dtype=torch.int32) // size


def check_weight(weight: Tensor) -> Tensor:
    """The weight in float32. Raises ValueError where it is not a finite float matrix."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float [N, K], got {weight.dtype} {list(weight.shape)}")
    weight = weight.detach().float()
    if weight.numel() and not all(end.isfinite() for end in weight.aminmax()):  # one pass; NaN would be both ends
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"the weight has {bad} values that are NaN or infinite; was the model's training diverging?")
    return weight


def half_scale(scale: Tensor) -> Tensor:
    """A scale in float16. Raises ValueError where that overflows."""
    half = scale.half()
    if half.isinf().any():
        raise ValueError(f"a scale of {float(scale.max()):.3g} is too large for float16; rescale the weight")
    return half


def round_scale(scale: Tensor) -> Tensor:
    """A scale as float16 stores it, in float32; at least 2^-24. Raises ValueError where float16 overflows."""
    return half_scale(scale).float().clamp(min=SMALLEST_SCALE)


def min_max_qparams(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale, rounded to float16 and back, and zero point of groups float `[.., S]`: both float32 `[..]`.

    Asymmetric: the range of the group, widened to contain 0. Symmetric: `2 absmax / quant_max`, so that the absmax
    lies half a step outside the side that has one code less. Ternary: the mean absolute value.
    """
    if grid.ternary:
        return round_scale(groups.abs().mean(-1)), torch.ones_like(groups[..., 0])
    # 0 lies in every range, so a weight of 0 stays 0.
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    return qparams_of_range(low, high, grid)


def qparams_of_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, as in `min_max_qparams`, of ranges with low <= 0 <= high."""
    if grid.symmetric:
        scale = round_scale(2 * torch.maximum(-low, high) / grid.quant_max)
        return scale, torch.full_like(scale, grid.middle)
    low = torch.minimum(low, -high / (grid.quant_max - 1))  # a group without negative weights: zero point 1, not 0
    scale = round_scale((high - low) / grid.quant_max)
    return scale, (-low / scale).round().clamp(1, grid.quant_max)


def round_to_nearest(weight: Tensor, grid: Grid, group_size: int = 128) -> QuantizedWeight:
    """Each weight to the nearest value of its group's `min_max_qparams`: the baseline without calibration.

    weight: float `[N, K]`; group_size -1 is one group a row. Raises ValueError for a group size that does not divide K
    and for NaN or infinite weights.
    """
    weight = check_weight(weight)
    g_idx = group_index(weight.shape[1], group_size).to(weight.device)
    count = int(g_idx[-1]) + 1
    groups = weight.view(weight.shape[0], count, weight.shape[1] // count)
    scale, zero = min_max_qparams(groups, grid)
    codes = (groups / scale[..., None]).round().add(zero[..., None]).clamp(0, grid.quant_max)
    return QuantizedWeight(codes.view_as(weight).to(torch.uint8), scale.half(), zero.to(torch.int32), g_idx, grid.bits)
