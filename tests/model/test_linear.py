"""BitLinear and PackedLinear, one layer at a time."""

import copy
import io
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet import kernels
from bitnet.kernels import GROUP_SIZES, FadingProduct, fake_quant_linear, float_linear, training_product
from bitnet.kernels.reference import fake_quantize_activations, fake_quantize_weight
from bitnet.model.linear import BitLinear, PackedLinear, pack, replace_linear
from bitnet.quant import quantize_ternary
from bitnet.quant.ternary import soft_ternary
from tests.builders import mlp

pytestmark = pytest.mark.usefixtures("reference_backend")
QUANTIZERS = ["ternary", "ternary-g64", "binary", "int4", "int8"]
LONG = os.environ.get("BITNET_LONG") == "1"


# BitLinear is a Linear


def test_constructor_is_positional_like_linears() -> None:
    layer, linear = (kind(4, 3, False, "cpu", torch.bfloat16) for kind in (BitLinear, nn.Linear))
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert layer.weight.dtype == linear.weight.dtype == torch.bfloat16
    assert BitLinear(4, 3).bias.shape == (3,)
    assert BitLinear(4, 3, device="meta").weight.is_meta
    assert (layer.quantizer, BitLinear(4, 3, quantizer="int4").quantizer) == ("ternary", "int4")


@pytest.mark.parametrize("quantizer", ["ternary", "ternary-g64", "binary", "int4", "int8"])
def test_a_packed_model_is_made_without_memory(quantizer: str) -> None:
    wanted = pack(replace_linear(mlp(), quantizer=quantizer))
    with torch.device("meta"):
        empty = replace_linear(mlp(), quantizer=quantizer)
    empty = pack(empty)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(wanted.state_dict(), assign=True)
    x = torch.randn(5, next(wanted.children()).in_features)
    assert torch.equal(empty(x), wanted(x))


@pytest.mark.parametrize("make", [lambda q: BitLinear(4, 3, quantizer=q), lambda q: PackedLinear(4, 3, quantizer=q),
                                  lambda q: replace_linear(mlp(), quantizer=q)])  # fmt: skip
def test_unknown_quantizer_is_named(make) -> None:
    with pytest.raises(ValueError, match=r"'fp7'.*ternary"):
        make("fp7")


def test_same_seed_gives_the_parameters_of_a_linear() -> None:
    layers = []
    for kind in (BitLinear, nn.Linear):
        torch.manual_seed(3)
        layers.append(kind(20, 10))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_a_linears_both_ways(bias: bool) -> None:
    layer, linear = BitLinear(20, 10, bias), nn.Linear(20, 10, bias)
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in (layer, linear)]
    assert shapes[0] == shapes[1]
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)
    other = nn.Linear(20, 10, bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, linear.weight)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("packed", [False, True])
