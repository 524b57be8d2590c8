"""PTQTP: least squares against torch's, trits against all nine, errors that fall."""

import pytest
import torch

from bitnet.quant.grouped import TERNARY, round_to_nearest
from bitnet.quant.trit_planes import TritPlanes, quantize_planes, ridge_scales


def test_scales_are_those_of_least_squares() -> None:
    torch.manual_seed(0)
    groups, planes = torch.randn(5, 40), torch.randint(-1, 2, (2, 5, 40)).float()
    for i in range(5):
        expected = torch.linalg.lstsq(planes[:, i].t(), groups[i, :, None]).solution[:, 0]
        torch.testing.assert_close(ridge_scales(groups, planes)[:, i], expected, rtol=1e-4, atol=1e-5)
    same = ridge_scales(groups, torch.stack([planes[0], planes[0]]))  # one plane twice: shared evenly, not infinite
    torch.testing.assert_close(same[0], same[1])
    assert (ridge_scales(groups, torch.zeros(2, 5, 40)) == 0).all()


def test_each_pair_of_trits_is_the_best_of_nine() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64) * 0.02
    found = quantize_planes(weight, 32)
    assert found.planes.abs().max() == 1
    trits = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))
    scale = found.scale.float().repeat_interleave(32, 2)  # [2, N, K]
    levels = (trits[:, :, None, None] * scale).sum(1)
    error = (found.dequantize() - weight).abs()
    torch.testing.assert_close(error, (levels - weight).abs().amin(0), rtol=1e-5, atol=1e-8)
    one = round_to_nearest(weight, TERNARY, 32).dequantize()
    assert error.square().sum() < 0.15 * (one - weight).square().sum()


def test_what_two_planes_can_hold_comes_back() -> None:
    torch.manual_seed(0)
    planes = torch.randint(-1, 2, (2, 8, 64), dtype=torch.int8)
    scale = torch.tensor([1.5, 0.5]).view(2, 1, 1).expand(2, 8, 2).half()
    weight = TritPlanes(planes, scale).dequantize()
    torch.testing.assert_close(quantize_planes(weight, 32).dequantize(), weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(quantize_planes(torch.zeros(3, 32), 32).dequantize(), torch.zeros(3, 32))
    with pytest.raises(ValueError, match="too large for float16"):
        quantize_planes(torch.full((2, 32), 1e6), 32)
    with pytest.raises(ValueError, match="group_size 48"):
        quantize_planes(weight, 48)
