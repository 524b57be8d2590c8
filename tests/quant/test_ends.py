"""Where the domains of the quantizers end: weights without rows or columns, ranges as wide as float32, wide sums."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitnet import kernels
from bitnet.kernels import blocks, cpu, reference
from bitnet.kernels.cpu import native
from bitnet.kernels.int8_training import Int8Product
from bitnet.model.linear import BitLinear, PackedLinear, pack
from bitnet.model.quantized import StaticInt8Linear
from bitnet.model.weight_only import BlockLinear, FloatLinear, GroupLinear, NF4Linear
from bitnet.quant import affine, calibration
from bitnet.quant.awq import awq_scale, clip_quantize
from bitnet.quant.gptq import gptq_quantize
from bitnet.quant.grouped import TERNARY, Grid, round_to_nearest
from bitnet.quant.nf4 import dequantize_nf4, quantize_nf4
from bitnet.quant.packing import pack_codes
from bitnet.quant.smoothquant import smooth_scale

GRIDS = [Grid(4), Grid(3, symmetric=True), TERNARY]
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("group_size", [64, -1])
def test_grouped_quantizers_of_no_rows(group_size: int) -> None:
    weight, hessian = torch.randn(0, 128), torch.eye(128)
    for grid in GRIDS:
        results = [
            round_to_nearest(weight, grid, group_size),
            clip_quantize(weight, hessian, grid, group_size),
            *(
                gptq_quantize(weight, hessian, grid, group_size=group_size, algorithm=a)
                for a in ("refined", "original")
            ),
        ]
        for result in results:
            assert result.dequantize().shape == (0, 128)
            assert result.scale.shape == (0, 1 if group_size == -1 else 2)
        scale, _ = awq_scale([weight], torch.ones(128), hessian, grid, group_size)
        assert torch.equal(scale, torch.ones(128))
    layer = GroupLinear.from_quantized(round_to_nearest(weight, Grid(4), group_size))
    assert layer(torch.randn(2, 128)).shape == (2, 0)


def test_grouped_quantizers_refuse_no_columns() -> None:
    weight, hessian = torch.randn(4, 0), torch.zeros(0, 0)
    calls: list[Callable[[], object]] = [
        lambda: round_to_nearest(weight, Grid(4)),
        lambda: clip_quantize(weight, hessian, Grid(4), -1),
        lambda: gptq_quantize(weight, hessian),
        lambda: gptq_quantize(weight, hessian, algorithm="original", group_size=-1),
        lambda: awq_scale([weight], torch.ones(0), hessian, Grid(4)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="without input channels"):
            call()


@pytest.mark.parametrize("shape", [(0, 128), (4, 0), (0, 0)])
def test_every_other_quantizer_of_an_empty_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    for granularity in (
        affine.PerTensor(), affine.PerChannel(0), affine.PerChannel(1), affine.PerToken(), affine.PerGroup(64)
    ):  # fmt: skip
        wanted = affine.scale_shape(weight.shape, granularity)
        codes, scale = affine.quantize_symmetric(weight, 8, granularity)
        assert (list(codes.shape), list(scale.shape)) == (list(shape), wanted)
        assert affine.dequantize(codes, scale).shape == shape
        assert list(affine.choose_qparams_asymmetric(weight, 8, granularity)[0].shape) == wanted
        assert list(calibration.choose_qparams_mse(weight, 8, granularity, steps=2)[0].shape) == wanted
    for quantizer in ("ternary", "binary", "int8", "int4"):
        codes, scale = kernels.quantize_weight(weight, quantizer)
        assert codes.shape == shape
        assert scale.isfinite().all()
    for double in (False, True):
        assert dequantize_nf4(quantize_nf4(weight, double_quant=double)).shape == shape
    assert blocks.dequantize(blocks.quantize(weight, "Q4_0"), "Q4_0").shape == shape
    assert torch.equal(smooth_scale([weight], torch.ones(shape[1])), torch.ones(shape[1]))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("columns", "rows"), [(0, 4), (4, 0), (0, 0)])
def test_layers_without_inputs_or_outputs(columns: int, rows: int, backend: str) -> None:
    x = torch.randn(2, columns)
    with kernels.use_backend(backend):
        for quantizer in ("ternary", "binary", "int8", "int4", "none"):
            layer = BitLinear(columns, rows, quantizer=quantizer)
            expected = layer.bias.expand(2, rows) if columns == 0 else torch.empty(2, 0)
            y = layer(x)
            assert torch.equal(y, expected)
            y.sum().backward()
            if quantizer != "none":
                assert torch.equal(pack(layer)(x), expected)
                product = kernels.training_product(kernels.fake_quant_linear, layer.weight, quantizer, 1.0, int8=True)
                assert torch.equal(product(x, layer.weight, layer.bias, quantizer), expected)
        linear = nn.Linear(columns, rows)
        for layer in (
            StaticInt8Linear.from_linear(linear, torch.tensor(0.1)), FloatLinear.from_linear(linear, "float8"),
            FloatLinear.from_linear(linear, "float16"),
        ):  # fmt: skip
            assert layer(x).shape == (2, rows)
        if columns == 0:
            for layer in (NF4Linear.from_linear(linear), BlockLinear.from_linear(linear, "Q4_0")):
                assert layer(x).shape == (2, rows)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("low", "high"), [(-3e38, 3e38), (-LARGEST, LARGEST), (-1.0, LARGEST), (-3e38, 1e38)])
def test_asymmetric_scales_of_ranges_as_wide_as_float32(low: float, high: float, bits: int) -> None:
    x = torch.tensor([low, high])
    scale, zero = affine.choose_qparams_asymmetric(x, bits, affine.PerTensor())
    expected = (x[1].double() - x[0].double()) / (2**bits - 1)
    assert scale.item() == pytest.approx(expected.item(), rel=1e-6)
    codes = affine.quantize(x, scale, zero, 0, 2**bits - 1)
    assert codes.tolist() == pytest.approx([0, 2**bits - 1], abs=bits == 16)  # float32 has no digits for the rest
    ranged = affine.choose_qparams_from_range(x[:1], x[1:], bits, symmetric=False)[0]
    assert torch.equal(ranged, scale)
    assert affine.choose_qparams_asymmetric(torch.tensor([0.0, torch.inf]), bits, affine.PerTensor())[0].isinf()


def test_the_original_gptq_refuses_ranges_beyond_float32() -> None:
    with pytest.raises(ValueError, match="a range beyond float32; rescale them"):
        gptq_quantize(torch.tensor([[-3e38, 3e38]]), torch.eye(2), group_size=-1, algorithm="original")


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_sums_of_more_columns_than_int32_holds(bits: int, largest: int) -> None:
    K = kernels.INT32_COLUMNS[8] + 3000
    packed = pack_codes(torch.full((1, K), largest, dtype=torch.int8), bits)
    x, options = torch.ones(2, K), {"bits": bits, "in_features": K}
    for backend in (kernels, reference):
        y = backend.packed_linear(x, packed, torch.ones(1, 1), None, **options)
        assert y.tolist() == [[pytest.approx(largest * K, rel=1e-6)]] * 2
    if bits == 4:
        return
    codes = torch.full((1, K), -128, dtype=torch.int8)
    refusals: list[Callable[[], object]] = [
        lambda: kernels.packed_matmul(codes, packed, **options),
        lambda: reference.packed_matmul(codes, packed, **options),
        lambda: StaticInt8Linear(K, 1),
    ]
    if native.instruction_sets():
        refusals.append(lambda: cpu.packed_linear(x, packed, torch.ones(1, 1), None, **options))
    for refused in refusals:
        with pytest.raises(ValueError, match=r"8-bit weights hold 131,071 columns, and these have 134,071; use fewer"):
            refused()
    product = kernels.training_product(kernels.fake_quant_linear, torch.ones(1, K), "int8", 1.0, int8=True)
    assert product is kernels.fake_quant_linear


def test_the_widest_sums_that_int32_holds() -> None:
    K = kernels.INT32_COLUMNS[8]
    codes = torch.full((1, K), -128, dtype=torch.int8)
    packed = pack_codes(codes, 8)
    for backend in (kernels, reference):
        assert backend.packed_matmul(codes, packed, bits=8, in_features=K).tolist() == [[2**14 * K]]
    # Zero points make the sums of codes up to twice as large.
    linear = nn.Linear(K, 1, bias=False)
    nn.init.constant_(linear.weight, 1.0)
    layer = StaticInt8Linear.from_linear(linear, torch.tensor(1.0), torch.tensor(-128))
    assert layer(torch.full((1, K), 255.0)).item() == pytest.approx(255.0 * K, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_steps_keep_the_dtype(dtype: torch.dtype, bias: bool) -> None:
    layer = BitLinear(64, 32, bias=bias, dtype=dtype)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    y = Int8Product(layer.weight, "ternary")(x, layer.weight, layer.bias, "ternary")
    y.sum().backward()
    wanted: list[Tensor | None] = [y, x.grad, layer.weight.grad]
    assert [each.dtype for each in wanted if each is not None] == [dtype] * 3
    torch.testing.assert_close(y, layer(x), atol=0.02, rtol=0.02)


def test_packing_a_layer_too_wide_for_int32_is_right() -> None:
    K = kernels.INT32_COLUMNS[8] + 1
    linear = nn.Linear(K, 2, bias=False)
    nn.init.constant_(linear.weight, 0.5)
    packed = PackedLinear.from_linear(linear, "int8")
    assert packed(torch.ones(1, K)).flatten().tolist() == pytest.approx([K / 2] * 2, rel=1e-6)
