"""Bits under a total: the choice is the best of all choices."""

import itertools

import numpy as np
import pytest

from bitnet.quant import allocation
from bitnet.quant.allocation import allocate


@pytest.mark.parametrize("budget", [2.0, 2.5, 3.3, 4.7, 8.0])
def test_it_is_the_best_of_all_choices(budget: float) -> None:
    drawn = np.random.default_rng(0)
    sizes = [24, 8, 40, 16]
    costs = [dict(zip((2, 3, 4, 8), sorted(drawn.random(4), reverse=True), strict=True)) for _ in sizes]

    def cost(choice: tuple[int, ...]) -> float:
        return sum(of[bits] for of, bits in zip(costs, choice, strict=True))

    total = budget * sum(sizes)
    allowed = [
        choice
        for choice in itertools.product((2, 3, 4, 8), repeat=4)
        if sum(b * s for b, s in zip(choice, sizes, strict=True)) <= total
    ]
    assert cost(tuple(allocate(costs, sizes, total))) == pytest.approx(min(map(cost, allowed)))


def test_the_budget_holds_where_sizes_have_no_common_divisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "CELLS", 50)
    costs, sizes = [{2: 1.0, 4: 0.1}, {2: 2.0, 4: 0.1}, {2: 0.5, 4: 0.4}], [997, 1009, 1013]
    found = allocate(costs, sizes, 3.4 * sum(sizes))
    assert sum(b * s for b, s in zip(found, sizes, strict=True)) <= 3.4 * sum(sizes)
    assert found[1] == 4


@pytest.mark.parametrize("budget", [9.0, 1e6, 1e300])
def test_more_than_all_can_take_is_as_much_as_they_can(budget: float) -> None:
    """The table has no cell more for it."""
    sizes = [1000, 24]
    assert allocate([{2: 1.0, 8: 0.1}, {2: 1.0, 8: 0.5}], sizes, budget * sum(sizes)) == [8, 8]


def test_too_small_a_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"1\.50 bits a weight are fewer than the 2\.00"):
        allocate([{2: 1.0, 4: 0.5}], [100], 150)
