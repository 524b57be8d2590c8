"""The default search for the IQ types of codebooks: the smallest squared error of what is stored, as in `search.py`.

At a given scale s the best vector of a codebook is found among all of them. Its error is

    sum w (|x| - s v)^2 = sum w x^2 + s (s qq - 2 xq),    xq = sum w |x| v,    qq = sum w v^2

where the first term is the same for all, and xq and qq do not depend on s: they are summed once. Where an odd number of
8 weights is negative and the type has no sign for that, one weight of the vector gets the wrong sign, the one with the
smallest w |x| v, which lowers xq by twice that. IQ1 has values with signs instead, each vector in two shifts.

So scales are tried in turn with least squares from a few starts, for each group; then d, and integers that move by
one, as `search.SuperBlocks` does it. ggml's vectors are one more candidate: a super-block is never worse than ggml's.
"""

import torch
from torch import Tensor

from bitnet.quant.blocks.codebooks import CODEBOOKS, SHIFT, values
from bitnet.quant.blocks.ggml_iq import by_block, in_groups, in_vectors
from bitnet.quant.blocks.ggml_search import divide_by, total
from bitnet.quant.blocks.layout import Vectors, by_group
from bitnet.quant.blocks.search import Best, inverse, ratio, stored

STEPS, ROUNDS = 2, 3
STARTS = (0.7, 0.85, 1.0, 1.15)  # largest magnitudes of a group, in units of its largest value; IQ1: means
TERNARY_STARTS = (1.0, 1.5, 2.0)
PARITY = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")  # an even number of each 8 signs is negative
CHUNK = 2**23  # pairs of a vector and a codebook's vector at a time


def improve(x: Tensor, kind: str, weight: Tensor | None, old: Vectors, size: int, unit: float) -> Vectors:
    """The better of the search's vectors and the `old` ones, for super-blocks `[256, B]` in groups of `size`, whose
    scales are `unit * d * (2 l + 1)`."""
    weight = torch.ones_like(x) if weight is None else weight
    book = CODEBOOKS[kind]
    each = max(1, CHUNK // (len(book.values) * 256 // book.size))
    parts = [
        _improve(x[:, i : i + each], kind, weight[:, i : i + each], _slice(old, i, i + each), size, unit)
        for i in range(0, x.shape[1], each)
    ]
    return Vectors(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(old)))


def _slice(vectors: Vectors, first: int, last: int) -> Vectors:
    return Vectors(*(part[first:last] for part in vars(vectors).values()))


def _improve(x: Tensor, kind: str, weight: Tensor, old: Vectors, size: int, unit: float) -> Vectors:
    groups, book, limit = len(x) // size, CODEBOOKS[kind], 7 if CODEBOOKS[kind].is_ternary else 15
    blocks, weights = by_group(x, groups), by_group(weight, groups)
    candidates = Candidates(blocks, weights, kind)

    def per_group(x: Tensor) -> Tensor:
        return x.repeat(groups)

    def over_groups(x: Tensor) -> Tensor:
        return total(x.view(groups, -1))

    before = (old.scale.float().unsqueeze(1) * unit * (2 * old.scales + 1).float()).t().reshape(-1)
    real = Best()
    for start in [before, *candidates.starts()]:
        scale = start
        for _ in range(STEPS):
            found = candidates.at(scale)
            real.offer(found.error, scale)
            scale = ratio(found.xq, found.qq)
    d = stored(divide_by(real.values[0].view(groups, -1).amax(dim=0), (2 * limit + 1) * unit))
    factor = 0.5 * (real.values[0] * inverse(per_group(d) * unit) - 1)
    level, best = factor.round().clamp(0, limit), Best()
    for _ in range(ROUNDS):
        group = Best()
        for step in (-1, 0, 1):
            moved = (level + step).clamp(0, limit)
            found = candidates.at(per_group(d) * unit * (2 * moved + 1))
            group.offer(found.error, moved, found.xq, found.qq)
        assert group.error is not None
        level, xq, qq = group.values
        best.offer(over_groups(group.error), d, level.view(groups, -1))
        factor = 2 * level + 1
        # Least squares for d, at x ~ d unit (2 l + 1) v: sums over the groups.
        d = stored(ratio(over_groups(factor * xq), over_groups(factor * factor * qq)) * (1 / unit))
    d, levels = best.values
    index, signs = candidates.choose(per_group(d) * unit * (2 * levels.flatten() + 1))
    new = Vectors(
        by_block(index, groups).to(torch.int16), by_block(signs, groups).to(torch.uint8), d.to(torch.float16),
        levels.t().to(torch.int16).contiguous(),
    )  # fmt: skip

    def error_of(vectors: Vectors) -> Tensor:
        scale = (vectors.scale.float().unsqueeze(1) * unit * (2 * vectors.scales + 1).float()).t().reshape(-1)
        difference = blocks - scale * by_group(values(vectors, book).t(), groups)
        return over_groups(total(weights * difference * difference))

    better = error_of(new) < error_of(old)
    return Vectors(*(
        torch.where(better if a.ndim == 1 else better.unsqueeze(1), a, b)
        for a, b in zip(vars(new).values(), vars(old).values(), strict=True)
    ))  # fmt: skip


class Found:
    """The best vectors at a scale: for each group the error without its constant term, xq and qq."""

    def __init__(self, scale: Tensor, lowest: Tensor, xq: Tensor, qq: Tensor) -> None:
        self.error, self.xq, self.qq = scale * total(lowest), total(xq), total(qq)


