"""NF4 against its definition and the published codebook."""

import math

import pytest
import torch

from bitnet.quant import (
    dequantize_nf4,
    packed_width,
    quantization_error,
    quantize_nf4,
    quantize_symmetric,
    unpack_codes,
)
from bitnet.quant.affine import PerGroup, dequantize
from bitnet.quant.nf4 import DoubleQuantized, nf4_codebook

# The values printed in appendix E of the paper and used by every implementation since.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_codebook_is_the_published_one() -> None:
    codebook = nf4_codebook()
    torch.testing.assert_close(codebook, torch.tensor(PUBLISHED), rtol=0, atol=1e-6)
    assert codebook.dtype == torch.float32
    assert codebook[0] == -1.0
    assert codebook[7] == 0.0
    assert codebook[15] == 1.0


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_codes_are_the_nearest_values(block_size: int, rows: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, 512).to(dtype)
    before = weight.clone()
    nf4 = quantize_nf4(weight, block_size=block_size)
    blocks = weight.float().view(rows, -1, block_size)
    assert isinstance(nf4.scale, torch.Tensor)
    assert torch.equal(nf4.scale, blocks.abs().amax(-1))
    distance = (blocks[..., None] / nf4.scale[..., None, None] - nf4_codebook()).abs()
    nearest = distance.argmin(-1).view(rows, 512)
    codes = unpack_codes(nf4.packed, 4, 512).long() + 8
    assert torch.equal(codes, nearest)
    back = dequantize_nf4(nf4)
    assert torch.equal(back, nf4_codebook()[nearest] * nf4.scale.repeat_interleave(block_size, 1))
    assert back.dtype == torch.float32
    assert torch.equal(weight, before)
    # The largest magnitude of every block is exact, and the widest gap of the codebook bounds the rest.
    gap = float(nf4_codebook().diff().max()) / 2
    assert ((back - weight.float()).abs() <= nf4.scale.repeat_interleave(block_size, 1) * gap * 1.00001).all()
    assert torch.equal(back.view(blocks.shape).abs().amax(-1), nf4.scale)


def test_ties_take_the_lower_value() -> None:
    codebook = nf4_codebook()
    middles = (codebook[1:] + codebook[:-1]) / 2
    weight = torch.zeros(1, 64)
    weight[0, 0] = 1.0
    weight[0, 1:16] = middles
    weight[0, 16:31] = torch.nextafter(middles, torch.tensor(2.0))
    codes = unpack_codes(quantize_nf4(weight).packed, 4, 64)[0].long() + 8
    assert codes[1:31].tolist() == [*range(15), *range(1, 16)]


def test_gaussian_weights_use_all_codes() -> None:
    codes = unpack_codes(quantize_nf4(torch.randn(256, 1024)).packed, 4, 1024)
    share = torch.bincount(codes.flatten().long() + 8, minlength=16) / codes.numel()
    assert (share.argmin(), share.argmax()) == (15, 6)
    assert share.min() == pytest.approx(0.017, abs=0.001)
    assert share.max() == pytest.approx(0.093, abs=0.001)


def test_better_than_int4_of_the_same_size_on_gaussian_weights() -> None:
    weight = torch.randn(256, 1024)
    nf4 = quantization_error(weight, dequantize_nf4(quantize_nf4(weight)))
    int4 = quantization_error(weight, dequantize(*quantize_symmetric(weight, 4, PerGroup(64))))
    assert nf4.sqnr_db > int4.sqnr_db + 0.9


def test_a_round_trip_repeats_itself() -> None:
    once = dequantize_nf4(quantize_nf4(torch.randn(16, 256)))
    assert torch.equal(dequantize_nf4(quantize_nf4(once)), once)


