"""AWQ's and SmoothQuant's searches against brute force on stored activations."""

import pytest
import torch
from torch import Tensor

from bitnet.kernels.reference import quantize_activations
from bitnet.quant import PerChannel, dequantize, quantize_symmetric
from bitnet.quant.awq import awq_scale, clip_quantize
from bitnet.quant.gptq import layer_error
from bitnet.quant.grouped import Grid, round_to_nearest
from bitnet.quant.smoothquant import smooth_scale


def outlier_inputs(tokens: int = 300, columns: int = 64) -> Tensor:
    """Activations in which a few channels are much larger than the rest."""
    x = torch.randn(tokens, columns)
    x[:, ::13] *= 30
    return x


@pytest.mark.parametrize("grid", [Grid(3), Grid(4), Grid(4, True)], ids=str)
@pytest.mark.parametrize("group_size", [16, -1])
def test_awq_finds_the_alpha_of_least_output_error(grid, group_size) -> None:
    x = outlier_inputs()
    weights = [torch.randn(24, 64), 0.1 * torch.randn(8, 64)]
    magnitude = x.abs().mean(0)
    scale, alpha = awq_scale(weights, magnitude, x.T @ x, grid, group_size)
    errors = []
    for i in range(20):
        s = magnitude ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        quantized = [round_to_nearest(w * s, grid, group_size).dequantize() for w in weights]
        errors.append(sum(((x / s) @ q.T - x @ w.T).square().sum() for w, q in zip(weights, quantized, strict=True)))
    best = min(range(20), key=lambda i: errors[i])
    assert alpha == best / 20
    assert alpha > 0
    assert errors[best] < 0.8 * errors[0]  # and errors[0] is round-to-nearest
    expected = magnitude**alpha
    assert torch.allclose(scale, expected / (expected.max() * expected.min()).sqrt())
    assert float(scale.max() * scale.min()) == pytest.approx(1)


def test_awq_without_outliers_is_never_above_rounding() -> None:
    x, weight, grid = torch.randn(300, 32), torch.randn(16, 32), Grid(4)
    hessian = x.T @ x
    scale, _ = awq_scale([weight], x.abs().mean(0), hessian, grid, 16)
    quantized = round_to_nearest(weight * scale, grid, 16).dequantize() / scale
    plain = round_to_nearest(weight, grid, 16).dequantize()
    assert layer_error(weight, quantized, hessian).sum() <= layer_error(weight, plain, hessian).sum()


def test_awq_channels_that_never_fire() -> None:
    x = outlier_inputs()
    x[:, [1, 5]] = 0
    scale, _ = awq_scale([torch.randn(8, 64)], x.abs().mean(0), x.T @ x, Grid(4), 16)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    ones, alpha = awq_scale([torch.randn(8, 64)], torch.zeros(64), torch.zeros(64, 64), Grid(4), 16)
    assert alpha == 0
    assert (ones == 1).all()


@pytest.mark.parametrize("magnitude", [torch.full((64,), -1.0), torch.full((64,), torch.nan)])
def test_awq_bad_magnitudes_are_named(magnitude) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        awq_scale([torch.randn(8, 64)], magnitude, torch.eye(64), Grid(4), 16)


@pytest.mark.parametrize("grid", [Grid(2), Grid(3, True), Grid(4)], ids=str)
def test_clipping_minimizes_each_groups_output_error(grid) -> None:
    x = outlier_inputs(200, 32)
    weight = torch.randn(6, 32) * torch.exp(0.7 * torch.randn(6, 32))
    result = clip_quantize(weight, x.T @ x, grid, 16)

    def group_errors(quantized: Tensor) -> Tensor:
        parts = ((quantized - weight) * x[:, None]).view(200, 6, 2, 16)
        return parts.sum(-1).square().sum(0)

    ours = group_errors(result.dequantize())
    plain = group_errors(round_to_nearest(weight, grid, 16).dequantize())
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 0.95 * plain.sum()
    for i in range(10):  # no candidate is better in any group
        limit = weight.view(6, 2, 16).abs().amax(-1, keepdim=True) * (1 - i / 20)
        clipped = round_to_nearest(weight.view(6, 2, 16).clamp(-limit, limit).view(6, 32), grid, 16)
        group = clipped.g_idx.long()
        scale, zero = clipped.scale.float()[:, group], clipped.zero_point[:, group]
        codes = (weight / scale).round().add(zero).clamp(0, grid.quant_max)
        assert (ours <= group_errors((codes - zero) * scale) * (1 + 1e-4)).all()


def test_clipping_refuses_what_rounding_refuses() -> None:
    with pytest.raises(ValueError, match="group_size 24"):
        clip_quantize(torch.randn(4, 32), torch.eye(32), Grid(4), 24)


# SmoothQuant


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_smoothing_is_equation_4_and_changes_no_product(alpha) -> None:
    x, weights = outlier_inputs(), [torch.randn(16, 64), 3 * torch.randn(4, 64)]
    scale = smooth_scale(weights, x.abs().amax(0), alpha)
    for k in (0, 1, 13, 63):
        largest = max(float(w[:, k].abs().max()) for w in weights)
        assert float(scale[k]) == pytest.approx(float(x[:, k].abs().max()) ** alpha / largest ** (1 - alpha), rel=1e-5)
    for weight in weights:
        assert torch.allclose((x / scale) @ (weight * scale).T, x @ weight.T, atol=1e-3)
    if alpha == 0.5:
        largest = torch.cat(weights).abs().amax(0) * scale
        assert torch.allclose((x / scale).abs().amax(0), largest, rtol=1e-5)


def test_smoothing_lowers_the_error_of_int8_where_there_are_outliers() -> None:
    x, weight = outlier_inputs(), torch.randn(32, 64)
    scale = smooth_scale([weight], x.abs().amax(0))

    def error(x_in: Tensor, w_in: Tensor) -> float:
        codes, s = quantize_activations(x_in)
        w_codes, w_scale = quantize_symmetric(w_in, 8, PerChannel(0))
        y = (codes.float() * s) @ dequantize(w_codes, w_scale).T
        return float((y - x @ weight.T).square().sum())

    assert error(x / scale, weight * scale) < 0.5 * error(x, weight)


def test_smoothing_leaves_dead_channels_alone() -> None:
    x, weight = outlier_inputs(), torch.randn(8, 64)
    x[:, 3] = 0
    weight[:, 5] = 0
    scale = smooth_scale([weight], x.abs().amax(0))
    assert scale[3] == scale[5] == 1
    assert (scale > 0).all()


@pytest.mark.parametrize(
    ("absmax", "alpha", "message"),
    [
        (torch.ones(8), 1.5, "alpha is 1.5"),
        (torch.ones(8), -0.1, "alpha is -0.1"),
        (-torch.ones(8), 0.5, "not negative"),
        (torch.full((8,), torch.inf), 0.5, "finite"),
    ],
)
def test_smoothing_bad_input_is_named(absmax, alpha, message) -> None:
    with pytest.raises(ValueError, match=message):
        smooth_scale([torch.randn(4, 8)], absmax, alpha)
