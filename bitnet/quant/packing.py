"""Bit layouts of packed weight codes: the one place where they are drawn.

A packed matrix is uint8 `[N, ceil(K / B) * 32]` for weights `[N, K]`. Each row is cut along K into blocks of
`B = 256 / bits` codes and every block becomes 32 bytes. With the unsigned code `c = q + offset`:

    bits 2 (ternary, binary), B = 128, offset 1     bits 4, B = 64, offset 8       bits 8, B = 32, offset 128

    byte j of a block, bit 7 .. 0
    | c[96+j] | c[64+j] | c[32+j] | c[j] |          | c[32+j] | c[j] |             | c[j] |

Codes that share a byte are 32 apart, so one shift and one mask over a 32-byte vector yields 32 neighbouring weights:
the same bytes serve torch, SIMD registers and GPU lanes without a permutation. For 2 bits this is also the order of
the quants inside a ggml TQ2_0 block. A row's tail is padded with the code of weight 0, which adds nothing to a product.
"""

import torch
from einops import rearrange
from torch import Tensor

BYTES_PER_BLOCK = 32
OFFSET = {2: 1, 4: 8, 8: 128}


def codes_per_block(bits: int) -> int:
    """Number of codes in one 32-byte block: 128, 64 or 32 for 2, 4 or 8 bits."""
    if bits not in OFFSET:
        raise ValueError(f"bits is {bits}; packed codes have {', '.join(map(str, OFFSET))} bits")
    return BYTES_PER_BLOCK * 8 // bits


def packed_width(in_features: int, bits: int) -> int:
    """Bytes in one packed row of `in_features` codes, padding included."""
    return -(-in_features // codes_per_block(bits)) * BYTES_PER_BLOCK


def pack_codes(codes: Tensor, bits: int, *, checked: bool = True) -> Tensor:
    """Pack signed integer codes, drawn at the top of this file.

    codes: int8 `[N, K]`; range [-1, 1] for 2 bits (one of the four patterns stays unused), [-8, 7] for 4, [-128, 127]
    for 8. Returns uint8 `[N, packed_width(K, bits)]`. Raises ValueError for another dtype, rank or range; that of the
    range waits for a GPU, so codes that a quantizer of this package has just made need not be `checked`.
    """
    block = codes_per_block(bits)
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 [N, K], got {codes.dtype} {list(codes.shape)}")
    low, high = (-1, 1) if bits == 2 else (-OFFSET[bits], OFFSET[bits] - 1)
    if checked and codes.numel() and not codes.is_meta and (codes.min() < low or codes.max() > high):
        raise ValueError(f"codes span [{int(codes.min())}, {int(codes.max())}], {bits} bits hold [{low}, {high}]")
    padding = -codes.shape[1] % block
    unsigned = torch.nn.functional.pad(codes.to(torch.int16) + OFFSET[bits], (0, padding), value=OFFSET[bits])
    lanes = rearrange(unsigned, "n (b lane j) -> lane n b j", j=BYTES_PER_BLOCK, lane=8 // bits)
    packed = torch.zeros_like(lanes[0])
    for lane in range(8 // bits):
        packed |= lanes[lane] << (bits * lane)
    return rearrange(packed.to(torch.uint8), "n b j -> n (b j)")


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 `[N, packed_width(K, bits)]` to int8 `[N, K]` with K = `in_features`."""
    codes_per_block(bits)  # refuses other widths
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != packed_width(in_features, bits):
        raise ValueError(
            f"packed must be uint8 [N, {packed_width(in_features, bits)}] for {in_features} codes of {bits} bits, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    blocks = rearrange(packed, "n (b j) -> n b 1 j", j=BYTES_PER_BLOCK)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    lanes = (blocks >> shifts) & (2**bits - 1)  # [N, blocks, 8 / bits, 32]
    # uint8 arithmetic wraps, and so does the conversion to int8: c - offset comes out signed. (A reinterpretation would
    # do as well, but torch.jit.trace knows none.)
    codes = (lanes - OFFSET[bits]).to(torch.int8)
    return rearrange(codes, "n b lane j -> n (b lane j)")[:, :in_features]
