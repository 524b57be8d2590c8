"""I2_S, the ternary tensor of bitnet.cpp: 2-bit codes in the order of one processor family, and one scale behind them.

    x86: blocks of 128 codes in 32 bytes, J = 32        Arm: blocks of 64 codes in 16 bytes, J = 16

    byte j of a block, bit 7 .. 0    | c[j] | c[J + j] | c[2J + j] | c[3J + j] |        c = q + 1 in {0, 1, 2}

The blocks run through the whole matrix, rows being whole blocks; behind n / 4 bytes of codes come 32 more, whose first
four are the scale (float32) and the rest padding. A file does not say which layout it has. bitnet.cpp can also be built
with an x86 layout that interleaves four rows; the published files and this module have the one above.
Source: microsoft/BitNet, src/ggml-bitnet-mad.cpp (quantize_i2_s).
"""

import torch
from einops import rearrange
from torch import Tensor

LAYOUTS = {"x86": 128, "arm": 64}
TAIL = 32


def pack_i2_s(codes: Tensor, scale: float, layout: str = "x86") -> Tensor:
    """Bytes of a matrix, uint8 `[N * K / 4 + 32]`, from ternary codes int8 `[N, K]` and their scale.

    Raises ValueError where K is not a multiple of the layout's block.
    """
    block = _block(codes.shape[1], layout)
    lanes = rearrange((codes + 1).to(torch.uint8), "n (b lane j) -> lane (n b j)", lane=4, j=block // 4)
    data = lanes[0] << 6 | lanes[1] << 4 | lanes[2] << 2 | lanes[3]
    tail = torch.zeros(TAIL // 4)
    # 32 bytes of tail, of which the first four are the scale.
    tail[0] = scale
    return torch.cat([data, tail.view(torch.uint8)])


def unpack_i2_s(data: Tensor, shape: tuple[int, int], layout: str = "x86") -> tuple[Tensor, float]:
    """Inverse of `pack_i2_s`. Raises ValueError for another number of bytes or a code that is not ternary."""
    rows, columns = shape
    block = _block(columns, layout)
    if data.dtype != torch.uint8 or data.shape != (rows * columns // 4 + TAIL,):
        raise ValueError(f"I2_S data of {list(shape)} is uint8 [{rows * columns // 4 + TAIL}], got {list(data.shape)}")
    blocks = rearrange(data[:-TAIL], "(b j) -> b 1 j", j=block // 4)
    codes = (blocks >> torch.tensor([[6], [4], [2], [0]], dtype=torch.uint8)) & 3
    if (codes == 3).any():
        raise ValueError("I2_S data holds the code 3, which stands for no ternary weight; the file is damaged")
    return codes.view(torch.int8).reshape(rows, columns) - 1, float(data[-TAIL:].clone().view(torch.float32)[0])


def _block(columns: int, layout: str) -> int:
    if layout not in LAYOUTS:
        raise ValueError(f"I2_S layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if columns % LAYOUTS[layout]:
        raise ValueError(f"rows of {columns} weights are no multiple of {LAYOUTS[layout]}, as I2_S needs; use TQ2_0")
    return LAYOUTS[layout]
