"""Bits for each layer under a total: the choice of least cost, exactly.

    minimize  sum_u cost_u(b_u)      such that  sum_u size_u b_u <= budget

A knapsack with one choice for each unit, solved by dynamic programming over the budget in units of the sizes' greatest
common divisor. Where that gives more cells than `CELLS`, sizes are rounded up to coarser units, so that the budget
holds all the same.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

CELLS = 200_000


def allocate(costs: Sequence[Mapping[int, float]], sizes: Sequence[int], budget: float) -> list[int]:
    """The bits of each unit. costs: of a unit, bits to cost; sizes: its weights; budget: bits in all.

    Raises ValueError for a budget below the fewest bits of all.
    """
    least = sum(size * min(cost) for cost, size in zip(costs, sizes, strict=True))
    if budget < least:
        raise ValueError(
            f"{budget / sum(sizes):.2f} bits a weight are fewer than the {least / sum(sizes):.2f} that every layer has "
            "at least; give more"
        )
    most = max(max(cost) for cost in costs)
    unit = math.gcd(*sizes)
    unit *= max(1, math.ceil(sum(sizes) * most / unit / CELLS))
    units = [math.ceil(size / unit) for size in sizes]
    # No more than all take at most, whatever the budget.
    fewest, all_of = (sum(size * end(cost) for size, cost in zip(units, costs, strict=True)) for end in (min, max))
    cells = int(min(max(budget // unit, fewest), all_of))
    total = np.zeros(cells + 1)
    chosen = []
    for cost, size in zip(costs, units, strict=True):
        best, which = np.full(cells + 1, np.inf), np.zeros(cells + 1, np.int64)
        for bits, value in cost.items():
            shift = size * bits
            if shift > cells:
                continue
            found = total[: cells + 1 - shift] + value
            better = found < best[shift:]
            best[shift:][better] = found[better]
            which[shift:][better] = bits
        total = best
        chosen.append(which)
    at, result = int(np.argmin(total)), []
    for which, size in zip(reversed(chosen), reversed(units), strict=True):
        result.append(int(which[at]))
        at -= size * result[-1]
    return result[::-1]
