"""Group-quantized weights, and the layout in which GPTQ checkpoints store them.

    weight[n, k] ~ (codes[n, k] - zero_point[n, g]) * scale[n, g]        g = g_idx[k]

Codes are unsigned, 0 to quant_max. In a checkpoint the matrix lies transposed and is cut into 32-bit words:

    qweight  int32 [K * bits / 32, N]    codes of 32 neighbours along K fill `bits` words
    qzeros   int32 [G, N * bits / 32]    zero points, 32 neighbours along N
    scales   float16 [G, N]
    g_idx    int32 [K]                   group of each input channel

The words are one little-endian stream of bits: code i of 32 takes bits `i * bits` to `i * bits + bits - 1`, bit b being
bit `b % 32` of word `b // 32`. For 2, 4 and 8 bits no code crosses a word; for 3 bits codes 10 and 21 do:

    word 0  | c10 (low 2) | c9 | .. | c1 | c0 |      word 1  | c21 (low 1) | c20 | .. | c11 | c10 (high 1) |
    word 2  | c31 | .. | c22 | c21 (high 2) |

Two conventions for zero points: version 1 (AutoGPTQ's default, "gptq") stores `zero_point - 1`, version 2 ("gptq_v2")
the zero point itself. A zero point of 0 does not fit version 1, where readers disagree about the wrap-around, so the
grids of this project never use it (`Grid`).
"""

import torch
from torch import Tensor

from bitnet.quant.grouped import GPTQ_BITS, QuantizedWeight, half_scale


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers `[R, C]` below 2^bits as a stream of bits along dimension 0: int32 `[R * bits / 32, C]`.

    Raises ValueError where 32 words' worth of values does not come out even, or for a value out of range.
    """
    rows, columns = values.shape
    if rows * bits % 32:
        raise ValueError(f"{rows} values of {bits} bits do not fill 32-bit words; a GPTQ checkpoint cannot hold them")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**bits):
        raise ValueError(f"values span [{int(values.min())}, {int(values.max())}]; {bits} bits hold 0 to {2**bits - 1}")
    # A period is the fewest whole words that hold whole values: 1 word, or 3 for 3 bits.
    words = bits if bits == 3 else 1
    period = values.to(torch.int64).view(rows * bits // (32 * words), 32 * words // bits, columns)
    packed = torch.zeros(len(period), words, columns, dtype=torch.int64, device=values.device)
    for i in range(period.shape[1]):
        word, offset = divmod(i * bits, 32)
        packed[:, word] |= period[:, i] << offset
        if offset + bits > 32:
            packed[:, word + 1] |= period[:, i] >> (32 - offset)
    low = packed & 0xFFFFFFFF  # then read as signed
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).view(rows * bits // 32, columns)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`: int32 `[R * bits / 32, C]` to uint8 `[R, C]`."""
    columns = words.shape[1]
    count = bits if bits == 3 else 1
    stream = (words.to(torch.int64) & 0xFFFFFFFF).view(len(words) // count, count, columns)
    values = torch.empty(len(stream), 32 * count // bits, columns, dtype=torch.uint8, device=words.device)
    for i in range(values.shape[1]):
        word, offset = divmod(i * bits, 32)
        value = stream[:, word] >> offset
        # A 3-bit code may lie across two words.
        if offset + bits > 32:
            value |= stream[:, word + 1] << (32 - offset)
        values[:, i] = value & (2**bits - 1)
    return values.view(len(words) * 32 // bits, columns)


def pack_gptq(weight: QuantizedWeight, version: int = 1) -> dict[str, Tensor]:
    """The four tensors of a checkpoint, drawn at the top of this file; scales are stored in float16.

    Raises ValueError for sizes that do not fill 32-bit words (K and N must be multiples of 32 for 3 bits, of 32 / bits
    otherwise), for a zero point that the version cannot hold, and for a scale beyond float16.
    """
    offset = _zero_offset(version)
    # Version 1 stores the zero point minus one, and so cannot hold a zero point of 0.
    zeros = weight.zero_point - offset
    if (zeros < 0).any():
        raise ValueError("a zero point of 0 does not fit version 1 of the layout; write version 2 (gptq_v2)")
    return {
        "qweight": pack_words(weight.codes.t(), weight.bits),
        "qzeros": pack_words(zeros, weight.bits).t().contiguous(),
        "scales": half_scale(weight.scale).t().contiguous(),
        "g_idx": weight.g_idx.to(torch.int32),
    }


def unpack_gptq(tensors: dict[str, Tensor], bits: int, version: int = 1) -> QuantizedWeight:
    """Inverse of `pack_gptq`, float16 scales. Raises ValueError for tensors that do not fit together."""
    offset = _zero_offset(version)
    if bits not in GPTQ_BITS:
        raise ValueError(f"bits is {bits}; a GPTQ checkpoint has {', '.join(map(str, GPTQ_BITS))}")
    qweight, qzeros, scales, g_idx = (tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    columns, (groups, rows) = len(g_idx), scales.shape
    expected = [[columns * bits // 32, rows], [groups, rows * bits // 32]]
    if [list(qweight.shape), list(qzeros.shape)] != expected:
        raise ValueError(
            f"qweight {list(qweight.shape)} and qzeros {list(qzeros.shape)} are not {expected[0]} and {expected[1]} "
            f"of a {bits}-bit [{rows}, {columns}] weight in {groups} groups; is bits right?"
        )
    traced = torch.compiler.is_compiling()  # which can't look at values
    if columns and not traced and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(f"g_idx spans [{int(g_idx.min())}, {int(g_idx.max())}] and there are {groups} groups")
    zeros = unpack_words(qzeros.t(), bits).to(torch.int32) + offset
    return QuantizedWeight(unpack_words(qweight, bits).t().contiguous(), scales.t(), zeros, g_idx, bits)


def _zero_offset(version: int) -> int:
    if version not in (1, 2):
        raise ValueError(f"version is {version}; GPTQ checkpoints have version 1 (gptq) or 2 (gptq_v2)")
    return 2 - version
