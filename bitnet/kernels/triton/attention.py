"""What a decoding step does between its products: embedding rows, rotary positions and cache, attention of one token.

    embed             h = (code - 128) * scale of the token's row                       INT8 table
    rotate            q, k rotated by the angles of their positions; k and v to the cache
    attend            softmax(q k^T / sqrt(D)) v over the cached positions of one new token

`attend` cuts the positions between SPLITS programs, which keep a running maximum and sum (arXiv 2205.14135), and a
second launch joins their parts in a fixed order. The number of filled positions is read from the device, so that one
CUDA graph serves every step.

Letters: B batch, T new tokens, M = B * T, H query heads, G key/value heads, R = H / G, D head_dim, S capacity of the
cache, C hidden_size, V vocab_size.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

import math

import torch
from torch import Tensor

from bitnet.kernels.triton.language import cdiv, check, launch, power_of_2, tl, triton, wait_for_inputs

TILE = 64
"""Cached positions that a program of `attend` takes at a time."""
MAX_SPLITS = 16


@triton.jit
def embed_kernel(ids, packed, scale, h, C: tl.constexpr, BYTES: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    token = tl.load(ids + row + tl.zeros([BLOCK], tl.int64))
    exists = (token >= 0) & (token < V)
    code = tl.load(packed + token * BYTES + c, mask=exists & (c < C), other=128).to(tl.int32) - 128
    value = code.to(tl.float32) * tl.load(scale + token, mask=exists, other=float("nan"))
    tl.store(h + row * C + c, value.to(h.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(
    qkv, cos, sin, start, q, keys, values, T, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one head of q, k or v of one token. BLOCK is at least D / 2."""
    wait_for_inputs(PDL)
    m = tl.program_id(0)
    head = tl.program_id(1)
    half: tl.constexpr = D // 2
    i = tl.arange(0, BLOCK)
    inside = i < half
    source = qkv + (m.to(tl.int64) * (H + 2 * G) + head) * D + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(start) + m % T + tl.zeros([BLOCK], tl.int32)
    inside &= (position < S) & (position < POSITIONS)
    if head < H + G:
        c = tl.load(cos + position * D + i, mask=inside, other=0.0)
        s = tl.load(sin + position * D + i, mask=inside, other=0.0)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    if head < H:
        target = q + (m.to(tl.int64) * H + head) * D + i
        tl.store(target, first.to(q.dtype.element_ty), mask=inside)
        tl.store(target + half, second.to(q.dtype.element_ty), mask=inside)
    elif head < H + G:
        target = keys + (((m // T) * G + head - H).to(tl.int64) * S + position) * D + i
        tl.store(target, first.to(keys.dtype.element_ty), mask=inside)
        tl.store(target + half, second.to(keys.dtype.element_ty), mask=inside)
    else:
        target = values + (((m // T) * G + head - H - G).to(tl.int64) * S + position) * D + i
        tl.store(target, first.to(values.dtype.element_ty), mask=inside)
        tl.store(target + half, second.to(values.dtype.element_ty), mask=inside)


@triton.jit
def attend_kernel(
    q, keys, values, start, part, largest, total, R: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    SCALE: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the R query heads of one key/value head, on every SPLITS-th tile of positions. SCALE is
    log2(e) / sqrt(D), so that powers are of 2."""
    wait_for_inputs(PDL)
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(start) + 1
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    query = tl.load(q + (group * R + r) * D + d, mask=(r < R) & (d < D), other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        s = (step * SPLITS + split) * TILE + tl.arange(0, TILE)
        seen = (s < length) & (s < S)
        at = (group * S + s[:, None]) * D + d
        k = tl.load(keys + at, mask=seen[:, None] & (d < D), other=0.0)
        v = tl.load(values + at, mask=seen[:, None] & (d < D), other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * SCALE
        score = tl.where(seen[None, :], score, float("-inf"))
        top = tl.maximum(highest, tl.max(score, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)  # no position so far: -inf - -inf would be NaN
        share = tl.exp2(score - finite[:, None])
        shrink = tl.exp2(highest - finite)
        weight = weight * shrink + tl.sum(share, 1)
        acc = acc * shrink[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        highest = top
    row = (group * SPLITS + split) * R + tl.arange(0, ROWS)
    tl.store(largest + row, highest, mask=tl.arange(0, ROWS) < R)
    tl.store(total + row, weight, mask=tl.arange(0, ROWS) < R)
    tl.store(part + row[:, None] * D + d, acc, mask=(r < R) & (d < D))


@triton.jit
def join_kernel(part, largest, total, out, R: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr):
    wait_for_inputs(PDL)
    head = tl.program_id(0).to(tl.int64)  # of B * H
    row = (head // R * SPLITS + tl.arange(0, SPLITS)) * R + head % R
    d = tl.arange(0, BLOCK)[None, :]
    highest = tl.load(largest + row)
    factor = tl.exp2(highest - tl.max(highest, 0))
    weight = tl.sum(factor * tl.load(total + row), 0)
    acc = tl.load(part + row[:, None] * D + d, mask=d < D, other=0.0)
    value = tl.sum(acc * factor[:, None], 0) / weight
    column = tl.arange(0, BLOCK)
    tl.store(out + head * D + column, value.to(out.dtype.element_ty), mask=column < D)


def embed(ids: Tensor, packed: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows `[M, C]` of an INT8 table for ids int64 `[M]`; an id outside the table gives NaN.

    packed uint8 `[V, packed_width(C, 8)]`, in which 8-bit codes lie in their order; scale float32 `[V, 1]`.
    """
    check("ids", ids, torch.int64, packed.device, None)
    check("packed", packed, torch.uint8, ids.device, None, None)
    check("scale", scale, torch.float32, ids.device, packed.shape[0], 1)
    h = torch.empty(len(ids), width, dtype=dtype, device=ids.device)
    launch(
        embed_kernel, (len(ids),), ids, packed, scale, h, C=width, BYTES=packed.shape[1], V=packed.shape[0],
        BLOCK=power_of_2(width),
    )  # fmt: skip
    return h


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, start: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Rotated queries `[B, T, H, D]` of qkv `[B, T, (H + 2 G) * D]`; k and v go to the cache `[B, G, S, D]`.

    start: int32 `[1]`, the positions that are filled. cos, sin: float32 `[positions, D]`, both halves alike. What would
    lie behind the cache's or the tables' end is not written.
    """
    B, G, S, D = keys.shape
    check("qkv", qkv, None, keys.device, B, None, (heads + 2 * G) * D)
    for name, table in (("cos", cos), ("sin", sin)):
        check(name, table, torch.float32, keys.device, None, D)
    check("start", start, torch.int32, keys.device, 1)
    check("values", values, keys.dtype, keys.device, B, G, S, D)
    T = qkv.shape[1]
    q = torch.empty(B, T, heads, D, dtype=qkv.dtype, device=qkv.device)
    launch(
        rotate_kernel, (B * T, heads + 2 * G), qkv, cos, sin, start, q, keys, values, T, H=heads, G=G, D=D, S=S,
        POSITIONS=cos.shape[0], BLOCK=power_of_2(D // 2), warps=1,
    )  # fmt: skip
    return q


def attend(q: Tensor, keys: Tensor, values: Tensor, start: Tensor) -> Tensor:
    """Attention `[B, 1, H * D]` of one new token, queries `[B, 1, H, D]`, over the first start + 1 positions of the
    cache `[B, G, S, D]`, of q's type."""
    B, G, S, D = keys.shape
    H = q.shape[2]
    check("q", q, None, keys.device, B, 1, H, D)
    check("keys", keys, q.dtype, q.device, B, G, S, D)
    check("values", values, q.dtype, q.device, B, G, S, D)
    check("start", start, torch.int32, q.device, 1)
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} key/value heads; H must be a multiple of G")
    R, splits = H // G, min(MAX_SPLITS, power_of_2(cdiv(S, TILE)))
    part = torch.empty(B * G, splits, R, D, dtype=torch.float32, device=q.device)
    largest, total = (
        torch.empty(B * G, splits, R, dtype=torch.float32, device=q.device),
        torch.empty(B * G, splits, R, dtype=torch.float32, device=q.device),
    )
    out = torch.empty(B, 1, H * D, dtype=q.dtype, device=q.device)
    block = max(16, power_of_2(D))
    launch(
        attend_kernel, (B * G, splits), q, keys, values, start, part, largest, total, R=R, D=D, S=S,
        SCALE=math.log2(math.e) / math.sqrt(D), SPLITS=splits, STEPS=cdiv(S, splits * TILE),
        ROWS=max(16, power_of_2(R)), BLOCK=block, TILE=TILE,
    )  # fmt: skip
    launch(join_kernel, (B * H,), part, largest, total, out, R=R, D=D, SPLITS=splits, BLOCK=block)
    return out
