"""GGUF k-quants: super-blocks of 256 weights in G groups, scales in two levels.

         weight                   G   bytes
    Q2_K (d * s) * c - (dmin * m)  16     84   16 bytes | m[g] | s[g] |, 64 of c, d, dmin
    Q3_K (d * s) * (c - 4)         16    110   32 bytes of c >> 2, 64 of c & 3, 12 of s + 32, d
    Q4_K (d * s) * c - (dmin * m)   8    144   d, dmin, 12 bytes of s and m, 128 of c
    Q5_K (d * s) * c - (dmin * m)   8    176   d, dmin, 12 bytes of s and m, 32 of c >> 4, 128 of c & 15
    Q6_K (d * s) * (c - 32)        16    210   128 bytes of c & 15, 64 of c >> 4, 16 x int8 s, d

d and dmin are float16. Codes lie as `layout.pack_bits` draws them with a stride of 32; the nibbles of Q6_K have 64.
The 6-bit scales, with t = s + 32, and the scales with minimums (j < 4):

    Q3_K        byte j          | t[8+j] & 15 | t[j] & 15 |, also for 4 <= j < 8
                byte 8 + j      | t[12+j] >> 4 | t[8+j] >> 4 | t[4+j] >> 4 | t[j] >> 4 |
    Q4_K, Q5_K  byte j          | s[4+j] >> 4 | s[j] |
                byte 4 + j      | m[4+j] >> 4 | m[j] |
                byte 8 + j      | m[4+j] & 15 | s[4+j] & 15 |

Sources: llama.cpp's ggml-common.h and ggml-quants.c.
"""

import torch
from torch import Tensor

from bitnet.quant.blocks import ggml_search, search
from bitnet.quant.blocks.layout import Fields, by_group, codes_of, half_at, half_bytes, pack_bits, unpack_bits

SUPER_BLOCK = 256
GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16}
BITS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
LIMIT = {"Q2_K": 15, "Q4_K": 63, "Q5_K": 63}  # the largest integer of a scale or a minimum
CENTER = {"Q2_K": 0, "Q3_K": 4, "Q4_K": 0, "Q5_K": 0, "Q6_K": 32}


def pack(fields: Fields, kind: str) -> Tensor:
    """Fields of B super-blocks to bytes `[B, bytes]`, drawn at the top of this file."""
    codes, d = fields.codes, half_bytes(fields.scale)
    assert fields.scales is not None
    if kind == "Q3_K":
        scales = _pack_six((fields.scales + 32).to(torch.uint8))
        return torch.cat([pack_bits(codes >> 2, 1, 32), pack_bits(codes & 3, 2, 32), scales, d], dim=1)
    if kind == "Q6_K":
        scales = fields.scales.to(torch.int8).view(torch.uint8)
        return torch.cat([pack_bits(codes & 15, 4, 64), pack_bits(codes >> 4, 2, 32), scales, d], dim=1)
    assert fields.minimum is not None
    assert fields.minimums is not None
    s, m, dmin = fields.scales.to(torch.uint8), fields.minimums.to(torch.uint8), half_bytes(fields.minimum)
    if kind == "Q2_K":
        return torch.cat([s | m << 4, pack_bits(codes, 2, 32), d, dmin], dim=1)
    # The last four groups' upper two bits of s and of m sit above the first four groups' six.
    header = [d, dmin, s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4]
    high = [pack_bits(codes >> 4, 1, 32)] if kind == "Q5_K" else []
    return torch.cat([*header, *high, pack_bits(codes & 15, 4, 32)], dim=1)


