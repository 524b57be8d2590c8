import math

import pytest
import torch
from torch import Tensor

from bitnet.quant import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    absmean_scale,
    choose_qparams_asymmetric,
    choose_qparams_symmetric,
    dequantize,
    fake_quantize,
    fake_quantize_binary,
    fake_quantize_ternary,
    integer_range,
    pack_codes,
    packed_width,
    quantize,
    quantize_binary,
    quantize_symmetric,
    quantize_ternary,
    unpack_codes,
)
from bitnet.quant.affine import scale_shape
from bitnet.quant.packing import codes_per_block

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


# Ternary and binary weights


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


# Packing

LIMITS = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    low, high = LIMITS[bits]
    return torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300])
@pytest.mark.parametrize("rows", [1, 3])
def test_packing_round_trip(bits: int, columns: int, rows: int) -> None:
    codes = random_codes(rows, columns, bits)
    codes[0, 0], codes[-1, -1] = LIMITS[bits]
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(columns, bits))
    unpacked = unpack_codes(packed, bits, columns)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, before)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(("bits", "block"), [(2, 128), (4, 64), (8, 32)])
def test_packed_width(bits: int, block: int) -> None:
    assert codes_per_block(bits) == block
    assert [packed_width(k, bits) for k in (1, block - 1, block, block + 1, 3 * block)] == [32, 32, 32, 64, 96]


def test_bytes_of_one_2_bit_block_by_hand() -> None:
    codes = torch.zeros(1, 128, dtype=torch.int8)  # all bytes 01 01 01 01
    codes[0, 0], codes[0, 32], codes[0, 64], codes[0, 96] = -1, 0, 1, 1  # byte 0: 10 10 01 00
    codes[0, 1], codes[0, 33], codes[0, 65], codes[0, 97] = 1, -1, -1, -1  # byte 1: 00 00 00 10
    codes[0, 31], codes[0, 127] = -1, 1  # byte 31: 10 01 01 00
    expected = [0b01010101] * 32
    expected[0], expected[1], expected[31] = 0b10100100, 0b00000010, 0b10010100
    assert pack_codes(codes, 2).tolist() == [expected]


def test_bytes_of_one_4_bit_block_by_hand() -> None:
    codes = torch.zeros(1, 64, dtype=torch.int8)
    codes[0, 0], codes[0, 32] = -8, 7
    codes[0, 31], codes[0, 63] = 7, -1
    expected = [0x88] * 32
    expected[0], expected[31] = 0xF0, 0x7F
    assert pack_codes(codes, 4).tolist() == [expected]


def test_bytes_of_one_8_bit_block_by_hand() -> None:
    codes = torch.arange(-16, 16, dtype=torch.int8)[None]
    codes[0, 0], codes[0, 31] = -128, 127
    expected = [0, *range(113, 143), 255]
    assert pack_codes(codes, 8).tolist() == [expected]


def test_2_bit_layout_is_ggml_tq2_0() -> None:
    codes = random_codes(2, 512, 2)
    packed = pack_codes(codes, 2)
    for row in range(2):
        for block in range(2):  # 256 weights, 64 bytes
            bytes_ = packed[row, block * 64 : (block + 1) * 64].tolist()
            for g in range(2):
                for lane in range(4):
                    for m in range(32):
                        code = int(codes[row, block * 256 + g * 128 + lane * 32 + m])
                        assert bytes_[g * 32 + m] >> 2 * lane & 3 == code + 1


@pytest.mark.parametrize(("bits", "zero"), [(2, 0b01010101), (4, 0x88), (8, 0x80)])
def test_padding_is_the_code_of_zero(bits: int, zero: int) -> None:
    block = codes_per_block(bits)
    codes = random_codes(2, block + 1, bits)
    packed = pack_codes(codes, bits)
    padded = unpack_codes(packed, bits, 2 * block)
    assert torch.equal(padded[:, : block + 1], codes)
    assert not padded[:, block + 1 :].any()
    assert (packed[:, 33:] == zero).all()
    # A tail is read back to zeros only: other bytes in it do not reach the codes.
    packed[:, 33:] = 0
    assert torch.equal(unpack_codes(packed, bits, block + 1), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_non_contiguous_and_empty(bits: int) -> None:
    codes = random_codes(70, 5, bits)
    assert torch.equal(unpack_codes(pack_codes(codes.t(), bits), bits, 70), codes.t())
    packed = pack_codes(torch.cat([codes, codes]).t(), bits)
    assert torch.equal(unpack_codes(packed.t().contiguous().t(), bits, 140)[:, :70], codes.t())
    assert unpack_codes(pack_codes(codes[:0], bits), bits, 5).shape == (0, 5)


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 16])
def test_packing_names_the_bad_width(bits: int) -> None:
    message = f"bits is {bits}; .*2, 4, 8"
    with pytest.raises(ValueError, match=message):
        pack_codes(torch.zeros(1, 4, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=message):
        unpack_codes(torch.zeros(1, 32, dtype=torch.uint8), bits, 4)
    with pytest.raises(ValueError, match=message):
        packed_width(4, bits)


@pytest.mark.parametrize(("bits", "value"), [(2, 2), (2, -2), (4, 8), (4, -9)])
def test_packing_names_the_code_out_of_range(bits: int, value: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.int8)
    codes[1, 2] = value
    with pytest.raises(ValueError, match=f"{value}.*{bits} bits"):
        pack_codes(codes, bits)


def test_packing_names_the_wrong_dtype_and_shape() -> None:
    with pytest.raises(ValueError, match=r"torch.int32 \[2, 3\]"):
        pack_codes(torch.zeros(2, 3, dtype=torch.int32), 2)
    with pytest.raises(ValueError, match=r"\[3\]"):
        pack_codes(torch.zeros(3, dtype=torch.int8), 2)
    with pytest.raises(ValueError, match=r"\[2, 32\]"):
        unpack_codes(torch.zeros(2, 32, dtype=torch.uint8), 2, 129)
    with pytest.raises(ValueError, match="int8"):
        unpack_codes(torch.zeros(2, 32, dtype=torch.int8), 2, 128)
