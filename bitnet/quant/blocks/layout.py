"""What the block formats have in common: the fields of a block, and codes of a few bits in bytes.

`pack_bits(codes, bits, stride)` cuts a block's codes into chunks of `stride * 8 / bits` and makes `stride` bytes of
each. Byte j of a chunk holds the codes j, j + stride, j + 2 stride, .. of the chunk, the first in its lowest bits:

    bits 4, stride 16         bits 2, stride 32                              bits 1, stride 32
    | c[16+j] | c[j] |        | c[96+j] | c[64+j] | c[32+j] | c[j] |         | c[224+j] | .. | c[32+j] | c[j] |
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass
class Fields:
    """The content of B blocks of n weights in G groups, in numbers. What a type does not have is None.

    A weight is `(scale * scales) * (code - center) - (minimum * minimums)`; `center` belongs to the type. Types with
    one level have neither `scales` nor `minimums`, and Q4_1 and Q5_1 add their minimum instead.
    """

    codes: Tensor  # uint8 [B, n], as stored
    scale: Tensor  # float16 [B]
    minimum: Tensor | None = None  # float16 [B]
    scales: Tensor | None = None  # int16 [B, G], signed
    minimums: Tensor | None = None  # int16 [B, G]


@dataclass
class Vectors:
    """The content of B super-blocks of 256 weights in G groups, in vectors of a codebook (`iquants.py`)."""

    index: Tensor  # int16 [B, 256 / size]
    signs: Tensor  # uint8 [B, 32], a bit a weight; of IQ1 the shift of each vector, 1 for the one below 0
    scale: Tensor  # float16 [B]
    scales: Tensor  # int16 [B, G]: l of the factor 2 l + 1


def pack_bits(codes: Tensor, bits: int, stride: int) -> Tensor:
    """uint8 `[B, n]` of values below 2^bits to uint8 `[B, n * bits / 8]`, drawn at the top of this file."""
    lanes = rearrange(codes, "b (chunk lane j) -> lane b chunk j", lane=8 // bits, j=stride)
    packed = lanes[0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[lane] << (bits * lane)
    return packed.flatten(1)


def unpack_bits(packed: Tensor, bits: int, stride: int) -> Tensor:
    """Inverse of `pack_bits`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    lanes = (rearrange(packed, "b (chunk j) -> b chunk 1 j", j=stride) >> shifts) & (2**bits - 1)
    return lanes.flatten(1)


def by_group(x: Tensor, groups: int) -> Tensor:
    """`[256, B]` to columns of one group each: `[256 / G, G * B]`."""
    return x.view(groups, -1, x.shape[1]).transpose(0, 1).reshape(len(x) // groups, -1)


def codes_of(codes: Tensor, groups: int) -> Tensor:
    """Codes in the order of `by_group` to uint8 `[B, 256]`."""
    return codes.view(len(codes), groups, -1).permute(2, 1, 0).to(torch.uint8).flatten(1)


def half_bytes(half: Tensor) -> Tensor:
    """float16 `[B]` to its bytes `[B, 2]`, little-endian."""
    return _copy(half).view(torch.uint8).view(-1, 2)


def half_at(raw: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block: `[B]`."""
    return _copy(raw[:, start : start + 2]).view(torch.float16).view(-1)


def _copy(x: Tensor) -> Tensor:
    """A copy that can be viewed as another dtype: its own memory, in order, aligned."""
    return x.clone(memory_format=torch.contiguous_format)
