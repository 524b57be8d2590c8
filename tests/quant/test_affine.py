"""Clip ranges, fake quantization with a gradient, error measures; the rest of `affine.py` is in test_integers.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.quant import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    choose_qparams_asymmetric,
    choose_qparams_from_range,
    choose_qparams_symmetric,
    dequantize,
    fake_quantize,
    fake_quantize_ste,
    integer_range,
    quantization_error,
    quantize,
    quantize_symmetric,
)

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerToken(), PerGroup(8)]


def extremes(x: Tensor, granularity: Any) -> tuple[Tensor, Tensor]:
    match granularity:
        case PerTensor():
            return x.min().reshape(1, 1), x.max().reshape(1, 1)
        case PerChannel(axis):
            return x.amin(1 - axis, keepdim=True), x.amax(1 - axis, keepdim=True)
        case PerToken():
            return x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    groups = x.unflatten(1, (-1, granularity.group_size))
    return groups.amin(2), groups.amax(2)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0])
def test_the_range_of_the_data_gives_the_qparams_of_the_data(granularity: Any, bits: int, shift: float) -> None:
    x = torch.randn(6, 16) + shift
    low, high = extremes(x, granularity)
    for restricted in (True, False):
        scale, zero_point = choose_qparams_from_range(low, high, bits, symmetric=True, restricted=restricted)
        assert zero_point is None
        assert torch.equal(scale, choose_qparams_symmetric(x, bits, granularity, restricted=restricted))
    for signed in (True, False):
        got = choose_qparams_from_range(low, high, bits, symmetric=False, signed=signed)
        for ours, expected in zip(got, choose_qparams_asymmetric(x, bits, granularity, signed=signed), strict=True):
            assert torch.equal(ours, expected)


def test_clipping_by_hand() -> None:
    x = torch.tensor([-9.0, -1.6, -0.4, 0.0, 0.5, 1.5, 3.0, 100.0])
    low, high = torch.tensor([-1.5]), torch.tensor([1.75])
    scale, zero_point = choose_qparams_from_range(low, high, 4, symmetric=True)
    assert scale.tolist() == [0.25]
    assert quantize(x, scale, zero_point, *integer_range(4, restricted=True)).tolist() == [-7, -6, -2, 0, 2, 6, 7, 7]
    scale, zero_point = choose_qparams_from_range(low, high + 0.5, 4, symmetric=False, signed=False)
    assert scale.tolist() == [0.25]
    assert zero_point.tolist() == [6]
    codes = quantize(x, scale, zero_point, 0, 15)
    assert codes.tolist() == [0, 0, 4, 6, 8, 12, 15, 15]
    assert dequantize(codes, scale, zero_point).tolist() == [-1.5, -1.5, -0.5, 0, 0.5, 1.5, 2.25, 2.25]
    scale, zero_point = choose_qparams_from_range(low * 0, high + 2, 4, symmetric=True, signed=False)
    assert zero_point is None
    assert scale.tolist() == [0.25]
    assert torch.equal(
        choose_qparams_from_range(low * 0, high + 2, 4, symmetric=True, signed=False, restricted=False)[0], scale
    )
    assert quantize(x, scale, None, 0, 15).tolist() == [0, 0, 0, 0, 2, 6, 12, 15]


def test_bad_ranges_are_named() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="low 1, high -1"):
        choose_qparams_from_range(one, -one, 8, symmetric=True)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"high {bad}"):
            choose_qparams_from_range(one, one * bad, 8, symmetric=False)
    with pytest.raises(ValueError, match=r"\[1\] and \[2\]"):
        choose_qparams_from_range(one, torch.ones(2), 8, symmetric=False)
    with pytest.raises(ValueError, match=r"low is -1.*signed=True"):
        choose_qparams_from_range(-one, one, 8, symmetric=True, signed=False)


# Straight-through gradients


def gradient(function: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    (y * weight).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(
    ("scale", "zero_point", "limits"),
    [(0.05, 0, (-128, 127)), (0.05, 0, (-127, 127)), (0.5, 3, (-8, 7)), (0.01, 100, (0, 255)), (0.25, 0, (-1, 1))],
)
def test_ste_equals_torch_per_tensor(scale: float, zero_point: int, limits: tuple[int, int]) -> None:
    x = torch.randn(64, 50) * 4
    x[0, :4] = torch.tensor([0.0, 1e6, -1e6, scale * (limits[1] - zero_point)])
    weight = torch.randn_like(x)
    expected = gradient(lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits), x, weight)
    zero = torch.tensor([[zero_point]], dtype=torch.int32)
    ours = gradient(lambda x: fake_quantize_ste(x, torch.tensor([[scale]]), zero, *limits), x, weight)
    # torch multiplies by 1 / scale: a value within float32 noise of a tie may round the other way.
    fraction = x.double() / scale - (x.double() / scale).floor()
    clear = (fraction - 0.5).abs() > 1e-4
    assert clear.float().mean() > 0.99
    torch.testing.assert_close(ours[0][clear], expected[0][clear], rtol=1e-6, atol=0)
    assert torch.equal(ours[1][clear], expected[1][clear])
    assert not ours[1][0, 1:3].any()
    assert (ours[1] == 0).sum() >= 2


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ste_equals_torch_per_channel(axis: int, symmetric: bool) -> None:
    x = torch.randn(24, 40) * torch.linspace(0.1, 3, 24)[:, None]
    low, high = extremes(x, PerChannel(axis))
    scale, zero = choose_qparams_from_range(low * 0.5, high * 0.5, 4, symmetric=symmetric)
    scale = torch.exp2(scale.log2().round())  # then x / scale is x * (1 / scale), and there are no exceptions
    zeros = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero
    weight = torch.randn_like(x)
    expected = gradient(
        lambda x: torch.fake_quantize_per_channel_affine(x, scale.flatten(), zeros.flatten(), axis, -8, 7), x, weight
    )
    ours = gradient(lambda x: fake_quantize_ste(x, scale, zero, -8, 7), x, weight)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert 0 < (ours[1] == 0).float().mean() < 0.5


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ste_is_fake_quantize_with_or_without_the_mask(granularity: Any, dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 16).to(dtype), torch.randn(6, 16).to(dtype)
    scale = choose_qparams_symmetric(x, 3, granularity) * 0.5
    expected = fake_quantize(x, scale, None, -4, 3)
    y, masked = gradient(lambda x: fake_quantize_ste(x, scale, None, -4, 3), x, weight)
    assert torch.equal(y, expected)
    assert y.dtype == masked.dtype == dtype
    y, identity = gradient(lambda x: fake_quantize_ste(x, scale, None, -4, 3, clip_gradient=False), x, weight)
    assert torch.equal(y, expected)
    assert torch.equal(identity, weight)
    clipped = masked == 0
    assert clipped.any()
    assert torch.equal(masked[~clipped], weight[~clipped])


def test_ste_gives_nothing_to_scale_and_works_in_torch_func() -> None:
    x, scale = torch.randn(4, 8), torch.full((4, 1), 0.3, requires_grad=True)
    y = fake_quantize_ste(x.requires_grad_(), scale, None, -8, 7)
    y.sum().backward()
    assert scale.grad is None
    detached = scale.detach()
    grad = torch.func.grad(lambda x: fake_quantize_ste(x, detached, None, -8, 7).sum())(x.detach())
    assert torch.equal(grad, x.grad)


# Error measures


def test_quantization_error_by_hand() -> None:
    error = quantization_error(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.5]))
    assert error.mse == 0.125
    assert error.max_abs == 0.5
    assert error.sqnr_db == pytest.approx(20.0)
    same = quantization_error(torch.zeros(3), torch.zeros(3))
    assert (same.mse, same.sqnr_db, same.max_abs) == (0.0, math.inf, 0.0)
    assert quantization_error(torch.zeros(3), torch.ones(3)).sqnr_db == -math.inf
    for bad in (torch.ones(2), torch.ones(0)):
        with pytest.raises(ValueError, match="one shape"):
            quantization_error(bad, torch.ones(3) if bad.numel() else bad)


@pytest.mark.parametrize("bits", [4, 6, 8, 10, 12])
def test_a_bit_is_worth_six_decibels(bits: int) -> None:
    # Uniform noise of a step delta has variance delta^2 / 12, so a full-scale uniform signal gains 6.02 dB a bit.
    x = torch.rand(200_000) * 2 - 1
    codes, scale = quantize_symmetric(x, bits, PerTensor())
    error = quantization_error(x, dequantize(codes, scale))
    assert error.sqnr_db == pytest.approx(20 * math.log10(2**bits - 2), abs=0.15)
    assert error.mse == pytest.approx(float(scale) ** 2 / 12, rel=0.02)
    assert error.max_abs == pytest.approx(float(scale) / 2, rel=0.01)
