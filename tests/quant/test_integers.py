"""Integer quantization, absmax and zero point: by hand, against the formula, against torch."""

import math

import pytest
import torch
from torch import Tensor

from bitnet.quant import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    choose_qparams_asymmetric,
    choose_qparams_symmetric,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
    quantize_symmetric,
)
from bitnet.quant.affine import scale_shape

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerChannel(-1), PerToken(), PerGroup(8), PerGroup(1)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expand(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale of every element, spelled out independently of the blocked view in affine.py."""
    for dim, size in enumerate(shape):
        scale = scale.repeat_interleave(size // scale.shape[dim], dim)
    return scale


def assert_equal_but_for_ties(ours: Tensor, theirs: Tensor, ratio: Tensor) -> None:
    """Codes are equal, except where x / scale lies within float32 noise of a tie (torch multiplies by 1 / scale)."""
    differ = ours.int() != theirs.int()
    near_tie = ((ratio.double() - ratio.double().floor()) - 0.5).abs() < 1e-4
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (near_tie | ~differ).all()


# Integer ranges and the shape of the scale


@pytest.mark.parametrize(
    ("bits", "options", "expected"),
    [
        (8, {}, (-128, 127)), (8, {"restricted": True}, (-127, 127)), (8, {"signed": False}, (0, 255)),
        (4, {}, (-8, 7)), (4, {"signed": False}, (0, 15)), (2, {}, (-2, 1)), (2, {"restricted": True}, (-1, 1)),
        (16, {}, (-32768, 32767)),
    ],
)  # fmt: skip
def test_integer_range(bits: int, options: dict[str, bool], expected: tuple[int, int]) -> None:
    assert integer_range(bits, **options) == expected


@pytest.mark.parametrize("bits", [-8, 0, 1, 17, 32])
def test_integer_range_names_the_bad_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits}"):
        integer_range(bits)
    with pytest.raises(ValueError, match=f"{bits}"):
        choose_qparams_symmetric(torch.ones(2), bits, PerTensor())
    with pytest.raises(ValueError, match=f"{bits}"):
        choose_qparams_asymmetric(torch.ones(2), bits, PerTensor())


def test_restricted_unsigned_range_is_refused() -> None:
    with pytest.raises(ValueError, match="restricted=True"):
        integer_range(8, signed=False, restricted=True)


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (PerTensor(), [1, 1, 1]), (PerChannel(0), [2, 1, 1]), (PerChannel(1), [1, 4, 1]), (PerChannel(-1), [1, 1, 6]),
        (PerToken(), [2, 4, 1]), (PerGroup(3), [2, 4, 2]), (PerGroup(6), [2, 4, 1]),
    ],
)  # fmt: skip
def test_scale_shape(granularity, expected: list[int]) -> None:
    assert scale_shape(torch.Size((2, 4, 6)), granularity) == expected
    assert list(choose_qparams_symmetric(torch.randn(2, 4, 6), 8, granularity).shape) == expected


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (PerChannel(2), r"axis 2 .*\[3, 10\]"), (PerChannel(-3), "axis -3"), (PerGroup(4), r"4 .*\[3, 10\]"),
        (PerGroup(0), "group_size 0"), (PerGroup(-5), "group_size -5"), ("rows", "'rows'"),
    ],
)  # fmt: skip
def test_bad_granularity_is_named(granularity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_qparams_symmetric(torch.ones(3, 10), 8, granularity)
    with pytest.raises(ValueError, match=message):
        choose_qparams_asymmetric(torch.ones(3, 10), 8, granularity)


def test_integer_input_is_refused() -> None:
    for choose in (choose_qparams_symmetric, choose_qparams_asymmetric):
        with pytest.raises(ValueError, match="int64"):
            choose(torch.ones(3, dtype=torch.int64), 8, PerTensor())


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 4), (0, 1), (1, 3)])
def test_scale_that_does_not_tile_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[4, 10\]"):
        quantize(torch.ones(4, 10), torch.ones(shape), None, -128, 127)
    with pytest.raises(ValueError, match=r"\[4, 10\]"):
        dequantize(torch.ones(4, 10, dtype=torch.int8), torch.ones(shape))


# Absmax and zero-point


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("restricted", [True, False])
def test_absmax_against_the_formula(granularity, bits: int, restricted: bool) -> None:
    x = torch.randn(6, 16)
    before = x.clone()
    codes, scale = quantize_symmetric(x, bits, granularity, restricted=restricted)
    per_element = expand(scale, x.shape)
    quant_min, quant_max = integer_range(bits, restricted=restricted)
    assert torch.equal(codes.float(), (x / per_element).round().clamp(quant_min, quant_max))
    assert torch.equal(dequantize(codes, scale), codes.float() * per_element)
    assert torch.equal(fake_quantize(x, scale, None, quant_min, quant_max), dequantize(codes, scale))
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int32)
    assert torch.equal(x, before)
    if restricted:  # nothing is clipped, and the largest magnitude of every block reaches the last code
        error = (x.double() - codes.double() * per_element.double()).abs()
        assert (error <= per_element.double() * (0.5 + 1e-6 * quant_max)).all()
        largest = (x.abs() >= per_element * quant_max * (1 - 1e-6)).nonzero().tolist()
        assert largest
        assert all(abs(int(codes[row, column])) == quant_max for row, column in largest)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_zero_point_bound_and_exact_zero(granularity, bits: int, signed: bool, shift: float) -> None:
    x = torch.randn(6, 16) + shift
    x[2, 3] = 0.0
    scale, zero_point = choose_qparams_asymmetric(x, bits, granularity, signed=signed)
    quant_min, quant_max = integer_range(bits, signed=signed)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert scale.shape == zero_point.shape
    assert zero_point.min() >= quant_min
    assert zero_point.max() <= quant_max
    codes = quantize(x, scale, zero_point, quant_min, quant_max)
    back = dequantize(codes, scale, zero_point)
    assert torch.equal(fake_quantize(x, scale, zero_point, quant_min, quant_max), back)
    assert back[2, 3] == 0.0
    per_element = expand(scale, x.shape).double()
    assert ((x.double() - back.double()).abs() <= per_element * (0.5 + 1e-6 * 2**bits)).all()


@pytest.mark.parametrize("signed", [True, False])
def test_zero_point_by_hand(signed: bool) -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 6.5])  # range 7.5 over 15 steps: scale 0.5
    scale, zero_point = choose_qparams_asymmetric(x, 4, PerTensor(), signed=signed)
    offset = -8 if signed else 0
    assert scale.tolist() == [0.5]
    assert zero_point.tolist() == [2 + offset]
    codes = quantize(x, scale, zero_point, *integer_range(4, signed=signed))
    assert codes.tolist() == [c + offset for c in (0, 2, 3, 4, 15)]
    assert torch.equal(dequantize(codes, scale, zero_point), x)


def test_absmax_by_hand_with_ties() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    codes, scale = quantize_symmetric(x, 8, PerToken())
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]
    codes, scale = quantize_symmetric(torch.tensor([-128.0, 64.0, 128.0]), 8, PerTensor(), restricted=False)
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [-128, 64, 127]


QUINT = {(-128, 127): torch.qint8, (0, 255): torch.quint8}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_codes_equal_torch_per_tensor(signed: bool, power_of_two: bool) -> None:
    x = torch.randn(64, 48) + 0.3
    limits = integer_range(8, signed=signed)
    scale, zero_point = choose_qparams_asymmetric(x, 8, PerTensor(), signed=signed)
    if power_of_two:  # x / scale and x * (1 / scale) are the same number: equality has no exceptions
        scale = torch.full_like(scale, 2.0**-6)
    codes = quantize(x, scale, zero_point, *limits)
    theirs = torch.quantize_per_tensor(x, scale.item(), int(zero_point), QUINT[limits])
    fake = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), *limits)
    assert_equal_but_for_ties(codes, theirs.int_repr(), x / scale)
    equal = codes.int() == theirs.int_repr().int()
    assert equal.all() or not power_of_two
    assert torch.equal(dequantize(codes, scale, zero_point)[equal], theirs.dequantize()[equal])
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, *limits)[equal], fake[equal], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_codes_equal_torch_per_channel(axis: int, symmetric: bool, power_of_two: bool) -> None:
    x = torch.randn(24, 40) * torch.linspace(0.1, 3, 24)[:, None]
    if symmetric:
        scale = choose_qparams_symmetric(x, 8, PerChannel(axis))
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        scale, zero_point = choose_qparams_asymmetric(x, 8, PerChannel(axis), signed=True)
    if power_of_two:
        scale = torch.exp2(scale.log2().round())
    codes = quantize(x, scale, zero_point, -128, 127)
    theirs = torch.quantize_per_channel(x, scale.flatten(), zero_point.flatten(), axis, torch.qint8)
    fake = torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero_point.flatten(), axis, -128, 127)
    assert_equal_but_for_ties(codes, theirs.int_repr(), x / scale)
    equal = codes == theirs.int_repr()
    assert equal.all() or not power_of_two
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, -128, 127)[equal], fake[equal], rtol=0, atol=1e-6)
    if symmetric:
        assert torch.equal(codes, quantize(x, scale, None, -128, 127))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_and_tokens_equal_torch_per_channel_of_the_reshaped_tensor(bits: int) -> None:
    x = torch.randn(3, 5, 32)
    for granularity, rows in ((PerGroup(8), x.reshape(-1, 8)), (PerToken(), x.reshape(-1, 32))):
        scale, zero_point = choose_qparams_asymmetric(x, bits, granularity)
        scale = torch.exp2(scale.log2().ceil())
        fake = torch.fake_quantize_per_channel_affine(
            rows, scale.flatten(), zero_point.flatten(), 0, *integer_range(bits, signed=False)
        )
        ours = fake_quantize(x, scale, zero_point, *integer_range(bits, signed=False))
        assert torch.equal(ours, fake.reshape(x.shape))


@pytest.mark.parametrize("dtype", FLOATS)
def test_affine_input_dtypes_compute_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32).to(dtype)
    codes, scale = quantize_symmetric(x, 8, PerToken())
    expected_codes, expected_scale = quantize_symmetric(x.float(), 8, PerToken())
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    fake = fake_quantize(x, scale, None, -128, 127)
    assert fake.dtype == dtype
    assert torch.equal(fake, dequantize(codes, scale).to(dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e30, -1e30, 1e-30, -1e-30, 1e-40])
def test_constant_tensors(granularity, value: float) -> None:
    x = torch.full((2, 16), value)
    codes, scale = quantize_symmetric(x, 8, granularity)
    assert scale.isfinite().all()
    assert (scale >= 1e-5 / 128).all()
    expected = 0 if abs(value) < 1e-9 else int(math.copysign(127, value))
    assert (codes == expected).all()
    for signed in (True, False):
        scale, zero_point = choose_qparams_asymmetric(x, 8, granularity, signed=signed)
        back = fake_quantize(x, scale, zero_point, *integer_range(8, signed=signed))
        assert scale.isfinite().all()
        assert (scale > 0).all()
        torch.testing.assert_close(back, x if abs(value) > 1e-9 else torch.zeros_like(x))


def test_all_zero_row_among_others() -> None:
    x = torch.randn(3, 16)
    x[1] = 0
    codes, scale = quantize_symmetric(x, 8, PerToken())
    assert scale[1] == torch.tensor(1e-5) / 127
    assert not codes[1].any()
    assert torch.equal(codes[[0, 2]], quantize_symmetric(x[[0, 2]], 8, PerToken())[0])


def test_absmax_below_eps_keeps_the_floor() -> None:
    x = torch.tensor([[1e-6, -1e-6]])
    codes, scale = quantize_symmetric(x, 8, PerToken())
    assert scale == torch.tensor(1e-5) / 127
    assert codes.tolist() == [[13, -13]]
    codes, scale = quantize_symmetric(x, 8, PerToken(), eps=1e-12)
    assert codes.tolist() == [[127, -127]]


def test_magnitudes_over_the_whole_float_range_stay_finite() -> None:
    x = torch.tensor([[1e30, -1e30, 1e-30, 0.0], [1e38, -1e38, 1.0, -1.0], [1e-30, 1e-40, -1e-45, 0.0]])
    codes, scale = quantize_symmetric(x, 8, PerToken())
    assert codes.tolist() == [[127, -127, 0, 0], [127, -127, 0, 0], [0, 0, 0, 0]]
    assert scale.isfinite().all()
    assert dequantize(codes, scale).isfinite().all()


def test_values_outside_the_range_are_clipped_to_it() -> None:
    scale, zero_point = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)
    x = torch.tensor([-1e30, -10.0, 0.0, 1e30])
    assert quantize(x, scale, None, -8, 7).tolist() == [-8, -8, 0, 7]
    assert quantize(x, scale, zero_point, 0, 15).tolist() == [0, 0, 3, 15]


@pytest.mark.parametrize(
    ("limits", "dtype"),
    [((-128, 127), torch.int8), ((-1, 1), torch.int8), ((0, 127), torch.int8), ((0, 255), torch.uint8),
     ((0, 65535), torch.int32), ((-32768, 32767), torch.int32), ((-129, 127), torch.int32)],
)  # fmt: skip
def test_code_dtype_is_the_smallest_that_fits(limits: tuple[int, int], dtype: torch.dtype) -> None:
    low, high = limits
    codes = quantize(torch.tensor([-1e9, 1e9]), torch.ones(1), None, low, high)
    assert codes.dtype == dtype
    assert codes.tolist() == [low, high]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_zero_tokens(shape: tuple[int, ...]) -> None:
    codes, scale = quantize_symmetric(torch.zeros(shape), 8, PerToken())
    assert codes.shape == shape
    assert codes.dtype == torch.int8
    assert list(scale.shape) == [*shape[:-1], 1]
    assert dequantize(codes, scale).shape == shape
    assert fake_quantize(torch.zeros(shape), scale, None, -128, 127).shape == shape


def test_non_contiguous_and_one_dimensional_input() -> None:
    x = torch.randn(16, 6).t()
    for granularity in GRANULARITIES:
        for got, expected in zip(quantize_symmetric(x, 8, granularity),
                                 quantize_symmetric(x.contiguous(), 8, granularity), strict=True):  # fmt: skip
            assert torch.equal(got, expected)
    codes, scale = quantize_symmetric(torch.tensor([2.0, -1.1, 4.0, 0.0]), 4, PerGroup(2))
    torch.testing.assert_close(scale, torch.tensor([2.0, 4.0]) / 7)
    assert codes.tolist() == [7, -4, 7, 0]  # -1.1 / (2 / 7) = -3.85
