"""Ternary and binary weights, by hand and against the formula."""

import math

import pytest
import torch

from bitnet.quant import (
    absmean_scale,
    fake_quantize_binary,
    fake_quantize_ternary,
    fake_quantize_ternary_groups,
    quantize_binary,
    quantize_ternary,
    quantize_ternary_groups,
    scale_of_columns,
)
from bitnet.quant.ternary import _round_to_float16, soft_ternary

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_ternary_by_hand_with_ties() -> None:
    # mean(|W|) = 1: the ratios are the values, so 0.5 and 1.5 are exact ties. Half to even: 0.5 -> 0, 1.5 -> 2 -> 1.
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.51, -0.51, 0.49, -0.49], [2.0, -2.0, 0.0, 2.0]])
    assert weight.abs().mean() == 1.0
    codes, scale = quantize_ternary(weight)
    assert scale == 1.0
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    assert codes.tolist() == [[0, 0, 1, -1], [1, -1, 0, 0], [1, -1, 0, 1]]
    assert codes.dtype == torch.int8


@pytest.mark.parametrize("group_size", [0, 4])
def test_soft_ternary_is_the_mean_of_the_codes(group_size: int) -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([-1.0, 0.0, 1.0])
    if group_size:
        codes, scale = quantize_ternary_groups(weight, group_size)
        scale = scale_of_columns(scale, group_size, 10)
    else:
        codes, scale = quantize_ternary(weight)
    for temperature in (1.0, 0.3, 0.01):
        chances = (-((weight / scale)[..., None] - levels).square() / temperature).softmax(-1)
        found = soft_ternary(weight, torch.tensor(temperature), group_size)
        torch.testing.assert_close(found, scale * (chances * levels).sum(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(soft_ternary(weight, torch.tensor(0.0), group_size), codes * scale)
    # No number that is too small for full precision, of which products are slow.
    means = torch.cat([soft_ternary(weight, torch.tensor(t), group_size).abs() for t in (0.02, 0.01, 0.005)])
    assert means[means > 0].min() > 1e-20
    # Borders, zeros and a matrix of nothing else give no NaN.
    assert soft_ternary(torch.tensor([[0.5, 1.5, 0.0, -2.0]]), torch.tensor(0.0), group_size).isfinite().all()
    assert torch.equal(soft_ternary(torch.zeros(2, 4), torch.tensor(0.0), group_size), torch.zeros(2, 4))


def test_ternary_scale_is_the_mean_of_the_whole_matrix() -> None:
    codes, scale = quantize_ternary(torch.tensor([[4.0, 0.0], [-1.0, 1.0]]))
    assert scale == 1.5
    assert codes.tolist() == [[1, 0], [-1, 1]]


@pytest.mark.parametrize("shape", [(4, 4), (1,), (2, 3, 4)])
def test_ternary_of_zeros(shape: tuple[int, ...]) -> None:
    codes, scale = quantize_ternary(torch.zeros(shape))
    assert scale == torch.tensor(1e-5)
    assert not codes.any()
    assert not fake_quantize_ternary(torch.zeros(shape)).any()


@pytest.mark.parametrize(("value", "code"), [(3.0, 1), (-3.0, -1), (1e-4, 1), (4e-6, 0), (-1e-40, 0), (1e30, 1)])
def test_ternary_of_one_element(value: float, code: int) -> None:
    codes, scale = quantize_ternary(torch.tensor([value]))
    assert codes.tolist() == [code]
    assert scale == torch.tensor(max(abs(value), 1e-5))


@pytest.mark.parametrize("quantizer", [quantize_ternary, quantize_binary])
@pytest.mark.parametrize("dtype", FLOATS)
def test_master_dtype_is_quantized_in_float32(quantizer, dtype: torch.dtype) -> None:
    weight = torch.randn(33, 65).to(dtype)
    codes, scale = quantizer(weight)
    expected_codes, expected_scale = quantizer(weight.float())
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert scale.dtype == torch.float32
    assert codes.dtype == torch.int8


def test_half_precision_sum_does_not_overflow() -> None:
    weight = torch.full((512, 512), 100.0, dtype=torch.float16)  # the sum, 2.6e7, is inf in float16
    codes, scale = quantize_ternary(weight)
    assert scale == 100.0
    assert (codes == 1).all()


@pytest.mark.parametrize(("fake", "quantizer"), [(fake_quantize_ternary, quantize_ternary),
                                             (fake_quantize_binary, quantize_binary)])  # fmt: skip
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 5)])
def test_fake_quantize_is_codes_times_scale(fake, quantizer, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).to(dtype)
    before = weight.clone()
    codes, scale = quantizer(weight)
    assert codes.shape == weight.shape
    result = fake(weight)
    assert result.dtype == dtype
    assert torch.equal(result, (codes.float() * scale).to(dtype))
    assert torch.equal(weight, before)


