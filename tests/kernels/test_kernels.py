"""The reference kernels against their formulas: products, gradients, dtypes, and the choice of a backend."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import kernels
from bitnet.kernels import reference
from bitnet.quant import pack_codes

pytestmark = pytest.mark.usefixtures("reference_backend")
QUANTIZERS = ["ternary", "binary", "int4", "int8"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEADING = [(), (5,), (2, 3), (2, 0), (0,)]


def activations_by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale of the formula in float32, written without bitnet.quant."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-128, 127), scale


def weight_by_hand(weight: Tensor, quantizer: str) -> tuple[Tensor, Tensor]:
    """Codes and scale of each quantizer, from the papers' formulas."""
    weight = weight.float()
    if quantizer == "ternary":
        scale = weight.abs().mean().clamp(min=1e-5)
        return (weight / scale).round().clamp(-1, 1), scale.reshape(1, 1)
    if quantizer == "binary":
        return torch.where(weight - weight.mean() >= 0, 1.0, -1.0), weight.abs().mean().reshape(1, 1)
    largest = {"int8": 127, "int4": 7}[quantizer]
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-5) / largest
    return (weight / scale).round(), scale


def operands(shape: tuple[int, ...], N: int, K: int, quantizer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the packed weight, its scale and a bias."""
    codes, scale = kernels.quantize_weight(torch.randn(N, K), quantizer)
    return torch.randn(*shape, K), pack_codes(codes, kernels.PACKED_BITS[quantizer]), scale, torch.randn(N)


def product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
    bits = kernels.PACKED_BITS[quantizer]
    return kernels.packed_linear(x, packed, scale, bias, bits=bits, in_features=x.shape[-1])


# The integer product


@pytest.mark.parametrize(("bits", "weight_limits"), [(2, (-1, 1)), (4, (-8, 7)), (8, (-128, 127))])
@pytest.mark.parametrize("K", [1, 127, 128, 129, 1000])
def test_integer_matmul_is_exact(bits: int, weight_limits: tuple[int, int], K: int) -> None:
    low, high = weight_limits
    x = torch.randint(-128, 128, (7, K), dtype=torch.int8)
    weight = torch.randint(low, high + 1, (5, K), dtype=torch.int8)
    y = reference.integer_matmul(x, weight, bits=bits)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), x.long() @ weight.long().T)


# K on both sides of where float32 gives way to float64: 128 * |largest weight| * K <= 2^24.
@pytest.mark.parametrize(
    ("bits", "x_code", "weight_code", "threshold"),
    [
        (2, 127, 1, 2**17), (2, -128, 1, 2**17), (2, -128, -1, 2**17),
        (4, 127, 7, 2**14), (4, -128, -8, 2**14), (8, 127, 127, 2**10), (8, -128, -128, 2**10), (8, -128, 127, 2**10),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beyond", [-1, 0, 1, 7])
def test_integer_matmul_of_extreme_codes(bits: int, x_code: int, weight_code: int, threshold: int, beyond: int) -> None:
    K = threshold + beyond
    x = torch.full((2, K), x_code, dtype=torch.int8)
    x[1, -1] = 1  # an odd sum: float32 would round it above 2^24
    weight = torch.full((1, K), weight_code, dtype=torch.int8)
    expected = [[K * x_code * weight_code], [(K - 1) * x_code * weight_code + weight_code]]
    assert reference.integer_matmul(x, weight, bits=bits).tolist() == expected


def test_integer_matmul_far_above_the_float32_range() -> None:
    K = 2**17 - 1  # -128 * -128 * K is the largest sum that int32 holds
    x = torch.full((1, K), -128, dtype=torch.int8)
    assert reference.integer_matmul(x, x).item() == 128 * 128 * K == 2**31 - 2**14


def test_integer_matmul_is_exact_inside_autocast() -> None:
    x = torch.randint(-128, 128, (4, 999), dtype=torch.int8)
    weight = torch.randint(-1, 2, (3, 999), dtype=torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.integer_matmul(x, weight, bits=2).long(), x.long() @ weight.long().T)


# Quantizers behind their names


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_weight_against_the_formula(quantizer: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 40).to(dtype)
    codes, scale = kernels.quantize_weight(weight, quantizer)
    expected_codes, expected_scale = weight_by_hand(weight, quantizer)
    assert torch.equal(codes.float(), expected_codes)
    assert torch.equal(scale, expected_scale)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.equal(
        reference.fake_quantize_weight(weight, quantizer), (expected_codes * expected_scale).to(weight.dtype)
    )


@pytest.mark.parametrize(
    "call",
    [
        kernels.check_quantizer,
        lambda q: kernels.quantize_weight(torch.ones(2, 2), q),
        lambda q: kernels.fake_quant_linear(torch.ones(2), torch.ones(2, 2), None, q),
    ],
)
def test_unknown_quantizer_is_named(call) -> None:
    with pytest.raises(ValueError, match=r"'tertiary'.*ternary, binary, int8, int4, none"):
        call("tertiary")


def test_quantizer_none_has_no_codes() -> None:
    with pytest.raises(ValueError, match="'none'"):
        kernels.quantize_weight(torch.ones(2, 2), "none")


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_all_zero_weight(quantizer: str) -> None:
    x, weight = torch.randn(3, 8), torch.zeros(4, 8)
    assert not kernels.fake_quant_linear(x, weight, None, quantizer).any()
    codes, scale = kernels.quantize_weight(weight, quantizer)
    packed = pack_codes(codes, kernels.PACKED_BITS[quantizer])
    assert not product(x, packed, scale, None, quantizer).any()


# The packed product


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("K", [1, 129])
def test_packed_linear_is_the_formula(quantizer: str, leading: tuple[int, ...], biased: bool, K: int) -> None:
    weight = torch.randn(6, K)
    codes, scale = weight_by_hand(weight, quantizer)
    x = torch.randn(*leading, K)
    bias = torch.randn(6) if biased else None
    x_codes, x_scale = activations_by_hand(x) if x.numel() else (x, x[..., :1])
    expected = (x_codes.long() @ codes.long().T).double() * x_scale.double() * scale.double().view(-1)
    if bias is not None:
        expected = expected + bias.double()
    packed = pack_codes(codes.to(torch.int8), kernels.PACKED_BITS[quantizer])
    y = product(x, packed, scale, bias, quantizer)
    assert y.shape == (*leading, 6)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_linear_scales_in_float32_and_returns_the_dtype_of_x(quantizer: str, dtype: torch.dtype) -> None:
    x, packed, scale, bias = operands((4,), 6, 200, quantizer)
    x = x.to(dtype)
    y = product(x, packed, scale, bias, quantizer)
    assert y.dtype == dtype
    assert torch.equal(y, product(x.float(), packed, scale, bias, quantizer).to(dtype))
    half_bias = bias.to(torch.bfloat16)
    assert torch.equal(
        product(x, packed, scale, half_bias, quantizer), product(x, packed, scale, half_bias.float(), quantizer)
    )


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_packed_linear_inside_autocast_is_the_same(quantizer: str) -> None:
    x, packed, scale, bias = operands((4,), 6, 200, quantizer)
    expected = product(x, packed, scale, bias, quantizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(x, packed, scale, bias, quantizer), expected)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_packed_linear_takes_non_contiguous_input_and_modifies_nothing(quantizer: str) -> None:
    x, packed, scale, bias = operands((3, 5), 6, 70, quantizer)
    transposed = x.transpose(0, 1)
    strided = torch.randn(4, 140)[:, ::2]
    inputs = [x, packed, scale, bias]
    before = [tensor.clone() for tensor in inputs]
    y = product(transposed, packed, scale, bias, quantizer)
    assert torch.equal(y, product(transposed.contiguous(), packed, scale, bias, quantizer))
    assert torch.equal(
        product(strided, packed, scale, bias, quantizer),
        product(strided.contiguous(), packed, scale, bias, quantizer),
    )
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_packed_linear_of_zero_and_of_extreme_tokens() -> None:
    x, packed, scale, _ = operands((4,), 6, 64, "ternary")
    x[0], x[1], x[2] = 0, 1e30, 1e-30
    y = product(x, packed, scale, None, "ternary")
    assert not y[0].any()
    assert not y[2].any()
    assert y.isfinite().all()
    # A token's result does not depend on the tokens beside it.
    assert torch.equal(y[3], product(x[3], packed, scale, None, "ternary"))


def test_packed_linear_keeps_nan_visible() -> None:
    x, packed, scale, _ = operands((2,), 6, 64, "ternary")
    x[0, 3], x[1, 3] = float("nan"), float("inf")
    assert product(x, packed, scale, None, "ternary").isnan().all()


# The training product and its straight-through gradient


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_quant_linear_is_a_matmul_of_the_quantized_operands(
    quantizer: str, leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((*leading, 33), (6, 33), (6,)))
    inputs = [x, weight, bias]
    before = [tensor.clone() for tensor in inputs]
    x_codes, x_scale = activations_by_hand(x) if x.numel() else (x, x[..., :1])
    codes, scale = weight_by_hand(weight, quantizer)
    x_tilde, w_tilde = (x_codes * x_scale).to(dtype), (codes * scale).to(dtype)
    y = kernels.fake_quant_linear(x, weight, bias, quantizer)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x_tilde, w_tilde, bias))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_gradients_are_straight_through(quantizer: str, leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 33, requires_grad=True)
    weight = torch.randn(6, 33, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    grad_y = torch.randn(*leading, 6)
    kernels.fake_quant_linear(x, weight, bias, quantizer).backward(grad_y)
    with torch.no_grad():
        x_codes, x_scale = activations_by_hand(x)
        codes, scale = weight_by_hand(weight, quantizer)
    x_tilde, w_tilde, rows = (x_codes * x_scale).view(-1, 33), codes * scale, grad_y.view(-1, 6)
    # The quantized operands and not the latent ones, and nothing through the scales.
    torch.testing.assert_close(x.grad, grad_y @ w_tilde)
    torch.testing.assert_close(weight.grad, rows.T @ x_tilde)
    torch.testing.assert_close(bias.grad, rows.sum(0))


def test_gradient_ignores_clipping_and_scales() -> None:
    # Every weight but one is far outside [-1.5 gamma, 1.5 gamma]: its gradient is not cut off, as a clip's would be.
    x = torch.tensor([[1.0, -2.0, 4.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0, 30.0]], requires_grad=True)  # gamma 10, W~ = [0, 0, 10]
    kernels.fake_quant_linear(x, weight, None, "ternary").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0, 10.0]]
    torch.testing.assert_close(weight.grad, torch.tensor([[32.0, -64.0, 127.0]]) * 4 / 127)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_requires_a_gradient_gets_one(frozen: str) -> None:
    x = torch.randn(2, 8, requires_grad=frozen != "x")
    weight = torch.randn(3, 8, requires_grad=frozen != "weight")
    kernels.fake_quant_linear(x, weight, None, "ternary").sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantizer_none_is_f_linear_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in ((2, 3, 17), (5, 17), (5,))]
    results = []
    for linear in (F.linear, lambda *args: kernels.fake_quant_linear(*args, "none")):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        y = linear(*inputs)
        y.float().square().sum().backward()
        results.append([y, *(tensor.grad for tensor in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert reference.fake_quantize_weight(tensors[1], "none") is tensors[1]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_packed_and_training_product_agree(quantizer: str) -> None:
    weight = torch.randn(10, 300)
    x, bias = torch.randn(7, 300), torch.randn(10)
    codes, scale = kernels.quantize_weight(weight, quantizer)
    packed = pack_codes(codes, kernels.PACKED_BITS[quantizer])
    y = kernels.fake_quant_linear(x.double(), weight.double(), bias.double(), quantizer)
    torch.testing.assert_close(product(x, packed, scale, bias, quantizer), y.float(), rtol=1e-5, atol=1e-5)


def test_fake_quant_linear_under_autocast_multiplies_in_bfloat16() -> None:
    x, weight = torch.randn(4, 64), torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.fake_quant_linear(x, weight, None, "ternary")
    assert y.dtype == torch.bfloat16
    # The quantization is still float32's: the operands of the float32 product, rounded once.
    x_tilde = reference.fake_quantize_activations(x).bfloat16()
    w_tilde = reference.fake_quantize_weight(weight, "ternary").bfloat16()
    assert torch.equal(y, F.linear(x_tilde, w_tilde))


# Ternary codes with a scale for each group of columns


@pytest.mark.parametrize(("quantizer", "group_size"), [("ternary-g64", 64), ("ternary-g128", 128)])
@pytest.mark.parametrize("columns", [40, 192, 300])
def test_the_products_of_groups(quantizer: str, group_size: int, columns: int) -> None:
    x, weight, bias = torch.randn(2, 3, columns), torch.randn(10, columns), torch.randn(10)
    codes, scale = kernels.quantize_weight(weight, quantizer)
    packed = pack_codes(codes, kernels.PACKED_BITS[quantizer])
    options = {"bits": 2, "in_features": columns, "group_size": group_size}
    # Group by group, exact sums in integers.
    x_codes, x_scale = activations_by_hand(x)
    expected = torch.zeros(2, 3, 10, dtype=torch.float64)
    parts = zip(x_codes.split(group_size, -1), codes.split(group_size, -1), scale.unbind(1), strict=True)
    for x_part, part, of_group in parts:
        expected += (x_part.long() @ part.long().T).double() * of_group.double()
    expected = expected * x_scale.double() + bias.double()
    for each in (scale, scale.half()):
        y = kernels.packed_linear(x, packed, each, bias, **options)
        torch.testing.assert_close(y, expected.float(), rtol=2e-6, atol=2e-6)
    half = kernels.packed_linear(x.bfloat16(), packed, scale, bias, **options)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"groups of {group_size} in 10 rows of {columns} have"):
        kernels.packed_linear(x, packed, scale.repeat(1, 2), bias, **options)

    # Training multiplies dequantized operands, and its gradient is straight through.
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    y = kernels.fake_quant_linear(*inputs, quantizer)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-6)
    y.sum().backward()
    w_tilde = kernels.dequantize_weight(codes, scale, quantizer).double()
    torch.testing.assert_close(inputs[0].grad, w_tilde.sum(0).expand(2, 3, -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[1].grad[0].float(), (x_codes * x_scale).sum((0, 1)), rtol=1e-6, atol=1e-5)


# The choice of the backend


def test_backend_by_name() -> None:
    x = torch.randn(2, 8)
    with kernels.use_backend("reference"):
        assert kernels.select_backend(x) is reference
        with kernels.use_backend("auto"):
            kernels.select_backend(x)
        assert kernels.select_backend(x) is reference


def test_unknown_backend_raises_and_the_previous_choice_returns() -> None:
    x = torch.randn(2, 8)
    with kernels.use_backend("reference"):
        with pytest.raises(ValueError, match=r"'cuda9'.*reference"), kernels.use_backend("cuda9"):
            kernels.fake_quant_linear(x, torch.randn(3, 8), None, "ternary")
        assert kernels.select_backend(x) is reference
    kernels.fake_quant_linear(x, torch.randn(3, 8), None, "ternary")


def test_calls_go_through_the_requested_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        @staticmethod
        def fake_quant_linear(*args):
            return "training", args[-1]

        @staticmethod
        def packed_linear(*args, bits: int, in_features: int, group_size: int | None):
            return "packed", bits, in_features

    monkeypatch.setitem(kernels.BACKENDS, "fake", Fake)
    x = torch.randn(2, 8)
    with kernels.use_backend("fake"):
        assert kernels.fake_quant_linear(x, x, None, "int4") == ("training", "int4")
        assert kernels.packed_linear(x, x, x, None, bits=2, in_features=8) == ("packed", 2, 8)
