"""LoRA adapters beside frozen layers: the formula, its gradient, putting on, taking off, merging."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitnet import kernels
from bitnet.inference.cpu_engine import Engine
from bitnet.kernels.cpu import native
from bitnet.model import BitNetForCausalLM, PackedLinear
from bitnet.model.lora import (
    LoRALinear,
    attach,
    dense_weight,
    detach,
    fingerprint,
    make_trainable,
    matrices_of,
    merge,
    projections,
)
from bitnet.ptq.methods import quantize_model
from tests.builders import random_ids, random_model
from tests.inference.builders import BASE

SHAPE = BASE.replace(num_hidden_layers=2, intermediate_size=128, hidden_size=64, head_dim=16)


def ternary(quantizer: str = "ternary") -> BitNetForCausalLM:
    torch.manual_seed(0)
    return random_model(SHAPE.replace(quantizer=quantizer)).pack(embeddings=False)


def quantized(method: str) -> Callable[[], BitNetForCausalLM]:
    def make() -> BitNetForCausalLM:
        torch.manual_seed(0)
        model = random_model(SHAPE.replace(quantizer="none"))
        return quantize_model(model, method) if method != "none" else model

    return make


BASES: dict[str, Callable[[], BitNetForCausalLM]] = {
    "ternary": ternary, "groups": lambda: ternary("ternary-g64"), "NF4": quantized("nf4"),
    "Q4_0": quantized("gguf-q4_0"), "float": quantized("none"), "INT8 tables": lambda: ternary().pack(),
}  # fmt: skip


def adapters_for(model: BitNetForCausalLM, rank: int = 3, names: str = "_proj") -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * 0.1,
            torch.randn(layer.out_features, rank, generator=generator) * 0.1,
        )
        for name, layer in projections(model)
        if names in name
    }


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_is_added_to_the_base_in_floats(name: str) -> None:
    model, x = BASES[name](), torch.randn(2, 5, 64)
    layer = dict(projections(model))["model.layers.0.mlp.up_proj"]
    down, up = torch.randn(3, 64), torch.randn(128, 3)
    with torch.no_grad():
        expected = layer(x) + (x @ down.T) @ up.T
        attach(model, {"model.layers.0.mlp.up_proj": (down, up)})
        found = model.model.layers[0].mlp.up_proj
        assert isinstance(found, LoRALinear)
        torch.testing.assert_close(found(x), expected, rtol=1e-5, atol=1e-5)
        detach(model)
        assert model.model.layers[0].mlp.up_proj is layer


@pytest.mark.parametrize("name", BASES)
def test_adapters_train_and_nothing_else_does(name: str) -> None:
    """At the start nothing changes; the gradient is that of a dense layer of the dequantized weight."""
    model, ids = BASES[name](), random_ids(SHAPE, 2, 9)
    before, sums = model(ids).detach(), fingerprint(model)
    make_trainable(model, 2, 4.0)
    assert torch.equal(model(ids).detach(), before)
    trained = {each: p for each, p in model.named_parameters() if p.requires_grad}
    assert set(model.state_dict()) == set(trained)
    assert len(trained) == 2 * 7 * 2
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(bool(p.grad.isfinite().all()) for p in trained.values())
    # B is 0, so A has no gradient yet and B has one, in every layer: it came through the frozen layers behind it.
    assert all(bool(p.grad.any()) == each.endswith("lora_B") for each, p in trained.items())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.sub_(0.5 * parameter.grad)
    assert float(model.loss(ids[:, :-1], ids[:, 1:]).detach()) < float(loss.detach())
    model.load_state_dict({each: p.detach().clone() for each, p in trained.items()})
    assert fingerprint(model) == sums
    with pytest.raises(RuntimeError, match="lora_A"):
        model.load_state_dict({each: p for each, p in trained.items() if "layers.0.mlp.up_proj.lora_A" not in each})


@pytest.mark.parametrize("name", ["ternary", "groups", "float"])
def test_captured_in_a_graph_the_gradient_is_the_same(name: str) -> None:
    torch.compiler.reset()
    model, x = BASES[name](), torch.randn(4, 64)
    attach(model, adapters_for(model))
    layer, grad = model.model.layers[1].mlp.up_proj, torch.randn(4, 128)
    gradients = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        with kernels.use_backend("reference"):
            call(inputs).backward(grad)
        gradients.append([inputs.grad, layer.lora_A.grad, layer.lora_B.grad])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_gradient_passes_straight_through_the_frozen_product() -> None:
    model, x = ternary(), torch.randn(4, 64, requires_grad=True)
    attach(model, adapters_for(model))
    layer, grad = model.model.layers[1].mlp.up_proj, torch.randn(4, 128)
    layer(x).backward(grad)
    weight = dense_weight(layer.base) + layer.lora_B @ layer.lora_A
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-5, atol=1e-5)
    assert layer.lora_A.grad is None  # an adapter that is put on does not train


def test_the_fingerprint_is_of_codes_and_scales_wherever_they_lie() -> None:
    latent = random_model(SHAPE)
    first = fingerprint(latent)
    packed = latent.pack()
    assert fingerprint(packed) == first
    attach(packed, adapters_for(packed))
    assert fingerprint(packed) == first
    packed.model.layers[0].mlp.up_proj.base.weight_scale.mul_(1.0001)
    assert fingerprint(packed) != first
    assert len({fingerprint(make()) for make in BASES.values()}) == len(BASES) - 1  # tables are no part of it


def test_what_does_not_fit_is_refused() -> None:
    model = ternary()
    with pytest.raises(ValueError, match="which the model does not have"):
        attach(model, {"model.layers.9.mlp.up_proj": (torch.zeros(1, 64), torch.zeros(128, 1))})
    with pytest.raises(ValueError, match=r"\[128, 2\] times \[1, 64\], and the weight is 128 x 64"):
        attach(model, {"model.layers.0.mlp.up_proj": (torch.zeros(1, 64), torch.zeros(128, 2))})
    with pytest.raises(ValueError, match="a rank of 99 does not fit a weight"):
        make_trainable(model, 99, 1.0)
    with pytest.raises(ValueError, match="StaticInt8Linear is no base for adapters"):
        make_trainable(_static(), 1, 1.0)
    with pytest.raises(ValueError, match="one matrix where two belong together"):
        matrices_of({"x.lora_A": torch.zeros(1, 2)}, 1.0)


def _static() -> BitNetForCausalLM:
    model = quantized("none")()
    return quantize_model(model, "w8a8-static", random_ids(SHAPE, 32, 32))


# Merging


@pytest.mark.parametrize("name", ["NF4", "Q4_0", "float"])
def test_merging_into_floats_is_exact(name: str) -> None:
    model, ids = BASES[name](), random_ids(SHAPE, 1, 9)
    adapters = adapters_for(model)
    merged, lost = merge(model, adapters)
    assert lost == 0
    assert merged.config.quantizer == "none"
    attach(model, adapters)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantizer", ["ternary", "ternary-g64", "binary", "int8", "int4"])
def test_merging_into_few_bits_says_what_is_lost(quantizer: str) -> None:
    model = ternary(quantizer)
    adapters = adapters_for(model, names="mlp")
    merged, lost = merge(model, adapters)
    assert merged.is_packed
    assert merged.config == model.config
    layers, after = dict(projections(model)), dict(projections(merged))
    left = changed = 0.0
    for name, layer in layers.items():
        if name not in adapters:
            assert torch.equal(after[name].packed_weight, layer.packed_weight)
            assert torch.equal(after[name].weight_scale, layer.weight_scale)
            continue
        down, up = adapters[name]
        wanted = dense_weight(layer) + up @ down
        left += float((wanted - dense_weight(after[name])).square().sum())
        changed += float((up @ down).square().sum())
    assert lost == pytest.approx((left / changed) ** 0.5, rel=1e-4)
    assert (0.001 if quantizer == "int8" else 0.05) < lost < 3
    nothing = merge(model, {name: (down, 0 * up) for name, (down, up) in adapters.items()})
    assert torch.equal(dict(projections(nothing[0]))["model.layers.0.mlp.up_proj"].codes(),
                       layers["model.layers.0.mlp.up_proj"].codes())  # fmt: skip


# On the native engine


@pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")
@pytest.mark.parametrize("name", ["ternary", "groups", "NF4", "Q4_0", "float"])
@pytest.mark.parametrize("names", ["_proj", "k_proj", "up_proj"])
def test_the_native_engine_adds_adapters_as_torch_does(name: str, names: str) -> None:
    """Equal to rounding where no activation is quantized; with INT8 activations, to some codes beside."""
    model, ids = BASES[name](), random_ids(SHAPE, 2, 7)
    integers = isinstance(dict(projections(model))["model.layers.0.mlp.up_proj"], PackedLinear)
    options = {"embeddings": "float16"} if integers else {"activations": "float"}
    model.model.embed_tokens.weight.data = _table(model).half().float()
    adapters = adapters_for(model, names=names)
    for isa in native.instruction_sets():
        with native.use_instruction_set(isa), torch.no_grad():
            engine = Engine.from_model(model, **options)
            plain, size = engine(ids), engine.weight_bytes()
            engine.attach(adapters)
            assert engine.weight_bytes() > size
            logits = engine(ids)
            attach(model, adapters)
            with kernels.use_backend("reference"):
                expected = model(ids)
            detach(model)
            assert (logits - plain).norm() > 0.05 * plain.norm()
            assert (logits - expected).norm() < (0.03 if integers else 1e-4) * expected.norm(), isa
            cache = engine.new_cache(2, 16)
            pieces = torch.cat([engine(part, cache) for part in ids.split([1, 5, 1], dim=1)], dim=1)
            assert torch.equal(pieces, logits)
            engine.attach({})
            assert torch.equal(engine(ids), plain)


def _table(model: BitNetForCausalLM) -> Tensor:
    return model.model.embed_tokens.weight.detach()


@pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")
def test_one_product_with_an_adapter_is_the_sum_of_both() -> None:
    """Of a layer alone, where no rounding border lies between: odd sizes, few and many tokens."""
    from bitnet.inference.cpu_model import _attach, _Place
    from bitnet.inference.weights import stored
    from bitnet.kernels.cpu.matrices import NativeMatrix, linear

    for columns, rows, rank in ((40, 50, 1), (131, 33, 5), (64, 16, 16)):
        layer = PackedLinear.from_linear(torch.nn.Linear(columns, rows), "ternary")
        down, up = torch.randn(rank, columns), torch.randn(rows, rank)
        weight = stored(layer)
        matrix = NativeMatrix(weight.form, rows)
        for first, piece in weight.pieces():
            matrix.write(piece, first)
        if weight.bias is not None:
            matrix.write_bias(weight.bias)
        keep = _attach(matrix.struct, [(_Place(0, 0, 1), (down, up))])
        for tokens in (1, 3, 40):
            x = torch.randn(tokens, columns)
            with torch.no_grad(), kernels.use_backend("reference"):
                expected = layer(x) + (x @ down.T) @ up.T
            torch.testing.assert_close(linear(matrix, x), expected, rtol=1e-5, atol=1e-5)
        assert len(keep) == 2
