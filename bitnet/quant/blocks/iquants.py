"""GGUF's IQ types of codebooks: super-blocks of 256 weights, an index for each 4 or 8, an integer scale for a group.

              weight                             vectors    indices  group  signs     bytes
    IQ2_XXS   d (2 l + 1) / 8 * +-v                   32  of 8 bits     32  7 a vector   66
    IQ2_XS    d (2 l + 1) / 8 * +-v                   32  of 9 bits     16  7 a vector   74
    IQ2_S     d (2 l + 1) / 8 * +-v                   32  of 10 bits    16  free         82
    IQ3_XXS   d (2 l + 1) / 4 * +-v                   64  of 8 bits     32  7 of 8       98
    IQ3_S     d (2 l + 1) * +-v                       64  of 9 bits     32  free        110
    IQ1_S     d (2 l + 1) * (v +- 1/8), a group       32  of 11 bits    32  none         50
    IQ1_M     d (2 l + 1) * (v +- 1/8), a vector      32  of 11 bits    16  none         56

v is the codebook's vector (`codebooks.py`), d float16, l an integer below 16 (IQ1: 8) for each group. "7 of 8" signs:
the number of negative weights among each 8 is even, which says what the eighth sign is. With i for the 256 / size
indices, s for the 32 bytes of signs (bit j: weight j of 8 is negative) and h for the shifts (1: v - 1/8), lowest bits
right, bytes in order:

    IQ2_XXS  d, for each 32 weights:  i, i, i, i, 4 bytes | l | s[3] & 127 | s[2] & 127 | s[1] & 127 | s[0] & 127 |
    IQ2_XS   d, 32 x 2 bytes | s & 127 | i |, l
    IQ2_S    d, i & 255, s, i >> 8 in 2 bits, l
    IQ3_XXS  d, i, 8 x 4 bytes as in IQ2_XXS
    IQ3_S    d, i & 255, i >> 8 in 1 bit, s, l
    IQ1_S    d, i & 255, for each 32 weights 2 bytes | h | l | i[3] >> 8 | i[2] >> 8 | i[1] >> 8 | i[0] >> 8 |
    IQ1_M    i & 255, 16 bytes | h[1] | i[1] >> 8 | h[0] | i[0] >> 8 |, 4 x 2 bytes | a nibble of d | l[3] | .. | l[0] |

where l alone is in nibbles, the first in the low bits. Sources: llama.cpp's ggml-common.h and ggml-quants.c.
"""

import torch
from torch import Tensor

from bitnet.quant.blocks import ggml_iq, iq_search
from bitnet.quant.blocks.codebooks import CODEBOOKS, SHIFT, values
from bitnet.quant.blocks.layout import Vectors, half_at, half_bytes, pack_bits, unpack_bits

BITS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 2, "IQ3_XXS": 3, "IQ3_S": 3, "IQ1_S": 1, "IQ1_M": 1}
GROUP = {"IQ2_XXS": 32, "IQ2_XS": 16, "IQ2_S": 16, "IQ3_XXS": 32, "IQ3_S": 32, "IQ1_S": 32, "IQ1_M": 16}
UNIT = {"IQ2_XXS": 0.125, "IQ2_XS": 0.125, "IQ2_S": 0.125, "IQ3_XXS": 0.25, "IQ3_S": 1.0, "IQ1_S": 1.0, "IQ1_M": 1.0}
NEEDS_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
"""ggml refuses these without weights: nearly every vector is a compromise, and of what, the weights say."""


