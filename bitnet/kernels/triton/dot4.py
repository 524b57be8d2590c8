"""Products for a few tokens on integer dot instructions: four codes times four activations, added to an int32.

    y = sum(c * x) - offset * sum(x)        c = w + offset, unsigned as it is packed; offset * sum(x) once, at the end

A 32-bit word of packed 2-bit codes holds 16 of them, four to a lane (`bitnet/quant/packing.py`). Two lanes are
multiplied in place, masked with 0x03 and 0x0C: the second gives 4 c, and its sum, an exact multiple of 4, is shifted at
the end. So 16 weights take one shift, four masks and four dot products. Weights are read once for all tokens.
"""

# ruff: noqa: RUF005 - Triton's tuples know + and no unpacking
# mypy: disable-error-code="no-untyped-def, valid-type, assignment, misc, var-annotated"

from bitnet.kernels.triton.language import store_product, tl, triton, wait_for_inputs


@triton.jit
def dot4(a, b, acc, ASM: tl.constexpr):
    """acc + the product sum of four signed bytes in a and in b."""
    if ASM == "ptx":
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    elif ASM == "gcn":
        return tl.inline_asm_elementwise(
            "v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            acc += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return acc


@triton.jit
def add_products(w, x_words, inside, low, high, BITS: tl.constexpr, ASM: tl.constexpr):
    """Add all weights in the words w `[ROWS, COLUMNS]` times one token's x to low, and 4 times their products to high.

    x_words: pointers `[1, COLUMNS]` or `[ROWS, COLUMNS]` to the words of lane 0.
    """
    for lane in tl.static_range(8 // BITS):
        x = tl.broadcast_to(tl.load(x_words + 8 * lane, mask=inside, other=0), w.shape)
        if BITS == 8:
            low = dot4(w ^ -0x7F7F7F80, x, low, ASM)  # 0x80808080: c - 128, signed
        elif BITS == 4:
            low = dot4((w >> (4 * lane)) & 0x0F0F0F0F, x, low, ASM)
        elif lane % 2 == 0:
            low = dot4((w >> (2 * lane)) & 0x03030303, x, low, ASM)
        else:
            high = dot4((w >> (2 * lane - 2)) & 0x0C0C0C0C, x, high, ASM)
    return low, high


@triton.jit
def dot4_kernel(
    packed, x, total, x_scale, w_scale, bias, residual, y, N: tl.constexpr, WORDS: tl.constexpr, X_STRIDE: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """packed and x are read as int32, four bytes a word; WORDS to a row of packed, X_STRIDE to a row of x. One program:
    ROWS rows of weights times all tokens, 1 to 4 of them. The first AHEAD steps' weights are read before the wait."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    words = packed.to(tl.pointer_type(tl.int32)) + n[:, None].to(tl.int64) * WORDS
    x_words = x.to(tl.pointer_type(tl.int32))
    zeros = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    low0, low1, low2, low3 = zeros, zeros, zeros, zeros
    high0, high1, high2, high3 = zeros, zeros, zeros, zeros
    # Rows with few words share a warp: one load of x in the shape of w's tile then needs no exchange.
    shape: tl.constexpr = 1 if COLUMNS >= 128 else ROWS
    steps: tl.constexpr = (WORDS + COLUMNS - 1) // COLUMNS
    column = tl.arange(0, COLUMNS)[None, :]
    ahead = ()
    for step in tl.static_range(AHEAD):
        at = step * COLUMNS + column
        ahead = ahead + (tl.load(words + at, mask=(n[:, None] < N) & (at < WORDS), other=0),)
    wait_for_inputs(PDL)
    for step in tl.static_range(steps):
        at = step * COLUMNS + column
        inside = at < WORDS
        if step < AHEAD:  # noqa: SIM108 - decided while compiling
            w = ahead[step]
        else:
            w = tl.load(words + at, mask=(n[:, None] < N) & inside, other=0)
        lanes = x_words + tl.broadcast_to(at // 8 * (64 // BITS) + at % 8, [shape, COLUMNS])
        low0, high0 = add_products(w, lanes, inside, low0, high0, BITS, ASM)
        if TOKENS > 1:
            low1, high1 = add_products(w, lanes + X_STRIDE, inside, low1, high1, BITS, ASM)
        if TOKENS > 2:
            low2, high2 = add_products(w, lanes + 2 * X_STRIDE, inside, low2, high2, BITS, ASM)
        if TOKENS > 3:
            low3, high3 = add_products(w, lanes + 3 * X_STRIDE, inside, low3, high3, BITS, ASM)
    for m in tl.static_range(TOKENS):
        if m == 0:
            acc = tl.sum(low0 + (high0 >> 2), 1)
        elif m == 1:
            acc = tl.sum(low1 + (high1 >> 2), 1)
        elif m == 2:
            acc = tl.sum(low2 + (high2 >> 2), 1)
        else:
            acc = tl.sum(low3 + (high3 >> 2), 1)
        acc -= OFFSET * tl.load(total + m)
        token = tl.full([ROWS], m, tl.int32)
        store_product(acc, y, token, n, n < N, x_scale, w_scale, bias, residual, N, PER_ROW, BIAS, RESIDUAL)
