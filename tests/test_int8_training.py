"""The int8 product of training against the fake-quant reference: outputs, gradients, and what the backward keeps."""

import pytest
import torch

from bitnet.kernels import quantize_weight, reference
from bitnet.kernels.int8_training import int8_linear
from bitnet.model import BitLinear
from bitnet.runtime import int8_pays


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
    layer.quantize_for_step()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(10, 64, requires_grad=True))
    assert sum(t.nbytes for t in kept if t.shape[0] == 10) == 10 * (64 + 4)


def test_a_layer_quantizes_again_in_place_and_can_go_back():
    layer, x = BitLinear(16, 8), torch.randn(4, 16)
    layer.quantize_for_step()
    codes, first = layer.step_codes, layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer(x), first)  # the codes of before
    layer.quantize_for_step()
    assert layer.step_codes is codes
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - first, rtol=1e-5, atol=1e-5)
    layer.quantize_for_step(False)
    assert torch.equal(layer(x), reference.fake_quant_linear(x, layer.weight, layer.bias, "ternary"))


def test_int8_is_for_float32_on_a_cpu():
    cpu = torch.device("cpu")
    assert int8_pays("int8", cpu, torch.float32)
    assert not int8_pays("float", cpu, torch.float32)
    assert not int8_pays("auto", cpu, torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 on cpu"):
        int8_pays("int8", cpu, torch.bfloat16)