def pack(vectors: Vectors, kind: str) -> Tensor:
    """B super-blocks to bytes `[B, bytes]`, drawn at the top of this file."""
    index, signs, scales, d = vectors.index.long(), vectors.signs, vectors.scales, half_bytes(vectors.scale)
    low = (index & 255).to(torch.uint8)
    nibbles = pack_bits(scales.to(torch.uint8), 4, 1)
    if kind in ("IQ2_XXS", "IQ3_XXS"):
        seven = (signs & 127).long().view(-1, 8, 4)
        words = sum(seven[..., i] << (7 * i) for i in range(4)) | scales.long() << 28
        if kind == "IQ3_XXS":
            return torch.cat([d, low, _to_bytes(words, 4)], dim=1)
        return torch.cat([d, torch.cat([low.view(-1, 8, 4), _to_bytes(words, 4).view(-1, 8, 4)], dim=2).flatten(1)], 1)
    if kind == "IQ2_XS":
        return torch.cat([d, _to_bytes(index | (signs & 127).long() << 9, 2), nibbles], dim=1)
    high = (index >> 8).to(torch.uint8)
    if kind == "IQ2_S":
        return torch.cat([d, low, signs, pack_bits(high, 2, 1), nibbles], dim=1)
    if kind == "IQ3_S":
        return torch.cat([d, low, pack_bits(high, 1, 1), signs, nibbles], dim=1)
    if kind == "IQ1_S":
        fields = high.long().view(-1, 8, 4)
        words = sum(fields[..., i] << (3 * i) for i in range(4)) | scales.long() << 12 | signs.long()[:, ::4] << 15
        return torch.cat([d, low, _to_bytes(words, 2)], dim=1)
    fields = scales.long().view(-1, 4, 4)
    quarters = d[:, [0, 0, 1, 1]].long() >> torch.tensor([0, 4, 0, 4], device=d.device) & 15
    words = sum(fields[..., i] << (3 * i) for i in range(4)) | quarters << 12
    return torch.cat([low, pack_bits(high | signs << 3, 4, 1), _to_bytes(words, 2)], dim=1)


