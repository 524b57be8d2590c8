"""GGUF types whose 4-bit codes stand for 16 uneven levels, which lie denser around zero, as weights do.

    IQ4_NL  d * LEVELS[c]        18 bytes for 32 weights:    d, 16 bytes of nibbles
    IQ4_XS  (d * s) * LEVELS[c]  136 bytes for 256 weights:  d, 2 bytes of t >> 4, 4 bytes of t & 15, 8 x 16 of nibbles

d is float16, and s = t - 32 an integer for each group of 32 weights.

    nibbles, byte j   | c[16+j] | c[j] |, of each 32 codes
    t >> 4, byte j    | t[4j+3] | .. | t[4j] |             t & 15, byte j    | t[2j+1] | t[2j] |

Sources: llama.cpp's ggml-common.h and ggml-quants.c.
"""

from itertools import pairwise

import torch
from torch import Tensor

from bitnet.quant.blocks import ggml_search, search
from bitnet.quant.blocks.layout import Fields, by_group, codes_of, half_at, half_bytes, pack_bits, unpack_bits

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BITS = {"IQ4_NL": 4, "IQ4_XS": 4}
GROUPS = {"IQ4_NL": 1, "IQ4_XS": 8}
LIMIT = 32  # of a scale's integer s: -32 to 31
SPREAD = 14.0  # by how much the trial ranges are wider or narrower at most, in units of d


def pack(fields: Fields, kind: str) -> Tensor:
    """Fields of B blocks to bytes `[B, bytes]`, drawn at the top of this file."""
    parts = [half_bytes(fields.scale)]
    if fields.scales is not None:
        t = (fields.scales + LIMIT).to(torch.uint8)
        parts += [pack_bits(t >> 4, 2, 1), pack_bits(t & 15, 4, 1)]
    return torch.cat([*parts, pack_bits(fields.codes, 4, 16)], dim=1)


def unpack(raw: Tensor, kind: str) -> Fields:
    """Inverse of `pack`."""
    if kind == "IQ4_NL":
        return Fields(unpack_bits(raw[:, 2:], 4, 16), half_at(raw, 0))
    t = unpack_bits(raw[:, 4:8], 4, 1) | unpack_bits(raw[:, 2:4], 2, 1) << 4
    return Fields(unpack_bits(raw[:, 8:], 4, 16), half_at(raw, 0), scales=t.to(torch.int16) - LIMIT)


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Bytes `[B, bytes]` to float32 `[B, 32]` or `[B, 256]`."""
    fields = unpack(raw, kind)
    scale = fields.scale.float().unsqueeze(1)
    if fields.scales is not None:
        scale = (scale * fields.scales.float()).repeat_interleave(32, dim=1)
    return scale * values_at(fields.codes.long())


def quantize(
    blocks: Tensor, kind: str, importance: Tensor | None, sigma2: Tensor | None, *, compatible: bool = False
) -> Fields:
    """Fields of blocks float32 `[B, 32]` or `[B, 256]`, with weights of the same shape or None."""
    x, groups = blocks.t().contiguous(), GROUPS[kind]
    mean_square = ggml_search.total(x * x) * (2 / len(x))
    weight = x * x if importance is None else importance.t() * ggml_search.root(mean_square + x * x)
    x, weight = by_group(x, groups), by_group(weight, groups)
    scales = _compatible_scales(x, weight)
    if groups == 1:
        codes = nearest_level(ggml_search.inverse(scales) * x)
        fields = Fields(codes_of(codes, 1), ggml_search.to_half(scales))
    else:
        fields = _compatible_super(x, scales.view(groups, -1))
    if compatible:
        return fields
    weight = torch.ones_like(x) if importance is None else by_group(importance.t().contiguous(), groups)
    starts = search.scale_starts(x, LEVELS[0], LEVELS[-1], SPREAD)

    def quantize(scale: Tensor) -> Tensor:
        return values_at(nearest_level(x * search.inverse(scale)))

    if groups == 1:
        scale, error = search.fit_scale(x, weight, starts, quantize, search.stored)
        found = Fields(codes_of(nearest_level(x * search.inverse(scale)), 1), scale.to(torch.float16))
        before = search.Sums(x, weight, values_at(fields.codes.t().long()), fields.scale.float()).error
    else:
        blocks_of = search.SuperBlocks(x, weight, groups)
        d, s, error = blocks_of.symmetric(quantize, starts, LIMIT)
        found = blocks_of.fields(nearest_level(x * search.inverse(blocks_of.per_group(d) * s)), d, s)
        before = blocks_of.error_of(fields, values_at(fields.codes.long()))
    return search.pick(error < before, found, fields)


def _compatible_scales(x: Tensor, weight: Tensor) -> Tensor:
    """ggml's scale of each column: 16 trial scales with a least-squares refit each."""
    extreme = ggml_search.largest(x)
    zero = extreme.abs() < ggml_search.TINY

    def trial(inv_scale: Tensor) -> tuple[Tensor, Tensor]:
        q = values_at(nearest_level(inv_scale * x))
        return ggml_search.total(weight * q * x), ggml_search.total(weight * q * q)

    # The first trial puts the largest magnitude at 127, the others at the first level, -127, and around it.
    sum_xq, sum_qq = trial(ggml_search.divide(1, ggml_search.divide_by(-extreme, LEVELS[0])))
    scale = torch.where(sum_qq > 0, sum_xq / sum_qq, 0.0)
    best = scale * sum_xq
    for step in range(-7, 8):
        sum_xq, sum_qq = trial(ggml_search.divide(step + LEVELS[0], extreme))
        # A refitted scale lowers the error by sum_xq^2 / sum_qq; compared without a division, as in ggml.
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale = torch.where(better, sum_xq / sum_qq, scale)
        best = torch.where(better, scale * sum_xq, best)
    return torch.where(zero, 0.0, scale)


def _compatible_super(x: Tensor, scales: Tensor) -> Fields:
    """ggml's IQ4_XS of groups `[32, 8 B]` with scales `[8, B]`: codes for d before it is rounded to float16."""
    d = ggml_search.divide_by(-ggml_search.largest(scales), LIMIT)
    s = ggml_search.nearest_int(ggml_search.inverse(d) * scales).clamp(-LIMIT, LIMIT - 1)
    codes = nearest_level(ggml_search.inverse((d * s).view(-1)) * x)
    return Fields(codes_of(codes, len(s)), ggml_search.to_half(d), scales=s.t().to(torch.int16).contiguous())


def nearest_level(x: Tensor) -> Tensor:
    """Index (int64) of the entry of LEVELS nearest to x, the upper one of two; NaN gives the first."""
    index = torch.zeros_like(x, dtype=torch.int64)
    for low, high in pairwise(LEVELS):
        # Whether x lies above the middle of two levels, doubled so that nothing is rounded.
        index += x + x >= low + high
    return index


def values_at(index: Tensor) -> Tensor:
    """Entries of LEVELS, float32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=index.device)[index]
