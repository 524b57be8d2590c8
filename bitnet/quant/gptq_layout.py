"""Group-quantized weights, and the layout in which GPTQ checkpoints store them.

    weight[n, k] ~ (codes[n, k] - zero_point[n, g]) * scale[n, g]        g = g_idx[k]

Codes are unsigned, 0 to quant_max. In a checkpoint the matrix lies transposed and is cut into 32-bit words:

    qweight  int32 [K * bits / 32, N]    codes of 32 neighbours along K fill `bits` words
    qzeros   int32 [G, N * bits / 32]    zero points, 32 neighbours along N
    scales   float16 [G, N]
    g_idx    int32 [K]                   group of each input channel

The words are one little-endian stream of bits: code i of 32 takes bits `i * bits` to `i * bits + bits - 1`, bit b being
bit `b % 32` of word `b // 32`. For 2, 4 and 8 bits no code crosses a word; for 3 bits codes 10 and 21 do:

    word 0  | c10 (low 2) | c9 | .. | c1 | c0 |      word 1  | c21 (low 1) | c20 | .. | c11 | c10 (high 1) |
    word 2  | c31 | .. | c22 | c21 (high 2) |

Two conventions for zero points: version 1 (AutoGPTQ's default, "gptq") stores `zero_point - 1`, version 2 ("gptq_v2")
the zero point itself. A zero point of 0 does not fit version 1, where readers disagree about the wrap-around, so the
grids of this project never use it (`Grid`).
"""

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


def round_scale(scale: Tensor) -> Tensor:
    """A scale as float16 stores it, in float32; at least 2^-24. Raises ValueError where float16 overflows."""
    rounded = scale.half().float()
    if rounded.isinf().any():
        raise ValueError(f"a scale of {float(scale.max()):.3g} is too large for float16; rescale the weight")
    return rounded.clamp(min=SMALLEST_SCALE)


def min_max_qparams(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale, rounded to float16 and back, and zero point of groups float `[.., S]`: both float32 `[..]`.

    Asymmetric: the range of the group, widened to contain 0. Symmetric: `2 absmax / quant_max`, so that the absmax
    lies half a step outside the side that has one code less. Ternary: the mean absolute value.
    """
    if grid.ternary:
        return round_scale(groups.abs().mean(-1)), torch.ones_like(groups[..., 0])
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
    groups = weight.view(weight.shape[0], int(g_idx[-1]) + 1, -1)
    scale, zero = min_max_qparams(groups, grid)
    codes = (groups / scale[..., None]).round().add(zero[..., None]).clamp(0, grid.quant_max)
    return QuantizedWeight(codes.view_as(weight).to(torch.uint8), scale.half(), zero.to(torch.int32), g_idx, grid.bits)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers `[R, C]` below 2^bits as a stream of bits along dimension 0: int32 `[R * bits / 32, C]`.

    Raises ValueError where 32 words' worth of values does not come out even, or for a value out of range.
    """
    rows, columns = values.shape
    if rows * bits % 32:
        raise ValueError(f"{rows} values of {bits} bits do not fill 32-bit words; a GPTQ checkpoint cannot hold them")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**bits):
        raise ValueError(f"values span [{int(values.min())}, {int(values.max())}]; {bits} bits hold 0 to {2**bits - 1}")
    # A period is the fewest whole words that hold whole values: 1 word, or 3 for 3 bits.
    words = bits if bits == 3 else 1
    period = values.to(torch.int64).view(-1, 32 * words // bits, columns)
    packed = torch.zeros(len(period), words, columns, dtype=torch.int64, device=values.device)
    for i in range(period.shape[1]):
        word, offset = divmod(i * bits, 32)
        packed[:, word] |= period[:, i] << offset
        if offset + bits > 32:
            packed[:, word + 1] |= period[:, i] >> (32 - offset)
    low = packed & 0xFFFFFFFF  # then read as signed
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).view(-1, columns)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`: int32 `[R * bits / 32, C]` to uint8 `[R, C]`."""
    columns = words.shape[1]
    count = bits if bits == 3 else 1
    stream = (words.to(torch.int64) & 0xFFFFFFFF).view(-1, count, columns)
    values = torch.empty(len(stream), 32 * count // bits, columns, dtype=torch.uint8, device=words.device)
    for i in range(values.shape[1]):
        word, offset = divmod(i * bits, 32)
        value = stream[:, word] >> offset
        if offset + bits > 32:
            value |= stream[:, word + 1] << (32 - offset)
        values[:, i] = value & (2**bits - 1)
    return values.view(-1, columns)


def pack_gptq(weight: QuantizedWeight, version: int = 1) -> dict[str, Tensor]:
    """The four tensors of a checkpoint, drawn at the top of this file; scales are stored in float16.

    Raises ValueError for sizes that do not fill 32-bit words (K and N must be multiples of 32 for 3 bits, of 32 / bits
    otherwise), and for a zero point that the version cannot hold.
    """
    offset = _zero_offset(version)
    zeros = weight.zero_point - offset
    if int(zeros.min()) < 0:
        raise ValueError("a zero point of 0 does not fit version 1 of the layout; write version 2 (gptq_v2)")
    return {
        "qweight": pack_words(weight.codes.t(), weight.bits),
        "qzeros": pack_words(zeros, weight.bits).t().contiguous(),
        "scales": weight.scale.t().half().contiguous(),
        "g_idx": weight.g_idx.to(torch.int32),
    }


def unpack_gptq(tensors: dict[str, Tensor], bits: int, version: int = 1) -> QuantizedWeight:
    """Inverse of `pack_gptq`, float16 scales. Raises ValueError for tensors that do not fit together."""
    offset = _zero_offset(version)
    if bits not in GPTQ_BITS:
        raise ValueError(f"bits is {bits}; a GPTQ checkpoint has {', '.join(map(str, GPTQ_BITS))}")
    qweight, qzeros, scales, g_idx = (tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    columns, (groups, rows) = len(g_idx), scales.shape
    expected = [[columns * bits // 32, rows], [groups, rows * bits // 32]]
    if [list(qweight.shape), list(qzeros.shape)] != expected:
        raise ValueError(
            f"qweight {list(qweight.shape)} and qzeros {list(qzeros.shape)} are not {expected[0]} and {expected[1]} "
            f"of a {bits}-bit [{rows}, {columns}] weight in {groups} groups; is bits right?"
        )
    if columns and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(f"g_idx spans [{int(g_idx.min())}, {int(g_idx.max())}] and there are {groups} groups")
    zeros = unpack_words(qzeros.t(), bits).to(torch.int32) + offset
    return QuantizedWeight(unpack_words(qweight, bits).t().contiguous(), scales.t(), zeros, g_idx, bits)


def _zero_offset(version: int) -> int:
    if version not in (1, 2):
        raise ValueError(f"version is {version}; GPTQ checkpoints have version 1 (gptq) or 2 (gptq_v2)")
    return 2 - version