@pytest.mark.parametrize("double_quant", [False, True])
def test_zeros_stay_zero(double_quant: bool) -> None:
    weight = torch.randn(4, 256)
    weight[1] = 0
    weight[2, 64:128] = 0
    nf4 = quantize_nf4(weight, double_quant=double_quant)
    back = dequantize_nf4(nf4)
    assert (unpack_codes(nf4.packed, 4, 256)[1] == 7 - 8).all()  # the index of 0
    assert not back[1].any()
    assert not back[2, 64:128].any()
    assert back.isfinite().all()
    assert not dequantize_nf4(quantize_nf4(torch.zeros(3, 128), double_quant=double_quant)).any()


@pytest.mark.parametrize("value", [1.0, -3.5, 1e-30, 1e30])
@pytest.mark.parametrize("double_quant", [False, True])
def test_constants(value: float, double_quant: bool) -> None:
    weight = torch.full((4, 128), value)
    torch.testing.assert_close(
        dequantize_nf4(quantize_nf4(weight, double_quant=double_quant)), weight, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 192), (64, 256), (65, 1024), (7, 64 * 37)])
def test_double_quantization_of_the_scales(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    plain, double = quantize_nf4(weight), quantize_nf4(weight, double_quant=True)
    assert isinstance(plain.scale, torch.Tensor)
    assert isinstance(double.scale, DoubleQuantized)
    assert double.scale.codes.dtype == torch.int8
    assert double.scale.codes.shape == plain.scale.shape
    assert double.scale.scale.shape == (math.ceil(plain.scale.numel() / 256),)
    torch.testing.assert_close(double.scale.offset, plain.scale.mean())
    stored = double.scale.dequantize()
    # Spelled out block by block: int8 by absmax of what is left without the mean.
    for i, block in enumerate((plain.scale.flatten() - double.scale.offset).split(256)):
        step = block.abs().max() / 127
        expected = (block / step).round().nan_to_num() * step + double.scale.offset
        torch.testing.assert_close(stored.flatten()[i * 256 : (i + 1) * 256], expected, rtol=1e-6, atol=1e-7)
        assert ((stored - plain.scale).abs().flatten()[i * 256 : (i + 1) * 256] <= step * 0.5001 + 1e-6).all()
    # Codes belong to the stored scale: each is the nearest for it.
    codes = unpack_codes(double.packed, 4, columns).long() + 8
    ratio = weight.view(rows, -1, 64) / stored[..., None]
    assert torch.equal(codes, (ratio[..., None] - nf4_codebook()).abs().argmin(-1).view(rows, columns))
    assert quantization_error(weight, dequantize_nf4(double)).sqnr_db > 19.5


def test_double_quantized_scales_are_never_negative() -> None:
    zeros = 0
    for seed in range(8):  # an all-zero row lies below the mean by some number of steps and a fraction
        weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
            [[1.0], [0], [2], [9]]
        )
        scale = quantize_nf4(weight, double_quant=True).scale
        assert isinstance(scale, DoubleQuantized)
        assert (scale.dequantize() >= 0).all()
        zeros += int((scale.codes * scale.scale + scale.offset < 0).any())
    assert zeros  # and without the clamp some would be


def test_sizes() -> None:
    weight = torch.randn(64, 1024)
    plain, double = quantize_nf4(weight), quantize_nf4(weight, double_quant=True)
    assert plain.packed.shape == (64, packed_width(1024, 4)) == (64, 512)
    assert plain.nbytes * 8 / weight.numel() == 4.5
    assert double.nbytes == 64 * 512 + 1024 + 4 * 4 + 4
    assert (double.nbytes - 4) * 8 / weight.numel() == 4 + 8 / 64 + 32 / (64 * 256)


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"group_size 64 does not divide .*\[4, 100\]"):
        quantize_nf4(torch.randn(4, 100))
    with pytest.raises(ValueError, match=r"\[4\]"):
        quantize_nf4(torch.randn(4))
    with pytest.raises(ValueError, match="int32"):
        quantize_nf4(torch.ones(4, 64, dtype=torch.int32))
    for value in (math.nan, math.inf):
        weight = torch.randn(4, 64)
        weight[2, 3] = value
        with pytest.raises(ValueError, match=r"\[4, 64\] holds 1 NaN or infinite"):
            quantize_nf4(weight)
