"""MXFP4 and NVFP4: quantizing to 4-bit floats (E2M1), the rounding and the scales; bytes are GGUF's (`blocks/fp4.py`).

    MXFP4   w ~ 2^e v            32 weights share e                                  OCP Microscaling Formats 1.0
    NVFP4   w ~ t s v            16 weights share s (E4M3), a matrix t (float32)     NVIDIA Blackwell

v is 0, 0.5, 1, 1.5, 2, 3, 4 or 6, with a sign; what lies half-way takes the even one, as in the standard. The standards
leave the scale to the encoder: OCP suggests e = floor(log2(absmax)) - 2, which clips what is above 6, and NVIDIA
s = absmax / 6. Here the scale of least (weighted) squared error is taken, among the two exponents that can be best, or
among E4M3 values around absmax / 6. t = absmax / (6 * 448), so that the largest scale is E4M3's largest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.quant.blocks import READ_ONLY, fp4
from bitnet.quant.grouped import check_weight

GROUP = {"MXFP4": 32, "NVFP4": 16}
LARGEST, LARGEST_SCALE = 6.0, 448.0
SMALLEST_EXPONENT, LARGEST_EXPONENT = -127, 127


@dataclass(frozen=True)
class Scales:
    """Of the groups of a weight `[N, K]`: `values` float32 `[N, G]`, everything that multiplies v; `raw` uint8 `[N, G]`
    as they are stored; `tensor_scale`, which the stored ones lack."""

    values: Tensor
    raw: Tensor
    tensor_scale: float


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest value of E2M1, in float32, ties to the even one; beyond 6 it is 6."""
    size = x.abs()
    step = 0.5 * (1 + (size >= 2).float() + 2 * (size >= 4).float())  # between neighbours: 1/2, 1 or 2
    return (size / step).round_().mul_(step).clamp_(max=LARGEST).copysign_(x)


def codes_of(x: Tensor) -> Tensor:
    """Index into `blocks.fp4.VALUES` of the nearest value, uint8."""
    index = torch.bucketize(round_e2m1(x).abs(), torch.tensor(fp4.VALUES[:8], device=x.device))
    return (index + 8 * ((x < 0) & (index > 0))).to(torch.uint8)


def tensor_scale(weight: Tensor, kind: str) -> float:
    """t of a weight: 1 in MXFP4, which has none."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    return largest / (LARGEST * LARGEST_SCALE) or 1.0 if kind == "NVFP4" else 1.0


def choose_scales(weight: Tensor, kind: str, of_tensor: float, importance: Tensor | None = None) -> Scales:
    """Scales of least squared error, each column's weighed by `importance` `[K]` where it is given.

    weight: float32 `[N, K]`. Raises ValueError for a K that the format's blocks do not divide.
    """
    size = READ_ONLY[kind].block_size
    if weight.shape[1] % size:
        raise ValueError(f"{kind} has blocks of {size}, which do not divide {weight.shape[1]} input channels")
    groups = weight.view(len(weight), -1, GROUP[kind])
    weighs = torch.ones_like(groups[0]) if importance is None else importance.float().view(groups.shape[1:])
    absmax = groups.abs().amax(-1)
    unit = torch.where(absmax > 0, absmax, 1.0)  # so that no square overflows
    best = torch.full_like(absmax, torch.inf)
    values, raw = torch.zeros_like(absmax), torch.zeros_like(absmax, dtype=torch.uint8)
    for candidate, stored in _candidates(absmax, kind, of_tensor):
        divisor = torch.where(candidate > 0, candidate, 1.0)[..., None]
        error = (round_e2m1(groups / divisor) * (candidate / unit)[..., None] - groups / unit[..., None]).square_()
        total = torch.einsum("ngs,gs->ng", error, weighs)
        better = total < best
        best = torch.where(better, total, best)
        values, raw = torch.where(better, candidate, values), torch.where(better, stored, raw)
    return Scales(values, raw, of_tensor)


def encode(weight: Tensor, scales: Scales, kind: str) -> Tensor:
    """Rows of blocks, uint8 `[N, row bytes]`, of a weight `[N, K]` rounded to nearest by these scales."""
    rows = len(weight)
    values = scales.values[..., None]
    codes = codes_of(weight.view(rows, -1, GROUP[kind]) / torch.where(values > 0, values, 1.0))
    codes = torch.where(values > 0, codes, 0).to(torch.uint8)
    # Byte j of a group has its weight j in the low bits and j + 16 (NVFP4: j + 8) in the high ones.
    low, high = codes.chunk(2, -1)
    packed = low | high << 4
    if kind == "MXFP4":
        return torch.cat([scales.raw[..., None], packed], -1).reshape(rows, -1)
    blocks = torch.cat([scales.raw.view(rows, -1, 4), packed.reshape(rows, -1, 32)], -1)
    return blocks.reshape(rows, -1)


def quantize_float4(weight: Tensor, kind: str, importance: Tensor | None = None) -> tuple[Tensor, float]:
    """Blocks uint8 `[N, row bytes]` of a weight `[N, K]` rounded to nearest, and the tensor scale.

    Raises ValueError for NaN or infinite weights and a K that the blocks do not divide.
    """
    weight = check_weight(weight)
    scales = choose_scales(weight, kind, tensor_scale(weight, kind), importance)
    return encode(weight, scales, kind), scales.tensor_scale


def _candidates(absmax: Tensor, kind: str, of_tensor: float) -> list[tuple[Tensor, Tensor]]:
    """Scales of groups and their stored bytes, `[N, G]` both."""
    if kind == "MXFP4":
        # frexp: absmax = m 2^e with m in [0.5, 1), so OCP's exponent is e - 3.
        exponents = torch.frexp(absmax.double()).exponent - 3
        found = []
        for exponent in (exponents, exponents + 1):
            exponent = exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT - 2)
            scale = torch.ldexp(torch.ones_like(absmax, dtype=torch.float64), exponent).float()
            found.append((scale, (exponent + 127).to(torch.uint8)))
        return found
    wanted = absmax / (LARGEST * of_tensor)
    found = []
    for factor in (1.0, *torch.linspace(0.7, 1.6, 19).tolist()):
        stored = (wanted * factor).clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn)
        found.append((stored.float() * of_tensor, stored.view(torch.uint8)))
    return found
