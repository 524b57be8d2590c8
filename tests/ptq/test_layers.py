"""Layers of models that were quantized after training: their numbers, casts, copies, and errors."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitnet import kernels
from bitnet.model import PackedLinear
from bitnet.model.quantized import (
    StaticInt8Linear,
    bits_per_weight,
    build,
    cache_weights,
    describe,
)
from bitnet.model.weight_only import FloatLinear, GroupLinear, NF4Linear
from bitnet.quant import pack_codes
from bitnet.quant.grouped import Grid, round_to_nearest


def linear(rows: int = 32, columns: int = 64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(columns, rows, bias)


def layers(bias: bool = True) -> dict[str, nn.Module]:
    source = linear(bias=bias)
    return {
        **{dtype: FloatLinear.from_linear(source, dtype) for dtype in ("float32", "float16", "bfloat16", "float8")},
        **{
            f"int{bits} v{version}": GroupLinear.from_quantized(
                round_to_nearest(source.weight, Grid(bits), 16), source.bias, version=version
            )
            for bits in (2, 3, 4, 8)
            for version in (1, 2)
        },
        "input scale": GroupLinear.from_quantized(
            round_to_nearest(source.weight, Grid(4), -1), source.bias, input_scale=torch.rand(64) + 0.5
        ),
        "nf4": NF4Linear.from_linear(source),
        "nf4, float scales": NF4Linear.from_linear(source, double_quant=False, block_size=32),
        "static": StaticInt8Linear.from_linear(source, torch.tensor(0.03), torch.tensor(7)),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("bias", [True, False])
def test_weight_only_layers_are_linear_layers_of_the_dequantized_weight(name, bias) -> None:
    layer, source = layers(bias)[name], linear(bias=bias)
    x = torch.randn(2, 5, 64)
    weight = layer.dequantize()
    assert weight.shape == (32, 64)
    assert weight.dtype == torch.float32
    scale = layer.input_scale if name == "input scale" else torch.ones(64)
    assert torch.equal(layer.weight, weight / scale)  # what it multiplies its input by
    assert (weight - source.weight).abs().max() < (0.1 if "int2" in name else 0.05)
    if name == "static":
        return
    assert torch.equal(layer(x), F.linear(x / scale, weight, source.bias))
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), layer(x), atol=0.05)


@pytest.mark.parametrize("name", layers())
def test_casts_and_copies_keep_the_stored_weight(name) -> None:
    layer, x = layers()[name], torch.randn(3, 64)
    expected = layer(x)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float, lambda: copy.deepcopy(layer)):
        other = cast()
        assert {key: value.dtype for key, value in other.state_dict().items()} == {
            k: v.dtype for k, v in before.items()
        }
        assert torch.equal(other(x), expected)
    again = build(json.loads(json.dumps(describe(layer))))
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    again.load_state_dict(before)
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("name", layers())
def test_bytes_and_bits(name) -> None:
    layer = layers(bias=True)[name]
    stored = sum(value.nbytes for key, value in layer.state_dict().items() if key != "bias")
    assert layer.weight_bytes() == stored
    nominal, effective = bits_per_weight(layer)
    assert effective == 8 * stored / (32 * 64)
    assert nominal <= effective
    if name == "int4 v1":  # codes, 4 groups of scales and zero points a row, group numbers a column
        assert stored == 32 * 64 // 2 + 4 * 32 * 2 + 4 * 32 // 2 + 64 * 4
    assert bits_per_weight(PackedLinear(64, 32, False, quantizer="int8")) == (8.0, 8 * (32 * 64 + 32 * 4) / (32 * 64))
    assert bits_per_weight(nn.Linear(4, 4)) is None


@pytest.mark.parametrize("name", [name for name in layers() if name != "static"])
def test_cached_weights_are_the_same_and_notice_new_ones(name) -> None:
    layer, x = layers()[name], torch.randn(3, 64)
    expected = layer(x)
    cache_weights(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    names = set(layer.state_dict())
    zeros = {key: torch.zeros_like(value) for key, value in layer.state_dict().items() if "scale" in key}
    if zeros and name != "input scale":
        layer.load_state_dict({**layer.state_dict(), **zeros})
        bias = layer.bias.expand(3, -1)
        assert torch.equal(layer(x), bias)
    cache_weights(layer, False)
    layer(x)
    assert set(layer.state_dict()) == names


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 7, 64), (40, 64), (0, 64)])
def test_static_int8_is_exact_integer_arithmetic(backend, zero_point, shape) -> None:
    source = linear()
    layer = StaticInt8Linear.from_linear(source, torch.tensor([0.02]), torch.tensor([zero_point]))
    x = torch.randn(shape)
    with kernels.use_backend(backend):
        y = layer(x)
    codes = (torch.round(x.double() / layer.activation_scale.double()) + zero_point).clamp(-128, 127).long()
    weight = (layer.dequantize() / layer.weight_scale).round().long()
    accumulator = (codes - zero_point) @ weight.T
    expected = accumulator.float() * layer.activation_scale * layer.weight_scale.view(-1) + source.bias
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert y.shape == (*shape[:-1], 32)


@pytest.mark.parametrize(("bits", "columns"), [(2, 100), (4, 64), (8, 33), (8, 6912)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_matmul_of_stored_codes_is_exact(bits, columns, rows) -> None:
    low, high = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}[bits]
    x = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    weight = torch.randint(low, high + 1, (20, columns), dtype=torch.int8)
    x[0], weight[0] = -128, low  # the largest sum
    expected = (x.long() @ weight.long().T).int()
    for backend in ("reference", "auto"):
        with kernels.use_backend(backend):
            assert torch.equal(
                kernels.packed_matmul(x, pack_codes(weight, bits), bits=bits, in_features=columns), expected
            )
    if kernels.native_available():
        with pytest.raises(ValueError, match="give int8"):
            kernels.cpu.packed_matmul(x.float(), pack_codes(weight, bits), bits=bits, in_features=columns)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FloatLinear(4, 4, dtype="float7"), r"'float7' is unknown"),
        (lambda: GroupLinear(64, 32, bits=5), r"bits is 5"),
        (lambda: StaticInt8Linear.from_linear(linear(), torch.tensor(0.0)), r"scale is \[0.0\]"),
        (lambda: StaticInt8Linear.from_linear(linear(), torch.ones(3)), r"scale is \[1.0, 1.0, 1.0\]"),
        (
            lambda: StaticInt8Linear.from_linear(linear(), torch.tensor(1.0), torch.tensor(200)),
            r"zero point is \[200\]",
        ),
        (lambda: build({"kind": "Magic"}), r"kind 'Magic'"),
        (lambda: build({"kind": "FloatLinear", "in_features": 3, "size": 4}), r"FloatLinear cannot be built"),
    ],
)
def test_layer_errors_are_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_float_layers_refuse_what_they_cannot_hold() -> None:
    source = linear()
    with torch.no_grad():
        source.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"overflows float16; use bfloat16"):
        FloatLinear.from_linear(source, "float16")
    assert FloatLinear.from_linear(source, "float8").dequantize().isfinite().all()
    with torch.no_grad():
        source.weight[0, 0] = torch.inf
    for dtype in ("bfloat16", "float8"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            FloatLinear.from_linear(source, dtype)
