"""GGUF's ternary and binary types: one scale (float16 d) for a block of n weights, `d * (c - 1)` or `d * (2 c - 1)`.

    TQ1_0   n = 256,  54 bytes:  48 bytes of 5 codes, 4 bytes of 4 codes, d        1.69 bits a weight
    TQ2_0   n = 256,  66 bytes:  64 bytes of 4 codes, d                            2.06 bits a weight
    Q2_0    n = 64,   18 bytes:  d, 16 bytes of 4 codes                            2.25 bits a weight
    PQ2_0   n = 128,  34 bytes:  d, 32 bytes of 4 codes                            2.13 bits a weight
    Q1_0    n = 128,  18 bytes:  d, 16 bytes of 8 codes, 1 for d and 0 for -d      1.13 bits a weight

    TQ2_0, byte 32 g + j, g < 2     codes 128 g + j, + 32, + 64, + 96, two bits each, the first in the lowest
    Q2_0, PQ2_0, byte 2 + j         codes 4 j, 4 j + 1, 4 j + 2, 4 j + 3, likewise
    Q1_0, byte 2 + j                codes 8 j .. 8 j + 7, a bit each, likewise

A byte of TQ1_0 is a fraction of 256: with n = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4 it holds ceil(256 n / 243), and the
next code is what overflows a byte when the fraction is multiplied by 3. Its codes are

    byte j < 32          codes j, 32 + j, 64 + j, 96 + j, 128 + j
    byte 32 + j, j < 16  codes 160 + j, 176 + j, .. 224 + j
    byte 48 + j, j < 4   codes 240 + j, 244 + j, 248 + j, 252 + j, then nothing: the fifth counts as 0

The code 3 of two bits, which no ternary weight has, stands for 2 d. PQ2_0 is what PrismML's files called Q2_0 before
llama.cpp had one. Sources: llama.cpp's ggml-common.h and ggml-quants.c.
"""

import torch
from torch import Tensor

from bitnet.quant.blocks import ggml_search, search
from bitnet.quant.blocks.layout import Fields, half_at, half_bytes, pack_bits, unpack_bits

BITS = {"TQ1_0": 2, "TQ2_0": 2, "Q1_0": 1, "Q2_0": 2, "PQ2_0": 2}
SIZES = {"TQ1_0": (256, 54), "TQ2_0": (256, 66), "Q1_0": (128, 18), "Q2_0": (64, 18), "PQ2_0": (128, 34)}
CHUNKS = ((0, 160, 5), (160, 240, 5), (240, 256, 4))  # first code, end, codes in a byte


def pack(fields: Fields, kind: str) -> Tensor:
    """Fields of B blocks to bytes `[B, bytes]`, drawn at the top of this file."""
    if kind == "TQ2_0":
        return torch.cat([pack_bits(fields.codes, 2, 32), half_bytes(fields.scale)], dim=1)
    if kind != "TQ1_0":
        return torch.cat([half_bytes(fields.scale), pack_bits(fields.codes, BITS[kind], 1)], dim=1)
    parts = []
    for first, end, count in CHUNKS:
        digits = fields.codes[:, first:end].view(len(fields.codes), count, -1).to(torch.int32)
        number = sum(digits[:, i] * 3 ** (4 - i) for i in range(count))
        # Rounded up: rounded down, the digits that come back by multiplying with 3 would be too small.
        parts.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat([*parts, half_bytes(fields.scale)], dim=1)


def unpack(raw: Tensor, kind: str) -> Fields:
    """Inverse of `pack`."""
    if kind == "TQ2_0":
        return Fields(unpack_bits(raw[:, :64], 2, 32), half_at(raw, 64))
    if kind != "TQ1_0":
        return Fields(unpack_bits(raw[:, 2:], BITS[kind], 1), half_at(raw, 0))
    parts, at = [], 0
    for first, end, count in CHUNKS:
        width = (end - first) // count
        fraction = raw[:, at : at + width].unsqueeze(1)
        powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8, device=raw.device).view(-1, 1)
        parts.append((((fraction * powers).to(torch.int16) * 3) >> 8).to(torch.uint8).flatten(1))  # the product wraps
        at += width
    return Fields(torch.cat(parts, dim=1), half_at(raw, 52))


