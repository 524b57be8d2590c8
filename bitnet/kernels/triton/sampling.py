"""The next token of every row in one launch: temperature, top-p, min-p and the draw of `bitnet/inference/sampling.py`.

    weights   w = exp((l - max l) / temperature), as integers of 2^-40, so that sums have no order
    compact   only tokens that reach min_p and can be in the top-p set, in the order of their ids
    select    by bisection of the bits of w: the token at a mass x of the descending order, equal ones by id

The end of the top-p set and the token drawn from it are such selections, so nothing is sorted; without top-p the draw
goes by the order of the ids. One program takes one row.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

import torch
from torch import Tensor

from bitnet.kernels.triton.language import check, launch, power_of_2, tl, triton, wait_for_inputs

_BLOCK = 2048
_UNITS = tl.constexpr(2.0**40)


@triton.jit
def units(w):
    """Weights of at most 1 as whole numbers."""
    return (w * _UNITS).to(tl.int64)


@triton.jit
def select(weights, n, x, BLOCK: tl.constexpr):
    """Where the cumulative mass of `n` weights in descending order first exceeds x: the weight's bits, how many equal
    ones come before, and the mass up to it, itself included."""
    i = tl.arange(0, BLOCK)
    key = (x * 0).to(tl.int32)
    above = x * 0
    bit = 1 << 29  # 1.0 is below 2^30
    while bit > 0:
        candidate = key | bit
        acc = tl.zeros([BLOCK], tl.int64)
        at = n * 0
        while at < n:
            w = tl.load(weights + at + i, mask=at + i < n, other=0.0)
            acc += tl.where(w.to(tl.int32, bitcast=True) >= candidate, units(w), 0)
            at += BLOCK
        mass = tl.sum(acc, 0)
        above = tl.where(mass > x, above, mass)
        key = tl.where(mass > x, candidate, key)
        bit = bit >> 1
    each = tl.maximum(units(key.to(tl.float32, bitcast=True)), 1)
    before = (x - above) // each
    return key, before.to(tl.int32), above + (before + 1) * each


@triton.jit(do_not_specialize=["V", "stride"])
def draw_kernel(
    logits, uniform, weights, kept, ids, V, stride, temperature, p1, p2, p3, min_p, NOT_FINITE: tl.constexpr,
    TOP_P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    weights += row * V
    kept += row * V
    i = tl.arange(0, BLOCK)

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    at = V * 0
    while at < V:
        l = tl.load(logits + at + i, mask=at + i < V, other=float("-inf"))  # noqa: E741 - the specification's letter
        bad |= ((l - l != 0.0) & (at + i < V)).to(tl.int32)
        top = tl.maximum(top, l)
        at += BLOCK
    if tl.max(bad, 0) > 0:
        tl.store(ids + row, NOT_FINITE)
    else:
        largest = tl.max(top, 0)
        acc = tl.zeros([BLOCK], tl.int64)
        at = V * 0
        while at < V:
            l = tl.load(logits + at + i, mask=at + i < V, other=float("-inf"))  # noqa: E741
            acc += units(tl.exp(tl.div_rn(l - largest, temperature)))
            at += BLOCK
        total = tl.sum(acc, 0)
        one = total.to(tl.float64) * 0 + 1
        share = one * p1 + one * p2 + one * p3  # numbers arrive as float32, and ends of flat lists are met exactly
        floor = min_p
        if TOP_P:
            # Tokens below it together weigh less than 1 - p of the total. A little lower, for the rounding.
            lowest = (1.0 - share) * total.to(tl.float64) / (V * _UNITS)
            floor = tl.maximum(floor, (lowest * 0.999).to(tl.float32))

        n = V * 0
        acc = tl.zeros([BLOCK], tl.int64)
        at = V * 0
        while at < V:
            l = tl.load(logits + at + i, mask=at + i < V, other=float("-inf"))  # noqa: E741
            w = tl.exp(tl.div_rn(l - largest, temperature))
            keep = (w >= floor) & (at + i < V)
            place = n + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(weights + place, w, mask=keep)
            tl.store(kept + place, at + i, mask=keep)
            acc += tl.where(keep, units(w), 0)
            n += tl.sum(keep.to(tl.int32), 0)
            at += BLOCK
        mass = tl.sum(acc, 0)
        tl.debug_barrier()  # the lists are read by other threads than wrote them

        if TOP_P:
            # The first token with which the mass reaches p * total, or all that min_p leaves.
            end = tl.ceil(share * total.to(tl.float64)).to(tl.int64) - 1
            end = tl.maximum(tl.minimum(end, mass - 1), 0)
            _, _, within = select(weights, n, end, BLOCK)
            mass = tl.minimum(mass, within)
        x = tl.minimum((tl.load(uniform + row) * mass.to(tl.float64)).to(tl.int64), mass - 1)

        key = 0
        before = V * 0
        if TOP_P:
            key, before, _ = select(weights, n, x, BLOCK)
        chosen = tl.full([BLOCK], -1, tl.int32)
        at = n * 0
        while at < n:
            w = tl.load(weights + at + i, mask=at + i < n, other=0.0)
            token = tl.load(kept + at + i, mask=at + i < n, other=-1)
            if TOP_P:
                equal = ((w.to(tl.int32, bitcast=True) == key) & (at + i < n)).to(tl.int32)
                found = (equal > 0) & (tl.cumsum(equal, 0) - 1 == before)
                before -= tl.sum(equal, 0)
            else:  # in the order of the ids
                mine = units(w)
                reached = tl.cumsum(mine, 0)
                found = (reached > x) & (reached - mine <= x)
                x -= tl.sum(mine, 0)
            chosen = tl.maximum(chosen, tl.where(found, token, -1))
            at += BLOCK
        tl.store(ids + row, tl.max(chosen, 0).to(tl.int64))


def draw(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float = 1.0, min_p: float = 0.0, not_finite: int
) -> Tensor:
    """Ids int64 `[B]` of logits float32 `[B, V]` (rows may lie apart) and u float64 `[B]` in [0, 1), steps 4 and 6 to 8
    of the specification; `not_finite` for a row with a logit that is not. Raises ValueError for other types and shapes.
    """
    B, V = logits.shape
    if logits.stride(1) != 1 or logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype} with strides {logits.stride()}; give float32, a row in one piece")
    if not 0 < temperature < float("inf") or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p} and min_p {min_p} draw nothing")
    check("uniform", uniform, torch.float64, logits.device, B)
    weights = torch.empty(B, V, dtype=torch.float32, device=logits.device)
    kept = torch.empty(B, V, dtype=torch.int32, device=logits.device)
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    parts: list[float] = []
    for _ in range(3):
        parts.append(float(torch.tensor(top_p - sum(parts), dtype=torch.float32)))
    launch(
        draw_kernel, (B,), logits, uniform, weights, kept, ids, V, logits.stride(0), float(temperature), *parts,
        float(min_p), NOT_FINITE=not_finite, TOP_P=top_p < 1, BLOCK=min(_BLOCK, power_of_2(V)),
        warps=8,
    )  # fmt: skip
    return ids
