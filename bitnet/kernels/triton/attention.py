"""What a decoding step does between its products: embedding rows, rotary positions and cache, attention of one token.

    embed             h = (code - 128) * scale of the token's row                       INT8 table
    rotate            q, k rotated by the angles of their positions; k and v to the cache      several tokens
    attend            the same for one new token, and softmax(q k^T / sqrt(D)) v over all positions

`attend` cuts the positions between SPLITS programs, which keep a running maximum and sum (arXiv 2205.14135); the one
that comes last joins the parts in a fixed order. The number of filled positions is read from the device, so that one
CUDA graph serves every step and no program walks further than they reach.

Keys and values are stored in a float type, FP8 (E4M3) among them, or as INT8 codes with a float32 scale for every
position of a head (absmax, as activations are quantized); attention sees what is stored, the newest position included.
FP8 has no scale: it keeps four significant bits of numbers from 2^-6 to 448, of smaller ones what is a multiple of
2^-9, and larger ones become 448. Kernels see it as bytes (`float8.py`).

Letters: B batch, T new tokens, M = B * T, H query heads, G key/value heads, R = H / G, D head_dim, S capacity of the
cache, C hidden_size, V vocab_size.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

import math

import torch
from torch import Tensor

from bitnet.kernels.triton.activations import codes_of, scale_of
from bitnet.kernels.triton.float8 import decode_e4m3, encode_e4m3
from bitnet.kernels.triton.language import cdiv, check, launch, power_of_2, tl, triton, wait_for_inputs
from bitnet.kernels.triton.limits import MAX_HEAD_VALUES, attention_tile, head_values
from bitnet.quant.affine import SCALE_EPS

TILE = 64
"""Cached positions that a program of `attend` takes at a time, at most."""
MAX_SPLITS = 32
PROGRAMS = 128
"""Of one launch of `attend`, at least, where there are positions enough for them; more were slower on an H200."""


@triton.jit
def embed_kernel(
    ids, packed, scale, h, C: tl.constexpr, BYTES: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    token = tl.load(ids + row + tl.zeros([BLOCK], tl.int64))
    exists = (token >= 0) & (token < V)
    code = tl.load(packed + token * BYTES + c, mask=exists & (c < C), other=128).to(tl.int32) - 128
    value = code.to(tl.float32) * tl.load(scale + token, mask=exists, other=float("nan"))
    tl.store(h + row * C + c, value.to(h.dtype.element_ty), mask=c < C)


@triton.jit
def largest_of(x):
    """Absolute values as integers, which keep their order."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def store_halves(
    cache, scale, place, first, second, i, inside, stored: tl.constexpr, D: tl.constexpr, SMALLEST: tl.constexpr
):
    """A key or value of a head to the position `place` of the cache, as codes of what a cache of type `stored` would
    hold, or in its own type."""
    held: tl.constexpr = cache.dtype.element_ty
    if held == tl.uint8:
        first = encode_e4m3(first.to(stored).to(tl.float32))
        second = encode_e4m3(second.to(stored).to(tl.float32))
    if held == tl.int8:
        first, second = first.to(stored).to(tl.float32), second.to(stored).to(tl.float32)
        s = scale_of(tl.maximum(tl.max(largest_of(first), 0), tl.max(largest_of(second), 0)), SMALLEST)
        tl.store(scale + place, s + first * 0, mask=inside & (i == 0))
        first, second = codes_of(first, s), codes_of(second, s)
    target = cache + place * D + i
    tl.store(target, first.to(held), mask=inside)
    tl.store(target + D // 2, second.to(held), mask=inside)


@triton.jit(do_not_specialize=["T", "S"])
def rotate_kernel(
    qkv, cos, sin, start, q, keys, values, key_scale, value_scale, T, S, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr, SMALLEST: tl.constexpr, PDL: tl.constexpr,
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
        place = ((m // T) * G + head - H).to(tl.int64) * S + position
        store_halves(keys, key_scale, place, first, second, i, inside, q.dtype.element_ty, D, SMALLEST)
    else:
        place = ((m // T) * G + head - H - G).to(tl.int64) * S + position
        store_halves(values, value_scale, place, first, second, i, inside, q.dtype.element_ty, D, SMALLEST)


@triton.jit
def turned(pointer, d, inside, c, s, D: tl.constexpr):
    """Heads of q or k, rotated: `first * c - second * s` in the first half, `second * c + first * s` in the other."""
    own = tl.load(pointer + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(pointer + tl.where(d < D // 2, d + D // 2, d - D // 2), mask=inside, other=0.0).to(tl.float32)
    return own * c + tl.where(d < D // 2, -(other * s), other * s)


@triton.jit
def cached_tile(
    keys, values, key_scale, value_scale, tile, position, S, stored: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys and values `[TILE, BLOCK]` of the tile's positions before `position`, zeros for the others, in the type
    `stored`. keys, values and their scales: of one head, from its position 0 on."""
    t = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, BLOCK)[None, :]
    there = (t < position) & (t < S)
    old = there[:, None] & (d < D)
    at = t[:, None] * D + d
    k, v = tl.load(keys + at, mask=old, other=0), tl.load(values + at, mask=old, other=0)
    if k.dtype == tl.uint8:
        k, v = decode_e4m3(k), decode_e4m3(v)
    if k.dtype == tl.int8:
        k = k.to(tl.float32) * tl.load(key_scale + t, mask=there, other=0.0)[:, None]
        v = v.to(tl.float32) * tl.load(value_scale + t, mask=there, other=0.0)[:, None]
    return k.to(stored), v.to(stored)


@triton.jit
def as_held(x, cache, SMALLEST: tl.constexpr):
    """A key or value x `[1, BLOCK]` in the type of the cache, its scale `[1, 1]`, which counts for INT8 codes, and the
    value that these stand for, in x's type."""
    s = tl.full([1, 1], 1.0, tl.float32)
    if cache.dtype.element_ty == tl.int8:
        s = scale_of(tl.max(largest_of(x.to(tl.float32)), 1)[:, None], SMALLEST)
        held = codes_of(x.to(tl.float32), s).to(tl.int8)
        value = held.to(tl.float32) * s
    elif cache.dtype.element_ty == tl.uint8:
        held = encode_e4m3(x.to(tl.float32))
        value = decode_e4m3(held)
    else:
        held = x.to(cache.dtype.element_ty)
        value = held
    return held, s, value.to(x.dtype)


@triton.jit
def angles(cos, sin, position, S, D: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine `[1, BLOCK]` of a position, and where a key or value of it may be stored."""
    d = tl.arange(0, BLOCK)[None, :]
    here = position + tl.zeros([1, BLOCK], tl.int32)
    exists = (here < S) & (here < POSITIONS) & (d < D)
    c = tl.load(cos + position * D + d, mask=exists, other=0.0)
    return c, tl.load(sin + position * D + d, mask=exists, other=0.0), exists


@triton.jit
def attend_tiles(
    row, head, keys, values, key_scale, value_scale, k, v, c, s, exists, position, split, S, H: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Running maximum `[ROWS]`, sum and weighted values of the R query heads of key/value head `head` over every
    SPLITS-th tile from `split` on, whose first is (k, v); the new key and value, taken from the token's `row` of qkv,
    go to the cache."""
    R: tl.constexpr = H // G
    stored: tl.constexpr = k.dtype
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    wide, heads = d < D, r < R
    tile = split
    query = turned(row + (head * R + r) * D, d, wide & heads, c, s, D).to(stored)
    new_key = turned(row + (H + head) * D, d, wide, c, s, D).to(stored)
    new_value = tl.load(row + (H + G + head) * D + d, mask=wide, other=0.0)
    held_key, key_s, new_key = as_held(new_key, keys, SMALLEST)
    held_value, value_s, new_value = as_held(new_value, values, SMALLEST)
    if position // TILE % SPLITS == split:
        tl.store(keys + position * D + d, held_key, mask=exists)
        tl.store(values + position * D + d, held_value, mask=exists)
        if keys.dtype.element_ty == tl.int8:
            tl.store(key_scale + position + d * 0, key_s + d * 0.0, mask=exists & (d == 0))
            tl.store(value_scale + position + d * 0, value_s + d * 0.0, mask=exists & (d == 0))
    # Matrix instructions take 16 rows, too many for one query: there every place of the tile keeps its own maximum and
    # sum, and nothing passes between threads before the end.
    places: tl.constexpr = TILE if R == 1 else ROWS
    highest = tl.full([places], float("-inf"), tl.float32)
    weight = tl.zeros([places], dtype=tl.float32)
    acc = tl.zeros([places, BLOCK], dtype=tl.float32)
    while tile <= position // TILE:
        t = tile * TILE + tl.arange(0, TILE)
        seen = (t <= position) & (t < S)
        newest = (t == position)[:, None]  # on its way to memory: taken from here
        k = tl.where(newest, new_key, k)
        v = tl.where(newest, new_value, v)
        if R == 1:
            score = tl.where(seen, tl.sum(query.to(tl.float32) * k.to(tl.float32), 1) * SCALE, float("-inf"))
            top = tl.maximum(highest, score)
        else:
            score = tl.dot(query, tl.trans(k), input_precision="ieee") * SCALE
            score = tl.where(seen[None, :], score, float("-inf"))
            top = tl.maximum(highest, tl.max(score, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)  # no position so far: -inf - -inf would be NaN
        shrink = tl.exp2(highest - finite)
        if R == 1:
            share = tl.exp2(score - finite)
            weight = weight * shrink + share
            acc = acc * shrink[:, None] + share[:, None] * v.to(tl.float32)
        else:
            share = tl.exp2(score - finite[:, None])
            weight = weight * shrink + tl.sum(share, 1)
            acc = acc * shrink[:, None] + tl.dot(share.to(stored), v, input_precision="ieee")
        highest = top
        tile += SPLITS
        k, v = cached_tile(keys, values, key_scale, value_scale, tile, position, S, stored, D, BLOCK, TILE)
    if R == 1:
        top = tl.max(highest, 0)
        shrink = tl.exp2(highest - tl.where(top == float("-inf"), 0.0, top))
        weight = tl.sum(weight * shrink, 0)[None]
        acc = tl.sum(acc * shrink[:, None], 0)[None, :]
        highest = top[None]
    return highest, weight, acc


@triton.jit(do_not_specialize=["S"])
def attend_kernel(
    qkv, cos, sin, start, keys, values, key_scale, value_scale, part, largest, total, arrived, out, S, H: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, POSITIONS: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SMALLEST: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: the R query heads of one key/value head, on every SPLITS-th tile of positions. SCALE is
    log2(e) / sqrt(D), so that powers are of 2. The program of a group that comes last joins the parts of all."""
    R: tl.constexpr = H // G
    group, split = tl.program_id(0), tl.program_id(1)
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    wide, heads = d < D, r < R
    if not AHEAD:
        wait_for_inputs(PDL)
    position = tl.load(start)
    c, s, exists = angles(cos, sin, position, S, D, POSITIONS, BLOCK)
    keys, values = keys + group.to(tl.int64) * S * D, values + group.to(tl.int64) * S * D
    key_scale, value_scale = key_scale + group.to(tl.int64) * S, value_scale + group.to(tl.int64) * S
    stored: tl.constexpr = qkv.dtype.element_ty
    k, v = cached_tile(keys, values, key_scale, value_scale, split, position, S, stored, D, BLOCK, TILE)
    if AHEAD:
        wait_for_inputs(PDL)
    row = qkv + (group // G).to(tl.int64) * (H + 2 * G) * D
    highest, weight, acc = attend_tiles(
        row, group % G, keys, values, key_scale, value_scale, k, v, c, s, exists, position, split, S, H, G, D, SCALE,
        SPLITS, ROWS, BLOCK, TILE, SMALLEST,
    )  # fmt: skip
    own = (group.to(tl.int64) * SPLITS + split) * ROWS
    tl.store(largest + own + tl.arange(0, ROWS), highest)
    tl.store(total + own + tl.arange(0, ROWS), weight)
    tl.store(part + (own + r) * BLOCK + d, acc, mask=wide & heads)
    tl.debug_barrier()  # all threads' stores come before the count
    if tl.atomic_add(arrived + group, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived + group, 0)  # for the next launch
        first = group.to(tl.int64) * SPLITS * ROWS
        rows = first + tl.arange(0, SPLITS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        top = tl.max(tl.load(largest + rows), 0)
        acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        weight = tl.zeros([ROWS], dtype=tl.float32)
        for other in tl.static_range(SPLITS):
            place = first + other * ROWS
            factor = tl.exp2(tl.load(largest + place + tl.arange(0, ROWS)) - top)
            weight += factor * tl.load(total + place + tl.arange(0, ROWS))
            acc += factor[:, None] * tl.load(part + (place + r) * BLOCK + d, mask=wide & heads, other=0.0)
        target = out + (group.to(tl.int64) * R + r) * D + d
        tl.store(target, (acc / weight[:, None]).to(qkv.dtype.element_ty), mask=wide & heads)


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


def check_cache(keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None) -> None:
    """Raise ValueError unless keys and values `[B, G, S, D]` are of one float type, of those of 8 bits
    torch.float8_e4m3fn, or int8 with float32 scales `[B, G, S]`."""
    if keys.is_floating_point() and keys.itemsize == 1 and keys.dtype != torch.float8_e4m3fn:
        raise ValueError(f"keys are {keys.dtype}; give torch.float8_e4m3fn, or more bits")
    dtype = None if scales is None else torch.int8
    for name, part in (("keys", keys), ("values", values)):
        check(name, part, dtype, keys.device, *keys.shape)
    if values.dtype != keys.dtype:
        raise ValueError(f"keys are {keys.dtype} and values {values.dtype}; give one type")
    for scale in scales or ():
        check("scale", scale, torch.float32, keys.device, *keys.shape[:3])


def as_bytes(cache: Tensor) -> Tensor:
    """As kernels take it: FP8 as uint8."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, start: Tensor, keys: Tensor, values: Tensor, heads: int,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Rotated queries `[B, T, H, D]` of qkv `[B, T, (H + 2 G) * D]`; k and v go to the cache `[B, G, S, D]`.

    start: int32 `[1]`, the positions that are filled. cos, sin: float32 `[positions, D]`, both halves alike. `scales`
    of keys and of values, float32 `[B, G, S]`, make it a cache of INT8 codes. What would lie behind the cache's or the
    tables' end is not written.
    """
    B, G, S, D = keys.shape
    check("qkv", qkv, None, keys.device, B, None, (heads + 2 * G) * D)
    check_cache(keys, values, scales)
    for name, table in (("cos", cos), ("sin", sin)):
        check(name, table, torch.float32, keys.device, None, D)
    check("start", start, torch.int32, keys.device, 1)
    T = qkv.shape[1]
    q = torch.empty(B, T, heads, D, dtype=qkv.dtype, device=qkv.device)
    launch(
        rotate_kernel, (B * T, heads + 2 * G), qkv, cos, sin, start, q, as_bytes(keys), as_bytes(values),
        *(scales or (cos, cos)), T, S, H=heads, G=G, D=D, POSITIONS=cos.shape[0], BLOCK=power_of_2(D // 2),
        SMALLEST=SCALE_EPS, warps=1,
    )  # fmt: skip
    return q


class AttentionParts:
    """What the programs of `attend` leave for the one that comes last; one for each cache, whose launches follow each
    other."""

    def __init__(self, batch_size: int, heads: int, groups: int, width: int, capacity: int, device: torch.device):
        if (values := head_values(heads, groups, width)) > MAX_HEAD_VALUES:
            raise ValueError(
                f"{heads // groups} query heads of {width} share a key head, {values} values in powers of 2; a program "
                f"holds {MAX_HEAD_VALUES}, attend in torch"
            )
        rows, block = attention_tile(heads, groups, width)
        self.splits = splits(batch_size, heads, groups, width, capacity)
        shape = (batch_size * groups, self.splits, rows)
        self.part = torch.empty(*shape, block, dtype=torch.float32, device=device)
        self.largest, self.total = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.arrived = torch.zeros(batch_size * groups, dtype=torch.int32, device=device)


def splits(batch_size: int, heads: int, groups: int, width: int, capacity: int) -> int:
    """Programs that share the positions of a key head: enough of them for a large GPU, none without a tile of its own.
    A power of 2, which never falls as the capacity grows."""
    # The parts of many or wide heads fill registers.
    most = MAX_SPLITS * 16 * 128 // max(16 * 128, head_values(heads, groups, width))
    return max(1, min(most, power_of_2(cdiv(capacity, TILE)), power_of_2(cdiv(PROGRAMS, batch_size * groups))))


def _positions_and_warps(programs: int, rows: int, row_bytes: int) -> tuple[int, int]:
    """Of a program of `attend`, best of 2 to 8 warps and 32 to 128 positions on an H200, for 4 to 64 sequences."""
    if row_bytes > 256:
        return (32 if row_bytes <= 512 else 16), 8  # what registers hold
    if programs < 256:
        return TILE, 8
    return 32, 8 if rows == 1 and programs < 1024 else 4


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, start: Tensor, keys: Tensor, values: Tensor, heads: int,
    parts: AttentionParts, scales: tuple[Tensor, Tensor] | None = None, *, constant: bool = False,
) -> Tensor:  # fmt: skip
    """Attention `[B, 1, H * D]` of one new token over the first start + 1 positions of the cache `[B, G, S, D]`.

    qkv `[B, 1, (H + 2 G) * D]`: q and k are rotated by the angles of position `start` (int32 `[1]`), and k and v go to
    the cache; cos, sin, scales: as `rotate`. Arithmetic on matrix units is in qkv's type. Where `start` lies
    behind the cache's or the tables' end nothing is written. `constant` promises that no kernel still running writes
    `start` or earlier positions of the cache, as inside a CUDA graph of one step.
    """
    B, G, S, D = keys.shape
    rows, block = attention_tile(heads, G, D)
    check("qkv", qkv, None, keys.device, B, 1, (heads + 2 * G) * D)
    check_cache(keys, values, scales)
    check("start", start, torch.int32, qkv.device, 1)
    for name, table in (("cos", cos), ("sin", sin)):
        check(name, table, torch.float32, keys.device, None, D)
    check("parts", parts.part, torch.float32, qkv.device, B * G, parts.splits, rows, block)
    out = torch.empty(B, 1, heads * D, dtype=qkv.dtype, device=qkv.device)
    positions, warps = _positions_and_warps(B * G * parts.splits, rows, block * qkv.element_size())
    launch(
        attend_kernel, (B * G, parts.splits), qkv, cos, sin, start, as_bytes(keys), as_bytes(values),
        *(scales or (cos, cos)), parts.part, parts.largest, parts.total, parts.arrived, out, S, H=heads, G=G, D=D,
        POSITIONS=cos.shape[0], SCALE=math.log2(math.e) / math.sqrt(D), SPLITS=parts.splits, ROWS=rows, BLOCK=block,
        SMALLEST=SCALE_EPS, AHEAD=constant, TILE=positions, warps=warps,
    )  # fmt: skip
    return out