def values(codes: Tensor, kind: str) -> Tensor:
    """Codes as they are stored, as what they stand for, in units of d: float32."""
    return codes.float() * 2 - 1 if kind == "Q1_0" else codes.float() - 1


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Bytes `[B, bytes]` to float32 `[B, n]`."""
    fields = unpack(raw, kind)
    return values(fields.codes, kind) * fields.scale.float().unsqueeze(1)


def pack_rows(codes: Tensor, scale: float | Tensor, kind: str) -> Tensor:
    """Ternary codes int8 `[N, K]`, K a multiple of n, to rows uint8 `[N, K / n * bytes]`, without a float between.

    `scale` is d, for all blocks or `[N, K / n]`. Raises ValueError for codes that the type doesn't hold (Q1_0 has no
    0), other shapes, and scales that float16 doesn't hold.
    """
    size = SIZES[kind][0]
    if codes.dtype != torch.int8 or codes.ndim != 2 or codes.shape[1] % size:
        raise ValueError(
            f"codes must be int8 [N, K] with K a multiple of {size} for {kind}, got {codes.dtype} {list(codes.shape)}"
        )
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"codes span [{int(codes.min())}, {int(codes.max())}]; {kind} holds -1, 0 and 1")
    if kind == "Q1_0" and not codes.all():
        raise ValueError(f"{int((codes == 0).sum())} of {codes.numel()} codes are 0; Q1_0 holds -1 and 1, use Q2_0")
    blocks = (codes.shape[0], codes.shape[1] // size)
    scales = torch.as_tensor(scale, dtype=torch.float32, device=codes.device)
    if scales.numel() != 1 and scales.shape != blocks:
        raise ValueError(f"scale has shape {list(scales.shape)}; give one number or {list(blocks)}")
    half = scales.to(torch.float16)
    if not half.isfinite().all():
        raise ValueError(
            f"scale {float(scales.abs().max())} does not fit into float16; store 1.0 and keep it elsewhere"
        )
    stored = ((codes + 1) // 2 if kind == "Q1_0" else codes + 1).view(torch.uint8).reshape(-1, size)
    return pack(Fields(stored, half.expand(blocks).reshape(-1)), kind).view(codes.shape[0], -1)


def unpack_rows(data: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows to codes int8 `[N, K]`, of which damaged or foreign files may have a 2, and d float32 `[N, K / n]`."""
    size = SIZES[kind][1]
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] % size:
        raise ValueError(f"{kind} rows must be uint8 [N, blocks * {size}], got {data.dtype} {list(data.shape)}")
    fields = unpack(data.reshape(-1, size), kind)
    codes = values(fields.codes, kind).to(torch.int8)
    return codes.view(len(data), -1), fields.scale.float().view(len(data), -1)


def pack_tq1(codes: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """`pack_rows` of TQ1_0."""
    return pack_rows(codes, scale, "TQ1_0")


def pack_tq2(codes: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """`pack_rows` of TQ2_0."""
    return pack_rows(codes, scale, "TQ2_0")


def unpack_tq1(data: Tensor) -> tuple[Tensor, Tensor]:
    """`unpack_rows` of TQ1_0."""
    return unpack_rows(data, "TQ1_0")


def unpack_tq2(data: Tensor) -> tuple[Tensor, Tensor]:
    """`unpack_rows` of TQ2_0."""
    return unpack_rows(data, "TQ2_0")


def quantize(
    blocks: Tensor, kind: str, importance: Tensor | None, sigma2: Tensor | None, *, compatible: bool = False
) -> Fields:
    """Fields of blocks float32 `[B, n]`. ggml takes the largest magnitude as d, which suits weights that are ternary
    already, and for Q1_0 their mean; the default finds the best d for any. In Q2_0 and PQ2_0 it uses the code 3 as
    well, with a d of either sign."""
    x = blocks.t().contiguous()
    weight = torch.ones_like(x) if importance is None else importance.t().contiguous()
    mean = ggml_search.divide_by(ggml_search.total(x.abs()), len(x))
    if kind == "Q1_0":
        fields = _fields((x >= 0).float(), mean)
        return fields if compatible else search.improve_signs(x, weight, mean, fields)
    scale = x.abs().amax(dim=0)
    scaled = x * ggml_search.inverse(scale)
    codes = ggml_search.round_away(scaled) + 1
    if kind in ("Q2_0", "PQ2_0"):  # what is not finite becomes the smallest integer there, and then 0
        codes = torch.where(scaled.isfinite(), codes, 0.0)
    fields = _fields(codes, scale)
    if compatible:
        return fields
    if kind in ("Q2_0", "PQ2_0"):
        return search.improve_scale(x, weight, search.scale_starts(x, -1, 2, 0.5), -1, 2, 1, fields)
    starts = [scale, *(mean * start for start in search.TERNARY_STARTS)]
    return search.improve_scale(x, weight, starts, -1, 1, 1, fields)


def _fields(codes: Tensor, scale: Tensor) -> Fields:
    return Fields(codes.t().to(torch.uint8).contiguous(), ggml_search.to_half(scale))
