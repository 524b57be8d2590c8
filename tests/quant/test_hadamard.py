"""Hadamard matrices by their definition and scipy's, and rotations that are ones."""

import pytest
import torch

from bitnet.quant.hadamard import hadamard, random_rotation


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 72, 576])
def test_rows_are_orthogonal_and_of_ones(order: int) -> None:
    found = hadamard(order)
    assert found is not None
    assert torch.equal(found.abs(), torch.ones_like(found))
    assert torch.equal(found @ found.t(), order * torch.eye(order, dtype=torch.float64))


def test_orders_that_have_none() -> None:
    assert [order for order in range(1, 30) if hadamard(order) is not None] == [1, 2, 4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize("size", [1, 2, 6, 45, 64, 80, 576])
def test_rotations_keep_lengths_and_spread_outliers(size: int) -> None:
    rotation = random_rotation(size, torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size, dtype=torch.float64))
    assert torch.equal(rotation, random_rotation(size, torch.Generator().manual_seed(1)))
    assert size == 1 or not torch.equal(rotation, random_rotation(size, torch.Generator().manual_seed(2)))
    if size >= 64:
        outlier = torch.zeros(size, dtype=torch.float64)
        outlier[3] = 1
        assert float((outlier @ rotation).abs().max()) < 0.3
