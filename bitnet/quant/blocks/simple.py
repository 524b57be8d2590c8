"""GGUF types with one level: 32 weights, one scale (float16 d), and for Q4_1 and Q5_1 a minimum (float16 m).

    Q4_0    d * (c - 8)          18 bytes:  d, 16 bytes of nibbles
    Q4_1    d * c + m            20 bytes:  d, m, 16 bytes of nibbles
    Q5_0    d * (c - 16)         22 bytes:  d, 4 bytes of fifth bits, 16 bytes of nibbles
    Q5_1    d * c + m            24 bytes:  d, m, 4 bytes of fifth bits, 16 bytes of nibbles
    Q8_0    d * q                34 bytes:  d, 32 x int8

    nibbles, byte j:  | c[16+j] & 15 | c[j] & 15 |        fifth bits, byte j:  | c[8j+7] >> 4 | .. | c[8j] >> 4 |

Sources: llama.cpp's ggml-common.h and ggml-quants.c.
"""

import torch
from torch import Tensor

from bitnet.quant.blocks import ggml_search, search
from bitnet.quant.blocks.layout import Fields, half_at, half_bytes, pack_bits, unpack_bits

BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
WITH_MINIMUM = ("Q4_1", "Q5_1")


def pack(fields: Fields, kind: str) -> Tensor:
    """Fields of B blocks to bytes `[B, bytes]`, drawn at the top of this file. Q8_0 stores its code minus 128."""
    parts = [half_bytes(fields.scale)]
    if fields.minimum is not None:
        parts.append(half_bytes(fields.minimum))
    if kind == "Q8_0":
        return torch.cat([*parts, fields.codes ^ 128], dim=1)
    if BITS[kind] == 5:
        parts.append(pack_bits(fields.codes >> 4, 1, 1))
    return torch.cat([*parts, pack_bits(fields.codes & 15, 4, 16)], dim=1)


def unpack(raw: Tensor, kind: str) -> Fields:
    """Inverse of `pack`."""
    minimum = half_at(raw, 2) if kind in WITH_MINIMUM else None
    if kind == "Q8_0":
        return Fields(raw[:, 2:] ^ 128, half_at(raw, 0))
    codes = unpack_bits(raw[:, -16:], 4, 16)
    if BITS[kind] == 5:
        codes |= unpack_bits(raw[:, -20:-16], 1, 1) << 4
    return Fields(codes, half_at(raw, 0), minimum)


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Bytes `[B, bytes]` to float32 `[B, 32]`."""
    fields = unpack(raw, kind)
    scale = fields.scale.float().unsqueeze(1)
    codes = fields.codes.float()
    if fields.minimum is not None:
        return codes * scale + fields.minimum.float().unsqueeze(1)
    return (codes - 2 ** (BITS[kind] - 1)) * scale


ROW_SIGMA = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")  # ggml weights these with the mean square of the whole row


def row_sigma2(x: Tensor) -> Tensor:
    """Mean square of each row of `[N, K]`, summed in order: float32 `[N]`."""
    columns = x.t().contiguous()
    return ggml_search.divide_by(ggml_search.total(columns * columns), len(columns))


def quantize(
    blocks: Tensor, kind: str, importance: Tensor | None, sigma2: Tensor | None, *, compatible: bool = False
) -> Fields:
    """Fields of blocks float32 `[B, 32]`, with weights of the same shape or None, and the rows' mean square `[B]` for
    the types of ROW_SIGMA."""
    x = blocks.t().contiguous()
    weight = None if importance is None else importance.t().contiguous()
    fields = _compatible(x, kind, weight, sigma2)
    return fields if compatible else _improve(x, kind, torch.ones_like(x) if weight is None else weight, fields)


def _improve(x: Tensor, kind: str, weight: Tensor, fields: Fields) -> Fields:
    """The default search, from ggml's fields."""
    half = 2 ** (BITS[kind] - 1)
    if kind in WITH_MINIMUM:
        return search.improve_minimum(x, weight, 2 * half - 1, fields)
    # `spread`: by how many codes the trial ranges are wider or narrower at most.
    first, spread = (-127, 2.0) if kind == "Q8_0" else (-half, 1.0 if half == 8 else 2.0)
    starts = search.scale_starts(x, first, half - 1, spread)
    return search.improve_scale(x, weight, starts, first, half - 1, half, fields)


def _compatible(x: Tensor, kind: str, importance: Tensor | None, sigma2: Tensor | None) -> Fields:
    levels = 2 ** (BITS[kind] - 1)
    if kind == "Q8_0":
        scale = ggml_search.divide_by(x.abs().amax(dim=0), 127)
        codes = ggml_search.round_away(x * ggml_search.inverse(scale)) + 128
        return Fields(_bytes(codes), ggml_search.to_half(scale))
    if importance is None:
        if kind in WITH_MINIMUM:
            low = x.amin(dim=0)
            scale = ggml_search.divide_by(x.amax(dim=0) - low, 2 * levels - 1)
            # ggml rounds these by adding a half and cutting off.
            codes = ggml_search.truncate((x - low) * ggml_search.inverse(scale) + 0.5)
            return Fields(_bytes(codes.clamp(max=2 * levels - 1)), *map(ggml_search.to_half, (scale, low)))
        scale = ggml_search.largest(x) / -levels
        codes = ggml_search.truncate(x * ggml_search.inverse(scale) + (levels + 0.5)).clamp(max=2 * levels - 1)
        return Fields(_bytes(codes), ggml_search.to_half(scale))
    assert sigma2 is not None
    # ggml's own weights: of two columns of one importance, the larger value counts more.
    weight = importance * ggml_search.root(sigma2 + x * x)
    if kind in WITH_MINIMUM:
        scale, low, codes = ggml_search.affine(x, weight, 2 * levels - 1, -0.9, 0.05, 36)
        return Fields(_bytes(codes), ggml_search.to_half(scale), ggml_search.to_half(-low))
    scale, codes = ggml_search.symmetric(x, weight, levels)
    return Fields(_bytes(codes), ggml_search.to_half(scale))


def _bytes(codes: Tensor) -> Tensor:
    """Codes `[n, B]` to uint8 `[B, n]`."""
    return codes.t().to(torch.uint8).contiguous()