def test_copies_compute_the_same(clone, packed: bool) -> None:
    layer: nn.Module = BitLinear(20, 10, quantizer="int4")
    if packed:
        layer = pack(layer)
    twin = clone(layer)
    x = torch.randn(3, 20)
    assert type(twin) is type(layer)
    assert twin.quantizer == "int4"
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert layer(x).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_bit_linear_in_other_dtypes(dtype: torch.dtype, quantizer: str) -> None:
    layer = BitLinear(64, 10, quantizer=quantizer).to(dtype)
    x = torch.randn(3, 64, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    # The error of the low-precision product against float32's, in units of the dtype's own rounding of the result.
    exact = BitLinear(64, 10, quantizer=quantizer)
    exact.load_state_dict(layer.state_dict())
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(y.float(), exact(x.float()), rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


def test_autocast_returns_bfloat16_and_float32_gradients() -> None:
    layer = BitLinear(64, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 64))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def check_product(layer: BitLinear, x: Tensor, operand: Tensor, weight: Tensor) -> None:
    """That a layer multiplies these, and that their gradients go to x and the latent weight as they are."""
    y = layer(x)
    torch.testing.assert_close(y, F.linear(operand, weight, layer.bias), rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, grad.T @ operand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["ternary", "binary", "int8", "int4"])
def test_a_fading_product_fades_both_operands_in_and_keeps_the_gradient_straight(quantizer: str) -> None:
    layer, x = BitLinear(24, 12, quantizer=quantizer), torch.randn(5, 24, requires_grad=True)
    full = layer(x).detach()
    layer.product = FadingProduct(torch.tensor(0.0))
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    layer.product = FadingProduct(torch.tensor(1.0))
    torch.testing.assert_close(layer(x).detach(), full, rtol=1e-5, atol=1e-6)
    layer.product = FadingProduct(torch.tensor(0.25))
    weight = layer.weight.detach() * 0.75 + fake_quantize_weight(layer.weight, quantizer).detach() * 0.25
    operand = x.detach() * 0.75 + fake_quantize_activations(x).detach() * 0.25
    check_product(layer, x, operand, weight)


@pytest.mark.parametrize("quantizer", ["ternary", "ternary-g64"])
def test_a_soft_fading_product_has_the_mean_of_the_codes_and_a_straight_gradient(quantizer: str) -> None:
    layer, x = BitLinear(72, 12, quantizer=quantizer), torch.randn(5, 72, requires_grad=True)
    layer.product = FadingProduct(torch.tensor(0.25), soft=True)
    group_size = GROUP_SIZES.get(quantizer, 0)
    weight = soft_ternary(layer.weight.detach(), torch.tensor(0.75**2), group_size)
    operand = x.detach() * 0.75 + fake_quantize_activations(x).detach() * 0.25
    check_product(layer, x, operand, weight)


def test_other_quantizers_have_no_soft_codes() -> None:
    layer = BitLinear(72, 12, quantizer="int4")
    product = training_product(layer.product, layer.weight, "int4", torch.tensor(0.25), int8=False, soft=True)
    assert isinstance(product, FadingProduct)
    assert not product.soft


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_float_product_is_a_plain_linear_and_back(quantizer: str) -> None:
    layer, x = BitLinear(20, 10, quantizer=quantizer), torch.randn(3, 20)
    quantized = layer(x)
    layer.product = float_linear
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.product = fake_quant_linear
    assert torch.equal(layer(x), quantized)
    assert not torch.equal(quantized, F.linear(x, layer.weight, layer.bias))


class Beside(nn.Module):
    """Layers of every quantizer and with every product of training, each on a part of x of its own; of each pair with
    BITNET_LONG=1, else of ternary weights with all products and of the others with the whole quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        fading = torch.tensor(0.25)
        products: list[tuple[float | Tensor, dict[str, bool]]] = [
            (1.0, {"int8": False}), (1.0, {"int8": True}), (1.0, {"int8": True, "gradients": True}),
            (fading, {"int8": False}), (fading, {"int8": False, "soft": True}), (0.0, {"int8": False}),
        ]  # fmt: skip
        for quantizer in QUANTIZERS:
            for strength, how in products if LONG or quantizer == "ternary" else products[:1]:
                layer = BitLinear(72, 16, quantizer=quantizer)
                layer.product = training_product(layer.product, layer.weight, quantizer, strength, **how)
                self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(part) for layer, part in zip(self.layers, x, strict=True)])


def test_captured_in_one_graph_it_equals_eager() -> None:
    torch.compiler.reset()
    module = Beside()
    x = torch.randn(len(module.layers), 4, 72)
    gradients = []
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        inputs = x.clone().requires_grad_()
        module.zero_grad()
        y = call(inputs)
        y.square().sum().backward()
        gradients.append([y.detach(), *inputs.grad, *(parameter.grad for parameter in module.parameters())])
    for eager, compiled in zip(*gradients, strict=True):
        assert eager.any()
        torch.testing.assert_close(compiled, eager)


def test_compiled_by_inductor_it_equals_eager_within_one_code() -> None:
    torch.compiler.reset()
    layer, x = BitLinear(32, 16), torch.randn(4, 32)
    one_code = x.abs().amax(-1, keepdim=True) / 127 * layer.weight.abs().mean()
    with torch.no_grad():
        assert ((torch.compile(layer)(x) - layer(x)).abs() <= one_code * 1.001).all()


def test_packed_layer_is_captured_in_one_graph() -> None:
    torch.compiler.reset()
    layer, x = pack(BitLinear(32, 16)), torch.randn(4, 32)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# PackedLinear


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_features", [1, 127, 128, 129, 300])
def test_packed_equals_bit_linear(quantizer: str, bias: bool, in_features: int) -> None:
    layer = BitLinear(in_features, 10, bias, quantizer=quantizer).eval()
    packed = PackedLinear.from_linear(layer, quantizer)
    for shape in ((), (5,), (2, 3)):
        x = torch.randn(*shape, in_features)
        y = packed(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    codes, scale = kernels.quantize_weight(layer.weight, quantizer)
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.weight_scale, scale)


def test_packed_takes_codes_and_scale_from_one_quantization() -> None:
    layer = BitLinear(256, 64)
    packed = PackedLinear.from_linear(layer, "ternary")
    codes, scale = quantize_ternary(layer.weight)
    assert packed.weight_scale.item() == scale.item()
    assert torch.equal(packed.codes(), codes)


def test_packed_shares_nothing_with_the_latent_weights() -> None:
    layer = BitLinear(16, 4)
    packed, x = PackedLinear.from_linear(layer, "ternary"), torch.randn(2, 16)
    before = packed(x)
    with torch.no_grad():
        layer.weight.neg_()
        layer.bias.zero_()
    assert torch.equal(packed(x), before)


def test_packed_parameters_are_frozen() -> None:
    assert [p.requires_grad for p in PackedLinear.from_linear(nn.Linear(16, 4), "ternary").parameters()] == [False]
    assert [p.requires_grad for p in PackedLinear(16, 4).parameters()] == [False]


def test_packed_passes_no_gradient() -> None:
    packed = PackedLinear.from_linear(nn.Linear(16, 4), "ternary")
    # As documented: a gradient through the activations' scale alone would be silently wrong.
    assert not packed(torch.randn(2, 16, requires_grad=True)).requires_grad


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.half().float(),
    ],
)
def test_scale_stays_as_it_is_through_casts(quantizer: str, cast) -> None:
    packed = PackedLinear.from_linear(nn.Linear(40, 6), quantizer)
    scale, weight = packed.weight_scale.clone(), packed.packed_weight.clone()
    model = cast(nn.Sequential(packed, nn.Linear(6, 2)))
    assert model[0] is packed
    assert packed.weight_scale.dtype == (torch.float16 if quantizer in kernels.GROUP_SIZES else torch.float32)
    assert torch.equal(packed.weight_scale, scale)
    assert torch.equal(packed.packed_weight, weight)
    assert packed.bias is not None
    assert packed.bias.dtype == model[1].weight.dtype
    assert model(torch.randn(3, 40, dtype=model[1].weight.dtype)).isfinite().all()


def test_packed_moves_to_another_device_in_one_piece() -> None:
    packed = PackedLinear.from_linear(nn.Linear(40, 6), "int8").to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in packed.state_dict().values()} == {"meta"}
    assert packed.weight_scale.dtype == torch.float32
    assert packed.to_empty(device="cpu").weight_scale.dtype == torch.float32


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_packed_state_dict_round_trip(quantizer: str) -> None:
    model = pack(replace_linear(mlp(), quantizer=quantizer))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = pack(replace_linear(mlp(), quantizer=quantizer))
    x = torch.randn(5, 8)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))
    empty = nn.Sequential(
        PackedLinear(8, 32, quantizer=quantizer), nn.ReLU(), PackedLinear(32, 32, quantizer=quantizer), nn.ReLU(),
        PackedLinear(32, 1, quantizer=quantizer),
    )  # fmt: skip
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize(("quantizer", "bits"), [("ternary", 2), ("binary", 2), ("int4", 4), ("int8", 8)])
def test_packed_size(quantizer: str, bits: int) -> None:
    linear = nn.Linear(512, 256, bias=False)
    packed = PackedLinear.from_linear(linear, quantizer)
    scales = 1 if bits == 2 else 256
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in packed.state_dict().items()}
    assert sizes == {"packed_weight": 512 * 256 * bits // 8, "weight_scale": 4 * scales}
    if bits == 2:
        assert sum(sizes.values()) * 15.9 < linear.weight.nbytes


@pytest.mark.parametrize("quantizer", ["ternary", "ternary-g64", "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_packing_refuses_weights_that_are_no_numbers(quantizer: str, value: float) -> None:
    model = nn.Sequential(BitLinear(64, 8, quantizer=quantizer), BitLinear(8, 4, quantizer=quantizer))
    with torch.no_grad():
        model[1].weight[2, 3] = value
    with pytest.raises(ValueError, match="1 has weights that are NaN, infinite or too large"):
        pack(model)


def test_packed_refuses_the_quantizer_none() -> None:
    with pytest.raises(ValueError, match="'none'"):
        PackedLinear(4, 3, quantizer="none")