def test_absmean_is_not_idempotent() -> None:
    weight = torch.randn(512, 512)
    once = fake_quantize_ternary(weight)
    nonzero = (once != 0).float().mean()
    # P(|w| > gamma / 2) for a Gaussian, gamma = sqrt(2 / pi).
    assert nonzero.item() == pytest.approx(1 - math.erf(math.sqrt(2 / math.pi) / 2 / math.sqrt(2)), abs=5e-3)
    assert nonzero.item() == pytest.approx(0.69, abs=5e-3)
    torch.testing.assert_close(absmean_scale(once), absmean_scale(weight) * nonzero)
    # The codes of the second pass are the same: it is the scale that shrinks.
    assert torch.equal(quantize_ternary(once)[0], quantize_ternary(weight)[0])


def test_binary_by_hand_around_the_mean() -> None:
    weight = torch.tensor([[1.0, 3.0], [2.0, 2.0]])  # mean 2: two entries equal to it
    codes, scale = quantize_binary(weight)
    assert codes.tolist() == [[-1, 1], [1, 1]]
    assert scale == 2.0
    assert scale.dtype == torch.float32


def test_binary_sign_of_zero_is_plus_one() -> None:
    codes, scale = quantize_binary(torch.tensor([0.0, -0.0, 1.0, -1.0]))
    assert codes.tolist() == [1, 1, 1, -1]
    assert scale == 0.5
    codes, scale = quantize_binary(torch.zeros(3, 3))
    assert (codes == 1).all()
    assert scale == 0.0
    assert not fake_quantize_binary(torch.zeros(3, 3)).any()


# Groups


def test_groups_by_hand() -> None:
    weight = torch.zeros(1, 130)
    weight[0, :64] = 0.5  # a group of one magnitude
    weight[0, 64:128:2] = 1.0  # half of them 1: the mean is 0.5
    weight[0, 128] = -3.0  # the last group has two weights, and not 64
    codes, scale = quantize_ternary_groups(weight, 64)
    assert scale.tolist() == [[0.5, 0.5, 1.5]]
    assert codes[0, :64].tolist() == [1] * 64
    assert codes[0, 64:128].tolist() == [1, 0] * 32
    assert codes[0, 128:].tolist() == [-1, 0]


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("columns", [40, 128, 200])
def test_scales_of_groups_are_float16_numbers_and_each_group_is_absmean(group_size: int, columns: int) -> None:
    weight = torch.randn(5, columns) * torch.logspace(-9, 2, 5).view(-1, 1)
    codes, scale = quantize_ternary_groups(weight, group_size)
    assert torch.equal(scale.half().float(), scale)
    for row in range(5):
        for group, part in enumerate(weight[row].split(group_size)):
            expected = part.abs().mean().clamp(min=2.0**-14).half().float()
            assert scale[row, group] == expected
            found = codes[row, group * group_size : group * group_size + len(part)]
            assert torch.equal(found.float(), (part / expected).round().clamp(-1, 1))
    fake = fake_quantize_ternary_groups(weight.bfloat16(), group_size)
    assert fake.dtype == torch.bfloat16
    assert torch.equal(
        fake_quantize_ternary_groups(weight, group_size), codes * scale_of_columns(scale, group_size, columns)
    )


def test_rounding_to_float16_is_torchs() -> None:
    values = torch.cat([torch.rand(20000) + 2.0**-14, torch.tensor([2.0**-14, 1.00048828125, 1.00146484375, 60000.0])])
    assert torch.equal(_round_to_float16(values), values.half().float())
    assert _round_to_float16(torch.tensor([torch.inf, torch.nan])).isfinite().sum() == 0
