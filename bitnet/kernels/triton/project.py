"""One token through a whole projection in one launch: [gate] -> [RMSNorm] -> INT8 quantization -> packed product.

    v = norm(gate(x))     s = max(absmax(v), 1e-5) / 127     q = round(v / s)
    y = (sum(c * q) - offset * sum(q)) * s * w_scale + residual          c = w + offset, as it is packed

What `activations.py` and `dot4.py` do in two launches, with the same roundings. Every program quantizes the whole token
again, from the second-level cache, for its own ROWS rows of weights. On an H200 that takes 4.6 us for 2560 x 2560 where
two launches take 6.2, but 13.1 us for 13824 x 2560 and 7.9 us for 2560 x 6912 where they take 9.7 and 8.6: it pays for
few and short rows. Weights and norm are constants of the model and are read before the wait for the kernel before.

A word of packed codes holds 16 weights (2 bits), four to a lane; lane l of word `at` multiplies the four activations
from `at // 8 * 128 + 32 * l + at % 8 * 4` on (`bitnet/quant/packing.py`). So the token is read as one tile
`[COLUMNS, 4]` a lane, and its four codes are packed into a word as the integer dot instruction wants them.
"""

# ruff: noqa: RUF005 - Triton's tuples know + and no unpacking
# mypy: disable-error-code="no-untyped-def, valid-type, assignment, misc, var-annotated"

import torch
from torch import Tensor

from bitnet.kernels.triton.activations import activation, codes_of, normalize, scale_of
from bitnet.kernels.triton.dot4 import dot4
from bitnet.kernels.triton.language import (
    assembly,
    cdiv,
    check,
    launch,
    power_of_2,
    tl,
    triton,
    wait_for_inputs,
)
from bitnet.quant.affine import SCALE_EPS
from bitnet.quant.packing import OFFSET, packed_width

MAX_WORDS = 1024
"""Longest row, in 32-bit words of packed codes, that one program takes at once."""


@triton.jit
def code_words(v, s):
    """Four INT8 codes a row of v `[COLUMNS, 4]` as one word `[COLUMNS]`."""
    return tl.sum((codes_of(v, s) & 255) << (8 * tl.arange(0, 4)[None, :]), 1)