class Candidates:
    """All vectors of a codebook for the vectors of groups `[n, Q]`: their xq and qq, `[vectors, V * Q]`.

    Where that is not all, a vector has two variants: IQ3_XXS, whose signs are counted over two vectors, the one with a
    wrong sign; IQ1 the two shifts, of which IQ1_M chooses for each vector and IQ1_S for the whole group.
    """

    def __init__(self, x: Tensor, weight: Tensor, kind: str) -> None:
        self.x, self.kind, self.book = x, kind, CODEBOOKS[kind]
        size, self.count = self.book.size, len(x) // self.book.size
        self.magnitude = x if self.book.is_ternary else x.abs()
        self.w, self.wx = in_vectors(weight, size), in_vectors(weight * self.magnitude, size)
        self.negative = (x < 0).view(-1, 8, x.shape[1])
        self.odd = self.negative.sum(dim=1) % 2 == 1  # [n / 8, Q]
        if self.book.is_ternary:
            self.variants = [self._sums(self.book.values + shift)[:2] for shift in (SHIFT, -SHIFT)]
            return
        xq, qq, least = self._sums(self.book.values)
        flipped = xq - 2 * least
        if kind == "IQ3_XXS":
            self.variants = [(xq, qq), (flipped, qq)]
        elif kind in PARITY:
            self.variants = [(torch.where(self.odd.flatten(), flipped, xq), qq)]
        else:
            self.variants = [(xq, qq)]

    def _sums(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xq, qq and the smallest term of xq for the vectors of a table."""
        xq = torch.zeros(len(table), self.w.shape[1])
        qq, least = torch.zeros_like(xq), torch.full_like(xq, torch.inf)
        for i in range(self.book.size):
            value = table[:, i : i + 1]
            term = self.wx[i] * value
            xq += term
            qq += self.w[i] * (value * value)
            least = torch.minimum(least, term)
        return xq, qq, least

    def starts(self) -> list[Tensor]:
        """Scales to begin with, `[Q]`."""
        if self.book.is_ternary:
            mean = divide_by(total(self.x.abs()), len(self.x))
            return [mean * factor for factor in TERNARY_STARTS]
        largest = self.x.abs().amax(dim=0)
        return [divide_by(largest, self.book.levels[-1] / factor) for factor in STARTS]

    def at(self, scale: Tensor) -> Found:
        """The best vectors of each group at scales `[Q]`."""
        index, variant, lowest = self._best(scale)
        xq, qq = (self._pick(index, variant, which) for which in (0, 1))
        return Found(scale, lowest, xq.view(self.count, -1), qq.view(self.count, -1))

    def choose(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Indices `[V, Q]` at scales, and bytes of signs of each 8 weights `[n / 8, Q]`, or the shifts."""
        index, variant, _ = self._best(scale)
        index, variant = index.gather(0, variant.unsqueeze(0))[0], variant.view(self.count, -1)
        if self.book.is_ternary:
            return index.view(self.count, -1), variant
        negative = self.negative
        if self.kind in PARITY:
            flip = variant.flatten() == 1 if self.kind == "IQ3_XXS" else self.odd.flatten()
            terms = self.wx * self.book.values[index].t()
            flips = torch.zeros_like(terms, dtype=torch.bool).scatter_(0, terms.argmin(dim=0, keepdim=True), flip[None])
            negative = negative ^ in_groups(flips, self.count).view(negative.shape)
        return index.view(self.count, -1), (negative.long() << torch.arange(8).view(8, 1)).sum(dim=1)

    def _best(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For all vectors the best index of each variant `[variants, V * Q]`, the variant `[V * Q]`, and what it adds
        to a group's error, over the scale: `[V, Q]`."""
        scales = scale.repeat(self.count)
        terms = [scales * qq - (xq + xq) for xq, qq in self.variants]
        index = torch.stack([term.argmin(dim=0) for term in terms])
        lowest = torch.stack([term.gather(0, i[None])[0] for term, i in zip(terms, index, strict=True)])
        variant = self._variant(lowest.view(len(lowest), self.count, -1))
        return index, variant.flatten(), lowest.view(len(lowest), self.count, -1).gather(0, variant[None])[0]

    def _variant(self, lowest: Tensor) -> Tensor:
        """The variant of each vector `[V, Q]`, from the errors `[variants, V, Q]`."""
        if self.kind == "IQ1_M":
            return (lowest[1] < lowest[0]).long()
        if self.kind == "IQ1_S":
            return (total(lowest[1]) < total(lowest[0])).long().expand(lowest.shape[1:])
        if self.kind == "IQ3_XXS":
            first, second = lowest[:, ::2], lowest[:, 1::2]
            in_second = first[0] + second[1] < first[1] + second[0]
            return torch.stack([self.odd & ~in_second, self.odd & in_second], dim=1).flatten(0, 1).long()
        return torch.zeros(lowest.shape[1:], dtype=torch.int64)

    def _pick(self, index: Tensor, variant: Tensor, which: int) -> Tensor:
        """xq (0) or qq (1) of the best variant's vector."""
        found = [sums[which].gather(0, i[None])[0] for sums, i in zip(self.variants, index, strict=True)]
        return torch.stack(found).gather(0, variant[None])[0]
