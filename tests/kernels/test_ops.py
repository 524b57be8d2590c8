"""Packed layers under everything that looks at a program: traces, transforms, modes, fake tensors."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jacrev, jvp, stack_module_state
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.kernels import ops, use_backend
from bitnet.kernels.cpu import native
from bitnet.model.linear import PackedEmbedding, PackedLinear, pack, replace_linear
from bitnet.model.quantized import StaticInt8Linear
from bitnet.model.weight_only import BlockLinear, NF4Linear, WeightOnlyLayer

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
K = 64
BACKENDS = ["reference", *(["native"] if native.instruction_sets() else [])]
LAYERS = {
    **{name: lambda name=name: mlp(name) for name in ("ternary", "int4", "int8")},
    "static": lambda: StaticInt8Linear.from_linear(nn.Linear(K, 24), torch.tensor(0.02), torch.tensor(3)),
    "blocks": lambda: BlockLinear.from_linear(nn.Linear(K, 24), "Q4_0"),
    "nf4": lambda: NF4Linear.from_linear(nn.Linear(K, 24)),
}


def mlp(quantizer: str) -> nn.Module:
    return pack(replace_linear(nn.Sequential(nn.Linear(K, 40), nn.ReLU(), nn.Linear(40, 24)), quantizer=quantizer))


class Passing(TorchDispatchMode):
    """Sees every operator and changes none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[(backend, kind) for backend in BACKENDS for kind in LAYERS], ids="-".join)
def layer(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    backend, kind = request.param
    with use_backend("auto" if backend == "native" else backend):
        yield LAYERS[kind]().eval()


def test_traces_compute_what_the_layer_does(layer: nn.Module, request: pytest.FixtureRequest) -> None:
    x = torch.randn(5, K)
    if request.node.callspec.id != "reference-blocks":  # torch.jit.trace knows no reinterpretation of bytes
        assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x), layer(x))
    assert torch.equal(make_fx(layer)(x)(x), layer(x))


def test_programs_take_other_sizes() -> None:
    packed, x, other = mlp("ternary"), torch.randn(5, K), torch.randn(7, K)
    if len(BACKENDS) == 2:
        assert torch.equal(torch.jit.trace(packed, x)(other), packed(other))
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert torch.equal(exported.module()(other), packed(other))
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="eager")(x), packed(x))


def test_transforms_and_modes_see_the_same_numbers(layer: nn.Module) -> None:
    x = torch.randn(3, 7, K)
    expected = layer(x)
    # Integer products are exact; a float product of another shape sums in another order.
    tolerance = 1e-5 if isinstance(layer, WeightOnlyLayer) else 0
    close = functools.partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    close(torch.vmap(layer)(x), expected)
    close(torch.vmap(torch.vmap(layer), in_dims=1)(x), expected.transpose(0, 1))
    close(torch.vmap(layer, in_dims=1, out_dims=1)(x), expected)
    assert torch.equal(functionalize(layer)(x), expected)
    with Passing(), Passing():
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(torch._neg_view(-x)), expected)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    assert layer(fake.from_tensor(x)).shape == expected.shape
    with fake:
        assert layer(fake.from_tensor(x)).shape == expected.shape


def test_defaults_of_device_and_dtype_are_not_those_of_the_kernels(layer: nn.Module) -> None:
    x = torch.randn(3, K)
    expected = layer(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(layer(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ensemble_of_packed_layers_by_vmap(backend: str) -> None:
    with use_backend("auto" if backend == "native" else backend):
        layers = [pack(replace_linear(nn.Sequential(nn.Linear(K, 8)))) for _ in range(3)]
        state, x = stack_module_state(layers), torch.randn(5, K)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(layers[0], (parameters, buffers), (x,))

        together = torch.vmap(one, in_dims=(0, 0, None))(*state, x)
        assert torch.equal(together, torch.stack([each(x) for each in layers]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["ternary", "static"])
def test_derivatives_are_refused(backend: str, kind: str) -> None:
    x = torch.randn(5, K)
    with use_backend("auto" if backend == "native" else backend):
        layer = LAYERS[kind]()
        asked = (
            lambda: jvp(layer, (x,), (x,)),
            lambda: grad(lambda x: layer(x).sum())(x),
            lambda: jacrev(layer)(x),
            lambda: torch.vmap(grad(lambda x: layer(x).sum()))(x),
        )
        for ask in asked:
            with pytest.raises(NotImplementedError, match="no derivative; take it before pack"):
                ask()
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="no derivative"):
                layer(forward_ad.make_dual(x, x))
            assert torch.equal(layer(x), layer(x.clone()))
        # Of what is constant nothing is asked.
        assert torch.equal(grad(lambda v: (v * layer(x)).sum())(torch.tensor(1.0)), layer(x).sum())
        y = layer(x.requires_grad_())
        assert not y.requires_grad


def test_tables_in_traces() -> None:
    table, ids, h = PackedEmbedding.from_weight(torch.randn(50, K)), torch.randint(50, (3, 4)), torch.randn(2, K)
    assert torch.equal(torch.jit.trace(table, ids)(ids), table(ids))
    assert torch.equal(make_fx(lambda h: table.project(h))(h)(h), table.project(h))


def test_operators_follow_the_rules_of_torch() -> None:
    layer = PackedLinear.from_linear(nn.Linear(K, 8), "ternary")
    product = (torch.randn(3, K), layer.packed_weight, layer.weight_scale, layer.bias, 2, K)
    torch.library.opcheck(ops.packed_linear, product)
    codes = torch.randint(-5, 5, (3, K), dtype=torch.int8)
    torch.library.opcheck(ops.packed_matmul, (codes, layer.packed_weight, 2, K))
    blocks = BlockLinear.from_linear(nn.Linear(K, 8), "Q4_0")
    torch.library.opcheck(ops.dequantize_blocks, (blocks.data, "Q4_0"))


@pytest.mark.skipif(len(BACKENDS) == 1, reason="the native kernels were not built")
def test_tensors_on_two_devices_are_refused_under_a_mode() -> None:
    layer = PackedLinear.from_linear(nn.Linear(K, 8), "ternary").to("meta")
    with Passing(), pytest.raises(ValueError, match="x is on cpu and the packed weight on meta"):
        layer(torch.randn(2, K))
