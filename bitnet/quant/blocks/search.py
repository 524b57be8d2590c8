"""The default search: scales, minimums and codes with the smallest squared error of what is stored.

    error = sum of weight * (x - dequantized)^2,   weight = importance, or 1

One step improves everything: at given scales each code is the nearest one, and at given codes the best scales follow
from least squares. The error of every step is measured at the scales as they are stored, float16 and integers of a few
bits, so rounding is part of the search instead of an accident after it. Steps start from a dozen ranges. For
super-blocks they find the best real scales of each group first; then the integers that stand for them move up and down
by one, in turn with least squares for the d and dmin of the whole super-block.

ggml's result (`ggml_search.py`) is one more candidate, so a block is never worse than ggml's. Groups are columns and
sums run from the first weight to the last, in float32: the native code (`bitnet/kernels/cpu/blocks.h`) does the same
operations and gives the same bytes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitnet.quant.blocks.ggml_search import divide, divide_by, largest, total
from bitnet.quant.blocks.layout import Fields

SMALL = 1e-30  # a scale below counts as 0: its inverse is no use
LARGEST = 65504.0  # of float16
SCALE_STEPS, AFFINE_STEPS, ROUNDS = 3, 4, 3
AFFINE_STARTS = (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0)  # codes by which a start's range is wider than the group's
TERNARY_STARTS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)  # scales, in mean magnitudes


def stored(x: Tensor) -> Tensor:
    """float32 to the float32 of its float16."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float16).float()


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for a scale too small to have one."""
    return torch.where(x.abs() < SMALL, 0.0, divide(1, x))


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0.0)


def nearest(x: Tensor, scale: Tensor, low: Tensor | float, first: int, last: int) -> Tensor:
    """The nearest codes in [first, last] for `x ~ scale * code + low`, as floats."""
    return ((x - low) * inverse(scale)).round().clamp(first, last)


class Sums:
    """The error of codes for `x ~ scale * code + low` in each column, and the sums that least squares needs."""

    def __init__(self, x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, low: Tensor | float = 0.0) -> None:
        difference = x - (scale * codes + low)
        weighted = weight * codes
        self.error = total(weight * difference * difference)
        self.q, self.qq, self.xq = total(weighted), total(weighted * codes), total(weighted * x)


class Best:
    """The best of several candidates in each column: their values where the error is smallest, the first of equals."""

    def __init__(self) -> None:
        self.error: Tensor | None = None
        self.values: list[Tensor] = []

    def offer(self, error: Tensor, *values: Tensor) -> None:
        if self.error is None:
            self.error, self.values = error, list(values)
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.values = [torch.where(better, new, old) for new, old in zip(values, self.values, strict=True)]


def scale_starts(x: Tensor, first: float, last: float, spread: float) -> list[Tensor]:
    """Scales that put the largest magnitude of a column near the first or the last code, which differ in size."""
    extreme, halves = largest(x), (-1.0, -0.5, 0.0, 0.5, 1.0)
    ends = [last + spread * a for a in halves]
    # Codes that reach further on one side (-8 to 7): the largest magnitude may go to either end, since a negative scale
    # turns the range round.
    if first != -last:
        ends = [first - spread * a for a in halves] + ends
    return [divide_by(extreme, end) for end in ends]


def fit_scale(
    x: Tensor,
    weight: Tensor,
    starts: Sequence[Tensor],
    quantize: Callable[[Tensor], Tensor],
    keep: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Best scale of each column and its error. `quantize` gives the codes at a scale, `keep` the scale as it is
    kept."""
    best = Best()
    for start in starts:
        scale = keep(start)
        # The nearest codes for this scale, then the best scale for these codes, in turn.
        for _ in range(SCALE_STEPS):
            sums = Sums(x, weight, quantize(scale), scale)
            best.offer(sums.error, scale)
            scale = keep(ratio(sums.xq, sums.qq))
    assert best.error is not None
    return best.values[0], best.error


