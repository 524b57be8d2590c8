"""GGUF's ternary types: 256 weights in {-1, 0, 1} with one scale (float16 d), `d * (c - 1)`.

    TQ1_0   54 bytes:  48 bytes of 5 codes, 4 bytes of 4 codes, d        1.69 bits a weight
    TQ2_0   66 bytes:  64 bytes of 4 codes, d                            2.06 bits a weight

    TQ2_0, byte 32 g + j, g < 2     codes 128 g + j, + 32, + 64, + 96, two bits each, the first in the lowest

A byte of TQ1_0 is a fraction of 256: with n = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4 it holds ceil(256 n / 243), and the
next code is what overflows a byte when the fraction is multiplied by 3. Its codes are

    byte j < 32          codes j, 32 + j, 64 + j, 96 + j, 128 + j
    byte 32 + j, j < 16  codes 160 + j, 176 + j, .. 224 + j
    byte 48 + j, j < 4   codes 240 + j, 244 + j, 248 + j, 252 + j, then nothing: the fifth counts as 0

The code 3 of TQ2_0, which no ternary weight has, stands for 2 d. Sources: llama.cpp's ggml-common.h and ggml-quants.c.
"""

import torch
from torch import Tensor

from bitnet.quant.blocks import ggml_search, search
from bitnet.quant.blocks.layout import Fields, half_at, half_bytes, pack_bits, unpack_bits

BITS = {"TQ1_0": 2, "TQ2_0": 2}
BLOCK = 256
CHUNKS = ((0, 160, 5), (160, 240, 5), (240, 256, 4))  # first code, end, codes in a byte


def pack(fields: Fields, kind: str) -> Tensor:
    """Fields of B blocks to bytes `[B, bytes]`, drawn at the top of this file."""
    if kind == "TQ2_0":
        return torch.cat([pack_bits(fields.codes, 2, 32), half_bytes(fields.scale)], dim=1)
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
    parts, at = [], 0
    for first, end, count in CHUNKS:
        width = (end - first) // count
        fraction = raw[:, at : at + width].unsqueeze(1)
        powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8, device=raw.device).view(-1, 1)
        parts.append((((fraction * powers).to(torch.int16) * 3) >> 8).to(torch.uint8).flatten(1))  # the product wraps
        at += width
    return Fields(torch.cat(parts, dim=1), half_at(raw, 52))


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Bytes `[B, bytes]` to float32 `[B, 256]`."""
    fields = unpack(raw, kind)
    return (fields.codes.float() - 1) * fields.scale.float().unsqueeze(1)


def pack_tq1(codes: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Ternary codes int8 `[N, K]`, K a multiple of 256, to TQ1_0 rows uint8 `[N, K / 256 * 54]`, without a float
    between. `scale` is d, for all blocks or `[N, K / 256]`. Raises ValueError for other codes, shapes and scales."""
    return _pack_codes(codes, scale, "TQ1_0")


def pack_tq2(codes: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """As `pack_tq1`, to TQ2_0 rows uint8 `[N, K / 256 * 66]`."""
    return _pack_codes(codes, scale, "TQ2_0")


def unpack_tq1(data: Tensor) -> tuple[Tensor, Tensor]:
    """TQ1_0 rows to codes int8 `[N, K]` in {-1, 0, 1} and d float32 `[N, K / 256]`."""
    return _unpack_codes(data, "TQ1_0", 54)


def unpack_tq2(data: Tensor) -> tuple[Tensor, Tensor]:
    """TQ2_0 rows to codes int8 `[N, K]`, of which damaged or foreign files may have a 2, and d float32 `[N, K /
    256]`."""
    return _unpack_codes(data, "TQ2_0", 66)


def _pack_codes(codes: Tensor, scale: float | Tensor, kind: str) -> Tensor:
    if codes.dtype != torch.int8 or codes.ndim != 2 or codes.shape[1] % BLOCK:
        raise ValueError(
            f"codes must be int8 [N, K] with K a multiple of {BLOCK} for {kind}, got {codes.dtype} {list(codes.shape)}"
        )
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"codes span [{int(codes.min())}, {int(codes.max())}]; {kind} holds -1, 0 and 1")
    blocks = (codes.shape[0], codes.shape[1] // BLOCK)
    scales = torch.as_tensor(scale, dtype=torch.float32, device=codes.device)
    if scales.numel() != 1 and scales.shape != blocks:
        raise ValueError(f"scale has shape {list(scales.shape)}; give one number or {list(blocks)}")
    half = scales.to(torch.float16)
    if not half.isfinite().all():
        raise ValueError(
            f"scale {float(scales.abs().max())} does not fit into float16; store 1.0 and keep it elsewhere"
        )
    fields = Fields((codes + 1).view(torch.uint8).reshape(-1, BLOCK), half.expand(blocks).reshape(-1))
    return pack(fields, kind).view(codes.shape[0], -1)


def _unpack_codes(data: Tensor, kind: str, size: int) -> tuple[Tensor, Tensor]:
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] % size:
        raise ValueError(f"{kind} rows must be uint8 [N, blocks * {size}], got {data.dtype} {list(data.shape)}")
    fields = unpack(data.reshape(-1, size), kind)
    codes = fields.codes.view(torch.int8).sub(1).view(len(data), -1)
    return codes, fields.scale.float().view(len(data), -1)


def quantize(
    blocks: Tensor, kind: str, importance: Tensor | None, sigma2: Tensor | None, *, compatible: bool = False
) -> Fields:
    """Fields of blocks float32 `[B, 256]`. ggml takes the largest magnitude as d, which suits weights that are ternary
    already; the default finds the best d for any."""
    x = blocks.t().contiguous()
    scale = x.abs().amax(dim=0)
    codes = ggml_search.round_away(x * ggml_search.inverse(scale)) + 1
    fields = Fields(codes.t().to(torch.uint8).contiguous(), ggml_search.to_half(scale))
    if compatible:
        return fields
    weight = torch.ones_like(x) if importance is None else importance.t().contiguous()
    mean = ggml_search.total(x.abs()) / BLOCK
    return search.improve_scale(
        x, weight, [scale, *(mean * start for start in search.TERNARY_STARTS)], -1, 1, 1, fields
    )
