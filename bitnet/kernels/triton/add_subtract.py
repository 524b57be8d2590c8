"""The ternary product as BitNet means it: additions and subtractions only, no multiplication.

    y[m, n] = sum of x[m, k] over w[n, k] = +1  -  sum of x[m, k] over w[n, k] = -1

`select_kernel` says just that, one weight a lane. `four_lanes_kernel` does it to four weights in a 32-bit register, on
unsigned bytes u = x + 128 and their complements 255 - u = 127 - x:

    plus = 0xFF where w = +1, zero = 0xFF where w = 0        from the two bits of the code w + 1
    v = (u xor ~plus) and ~zero                              u, 255 - u or 0
    sum(v) = y + 128 * count(+1) + 127 * count(-1)           summed in two 16-bit lanes a register

so y = sum(v) - 128 * count(w != 0) + count(w = -1). A thread adds 16 weights, 16-bit lanes of at most 2040, before it
folds them into its int32. One program takes ROWS rows of w and one token; no tail of K needs care, since it is padded
with the code of 0.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

from bitnet.kernels.triton.language import store_product, tl, triton


@triton.jit
def select_kernel(
    packed, x, total, x_scale, w_scale, bias, residual, y, N: tl.constexpr, BYTES: tl.constexpr, X_STRIDE: tl.constexpr,
    PER_ROW: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    for start in range(0, BYTES, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = at < BYTES
        byte = tl.load(
            packed + n[:, None].to(tl.int64) * BYTES + at[None, :], mask=(n[:, None] < N) & inside[None, :], other=0x55
        )
        k = at // 32 * 128 + at % 32
        for lane in tl.static_range(4):
            code = (byte >> (2 * lane)) & 3
            value = tl.load(x + m.to(tl.int64) * X_STRIDE + k + 32 * lane, mask=inside, other=0).to(tl.int32)[None, :]
            acc += tl.where(code == 2, value, 0) - tl.where(code == 0, value, 0)
    token = tl.zeros([ROWS], dtype=tl.int32) + m
    store_product(
        tl.sum(acc, 1), y, token, n, n < N, x_scale, w_scale, bias, residual, N, PER_ROW, BIAS, RESIDUAL
    )  # fmt: skip


@triton.jit
def spread(w, BIT: tl.constexpr, ASM: tl.constexpr):
    """0xFF in every byte of w that has this bit, else 0."""
    if ASM == "ptx":
        # The bit to the top of its byte, then prmt copies each byte's sign over the byte.
        shifted = w << (7 - BIT)
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0xba98;", "=r,r", [shifted], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = (w >> BIT) & 0x01010101
        return (bits << 8) - bits


@triton.jit
def select_bytes(u, plus, zero, ASM: tl.constexpr):
    """(u xor ~plus) and ~zero."""
    if ASM == "ptx":  # one instruction; the compiler finds it in two
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x41;", "=r,r,r,r", [u, plus, zero], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (u ^ ~plus) & ~zero


@triton.jit
def odd_bytes(v, ASM: tl.constexpr):
    """(v >> 8) & 0x00FF00FF."""
    if ASM == "ptx":
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (v >> 8) & 0x00FF00FF


@triton.jit
def count_ones(v, ASM: tl.constexpr):
    if ASM == "ptx":
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)
    else:
        v = (v & 0x55555555) + ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v & 0x0F0F0F0F) + ((v >> 4) & 0x0F0F0F0F)
        v = (v & 0x00FF00FF) + ((v >> 8) & 0x00FF00FF)
        return (v & 0xFFFF) + ((v >> 16) & 0xFFFF)


@triton.jit
def four_lanes_kernel(
    packed, x, total, x_scale, w_scale, bias, residual, y, N: tl.constexpr, WORDS: tl.constexpr, X_STRIDE: tl.constexpr,
    PER_ROW: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """packed and x are read as int32, four bytes a word; WORDS to a row of packed, X_STRIDE to a row of x."""
    m = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    words = packed.to(tl.pointer_type(tl.int32))
    x_words = x.to(tl.pointer_type(tl.int32)) + m.to(tl.int64) * X_STRIDE
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    # Rows with few words share a warp: one load of x in the shape of w's tile then needs no exchange.
    shape: tl.constexpr = 1 if COLUMNS >= 128 else ROWS
    for start in tl.static_range(0, WORDS, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = at < WORDS
        w = tl.load(
            words + n[:, None].to(tl.int64) * WORDS + at[None, :], mask=(n[:, None] < N) & inside[None, :],
            other=0x55555555,
        )  # fmt: skip
        lanes = x_words + tl.broadcast_to((at // 8 * 32 + at % 8)[None, :], [shape, COLUMNS])
        even = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
        odd = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
        for lane in tl.static_range(4):
            u = tl.load(lanes + 8 * lane, mask=inside[None, :], other=0) ^ -0x7F7F7F80  # 0x80808080: + 128 a byte
            plus = spread(w, 2 * lane + 1, ASM)
            zero = spread(w, 2 * lane, ASM)
            v = select_bytes(tl.broadcast_to(u, [ROWS, COLUMNS]), plus, zero, ASM)
            even += v & 0x00FF00FF
            odd += odd_bytes(v, ASM)
        both = even + odd
        minus = ~(w | (w >> 1)) & 0x55555555  # codes 00, one bit each
        nonzero = ~w & 0x55555555  # codes 00 and 10
        counts = count_ones(minus, ASM) - 128 * count_ones(nonzero, ASM)
        acc += (both & 0xFFFF) + ((both >> 16) & 0xFFFF) + counts
    token = tl.zeros([ROWS], dtype=tl.int32) + m
    store_product(
        tl.sum(acc, 1), y, token, n, n < N, x_scale, w_scale, bias, residual, N, PER_ROW, BIAS, RESIDUAL
    )  # fmt: skip