def unpack(raw: Tensor, kind: str) -> Fields:
    """Inverse of `pack`."""
    if kind == "Q3_K":
        codes = unpack_bits(raw[:, 32:96], 2, 32) | unpack_bits(raw[:, :32], 1, 32) << 2
        return Fields(codes, half_at(raw, 108), scales=_unpack_six(raw[:, 96:108]).to(torch.int16) - 32)
    if kind == "Q6_K":
        codes = unpack_bits(raw[:, :128], 4, 64) | unpack_bits(raw[:, 128:192], 2, 32) << 4
        scales = raw[:, 192:208].contiguous().view(torch.int8)
        return Fields(codes, half_at(raw, 208), scales=scales.to(torch.int16))
    if kind == "Q2_K":
        s, m = raw[:, :16] & 15, raw[:, :16] >> 4
        codes, d, dmin = unpack_bits(raw[:, 16:80], 2, 32), half_at(raw, 80), half_at(raw, 82)
    else:
        low, middle, high = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
        s = torch.cat([low & 63, high & 15 | low >> 6 << 4], dim=1)
        m = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], dim=1)
        codes, d, dmin = unpack_bits(raw[:, -128:], 4, 32), half_at(raw, 0), half_at(raw, 2)
        if kind == "Q5_K":
            codes |= unpack_bits(raw[:, 16:48], 1, 32) << 4
    return Fields(codes, d, dmin, s.to(torch.int16), m.to(torch.int16))


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Bytes `[B, bytes]` to float32 `[B, 256]`."""
    fields = unpack(raw, kind)
    assert fields.scales is not None
    scale = fields.scale.float().unsqueeze(1) * fields.scales.float()
    codes = fields.codes.view(len(raw), GROUPS[kind], -1).float()
    weight = scale.unsqueeze(2) * (codes - CENTER[kind])
    if fields.minimum is not None:
        assert fields.minimums is not None
        weight = weight - (fields.minimum.float().unsqueeze(1) * fields.minimums.float()).unsqueeze(2)
    return weight.flatten(1)


def _pack_six(t: Tensor) -> Tensor:
    low = t[:, :8] & 15 | t[:, 8:] << 4
    return torch.cat([low, pack_bits(t >> 4, 2, 4)], dim=1)


def _unpack_six(raw: Tensor) -> Tensor:
    low = torch.cat([raw[:, :8] & 15, raw[:, :8] >> 4], dim=1)
    return low | unpack_bits(raw[:, 8:], 2, 4) << 4


def quantize(
    blocks: Tensor, kind: str, importance: Tensor | None, sigma2: Tensor | None, *, compatible: bool = False
) -> Fields:
    """Fields of super-blocks float32 `[B, 256]`, with weights of the same shape or None."""
    x = blocks.t().contiguous()
    weight = None if importance is None else importance.t().contiguous()
    fields = (_compatible_affine if CENTER[kind] == 0 else _compatible_symmetric)(x, kind, weight)
    if compatible:
        return fields
    groups, center = GROUPS[kind], CENTER[kind]
    blocks_of = search.SuperBlocks(
        by_group(x, groups), by_group(torch.ones_like(x) if weight is None else weight, groups), groups
    )
    before = blocks_of.error_of(fields, fields.codes.float() - center)
    if center == 0:
        found, error = blocks_of.affine(2 ** BITS[kind] - 1, LIMIT[kind])
        return search.pick(error < before, found, fields)
    limit, spread = (32, 1.0) if kind == "Q3_K" else (128, 2.0)

    def quantize(scale: Tensor) -> Tensor:
        return search.nearest(blocks_of.x, scale, 0.0, -center, center - 1)

    starts = search.scale_starts(blocks_of.x, -center, center - 1, spread)
    d, s, error = blocks_of.symmetric(quantize, starts, limit)
    found = blocks_of.fields(quantize(blocks_of.per_group(d) * s) + center, d, s)
    return search.pick(error < before, found, fields)


def _compatible_affine(x: Tensor, kind: str, importance: Tensor | None) -> Fields:
    """Q2_K, Q4_K, Q5_K."""
    groups, high = GROUPS[kind], 2 ** BITS[kind] - 1
    grouped = by_group(x, groups)
    limit = LIMIT[kind]
    if importance is None:
        average = 0.0 if kind == "Q2_K" else ggml_search.root(ggml_search.total(grouped * grouped) / 32)
        weight = grouped.abs() + average
        first, step, steps = (-1.0, 0.1, 20) if kind == "Q4_K" else (-0.5, 0.1, 15)
        scales, minimums, codes = ggml_search.affine(grouped, weight, high, first, step, steps, absolute=kind == "Q2_K")
        d, s = _first_level(scales.view(groups, -1), limit)
        dmin, m = _first_level(minimums.view(groups, -1), limit)
    else:
        # 2 * sum / 256 and sum / 256: powers of two round nothing
        sigma2 = ggml_search.total(x * x) * ((1 if kind == "Q2_K" else 2) / SUPER_BLOCK)
        weight = by_group(importance * ggml_search.root(sigma2 + x * x), groups)
        scales, minimums, codes = ggml_search.affine(grouped, weight, high, -0.9, 0.05, 36)
        sums = ggml_search.total(weight).view(groups, -1)
        d, s = ggml_search.positive(scales.view(groups, -1), sums, limit)
        dmin, m = ggml_search.positive(minimums.view(groups, -1), sums, limit)
        if (s > limit).any():
            s, m = _overflow(kind, s.int(), m.int())
    half_d, half_dmin = ggml_search.to_half(d), ggml_search.to_half(dmin)
    scale, minimum = (half_d.float() * s).view(-1), (half_dmin.float() * m).view(-1)
    # Codes once more, for the scales as they are stored; where the scale became 0 those of the search stay.
    again = ggml_search.nearest_int((grouped + minimum) / scale).clamp(0, high)
    codes = torch.where(scale != 0, again, codes)
    return Fields(codes_of(codes, groups), half_d, half_dmin, _levels(s), _levels(m))


def _overflow(kind: str, s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """What a scale's code of more than 6 bits (4 for Q2_K) does to its neighbours in ggml's bytes: int32 `[G, B]`."""
    if kind == "Q2_K":
        s, m = s & 15, m | s >> 4
    elif kind == "Q4_K":
        s = torch.cat([s[:4] & 63, s[4:] & 63 | s[:4] >> 6 << 4])
    return s.clamp(max=63).float(), m.float()


def _first_level(scales: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """One scale for the scales `[G, B]` of a super-block, the largest at `limit`, and their codes."""
    high = scales.amax(dim=0).clamp(min=0)
    codes = ggml_search.nearest_int(torch.where(high > 0, ggml_search.divide(limit, high), 0.0) * scales)
    return torch.where(high > 0, ggml_search.divide_by(high, limit), 0.0), codes.clamp(max=limit)


def _compatible_symmetric(x: Tensor, kind: str, importance: Tensor | None) -> Fields:
    """Q3_K, Q6_K."""
    groups, center = GROUPS[kind], CENTER[kind]
    grouped = by_group(x, groups)
    if kind == "Q6_K":
        scales, codes = ggml_search.symmetric(
            grouped, grouped * grouped if importance is None else by_group(importance, groups), 32
        )
        d, s = _largest_at(scales.view(groups, -1), -128.0, 127)
        # A super-block of zeros is zeros in every field, as in ggml.
        dead = ggml_search.largest(scales.view(groups, -1)).abs() < ggml_search.TINY
        d, s = torch.where(dead, 0.0, d), torch.where(dead, 0.0, s)
        codes = torch.where(dead.repeat(groups), 0.0, codes)
    elif importance is None:
        scales, codes = ggml_search.symmetric_descent(grouped, center)
        d, s = _largest_at(scales.view(groups, -1), -32.0, 31)
    else:
        sigma2 = ggml_search.total(x * x) * (2 / SUPER_BLOCK)
        weight = by_group(importance * ggml_search.root(sigma2 + x * x), groups)
        scales, codes = ggml_search.symmetric(grouped, weight, center)
        d, s = ggml_search.symmetric(scales.view(groups, -1), ggml_search.total(weight).view(groups, -1), 32)
        # `symmetric` gives codes from 0 up; a scale is signed.
        s = s - 32
    half_d = ggml_search.to_half(d)
    scale = (half_d.float() * s).view(-1)
    again = ggml_search.nearest_int(grouped / scale).clamp(-center, center - 1) + center
    return Fields(codes_of(torch.where(scale != 0, again, codes), groups), half_d, scales=_levels(s))


def _largest_at(scales: Tensor, low: float, high: int) -> tuple[Tensor, Tensor]:
    """As `_first_level`, with the largest magnitude at `low`, below 0; all zero gives d = 0 and codes `low`."""
    inv = ggml_search.divide(low, ggml_search.largest(scales))
    some = ggml_search.largest(scales) != 0
    codes = ggml_search.nearest_int(inv * scales).clamp(low, high)
    return torch.where(some, ggml_search.divide(1, inv), 0.0), torch.where(some, codes, low)


def _levels(codes: Tensor) -> Tensor:
    return codes.t().to(torch.int16).contiguous()