def fit_affine(
    x: Tensor, weight: Tensor, high: int, keep: Callable[[Tensor], Tensor], *, free: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Best scale and low end of each column for codes [0, high], and the error. Not `free`: the low end is at most
    0."""
    bottom, top = x.amin(dim=0), x.amax(dim=0)
    if not free:
        bottom = torch.where(bottom > 0, 0.0, bottom)
    sum_w, sum_x = total(weight), total(weight * x)
    best = Best()
    for start in AFFINE_STARTS:
        scale, low = keep(divide_by(top - bottom, high + start)), keep(bottom)
        for _ in range(AFFINE_STEPS):
            sums = Sums(x, weight, nearest(x, scale, low, 0, high), scale, low)
            best.offer(sums.error, scale, low)
            # Least squares for both: the normal equations of sum w (x - scale q - low)^2, solved by determinants.
            determinant = sum_w * sums.qq - sums.q * sums.q
            new_scale = ratio(sum_w * sums.xq - sum_x * sums.q, determinant)
            new_low = ratio(sums.qq * sum_x - sums.q * sums.xq, determinant)
            if not free:
                # The low end can only be subtracted. Where it would be added, it is 0, and the scale is fitted alone.
                above = new_low > 0
                new_scale = torch.where(above, ratio(sums.xq, sums.qq), new_scale)
                new_low = torch.where(above, 0.0, new_low)
            scale = torch.where(determinant > 0, keep(new_scale), scale)
            low = torch.where(determinant > 0, keep(new_low), low)
    assert best.error is not None
    return best.values[0], best.values[1], best.error


def pick(better: Tensor, new: Fields, old: Fields) -> Fields:
    """New fields for the blocks that are better, old ones for the others."""

    def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        return torch.where(better if a.ndim == 1 else better.unsqueeze(1), a, b)

    names = ("codes", "scale", "minimum", "scales", "minimums")
    return Fields(**{name: choose(getattr(new, name), getattr(old, name)) for name in names})  # type: ignore[arg-type]


def improve_scale(
    x: Tensor, weight: Tensor, starts: Sequence[Tensor], first: int, last: int, center: int, old: Fields
) -> Fields:
    """One scale for a block `[n, B]` with codes [first, last]: the better of the search's fields and ggml's. `center`
    is what the stored codes have added."""

    def quantize(scale: Tensor) -> Tensor:
        return nearest(x, scale, 0.0, first, last)

    scale, error = fit_scale(x, weight, starts, quantize, stored)
    found = Fields((quantize(scale) + center).t().to(torch.uint8), scale.to(torch.float16))
    before = Sums(x, weight, old.codes.t().float() - center, old.scale.float()).error
    return pick(error < before, found, old)


def improve_signs(x: Tensor, weight: Tensor, start: Tensor, old: Fields) -> Fields:
    """As `improve_scale` for Q1_0, whose codes stand for -1 and 1; stored as 0 and 1."""

    def quantize(scale: Tensor) -> Tensor:
        return torch.where(x * inverse(scale) >= 0, 1.0, -1.0)

    scale, error = fit_scale(x, weight, [start], quantize, stored)
    found = Fields((quantize(scale) > 0).t().to(torch.uint8), scale.to(torch.float16))
    before = Sums(x, weight, old.codes.t().float() * 2 - 1, old.scale.float()).error
    return pick(error < before, found, old)


def improve_minimum(x: Tensor, weight: Tensor, high: int, old: Fields) -> Fields:
    """Scale and minimum of a block `[n, B]`, for Q4_1 and Q5_1."""
    assert old.minimum is not None
    scale, low, error = fit_affine(x, weight, high, stored, free=True)
    codes = nearest(x, scale, low, 0, high).t().to(torch.uint8)
    before = Sums(x, weight, old.codes.t().float(), old.scale.float(), old.minimum.float()).error
    return pick(error < before, Fields(codes, scale.to(torch.float16), low.to(torch.float16)), old)


class SuperBlocks:
    """Scales in two levels: groups `[n / G, G * B]` in the order of `kquants.by_group`."""

    def __init__(self, x: Tensor, weight: Tensor, groups: int) -> None:
        self.x, self.weight, self.groups = x, weight, groups
        self.sum_w, self.sum_x = total(weight), total(weight * x)

    def per_group(self, x: Tensor) -> Tensor:
        """A number of each super-block `[B]`, for its groups."""
        return x.repeat(self.groups)

    def over_groups(self, x: Tensor) -> Tensor:
        """Sum of the groups' numbers in each super-block: `[B]`."""
        return total(x.view(self.groups, -1))

    def error_of(self, old: Fields, values: Tensor) -> Tensor:
        """Error of each super-block as the fields store it, whose codes stand for `values` `[B, n]`."""
        assert old.scales is not None
        codes = values.t().reshape(self.groups, len(self.x), -1).transpose(0, 1).flatten(1)
        scale = self.per_group(old.scale.float()) * old.scales.float().t().flatten()
        low = torch.zeros_like(scale)
        if old.minimum is not None and old.minimums is not None:
            low = -(self.per_group(old.minimum.float()) * old.minimums.float().t().flatten())
        return self.over_groups(Sums(self.x, self.weight, codes, scale, low).error)

    def fields(
        self, codes: Tensor, d: Tensor, s: Tensor, dmin: Tensor | None = None, m: Tensor | None = None
    ) -> Fields:
        """Fields of codes (as stored), d and dmin, and the groups' integers."""

        def integers(level: Tensor | None) -> Tensor | None:
            return None if level is None else level.view(self.groups, -1).t().to(torch.int16)

        stored_codes = codes.view(len(codes), self.groups, -1).permute(2, 1, 0).to(torch.uint8).flatten(1)
        low = None if dmin is None else dmin.to(torch.float16)
        return Fields(stored_codes, d.to(torch.float16), low, integers(s), integers(m))

    def symmetric(
        self, quantize: Callable[[Tensor], Tensor], starts: Sequence[Tensor], limit: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """d `[B]`, integers in [-limit, limit) of the groups, and errors, for what `quantize` makes of scales."""
        # The best scale of each group as a real number first; the integers that stand for it follow.
        real, _ = fit_scale(self.x, self.weight, starts, quantize, lambda scale: scale)
        # The integers reach from -limit to limit - 1, so the largest scale goes to the end with one more.
        d = stored(divide_by(largest(real.view(self.groups, -1)), -limit))
        s = (real * inverse(self.per_group(d))).round().clamp(-limit, limit - 1)
        best = Best()
        for _ in range(ROUNDS):
            group = Best()
            for step in (-1, 0, 1):
                moved = (s + step).clamp(-limit, limit - 1)
                scale = self.per_group(d) * moved
                sums = Sums(self.x, self.weight, quantize(scale), scale)
                group.offer(sums.error, moved, sums.qq, sums.xq)
            assert group.error is not None
            s, qq, xq = group.values
            best.offer(self.over_groups(group.error), d, s.view(self.groups, -1))
            # Least squares for d, at x ~ d (s q): sums over the groups, each times its integer.
            d = stored(ratio(self.over_groups(s * xq), self.over_groups(s * s * qq)))
        assert best.error is not None
        return best.values[0], best.values[1].flatten(), best.error

    def affine(self, high: int, limit: int) -> tuple[Fields, Tensor]:
        """Fields and errors for codes in [0, high], and scales and minimums in [0, limit]."""
        real, low, _ = fit_affine(self.x, self.weight, high, lambda scale: scale, free=False)
        d = stored(divide_by(real.view(self.groups, -1).amax(dim=0), limit))
        dmin = stored(divide_by((-low).view(self.groups, -1).amax(dim=0), limit))
        s = (real * inverse(self.per_group(d))).round().clamp(0, limit)
        m = (-low * inverse(self.per_group(dmin))).round().clamp(0, limit)
        best = Best()
        for _ in range(ROUNDS):
            group = self._move(s, m, self.per_group(d), self.per_group(dmin), high, limit)
            assert group.error is not None
            s, m, q, qq, xq = group.values
            best.offer(self.over_groups(group.error), d, dmin, s.view(self.groups, -1), m.view(self.groups, -1))
            d, dmin = self._refit(s, m, q, qq, xq)
        assert best.error is not None
        d, dmin, s, m = best.values[0], best.values[1], best.values[2].flatten(), best.values[3].flatten()
        codes = nearest(self.x, self.per_group(d) * s, -(self.per_group(dmin) * m), 0, high)
        return self.fields(codes, d, s, dmin, m), best.error

    def _move(self, s: Tensor, m: Tensor, d: Tensor, dmin: Tensor, high: int, limit: int) -> Best:
        """The best integers near s and m: s moves by one, and for each s the minimum that least squares gives, too."""
        group = Best()
        for step in (-1, 0, 1):
            moved = (s + step).clamp(0, limit)
            scale = d * moved

            # The default arguments hold on to this step's tensors.
            def offer(minimum: Tensor, moved: Tensor = moved, scale: Tensor = scale) -> Sums:
                low = -(dmin * minimum)
                sums = Sums(self.x, self.weight, nearest(self.x, scale, low, 0, high), scale, low)
                group.offer(sums.error, moved, minimum, sums.q, sums.qq, sums.xq)
                return sums

            sums = offer(m)
            # Where the error's derivative by the minimum is 0 for these codes, in units of dmin.
            least = ratio(scale * sums.q - self.sum_x, self.sum_w) * inverse(dmin)
            least = least.round().clamp(0, limit)
            for change in (0, -1, 1):
                offer((least + change).clamp(0, limit))
        return group

    def _refit(self, s: Tensor, m: Tensor, q: Tensor, qq: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
        """Least squares for d and dmin of each super-block, at its integers and codes."""
        ss, sm, mm = self.over_groups(s * s * qq), self.over_groups(s * m * q), self.over_groups(m * m * self.sum_w)
        sx, mx = self.over_groups(s * xq), self.over_groups(m * self.sum_x)
        # The normal equations of x ~ d (s q) - dmin m over the whole super-block.
        determinant = ss * mm - sm * sm
        d = torch.where(determinant > 0, (sx * mm - mx * sm) / determinant, ratio(sx, ss))
        dmin = torch.where(determinant > 0, (sx * sm - mx * ss) / determinant, 0.0)
        # As in `fit_affine`: a minimum that would be added is left out.
        below = dmin < 0
        d, dmin = torch.where(below, ratio(sx, ss), d), torch.where(below, 0.0, dmin)
        return stored(d), stored(dmin)
