"""Absmean ternary quantization of weights (arXiv 2402.17764, eq. 1-3), packed or as int8 codes, and its inverse.

    scale = max(mean(|W|), 1e-5)        q = clamp(round(W / scale), -1, 1)

Two launches and no synchronisation with the host: partial sums of |W|, then every program adds the partial sums in the
same order and quantizes its part. The order of the additions depends on the shape alone, so a matrix has one scale on
every device. The packed layout is drawn in `bitnet/quant/packing.py`.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

from typing import Any

import torch
from torch import Tensor

from bitnet.kernels.triton.activations import padded
from bitnet.kernels.triton.language import cdiv, check, launch, power_of_2, tl, triton
from bitnet.quant.affine import SCALE_EPS
from bitnet.quant.packing import OFFSET, packed_width

_TILE = 4096
_MAX_PARTIALS = 1024


@triton.jit
def absolute_sum_kernel(
    weight, partial, SIZE: tl.constexpr, PARTIALS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr
):
    program = tl.program_id(0)
    acc = tl.zeros([TILE], dtype=tl.float32)
    for step in range(STEPS):
        i = (step * PARTIALS + program).to(tl.int64) * TILE + tl.arange(0, TILE)
        acc += tl.abs(tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32))
    tl.store(partial + program, tl.sum(acc, 0))


@triton.jit
def absmean(partial, SIZE: tl.constexpr, PARTIALS: tl.constexpr, P2: tl.constexpr, SMALLEST: tl.constexpr):
    i = tl.arange(0, P2)
    total = tl.sum(tl.load(partial + i, mask=i < PARTIALS, other=0.0).to(tl.float64), 0)
    mean = (total / SIZE).to(tl.float32)
    return tl.where(mean < SMALLEST, SMALLEST, mean)  # a NaN stays one


@triton.jit
def ternary(w, scale):
    # round(w / scale) is not 0 exactly where |w| > scale / 2: the float behind scale / 2 has a quotient that rounds
    # to more than 0.5, and 0.5 itself goes to 0. A NaN gives 0.
    half = 0.5 * scale
    return (w > half).to(tl.int32) - (w < -half).to(tl.int32)


@triton.jit
def pack_kernel(
    weight, partial, packed, scale, N: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
    PARTIALS: tl.constexpr, P2: tl.constexpr, TILE: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    s = absmean(partial, SIZE, PARTIALS, P2, SMALLEST)
    if tl.program_id(0) == 0:
        tl.store(scale, s)
    block = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]  # of 128 weights and 32 bytes
    row, first = block // BLOCKS, block % BLOCKS * 128
    j = tl.arange(0, 32)[None, :]
    byte = tl.zeros([TILE, 32], dtype=tl.int32)
    for lane in tl.static_range(4):
        k = first + 32 * lane + j
        w = tl.load(weight + row * K + k, mask=(row < N) & (k < K), other=0.0).to(tl.float32)
        byte |= (ternary(w, s) + 1) << (2 * lane)
    tl.store(packed + block * 32 + j, byte.to(tl.uint8), mask=row < N)


@triton.jit
def codes_kernel(
    weight, partial, codes, scale, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    PARTIALS: tl.constexpr, P2: tl.constexpr, TILE: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    s = absmean(partial, SIZE, PARTIALS, P2, SMALLEST)
    if tl.program_id(0) == 0:
        tl.store(scale, s)
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row, k = i // WIDTH, i % WIDTH
    w = tl.load(weight + row * K + k, mask=(row < N) & (k < K), other=0.0).to(tl.float32)
    tl.store(codes + i, ternary(w, s).to(tl.int8), mask=row < N)


@triton.jit
def unpack_kernel(
    packed, codes, BYTES: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE values of one row. Those behind the last block of `packed` are zeros."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    block = 256 // BITS  # codes in 32 bytes
    at = k // block * 32 + k % 32
    byte = tl.load(packed + row * BYTES + at, mask=at < BYTES, other=0).to(tl.int32)
    code = ((byte >> (k % block // 32 * BITS)) & (2**BITS - 1)) - OFFSET
    tl.store(codes + row * WIDTH + k, tl.where(at < BYTES, code, 0).to(tl.int8), mask=k < WIDTH)


@triton.jit
def dequantize_kernel(
    codes, scale, values, K: tl.constexpr, WIDTH: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    s = tl.load(scale + row) if PER_ROW else tl.load(scale)
    value = tl.load(codes + row * WIDTH + k, mask=k < K, other=0).to(tl.float32) * s
    tl.store(values + row * K + k, value.to(values.dtype.element_ty), mask=k < K)


def quantize_ternary(weight: Tensor, *, packed: bool = True) -> tuple[Tensor, Tensor]:
    """Codes and scale (float32 `[1, 1]`) of a weight, float `[N, K]`.

    The codes are uint8 `[N, packed_width(K, 2)]`, or with `packed=False` int8 `[N, padded(K)]`, with zeros behind K.
    Raises ValueError for other types and shapes and non-contiguous tensors.
    """
    check("weight", weight, None, weight.device, None, None)
    N, K = weight.shape
    if not N * K:
        raise ValueError(f"the weight is {list(weight.shape)}; an empty matrix has no mean")
    tiles = cdiv(N * K, _TILE)
    partials = min(tiles, _MAX_PARTIALS)
    partial = torch.empty(partials, dtype=torch.float32, device=weight.device)
    scale = torch.empty(1, 1, dtype=torch.float32, device=weight.device)
    launch(
        absolute_sum_kernel, (partials,), weight, partial, SIZE=N * K, PARTIALS=partials, STEPS=cdiv(tiles, partials),
        TILE=_TILE,
    )  # fmt: skip
    sums: dict[str, Any] = {"SIZE": N * K, "PARTIALS": partials, "P2": power_of_2(partials), "SMALLEST": SCALE_EPS}
    if packed:
        codes = torch.empty(N, packed_width(K, 2), dtype=torch.uint8, device=weight.device)
        blocks = codes.shape[1] // 32
        launch(
            pack_kernel,
            (cdiv(N * blocks, 32),),
            weight,
            partial,
            codes,
            scale,
            N=N,
            K=K,
            BLOCKS=blocks,
            TILE=32,
            **sums,
        )
    else:
        codes = torch.empty(N, padded(K), dtype=torch.int8, device=weight.device)
        launch(
            codes_kernel, (cdiv(codes.numel(), _TILE),), weight, partial, codes, scale, N=N, K=K, WIDTH=codes.shape[1],
            TILE=_TILE, **sums,
        )  # fmt: skip
    return codes, scale


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Signed codes int8 `[N, padded(K)]`, zeros behind the last block, of packed rows uint8 `[N, bytes]`."""
    check("packed", packed, torch.uint8, packed.device, None, packed_width(in_features, bits))
    N, width = packed.shape[0], padded(in_features)
    codes = torch.empty(N, width, dtype=torch.int8, device=packed.device)
    if N:
        tile = min(1024, power_of_2(width))
        launch(
            unpack_kernel, (N, cdiv(width, tile)), packed, codes, BYTES=packed.shape[1], WIDTH=width, BITS=bits,
            OFFSET=OFFSET[bits], TILE=tile,
        )  # fmt: skip
    return codes


def dequantize(codes: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """`codes * scale` in `dtype`, `[N, K]`: codes int8 `[N, padded(K)]`, scale float32 of 1 or N values."""
    check("codes", codes, torch.int8, codes.device, None, padded(in_features))
    N = codes.shape[0]
    if scale.device != codes.device or scale.dtype != torch.float32 or scale.numel() not in (1, N):
        raise ValueError(f"the scale is {scale.dtype} {list(scale.shape)} on {scale.device}; give float32, 1 or {N}")
    values = torch.empty(N, in_features, dtype=dtype, device=codes.device)
    if N:
        tile = min(1024, power_of_2(in_features))
        launch(
            dequantize_kernel, (N, cdiv(in_features, tile)), codes, scale.contiguous(), values, K=in_features,
            WIDTH=codes.shape[1], PER_ROW=scale.numel() > 1, TILE=tile,
        )  # fmt: skip
    return values
