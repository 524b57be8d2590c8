"""ggml's own searches for the IQ types of codebooks, step by step, so that the bytes come out the same.

As in `ggml_search.py` groups are columns, everything is float32, and sums run from the first weight to the last. Digits
stand for 1, 3, 5, .. here, near what the blocks' vectors are; IQ1 has -1, 0 and 1 with a shift of 1/8 up or down.
Letters: n weights in a group, G groups in a super-block, B super-blocks, V = n / size vectors in a group; vectors are
columns, too, `[size, V * G * B]`.

What it does is kept, faults and all: in a super-block of IQ3_S some of whose groups are zero, the vectors and signs of
the groups behind them are stored in their place. Source: llama.cpp's ggml-quants.c.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitnet.quant.blocks.codebooks import CODEBOOKS, SHIFT, Codebook
from bitnet.quant.blocks.ggml_search import divide, divide_by, nearest_int, positive, root, to_half, total
from bitnet.quant.blocks.layout import Vectors, by_group

SUPER_BLOCK = 256
LEVELS = ((-1 + SHIFT, SHIFT, 1 + SHIFT), (-1 - SHIFT, -SHIFT, 1 - SHIFT))  # of IQ1, shifted up and down
CHUNK = 2**22  # numbers that are compared at a time


@dataclass(frozen=True)
class Search:
    """What differs between the types."""

    square: int = 2
    """sigma2 is this many times the mean square."""
    steps: int = 9
    """Trial scales on either side."""
    step: float = 0.1
    """Between two of them, in units of the largest level."""
    tiny: float = 1e-15
    """A group whose largest magnitude is smaller counts as zero."""
    parity: bool = True
    """Whether the number of negative weights in 8 is even."""
    factor: float = 1.0
    """Multiplies d as it is stored."""


SEARCHES = {
    "IQ2_XXS": Search(square=1, steps=6),
    "IQ2_XS": Search(square=1),
    "IQ2_S": Search(tiny=1e-8, parity=False, factor=0.9875),
    "IQ3_XXS": Search(steps=15, step=0.2, tiny=1e-8, factor=1.0125),
    "IQ3_S": Search(step=0.2, tiny=0.0, parity=False, factor=1.033),
    "IQ1_S": Search(tiny=1e-12, factor=1.125),
    "IQ1_M": Search(tiny=1e-7, factor=1.1125),
}


def quantize(x: Tensor, kind: str, importance: Tensor | None, size: int) -> Vectors:
    """ggml's vectors of super-blocks `[256, B]` with groups of `size` weights."""
    search, groups = SEARCHES[kind], SUPER_BLOCK // size
    mean_square = total(x * x) * (search.square / SUPER_BLOCK)
    if importance is not None:
        weight = importance * root(mean_square + x * x)
    else:
        weight = mean_square * 0.25 + x * x if kind == "IQ2_S" else x * x
    x, weight = by_group(x, groups), by_group(weight, groups)
    if kind in ("IQ1_S", "IQ1_M"):
        return (_ternary if kind == "IQ1_S" else _ternary_halves)(x, weight, groups, search)
    return _signed(x, weight, kind, groups, search)


def in_vectors(x: Tensor, size: int) -> Tensor:
    """Groups `[n, Q]` to vectors `[size, V * Q]`, of which the first Q are the groups' first."""
    return x.view(-1, size, x.shape[1]).transpose(0, 1).reshape(size, -1)


def in_groups(x: Tensor, count: int) -> Tensor:
    """Inverse of `in_vectors` for groups of `count` vectors."""
    return x.view(len(x), count, -1).transpose(0, 1).reshape(len(x) * count, -1)


def by_block(x: Tensor, groups: int) -> Tensor:
    """What each vector or 8 weights of a group have, `[V, G * B]`, in a super-block's order: `[B, G * V]`."""
    return x.view(len(x), groups, -1).permute(2, 1, 0).flatten(1)


# The types of signs and magnitudes


