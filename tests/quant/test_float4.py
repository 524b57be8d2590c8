"""MXFP4 and NVFP4: rounding against ml_dtypes, scales, bytes, and GPTQ on top."""

import numpy as np
import pytest
import torch

from bitnet.quant import float4
from bitnet.quant.blocks import dequantize_blocks
from bitnet.quant.gptq import HessianSum, layer_error
from bitnet.quant.gptq_levels import best_damping, fit_levels, sensitivity
from tests import oracles

KINDS = list(float4.GROUP)


def test_values_are_rounded_as_ml_dtypes_does() -> None:
    ml_dtypes = oracles.require("ml_dtypes")
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5, 0.0])])
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(float4.round_e2m1(x).numpy(), expected.astype(np.float32))
    codes = expected.view(np.uint8) & 15
    ours = float4.codes_of(x).numpy()
    assert np.array_equal(np.where(codes == 8, 0, codes), ours)  # there is one zero


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_come_back_as_the_nearest_values_of_their_scales(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 128) * torch.logspace(-4, 1, 6)[:, None]
    weight[2] = 0
    data, of_tensor = float4.quantize_float4(weight, kind)
    found = dequantize_blocks(data, kind) * of_tensor
    scales = float4.choose_scales(weight, kind, of_tensor)
    values = scales.values.repeat_interleave(float4.GROUP[kind], 1)
    expected = torch.where(values > 0, float4.round_e2m1(weight / values) * values, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert float((found - weight)[[4, 5]].norm() / weight[[4, 5]].norm()) < (0.12 if kind == "MXFP4" else 0.1)
    # The usual choice is no better.
    groups = weight.view(6, -1, float4.GROUP[kind])
    absmax = groups.abs().amax(-1, keepdim=True)
    if kind == "MXFP4":
        usual = torch.exp2(absmax.clamp(min=1e-30).log2().floor() - 2)
        assert set(scales.raw.tolist()[0]) <= set(range(90, 140))
    else:
        usual = (absmax / 6 / of_tensor).to(torch.float8_e4m3fn).float() * of_tensor
    usual = usual.clamp(min=1e-30)
    error = (float4.round_e2m1(groups / usual) * usual - groups).square().sum()
    assert (found - weight).square().sum() <= error


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_and_bad_input(kind: str) -> None:
    weight = torch.zeros(2, 64)
    weight[0, :3] = torch.tensor([1e-40, 3e38, -3e38])
    data, of_tensor = float4.quantize_float4(weight, kind)
    found = dequantize_blocks(data, kind) * of_tensor
    assert found.isfinite().all()
    assert float((found - weight).double().norm() / weight.double().norm()) < 0.35
    assert torch.equal(dequantize_blocks(float4.quantize_float4(weight * 0, kind)[0], kind), weight * 0)
    with pytest.raises(ValueError, match="do not divide 40 input channels"):
        float4.quantize_float4(torch.ones(2, 40), kind)
    with pytest.raises(ValueError, match="NaN"):
        float4.quantize_float4(weight * torch.nan, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_lowers_the_error_of_the_output_and_no_row_is_worse(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 64) @ torch.randn(64, 64)
    seen = HessianSum(64)
    seen.update(x)
    hessian, weight = seen.matrix(), torch.randn(20, 64) * 0.05
    of_tensor = float4.tensor_scale(weight, kind)
    scales = float4.choose_scales(weight, kind, of_tensor, sensitivity(hessian, 0.01))
    values = scales.values.repeat_interleave(float4.GROUP[kind], 1)

    def nearest(column: int, target: torch.Tensor) -> torch.Tensor:
        return float4.round_e2m1(target / values[:, column]) * values[:, column]

    fitted = fit_levels(weight, hessian, nearest)
    rounded = float4.round_e2m1(weight / values) * values
    assert torch.equal(float4.round_e2m1(fitted / values) * values, fitted)  # it lies on the levels
    errors = [layer_error(weight, each, hessian) for each in (fitted, rounded)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.5 * errors[1].sum()
    assert torch.equal(
        dequantize_blocks(float4.encode(fitted, scales, kind), kind) * of_tensor, fitted
    ) or torch.allclose(dequantize_blocks(float4.encode(fitted, scales, kind), kind) * of_tensor, fitted, rtol=1e-6)


def test_damping_is_what_serves_held_out_inputs() -> None:
    weight, hessian = torch.randn(4, 8), torch.eye(8)
    seen: list[float | None] = []

    def quantize(rows: torch.Tensor, fitted: torch.Tensor, damping: float | None) -> torch.Tensor:
        seen.append(damping)
        return rows + (0.1 if damping == 0.1 else 0.5)

    assert best_damping(weight, hessian, hessian, quantize) == 0.1
    assert seen[0] is None
    assert best_damping(weight, hessian, hessian, lambda rows, *_: rows) is None
