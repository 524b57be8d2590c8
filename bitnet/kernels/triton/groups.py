"""The ternary product with a scale for each group of 64 or 128 columns: int8 matrix instructions within a group.

    y = s_x * sum over groups of  s_w (w_q @ x_q)  + bias         int32 within a group, float32 between, in their order

A packed block of 32 bytes is 128 columns (`bitnet/quant/packing.py`): one group of 128, or two of 64, whose codes are
lanes of the same bytes. The codes are turned into -1, 0 and 1 before they are multiplied, so no sum of x is needed.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

import torch
from torch import Tensor

from bitnet.kernels.reference import check_group_scale
from bitnet.kernels.triton.activations import padded
from bitnet.kernels.triton.language import assembly, cdiv, check, launch, power_of_2, tl, triton, wait_for_inputs
from bitnet.kernels.triton.tensor_core import unpack_lane
from bitnet.quant.packing import BYTES_PER_BLOCK, codes_per_block, packed_width

GROUPS = (64, 128)


@triton.jit(do_not_specialize=["M"])
def group_kernel(
    packed, x, x_scale, w_scale, bias, y, M, N: tl.constexpr, BLOCKS: tl.constexpr, X_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr, IN_BLOCK: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, tiles of rows). GROUPS of a row, IN_BLOCK of them in a block of 32 bytes."""
    wait_for_inputs(PDL)
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, 32)[None, :]
    w_rows = packed + n[:, None].to(tl.int64) * (BLOCKS * 32)
    x_rows = x + m[:, None].to(tl.int64) * X_STRIDE
    sums = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    lanes: tl.constexpr = 4 // IN_BLOCK
    for block in range(BLOCKS):
        byte = tl.load(w_rows + block * 32 + j, mask=n[:, None] < N, other=0)
        for group in tl.static_range(IN_BLOCK):
            acc = tl.zeros([ROWS, TOKENS], dtype=tl.int32)
            for lane in tl.static_range(group * lanes, (group + 1) * lanes):
                x_lane = tl.load(x_rows + block * 128 + 32 * lane + j, mask=m[:, None] < M, other=0)
                code = (unpack_lane(byte, lane, 2, ASM) - 1).to(tl.int8)
                acc = tl.dot(code, tl.trans(x_lane), acc, out_dtype=tl.int32)
            at = tl.zeros([ROWS], dtype=tl.int32) + (block * IN_BLOCK + group)
            scale = tl.load(w_scale + n.to(tl.int64) * GROUPS + at, mask=(n < N) & (at < GROUPS), other=0.0)
            sums += acc.to(tl.float32) * scale.to(tl.float32)[:, None]
    inside = (n[:, None] < N) & (m[None, :] < M)
    value = sums * tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
    if BIAS:
        value = value + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], value.to(y.dtype.element_ty), mask=inside)


def group_product(
    codes: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, *, in_features: int,
    group_size: int, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The product `[M, N]` in `dtype`.

    codes int8 `[M, padded(K)]` and x_scale float32 `[M]` are what `quantize_activations` returns; packed uint8
    `[N, packed_width(K, 2)]`; w_scale float16 or float32 `[N, ceil(K / group_size)]`; bias float `[N]`. Raises
    ValueError for tensors that do not fit together, before anything is launched.
    """
    if group_size not in GROUPS:
        raise ValueError(f"group_size is {group_size}; the Triton kernel takes {' or '.join(map(str, GROUPS))}")
    M, N, device = codes.shape[0], packed.shape[0], packed.device
    width = packed_width(in_features, 2)
    check("packed", packed, torch.uint8, device, None, width)
    check("codes", codes, torch.int8, device, None, padded(in_features))
    check("x_scale", x_scale, torch.float32, device, M)
    check_group_scale(w_scale, N, in_features, group_size)
    check("w_scale", w_scale, None, device, None, None)
    if bias is not None:
        check("bias", bias, None, device, N)
    y = torch.empty(M, N, dtype=dtype, device=device)
    if not M or not N:
        return y
    rows, tokens = 64, min(64, max(16, power_of_2(M)))
    launch(
        group_kernel, (cdiv(M, tokens), cdiv(N, rows)), packed, codes, x_scale, w_scale,
        w_scale if bias is None else bias, y, M, N=N, BLOCKS=width // BYTES_PER_BLOCK, X_STRIDE=codes.shape[1],
        GROUPS=w_scale.shape[1], IN_BLOCK=codes_per_block(2) // group_size, BIAS=bias is not None, ROWS=rows,
        TOKENS=tokens, ASM=assembly(), warps=4, stages=3,
    )  # fmt: skip
    return y