def _signed(x: Tensor, weight: Tensor, kind: str, groups: int, search: Search) -> Vectors:
    book = CODEBOOKS[kind]
    count, top = len(x) // book.size, 2 * book.base - 1
    magnitude, signs = _signs(x, weight, parity=search.parity)
    largest = magnitude.amax(dim=0)
    dead = largest <= 0 if search.tiny == 0 else largest < search.tiny
    vectors, root_weight = in_vectors(magnitude, book.size), in_vectors(root(weight), book.size)

    def sums(index: Tensor) -> tuple[Tensor, Tensor]:
        q = in_groups(_odd(book)[index].t(), count)
        return total(weight * magnitude * q), total(weight * q * q)

    def look_up(inv_scale: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return _look_up(book, vectors, root_weight, inv_scale.repeat(count), scale.repeat(count))

    index = torch.zeros(vectors.shape[1], dtype=torch.int64)
    on_grid = torch.full(index.shape, kind != "IQ3_S")
    if kind == "IQ2_XXS":
        scale, _ = positive(magnitude, weight, book.base + 1)
        extent = scale * book.base
        dead |= extent <= 0
        on_grid[:] = False
    else:
        scale, extent = divide_by(largest, top), largest
    best = torch.zeros_like(scale)
    for step in range(-search.steps, search.steps + 1):
        number = np.float32(top) + np.float32(step) * np.float32(search.step)
        inv_scale = divide(float(number), extent)
        found, exact = look_up(inv_scale, divide(1, inv_scale))
        sum_xq, sum_qq = sums(found)
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale = torch.where(better, sum_xq / sum_qq, scale)
        best = torch.where(better, scale * sum_xq, best)
        index = torch.where(better.repeat(count), found, index)
        if kind != "IQ2_XXS":
            on_grid = torch.where(better.repeat(count), exact, on_grid)
    # Vectors that were not on the grid are looked up at the best scale, and the scale is fitted once more.
    again = ~on_grid.view(count, -1).all(dim=0) & (scale > 0)
    found, _ = look_up(divide(1, scale), scale)
    moved = again.repeat(count)
    if kind != "IQ3_S":
        moved &= ~on_grid
    index = torch.where(moved, found, index)
    sum_xq, sum_qq = sums(index)
    scale = torch.where(again & (sum_qq > 0), sum_xq / sum_qq, scale)
    negative = scale < 0
    scale = torch.where(dead, 0.0, scale.abs())
    signs = torch.where(negative, signs ^ 255, signs)
    index = torch.where(dead, 0, index.view(count, -1))
    signs = torch.where(dead, 0, signs)
    index, signs = by_block(index, groups), by_block(signs, groups).to(torch.uint8)
    scales = scale.view(groups, -1)
    if kind == "IQ3_S":
        index, signs = _closed_up(index, signs, dead.view(groups, -1).t())
    d, factors = _factors(scales, 31, 15)
    dead_block = scales.amax(dim=0) <= 0
    if kind not in ("IQ2_S", "IQ3_S"):
        index, signs = (torch.where(dead_block.unsqueeze(1), 0, part) for part in (index, signs))
    return Vectors(index.to(torch.int16), signs, to_half(d * search.factor), factors)


def _signs(x: Tensor, weight: Tensor, *, parity: bool) -> tuple[Tensor, Tensor]:
    """Magnitudes of groups `[n, Q]`, and a byte of signs for each 8, int64 `[n / 8, Q]`. With `parity` the weight that
    matters least changes its sign where an odd number is negative, and its magnitude is below 0."""
    magnitude = torch.where(x >= 0, x, -x)
    negative = (x < 0).view(-1, 8, x.shape[1])
    if parity:
        least = (weight * x * x).view(negative.shape).argmin(dim=1, keepdim=True)
        odd = negative.sum(dim=1, keepdim=True) % 2 == 1
        flipped = torch.zeros_like(negative).scatter_(1, least, odd)
        magnitude = torch.where(flipped.view(x.shape), -magnitude, magnitude)
        negative ^= flipped
    return magnitude, (negative.long() << torch.arange(8).view(8, 1)).sum(dim=1)


def _odd(book: Codebook) -> Tensor:
    """What digits stand for in the search: float32 `[vectors, size]`."""
    return 2 * book.digits.float() + 1


def _look_up(book: Codebook, x: Tensor, root_weight: Tensor, inv_scale: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each vector's best place in the codebook, int64 `[M]`, and whether its rounded digits were there."""
    digits = nearest_int(0.5 * (inv_scale * x - 1)).clamp(0, book.base - 1)
    number = book.number(digits)
    index = book.place[number]
    exact = index >= 0
    off = (~exact).nonzero().flatten()
    index[off] = nearest_neighbour(book, _odd(book), number[off], x[:, off], root_weight[:, off], scale[off])
    return index, exact


def nearest_neighbour(
    book: Codebook, values: Tensor, number: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    """Of the neighbours of numbers `[M]` the first one with the smallest weighted error of x `[size, M]`; `values`
    are the codebook's vectors `[vectors, size]`."""
    found = torch.empty_like(number)
    each = max(1, CHUNK // book.neighbours.shape[1])
    for first in range(0, len(number), each):
        part = slice(first, first + each)
        neighbours = book.neighbours[number[part]].long()
        there = neighbours >= 0
        # Columns that no row of this part has are left out.
        neighbours = neighbours[:, : max(1, int(there.sum(dim=1).max()))]
        there = there[:, : neighbours.shape[1]]
        error = torch.zeros(neighbours.shape)
        for i in range(book.size):
            difference = scale[part].view(-1, 1) * values[:, i][neighbours] - x[i, part].view(-1, 1)
            error += weight[i, part].view(-1, 1) * difference * difference
        best = torch.where(there, error, torch.inf).argmin(dim=1, keepdim=True)
        found[part] = neighbours.gather(1, best).flatten()
    return found


def _closed_up(index: Tensor, signs: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """IQ3_S: the low bytes of the indices and the signs of groups that are not `dead` `[B, G]`, without gaps."""
    order = torch.argsort(dead.int(), dim=1, stable=True)

    def close(x: Tensor) -> Tensor:
        return x.view(*dead.shape, -1).gather(1, order.unsqueeze(2).expand(*dead.shape, x.shape[1] // dead.shape[1]))

    return (index & ~255) | (close(index & 255).flatten(1)), close(signs).flatten(1)


def _factors(scales: Tensor, largest: int, limit: int) -> tuple[Tensor, Tensor]:
    """d `[B]` and l int16 `[B, G]` for scales `[G, B]` of at least 0; 0 where all are."""
    high = scales.amax(dim=0)
    d = divide_by(high, largest)
    found = nearest_int(0.5 * (divide(1, d) * scales - 1)).clamp(0, limit)
    return d, torch.where(high > 0, found, 0.0).t().to(torch.int16).contiguous()


# IQ1


def _ternary(x: Tensor, weight: Tensor, groups: int, search: Search) -> Vectors:
    """IQ1_S: the best split of a group's sorted weights into -1, 0 and 1, for either shift."""
    up, down = ([torch.tensor(level) for level in levels] for levels in LEVELS)
    n = len(x)
    values, order = torch.sort(x, dim=0, stable=True)
    sorted_weight = weight.gather(0, order)
    sum_x, sum_w = _running(sorted_weight * values), _running(sorted_weight)
    split = _Split(x)
    for i in range(n + 1):
        for j in range(i, n + 1):
            for sign, level in ((1, up), (-1, down)):
                sum_xq = (
                    (sum_x[i] - sum_x[0]) * level[0]
                    + (sum_x[j] - sum_x[i]) * level[1]
                    + (sum_x[n] - sum_x[j]) * level[2]
                )
                sum_qq = (
                    (sum_w[i] - sum_w[0]) * level[0] * level[0]
                    + (sum_w[j] - sum_w[i]) * level[1] * level[1]
                    + (sum_w[n] - sum_w[j]) * level[2] * level[2]
                )
                split.offer(sum_xq, sum_qq, i, j, sign)
    dead = (x.abs().amax(dim=0) < search.tiny) | (split.first < 0)
    digits = split.digits(order)
    turned = split.scale < 0
    digits = torch.where(turned, 2 - digits, digits)
    shift = torch.where(turned, -split.choice, split.choice)
    index, scale = _ternary_index(x, weight, digits, split.scale.abs(), (shift * SHIFT).expand(n // 8, -1))
    scale = torch.where(dead, 0.0, scale)
    index = torch.where(dead, 0, index)
    d, factors = _factors(scale.view(groups, -1), 15, 7)
    below = (shift < 0) & ~dead & (d > 0).repeat(groups)
    shifts = by_block(below.expand(n // 8, -1), groups).to(torch.uint8)
    return Vectors(by_block(index, groups).to(torch.int16), shifts, to_half(d * search.factor), factors)


def _ternary_halves(x: Tensor, weight: Tensor, groups: int, search: Search) -> Vectors:
    """IQ1_M: as IQ1_S with a shift for each 8 of 16 weights; d is fitted to the whole super-block in the end."""
    n = len(x)
    values, order = torch.sort(x, dim=0, stable=True)
    sorted_weight = weight.gather(0, order)
    second = order >= 8
    halves = []
    for half in (~second, second):
        products = torch.where(half, sorted_weight * values, 0.0)
        halves.append((_running(products), _running(torch.where(half, sorted_weight, 0.0))))
    split = _Split(x)
    # The differences of the levels' squares are exact.
    terms = [(c, c * c, a * a - b * b, b * b - c * c) for a, b, c in LEVELS]
    for i in range(n + 1):
        for j in range(i, n + 1):
            sums = [
                [
                    (px[n] * top - (px[i] + px[j]), pw[n] * top * top + pw[i] * first + pw[j] * last)
                    for top, _, first, last in terms
                ]
                for px, pw in halves
            ]
            for choice in range(4):
                a, b = sums[0][choice // 2], sums[1][choice % 2]
                split.offer(a[0] + b[0], a[1] + b[1], i, j, choice)
    dead = (x.abs().amax(dim=0) < search.tiny) | (split.first < 0)
    digits = split.digits(order)
    turned = split.scale < 0
    digits = torch.where(turned, 2 - digits, digits)
    shifts_of = torch.where(dead, 0, torch.where(turned, 3 - split.choice, split.choice))
    shift = SHIFT - 2 * SHIFT * torch.stack([shifts_of // 2, shifts_of % 2]).float()
    index, scale = _ternary_index(x, weight, digits, split.scale.abs(), shift)
    scale = torch.where(dead, 0.0, scale)
    index = torch.where(dead, 0, index)
    d, factors = _factors(scale.view(groups, -1), 15, 7)
    q = in_groups(_at(CODEBOOKS["IQ1_M"], index, shift), 2) * (2 * factors.t().reshape(-1).float() + 1)

    def in_order(terms: Tensor) -> Tensor:
        return total(terms.view(n, groups, -1).transpose(0, 1).reshape(n * groups, -1))

    sum_xq, sum_qq = in_order(weight * q * x), in_order(weight * q * q)
    some = d > 0
    d = torch.where(some & (sum_qq > 0), sum_xq / sum_qq, d)
    shifts = by_block(torch.where(some.repeat(groups), (shift < 0).long(), 0), groups).to(torch.uint8)
    return Vectors(by_block(index, groups).to(torch.int16), shifts, to_half(d * search.factor), factors)


def _running(x: Tensor) -> list[Tensor]:
    """Sums of the first 0, 1, .. rows, from the first to the last."""
    sums = [torch.zeros_like(x[0])]
    for row in x:
        sums.append(sums[-1] + row)
    return sums


class _Split:
    """The best of the splits that were offered, for each group."""

    def __init__(self, x: Tensor) -> None:
        groups = x.shape[1]
        self.scale, self.best = x.abs().amax(dim=0), torch.full((groups,), torch.finfo(torch.float32).min)
        self.first, self.last = (torch.full((groups,), -1) for _ in range(2))
        self.choice = torch.zeros(groups, dtype=torch.int64)

    def offer(self, sum_xq: Tensor, sum_qq: Tensor, first: int, last: int, choice: int) -> None:
        better = (sum_qq > 0) & (sum_xq * sum_xq > self.best * sum_qq)
        self.scale = torch.where(better, sum_xq / sum_qq, self.scale)
        self.best = torch.where(better, self.scale * sum_xq, self.best)
        self.first, self.last = torch.where(better, first, self.first), torch.where(better, last, self.last)
        self.choice = torch.where(better, choice, self.choice)

    def digits(self, order: Tensor) -> Tensor:
        """0, 1 or 2 for each weight: below, between, above the ends of the split. int64 `[n, Q]`."""
        rank = torch.arange(len(order)).view(-1, 1)
        digits = (rank >= self.first).long() + (rank >= self.last)
        return torch.empty_like(digits).scatter_(0, order, digits)


def _at(book: Codebook, index: Tensor, shift: Tensor) -> Tensor:
    """What indices `[V, Q]` with shifts of the same shape stand for: `[size, V * Q]`."""
    return (book.values[index.flatten()] + shift.reshape(-1, 1)).t()


def _ternary_index(x: Tensor, weight: Tensor, digits: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `[V, Q]` of digits `[n, Q]`, or of their best neighbours at the scale and with the shift `[V, Q]`; and
    the scale, fitted again where a vector was not in the codebook."""
    book, count = CODEBOOKS["IQ1_S"], len(x) // 8
    number = book.number(in_vectors(digits, 8))
    index = book.place[number]
    off = index < 0
    vectors, weights, scales = in_vectors(x, 8), in_vectors(weight, 8), scale.repeat(count)
    for sign in (1.0, -1.0):
        mine = (off & (shift.flatten() == SHIFT * sign)).nonzero().flatten()
        values = book.values + SHIFT * sign
        index[mine] = nearest_neighbour(book, values, number[mine], vectors[:, mine], weights[:, mine], scales[mine])
    q = in_groups(_at(book, index.view(count, -1), shift), count)
    sum_xq, sum_qq = total(weight * q * x), total(weight * q * q)
    again = off.view(count, -1).any(dim=0) & (sum_xq > 0) & (sum_qq > 0)
    return index.view(count, -1), torch.where(again, sum_xq / sum_qq, scale)