def unpack(raw: Tensor, kind: str) -> Vectors:
    """Inverse of `pack`."""
    d = half_at(raw, 0)
    if kind in ("IQ2_XXS", "IQ3_XXS"):
        parts = raw[:, 2:].reshape(-1, 8, 8) if kind == "IQ2_XXS" else raw[:, 66:].reshape(-1, 8, 4)
        words = _of_bytes(parts[..., -4:].reshape(len(raw), -1), 4)
        seven = words.unsqueeze(2) >> torch.tensor([0, 7, 14, 21], device=raw.device) & 127
        index = parts[..., :4].flatten(1) if kind == "IQ2_XXS" else raw[:, 2:66]
        return Vectors(index.to(torch.int16), _with_eighth(seven.flatten(1)), d, (words >> 28).to(torch.int16))
    if kind == "IQ2_XS":
        words = _of_bytes(raw[:, 2:66], 2)
        return Vectors((words & 511).to(torch.int16), _with_eighth(words >> 9), d, _nibbles(raw[:, 66:]))
    if kind == "IQ2_S":
        index = raw[:, 2:34].to(torch.int16) | unpack_bits(raw[:, 66:74], 2, 1).to(torch.int16) << 8
        return Vectors(index, raw[:, 34:66], d, _nibbles(raw[:, 74:]))
    if kind == "IQ3_S":
        index = raw[:, 2:66].to(torch.int16) | unpack_bits(raw[:, 66:74], 1, 1).to(torch.int16) << 8
        return Vectors(index, raw[:, 74:106], d, _nibbles(raw[:, 106:]))
    threes = torch.tensor([0, 3, 6, 9], device=raw.device)
    if kind == "IQ1_S":
        words = _of_bytes(raw[:, 34:], 2)
        high = (words.unsqueeze(2) >> threes & 7).flatten(1)
        shifts = (words >> 15).to(torch.uint8).repeat_interleave(4, dim=1)
        index = raw[:, 2:34].to(torch.int16) | (high << 8).to(torch.int16)
        return Vectors(index, shifts, d, (words >> 12 & 7).to(torch.int16))
    words, high = _of_bytes(raw[:, 48:], 2), unpack_bits(raw[:, 32:48], 4, 1)
    quarters = (words >> 12 << torch.tensor([0, 4, 8, 12], device=raw.device)).sum(dim=1)
    d = half_at(_to_bytes(quarters.view(-1, 1), 2), 0)
    index = raw[:, :32].to(torch.int16) | (high & 7).to(torch.int16) << 8
    return Vectors(index, high >> 3, d, (words.unsqueeze(2) >> threes & 7).flatten(1).to(torch.int16))


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Bytes `[B, bytes]` to float32 `[B, 256]`."""
    vectors = unpack(raw, kind)
    # d has 11 bits, 2 l + 1 five and a value six: nothing is rounded in any order.
    scale = vectors.scale.float().unsqueeze(1) * (2 * vectors.scales + 1).float() * UNIT[kind]
    return scale.repeat_interleave(GROUP[kind], dim=1) * values(vectors, CODEBOOKS[kind])


def entries(raw: Tensor, kind: str) -> tuple[Vectors, float]:
    """Bytes `[B, bytes]` with an index into ENTRIES for each weight, uint8 `[B, 256]`, in the place of the vectors';
    and what the entries times d times 2 l + 1 are multiplied with."""
    vectors, book = unpack(raw, kind), CODEBOOKS[kind]
    digits = book.digits[vectors.index.long()].flatten(1)
    if book.is_ternary:
        codes = digits | vectors.signs.repeat_interleave(8, dim=1) << 3
        return Vectors(codes, vectors.signs, vectors.scale, vectors.scales), SHIFT
    codes = digits | unpack_bits(vectors.signs, 1, 1) << 3
    return Vectors(codes, vectors.signs, vectors.scale, vectors.scales), UNIT[kind]


def _entries(kind: str) -> tuple[int, ...]:
    book = CODEBOOKS[kind]
    above = tuple(round(level / SHIFT) + 1 for level in book.levels) if book.is_ternary else book.levels
    below = tuple(round(level / SHIFT) - 1 for level in book.levels) if book.is_ternary else tuple(-v for v in above)
    rest = (0,) * (8 - len(above))
    return above + rest + below + rest


ENTRIES = {kind: _entries(kind) for kind in BITS}
"""The 16 integers that a weight can be, in units of its scale: a digit, and 8 more for a sign or a shift down."""


def quantize(
    blocks: Tensor, kind: str, importance: Tensor | None, sigma2: Tensor | None, *, compatible: bool = False
) -> Vectors:
    """Super-blocks float32 `[B, 256]`, with weights of the same shape or None. Raises ValueError for the types of
    NEEDS_IMPORTANCE without weights."""
    x, weight = blocks.t().contiguous(), None if importance is None else importance.t().contiguous()
    fields = ggml_iq.quantize(x, kind, weight, GROUP[kind])
    return fields if compatible else iq_search.improve(x, kind, weight, fields, GROUP[kind], UNIT[kind])


def _to_bytes(words: Tensor, width: int) -> Tensor:
    """Integers `[B, n]` to uint8 `[B, n * width]`, little-endian."""
    shifts = torch.arange(0, 8 * width, 8, device=words.device)
    return (words.unsqueeze(2) >> shifts & 255).to(torch.uint8).flatten(1)


def _of_bytes(raw: Tensor, width: int) -> Tensor:
    """Inverse of `_to_bytes`: int64."""
    shifts = torch.arange(0, 8 * width, 8, device=raw.device)
    return (raw.reshape(len(raw), -1, width).long() << shifts).sum(dim=2)


def _nibbles(raw: Tensor) -> Tensor:
    return unpack_bits(raw, 4, 1).to(torch.int16)


def _with_eighth(seven: Tensor) -> Tensor:
    """Seven signs and the eighth that makes the number of negative ones even: uint8."""
    odd = sum(seven >> i & 1 for i in range(7)) & 1
    return (seven | odd << 7).to(torch.uint8)
