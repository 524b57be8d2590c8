"""The int8 product of training against the fake-quant reference: outputs, gradients, and what the backward keeps."""

import dataclasses
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.kernels import Int8Product, Product, quantize_weight, reference, sums_exactly, training_product
from bitnet.kernels.int8_training import int8_linear
from bitnet.machine import int8_pays
from bitnet.model import PRESETS, BitLinear, BitNetForCausalLM, bit_linears
from bitnet.training.config import TrainConfig


def next_product(layer: BitLinear, *, int8: bool) -> Product:
    """What a trainer gives a layer for its next step."""
    return training_product(layer.product, layer.weight, layer.quantizer, 1.0, int8=int8)


@pytest.mark.parametrize("quantizer", ["ternary", "binary", "int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 24), (2, 7, 33), (40, 64)])
def test_it_is_the_reference_within_rounding(quantizer, shape):
    generator = torch.Generator().manual_seed(len(shape) * shape[-1])
    x = torch.randn(shape, generator=generator).requires_grad_()
    weight = (torch.randn(19, shape[-1], generator=generator) / 8).requires_grad_()
    bias = torch.randn(19, generator=generator).requires_grad_()
    upstream = torch.randn(*shape[:-1], 19, generator=generator)
    codes, scale = quantize_weight(weight.detach(), quantizer)
    expected = reference.fake_quant_linear(x, weight, bias, quantizer)
    wanted = torch.autograd.grad(expected, (x, weight, bias), upstream)
    y = int8_linear(x, weight, bias, codes, scale)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for found, value in zip(torch.autograd.grad(y, (x, weight, bias), upstream), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_the_integers_are_exact():
    x, weight = torch.randn(9, 300) * 5, torch.randn(11, 300)
    codes, scale = quantize_weight(weight, "ternary")
    x_codes, x_scale = reference.quantize_activations(x)
    exact = reference.integer_matmul(x_codes, codes, bits=2).float() * x_scale * scale
    assert torch.equal(int8_linear(x, weight, None, codes, scale), exact)


def test_the_backward_keeps_int8():
    layer = BitLinear(64, 32, bias=False)
    layer.product = Int8Product(layer.weight, layer.quantizer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(10, 64, requires_grad=True))
    assert sum(t.nbytes for t in kept if t.shape[0] == 10) == 10 * (64 + 4)


def test_a_layer_quantizes_again_in_place_and_can_go_back():
    layer, x = BitLinear(16, 8), torch.randn(4, 16)
    layer.product = next_product(layer, int8=True)
    codes, first = layer.product.codes, layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer(x), first)  # the codes of before
    layer.product = next_product(layer, int8=True)
    assert layer.product.codes is codes
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - first, rtol=1e-5, atol=1e-5)
    layer.product = next_product(layer, int8=False)
    assert torch.equal(layer(x), reference.fake_quant_linear(x, layer.weight, layer.bias, "ternary"))


def test_int8_is_for_float32_on_a_cpu():
    cpu = torch.device("cpu")
    assert int8_pays("int8", cpu, torch.float32)
    assert not int8_pays("float", cpu, torch.float32)
    assert not int8_pays("auto", cpu, torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 on cpu"):
        int8_pays("int8", cpu, torch.bfloat16)
    with pytest.raises(ValueError, match="int8-all runs in float32"):
        int8_pays("int8-all", cpu, torch.bfloat16)


@pytest.mark.skipif(not sums_exactly(), reason="int8 products of 8-bit codes are not exact here")
def test_int8_gradients_are_not_for_shards_or_groups():
    cpu, config = torch.device("cpu"), TrainConfig(product="int8-all")
    assert config.multiplies_int8(cpu, torch.float32, "ddp")
    with pytest.raises(ValueError, match="shards arrive as floats"):
        config.multiplies_int8(cpu, torch.float32, "fsdp")
    groups = dataclasses.replace(config, model=config.model.replace(quantizer="ternary-g64"))
    with pytest.raises(ValueError, match="int8-all sums whole rows"):
        groups.multiplies_int8(cpu, torch.float32, "none")


@pytest.mark.skipif(not sums_exactly(), reason="int8 products of 8-bit codes are not exact here")
@pytest.mark.parametrize("quantizer", ["ternary", "binary", "int8", "int4"])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_int8_gradients_are_exact_products_of_their_codes(quantizer, size):
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(60, n, generator=generator) for n in (48, 33))
    x.requires_grad_()
    weight = (torch.randn(33, 48, generator=generator) / 8).requires_grad_()
    upstream = upstream * size * torch.rand(60, 1, generator=generator) ** 3
    codes, scale = quantize_weight(weight.detach(), quantizer)
    y = int8_linear(x, weight, None, codes, scale, gradients=True)
    assert torch.equal(y, int8_linear(x, weight, None, codes, scale))
    found = torch.autograd.grad(y, (x, weight), upstream)

    x_codes, x_scale = reference.quantize_activations(x.detach())
    expected = []
    for grad, dim, right in ((upstream * scale.view(-1), 1, codes), (upstream * x_scale, 0, x_codes)):
        step = grad.abs().amax(dim, keepdim=True) / 127
        q = (grad / step).round().double()
        left, step = (q.t(), step.view(-1, 1)) if dim == 0 else (q, step)
        expected.append((left @ right.double()) * step.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(reference.fake_quant_linear(x, weight, None, quantizer), (x, weight), upstream)
    assert 1e-3 < max(error(*pair) for pair in zip(found, wanted, strict=True)) < 0.02


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_int8_gradients_hide_no_overflow(wrong):
    weight = torch.randn(40, 64).requires_grad_()
    y = int8_linear(torch.randn(40, 64), weight, None, *quantize_weight(weight.detach(), "ternary"), gradients=True)
    upstream = torch.zeros_like(y)
    upstream[3, 5] = wrong
    assert not torch.autograd.grad(y, weight, upstream)[0][5].isfinite().all()


WITHOUT_VNNI = """
import torch
from bitnet.kernels import Int8Product, sums_exactly, training_product
from bitnet.training.config import TrainConfig
from bitnet.model import ModelConfig
print(sums_exactly())
for quantizer in ("int8", "int4", "ternary"):
    product = training_product(None, torch.ones(8, 64), quantizer, 1.0, int8=True)
    print(quantizer, isinstance(product, Int8Product))
product = training_product(None, torch.ones(8, 64), "ternary", 1.0, int8=True, gradients=True)
print("gradients", isinstance(product, Int8Product))
for quantizer, product in (("int8", "int8"), ("ternary", "int8-all"), ("int8", "auto"), ("ternary", "int8")):
    config = TrainConfig(model=ModelConfig(quantizer=quantizer), product=product)
    try:
        print(config.multiplies_int8(torch.device("cpu"), torch.float32, "none"))
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 instructions")
def test_sums_of_8_bit_weights_are_not_cut_off_without_vnni():
    """torch's int8 product adds two products in 16 bits there: 127 * 127 twice came out as 32,767."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_VNNI], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    exact, *products, first, second, automatic, ternary = done.stdout.splitlines()
    assert exact == "False"
    assert products == ["int8 False", "int4 True", "ternary True", "gradients False"]
    assert "product int8 would cut off sums of 8-bit codes" in first
    assert "product int8-all would cut off" in second
    assert (automatic, ternary) == ("False", "True")


def loss_and_gradients(
    model: BitNetForCausalLM, ids: Tensor, seen: dict[str, list[Tensor]] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of every parameter; into `seen`, of every BitLinear x, y, the gradients of y and of x."""

    def forward(name: str, x: Tensor, y: Tensor) -> None:
        if seen is not None:
            seen[name] = [x.detach().clone(), y.detach().clone()]

    def backward(name: str, grad_x: Tensor, grad_y: Tensor) -> None:
        if seen is not None:
            seen[name] += [grad_y.clone(), grad_x.clone()]

    hooks = []
    for name, layer in bit_linears(model):
        hooks.append(layer.register_forward_hook(lambda _, x, y, name=name: forward(name, x[0], y)))
        hooks.append(
            layer.register_full_backward_hook(lambda _, grad_x, grad_y, name=name: backward(name, grad_x[0], grad_y[0]))
        )
    model.zero_grad()
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    for hook in hooks:
        hook.remove()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Tensor | dict[str, Tensor], expected: Tensor | dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    if isinstance(found, dict) and isinstance(expected, dict):
        found, expected = (torch.cat([t.flatten() for t in each.values()]) for each in (found, expected))
    return float(((found - expected).norm() / expected.norm()).detach())  # type: ignore[operator, union-attr]


def test_a_model_differs_from_the_reference_by_flipped_activation_codes_alone():
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    model, ids = BitNetForCausalLM(config), torch.randint(config.vocab_size, (8, 65))
    layers, eps = dict(bit_linears(model)), torch.finfo(torch.float32).eps
    _, reference_gradient = loss_and_gradients(model, ids, of_reference := {})
    for layer in layers.values():
        layer.product = next_product(layer, int8=True)
    loss, gradient = loss_and_gradients(model, ids, of_int8 := {})

    # Each layer by itself, on the input and the upstream gradient that it had: a product and its gradients are sums in
    # float32 of the same terms, so what is left is their rounding.
    for name, layer in layers.items():
        x, y, grad_y, grad_x = of_int8[name]
        expected = reference.fake_quant_linear(x.requires_grad_(), layer.weight, None, layer.quantizer)
        wanted = torch.autograd.grad(expected, (x, layer.weight), grad_y)
        for found, value in zip((y, grad_x, gradient[f"{name}.weight"]), (expected, *wanted), strict=True):
            assert error(found, value) < 8 * eps, name

    # That rounding lifts some x / s_x over the border between two codes, and each flip lifts others downstream.
    codes = [{n: reference.quantize_activations(each[n][0])[0] for n in layers} for each in (of_int8, of_reference)]
    flips = [int((codes[0][name] != codes[1][name]).sum()) for name in layers]
    assert flips[0] == 0  # the first layers read the same input
    assert sum(flips) > 0

    # The reference on the codes of the int8 model, everything else its own: nothing but rounding is left.
    for name, layer in layers.items():
        layer.product = next_product(layer, int8=False)
        x_codes, x_scale = reference.quantize_activations(of_int8[name][0])

        def forward(x, layer=layer, forced=x_codes * x_scale):
            straight_through = forced + (x - x.detach())
            return F.linear(straight_through, reference.fake_quantize_weight(layer.weight, layer.quantizer))

        layer.forward = forward
    forced_loss, forced_gradient = loss_and_gradients(model, ids)
    assert forced_loss == pytest.approx(loss, rel=4 * eps)
    left = error(forced_gradient, gradient)
    assert left < 8 * eps * config.num_hidden_layers
    assert error(reference_gradient, gradient) > 20 * left