@triton.jit
def project_kernel(
    x, weight, packed, w_scale, residual, y, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    OFFSET: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, EPS: tl.constexpr, SMALLEST: tl.constexpr,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """packed is read as int32, WORDS to a row; COLUMNS is a power of 2 and at least that. One program: ROWS rows."""
    stored: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    words = packed.to(tl.pointer_type(tl.int32)) + n[:, None].to(tl.int64) * WORDS + column[None, :]
    w = tl.load(words, mask=(n[:, None] < N) & (column[None, :] < WORDS), other=0)
    at = (column // 8 * (256 // BITS) + column % 8 * 4)[:, None] + tl.arange(0, 4)[None, :]
    lanes: tl.constexpr = 8 // BITS
    norms = ()
    for lane in tl.static_range(lanes):
        if NORM:
            norms = norms + (tl.load(weight + at + 32 * lane, mask=at + 32 * lane < K, other=0.0).to(tl.float32),)
    scale = tl.load(w_scale + n, mask=n < N, other=0.0)
    wait_for_inputs(PDL)
    values = ()
    for lane in tl.static_range(lanes):
        values = values + (activation(x, at + 32 * lane, at + 32 * lane < K, K, GATE),)
    if RESIDUAL:
        old = tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    if NORM:
        squares = values[0] * values[0]
        for lane in tl.static_range(1, lanes):
            squares += values[lane] * values[lane]
        mean = tl.div_rn(tl.sum(tl.sum(squares, 1), 0), K * 1.0)
        root = tl.rsqrt(mean + EPS)
        normal = ()
        for lane in tl.static_range(lanes):
            normal = normal + (normalize(values[lane], root, norms[lane], stored),)
        values = normal
    largest = values[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for lane in tl.static_range(1, lanes):
        largest = tl.maximum(largest, values[lane].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    s = scale_of(tl.max(tl.max(largest, 1), 0), SMALLEST)
    low = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    high = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    total = tl.zeros([COLUMNS], dtype=tl.int32)
    ones = tl.full([COLUMNS], 0x01010101, tl.int32)
    for lane in tl.static_range(lanes):
        word = code_words(values[lane], s)
        total = dot4(word, ones, total, ASM)
        x_word = tl.broadcast_to(word[None, :], [ROWS, COLUMNS])
        if BITS == 8:
            low = dot4(w ^ -0x7F7F7F80, x_word, low, ASM)
        elif BITS == 4:
            low = dot4((w >> (4 * lane)) & 0x0F0F0F0F, x_word, low, ASM)
        elif lane % 2 == 0:
            low = dot4((w >> (2 * lane)) & 0x03030303, x_word, low, ASM)
        else:
            high = dot4((w >> (2 * lane - 2)) & 0x0C0C0C0C, x_word, high, ASM)
    acc = tl.sum(low + (high >> 2) - OFFSET * total[None, :], 1)
    value = acc.to(tl.float32) * s * scale
    if RESIDUAL:
        value = value.to(stored).to(tl.float32) + old
    tl.store(y + n, value.to(y.dtype.element_ty), mask=n < N)


def pays(rows: int, in_features: int, bits: int) -> bool:
    """Whether one launch is faster than two for a matrix of this shape."""
    return rows <= 4096 and bits < 8 and packed_width(in_features, bits) // 4 <= 256


def tile(in_features: int, bits: int) -> tuple[int, int]:
    """Rows and warps of a program: 16 words a thread."""
    columns = power_of_2(packed_width(in_features, bits) // 4)
    rows = max(4, min(32, 8192 // columns))
    return rows, max(1, min(16, rows * columns // 512))


def project(
    x: Tensor, norm_weight: Tensor | None, packed: Tensor, w_scale: Tensor, residual: Tensor | None = None, *,
    bits: int, in_features: int, eps: float = 0.0, gate: str = "none", dtype: torch.dtype = torch.float32,
    rows_and_warps: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The projection of one token, `[1, N]` in `dtype`.

    x float `[1, K]`, or `[1, 2K]` with `gate` "silu" or "relu2"; norm_weight float `[K]`; packed uint8
    `[N, packed_width(K, bits)]`; w_scale float32 `[N]`; residual float `[1, N]` of x's type. No kernel that is still
    running may write the norm or the weights. Raises ValueError for tensors that do not fit together.
    """
    N, K = packed.shape[0], in_features
    if gate not in ("none", "silu", "relu2"):
        raise ValueError(f"gate is {gate!r}; choose none, silu or relu2")
    if packed_width(K, bits) // 4 > MAX_WORDS:
        raise ValueError(f"rows of {K} codes of {bits} bits do not fit one program; quantize and multiply one by one")
    check("packed", packed, torch.uint8, packed.device, None, packed_width(K, bits))
    check("x", x, None, packed.device, 1, K if gate == "none" else 2 * K)
    check("w_scale", w_scale, torch.float32, packed.device, N)
    if norm_weight is not None:
        check("norm_weight", norm_weight, torch.float32, packed.device, K)
    if residual is not None:
        check("residual", residual, x.dtype, packed.device, 1, N)
    y = torch.empty(1, N, dtype=dtype, device=packed.device)
    words = packed.shape[1] // 4
    rows, warps = rows_and_warps or tile(K, bits)
    # A kernel without norm or residual gets some pointer, which it does not read.
    launch(
        project_kernel, (cdiv(N, rows),), x, w_scale if norm_weight is None else norm_weight, packed, w_scale,
        w_scale if residual is None else residual, y, N=N, K=K, WORDS=words, BITS=bits,
        OFFSET=0 if bits == 8 else OFFSET[bits], NORM=norm_weight is not None, GATE=gate, EPS=eps, SMALLEST=SCALE_EPS,
        RESIDUAL=residual is not None, ROWS=rows, COLUMNS=power_of_2(words), ASM=assembly(), warps=warps,
    )  # fmt: skip
    return y
