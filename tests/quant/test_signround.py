"""AutoRound's rounding: where it starts, what a step is, and where it may go."""

import pytest
import torch

from bitnet.quant.grouped import TERNARY, Grid, round_to_nearest
from bitnet.quant.signround import LEAST_RANGE, Rounding

GRIDS = [Grid(4), Grid(2), Grid(3, symmetric=True), TERNARY]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_starts_at_rounding_to_nearest_and_stays_within_half_a_step(grid: Grid) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64) * 0.02
    rounding = Rounding.of(weight, grid, 32)
    start = rounding.quantized()
    if not grid.ternary:
        nearest = round_to_nearest(weight, grid, 32)
        for name in ("codes", "scale", "zero_point", "g_idx"):
            assert torch.equal(getattr(start, name), getattr(nearest, name)), name
    for _ in range(30):
        rounding.move([torch.randn_like(each) for each in rounding.parameters()], 0.05)
    assert rounding.offset.abs().max() <= 0.5
    assert LEAST_RANGE <= float(rounding.high.min()) < float(rounding.high.max()) <= 1
    after = rounding.quantized()
    torch.testing.assert_close(after.dequantize(), rounding.dequantize())
    assert int(after.codes.max()) <= grid.quant_max
    assert grid.symmetric or int(after.zero_point.min()) >= 1
    still = Rounding.of(weight, grid, 32)
    still.offset.uniform_(-0.5, 0.5)
    assert (still.quantized().codes.int() - start.codes.int()).abs().max() <= 1


def test_a_step_goes_against_the_signs_of_the_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 32) * 0.02
    rounding = Rounding.of(weight, Grid(4), 32)
    for each in rounding.parameters():
        each.requires_grad_(True)
    # d/dV of sum(c w_q) is c s wherever the code is not clamped: straight through the rounding.
    factor = torch.randn(4, 32)
    gradients = torch.autograd.grad((rounding.dequantize() * factor).sum(), rounding.parameters())
    codes, scale, _ = rounding.codes()
    inside = ((codes > 0) & (codes < 15)).flatten(1)
    expected = factor * scale[..., 0]
    torch.testing.assert_close(gradients[0].flatten(1)[inside], expected[inside])
    before = rounding.offset.detach().clone()
    for each in rounding.parameters():
        each.requires_grad_(False)
    rounding.move(list(gradients), 0.01)
    torch.testing.assert_close(rounding.offset, before - 0.01 * gradients[0].sign())


def test_on_the_way_it_fits_a_target_better_than_the_nearest_values() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(256, 32) @ (0.5 * torch.randn(32, 32) + torch.eye(32)), torch.randn(8, 32)
    rounding = Rounding.of(weight, Grid(2), 32)
    losses = []
    for turn in range(100):
        for each in rounding.parameters():
            each.requires_grad_(True)
        loss = (x @ (rounding.dequantize() - weight).t()).square().mean()
        gradients = torch.autograd.grad(loss, rounding.parameters())
        losses.append(float(loss.detach()))
        for each in rounding.parameters():
            each.requires_grad_(False)
        rounding.move(list(gradients), (1 - turn / 100) / 100)
    assert min(losses) < 0.8 * losses[0]
