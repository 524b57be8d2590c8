"""GGUF types of 4-bit floats (E2M1), which are read: MXFP4 and NVFP4.

    MXFP4   32 weights, 17 bytes:  e, 16 bytes of nibbles as in Q4_0                      2^(e - 127) * v
    NVFP4   64 weights, 36 bytes:  4 scales, 4 x 8 bytes of nibbles of 16 weights each     s * v

v is 0, 0.5, 1, 1.5, 2, 3, 4 or 6, or with the highest bit of the nibble its negative (0 stays 0). A scale s of NVFP4
is UE4M3, with 7 as its bias: the highest bit is not looked at, and 0x7F counts as 0, as in ggml. Byte j of a group's
nibbles holds its weights j, in the low bits, and j + 8 (MXFP4: j + 16).

Sources: OCP Microscaling Formats 1.0; llama.cpp's ggml-quants.c.
"""

import torch
from torch import Tensor

from bitnet.quant.blocks.layout import unpack_bits

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Bytes `[B, bytes]` to float32 `[B, 32]` or `[B, 64]`."""
    table = torch.tensor(VALUES, dtype=torch.float32, device=raw.device)
    if kind == "MXFP4":
        exponent = raw[:, :1].to(torch.int32) - 127
        scale = torch.ldexp(torch.ones(len(raw), 1, dtype=torch.float64, device=raw.device), exponent)
        # 2^127 times 6 is beyond float32 and so beyond what ggml computes; in float64 the product is rounded once.
        return (scale * table[unpack_bits(raw[:, 1:], 4, 16).long()].double()).float()
    codes = unpack_bits(raw[:, 4:], 4, 8).view(len(raw), 4, 16)
    return (_scales(raw[:, :4]).unsqueeze(2) * table[codes.long()]).flatten(1)


def unpack(rows: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of bytes `[N, row bytes]` as indices into VALUES uint8 `[N, K]`, float16 scales of groups `[N, G]` of twice
    the values (which are integers), and float32 scales of rows `[N]`. A group of MXFP4 below 2^-24 of its row's largest
    counts as 0."""
    if kind == "NVFP4":
        raw = rows.reshape(-1, 36)
        scale = _scales(raw[:, :4]) / 2
        return (
            unpack_bits(raw[:, 4:], 4, 8).view(len(rows), -1),
            scale.half().view(len(rows), -1),
            torch.ones(len(rows)),
        )
    raw = rows.reshape(-1, 17)
    exponent = raw[:, 0].view(len(rows), -1).to(torch.int32)
    largest = exponent.amax(1, keepdim=True)
    scale = torch.ldexp(torch.ones(exponent.shape), exponent - largest).half()
    of_row = torch.ldexp(torch.ones(len(rows), dtype=torch.float64), largest.view(-1) - 128).float()
    return unpack_bits(raw[:, 1:], 4, 16).view(len(rows), -1), scale, of_row


def _scales(raw: Tensor) -> Tensor:
    """UE4M3 bytes as float32."""
    exponent, fraction = ((raw >> 3) & 15).to(torch.int32), (raw & 7).float()
    normal = torch.ldexp(1 + fraction / 8, exponent - 7)
    return torch.where(exponent == 0, fraction * 2.0**-9, normal).masked_fill(raw == 0x7F, 0.0)
