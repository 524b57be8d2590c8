"""Products on int8 matrix instructions: packed weights, unpacked in registers, for tens to hundreds of tokens, and
int8 weights, unpacked beforehand, for more (prefill, the forward pass of training).

    packed_kernel    y^T = c x^T - offset * sum(x)      c unsigned as it is packed; the weights are the left operand
    sum_parts_kernel y = epilogue(sum of the parts)     where K was split between programs, in a fixed order
    dense_kernel     y = x w^T

Byte j of a packed block holds codes that are 32 apart (`bitnet/quant/packing.py`), so one lane of a run of bytes is a
run of 32 neighbouring k, the depth of one matrix instruction. Splitting K fills a GPU when there are few rows and
tokens: every program writes its int32 part and a second launch adds them, so no sum depends on who came first.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

from bitnet.kernels.triton.language import store_product, tl, triton, wait_for_inputs


@triton.jit
def unpack_lane(byte, LANE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """One lane of packed bytes as int8: c for 2 and 4 bits, c - 128 for 8. In PTX four bytes to a shift and a mask."""
    if BITS == 8:
        code = byte ^ 0x80
    elif ASM == "ptx" and BITS * LANE == 0:
        code = byte & (2**BITS - 1)
    elif ASM == "ptx" and BITS == 4:
        code = tl.inline_asm_elementwise(
            "{shr.u32 $0, $1, 4; and.b32 $0, $0, 0x0f0f0f0f;}", "=r,r", [byte], dtype=tl.uint8, is_pure=True, pack=4
        )
    elif ASM == "ptx" and LANE == 1:
        code = tl.inline_asm_elementwise(
            "{shr.u32 $0, $1, 2; and.b32 $0, $0, 0x03030303;}", "=r,r", [byte], dtype=tl.uint8, is_pure=True, pack=4
        )
    elif ASM == "ptx" and LANE == 2:
        code = tl.inline_asm_elementwise(
            "{shr.u32 $0, $1, 4; and.b32 $0, $0, 0x03030303;}", "=r,r", [byte], dtype=tl.uint8, is_pure=True, pack=4
        )
    elif ASM == "ptx":
        code = tl.inline_asm_elementwise(
            "{shr.u32 $0, $1, 6; and.b32 $0, $0, 0x03030303;}", "=r,r", [byte], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        code = (byte >> (BITS * LANE)) & (2**BITS - 1)
    return code.to(tl.int8, bitcast=True)


@triton.jit(do_not_specialize=["M"])
def packed_kernel(
    packed, x, total, x_scale, w_scale, bias, residual, y, M, N: tl.constexpr, BYTES: tl.constexpr,
    X_STRIDE: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, tiles of rows, SPLIT). With SPLIT > 1 y is int32 `[SPLIT, M, N]`, else `[M, N]`."""
    wait_for_inputs(PDL)
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    steps: tl.constexpr = (BYTES + COLUMNS * SPLIT - 1) // (COLUMNS * SPLIT)
    w_rows = packed + n[:, None].to(tl.int64) * BYTES
    x_rows = x + m[:, None].to(tl.int64) * X_STRIDE
    acc = tl.zeros([ROWS, TOKENS], dtype=tl.int32)
    for step in range(steps):
        at = (part * steps + step) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = at < BYTES
        byte = tl.load(w_rows + at, mask=(n[:, None] < N) & inside, other=0)
        k = at // 32 * (256 // BITS) + at % 32
        for lane in tl.static_range(8 // BITS):
            x_lane = tl.load(x_rows + k + 32 * lane, mask=(m[:, None] < M) & inside, other=0)
            acc = tl.dot(unpack_lane(byte, lane, BITS, ASM), tl.trans(x_lane), acc, out_dtype=tl.int32)
    inside = (n[:, None] < N) & (m[None, :] < M)
    if part == 0:  # c - offset = w
        acc -= OFFSET * tl.load(total + m, mask=m < M, other=0)[None, :]
    y += part.to(tl.int64) * M * N
    store_product(
        acc, y, m[None, :], n[:, None], inside, x_scale, w_scale, bias, residual, N, PER_ROW, BIAS, RESIDUAL
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def sum_parts_kernel(
    parts, x_scale, w_scale, bias, residual, y, M, N: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    m = tl.program_id(0)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([TILE], dtype=tl.int32)
    for part in tl.static_range(SPLIT):
        at = (part * M + m).to(tl.int64) * N + n
        acc += tl.load(parts + at, mask=n < N, other=0)
    token = tl.zeros([TILE], dtype=tl.int32) + m
    store_product(acc, y, token, n, n < N, x_scale, w_scale, bias, residual, N, PER_ROW, BIAS, RESIDUAL)


@triton.jit(do_not_specialize=["M"])
def dense_kernel(
    codes, x, x_scale, w_scale, bias, residual, y, M, N: tl.constexpr, WIDTH: tl.constexpr, PER_ROW: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """codes `[N, WIDTH]` and x `[M, WIDTH]` int8. Programs run down GROUP tiles of tokens before the next tile of rows,
    so that the tiles at work share what the second-level cache holds."""
    tiles_m, tiles_n = tl.cdiv(M, TOKENS), tl.cdiv(N, ROWS)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    m = (group * GROUP + within % height) * TOKENS + tl.arange(0, TOKENS)
    n = within // height * ROWS + tl.arange(0, ROWS)
    x_rows = x + tl.minimum(m, M - 1)[:, None].to(tl.int64) * WIDTH
    w_rows = codes + tl.minimum(n, N - 1)[:, None].to(tl.int64) * WIDTH
    acc = tl.zeros([TOKENS, ROWS], dtype=tl.int32)
    for start in range(0, WIDTH, DEPTH):
        k = start + tl.arange(0, DEPTH)[None, :]
        acc = tl.dot(tl.load(x_rows + k), tl.trans(tl.load(w_rows + k)), acc, out_dtype=tl.int32)
    inside = (m[:, None] < M) & (n[None, :] < N)
    store_product(
        acc, y, m[:, None], n[None, :], inside, x_scale, w_scale, bias, residual, N, PER_ROW, BIAS, RESIDUAL
    )  # fmt: skip
