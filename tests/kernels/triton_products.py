"""The products in Triton's interpreter, integers bit for bit against the reference. Run by `test_triton.py`."""

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import kernels
from bitnet.kernels import ops as operators
from bitnet.kernels import reference
from bitnet.kernels import triton as backend
from bitnet.kernels.triton import language, ops, product, training, warm
from bitnet.kernels.triton.activations import padded, quantize_activations
from bitnet.kernels.triton.product import Plan, choose
from bitnet.kernels.triton.project import project
from bitnet.model import BitLinear, PackedLinear
from bitnet.quant import pack_codes, packed_width
from tests.kernels.interpreter import hasten

pytestmark = pytest.mark.usefixtures("poisoned_memory")
assert language.INTERPRETED, "run by test_triton.py, with TRITON_INTERPRET=1"
hasten()
CPU = torch.device("cpu")
LIMITS = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}


def plan_for(algorithm: str, M: int, N: int, K: int, bits: int) -> Plan:
    """The plan that a GPU would get, with more rows to a program where that only saves the interpreter time."""
    plan = choose(M, N, K, bits, CPU, algorithm)
    if algorithm == "dense":
        return dataclasses.replace(plan, rows=64)  # two tiles of 70 rows, each of which a program unpacks
    return dataclasses.replace(plan, rows=32) if algorithm in ("dot4", "four_lanes", "select") else plan


def padded_codes(codes: Tensor) -> Tensor:
    return F.pad(codes, (0, padded(codes.shape[1]) - codes.shape[1]))


def integers(x_codes: Tensor, w_codes: Tensor, bits: int, plan: Plan) -> Tensor:
    M, K = x_codes.shape
    total = x_codes.sum(1, dtype=torch.int32)
    return product.product(
        padded_codes(x_codes), torch.ones(M), total, pack_codes(w_codes, bits), torch.ones(1), bits=bits, in_features=K,
        dtype=torch.int32, plan=plan,
    )  # fmt: skip


def random_codes(M: int, N: int, K: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes with an all-zero token, saturated ones and saturated rows among them."""
    low, high = LIMITS[bits]
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    w = torch.randint(low, high + 1, (N, K), dtype=torch.int8)
    w[0], w[-1] = low, high
    if M > 3:
        x[0], x[1], x[2] = 0, 127, -128
    return x, w


CASES = [
    *((algorithm, 2, M, N, K) for algorithm in ("select", "four_lanes") for M, N, K in ((1, 37, 131), (2, 20, 700))),
    *(("dot4", bits, M, 32, 131) for bits in (2, 4, 8) for M in (1, 4)),
    *(("dot4", 2, M, 37, 131) for M in (2, 3)),
    *(("dot4", bits, 1, 20, 2600) for bits in (2, 4, 8)),
    # Every two of bits, M and K.
    *(("tensor_core", 2 << i, (1, 5, 33)[j], 70, (1, 129, 1300)[(i + j) % 3]) for i in range(3) for j in range(3)),
    *(("tensor_core", 2, M, 140, 515) for M in (70, 200)),
    *(("dense", bits, M, 70, 131) for bits, M in ((2, 1), (4, 65), (8, 300))),  # bits count where codes are unpacked
]


@pytest.mark.parametrize(("algorithm", "bits", "M", "N", "K"), CASES)
def test_integer_sums_are_exact(algorithm: str, bits: int, M: int, N: int, K: int) -> None:
    x, w = random_codes(M, N, K, bits)
    y = integers(x, w, bits, plan_for(algorithm, M, N, K, bits))
    assert torch.equal(y, reference.integer_matmul(x, w, bits=bits))


@pytest.mark.parametrize("algorithm", ["select", "four_lanes", "dot4", "tensor_core", "dense"])
def test_saturated_everywhere(algorithm: str) -> None:
    """Each token's codes are one number, and each row's."""
    M, N, K = 2, 3, 300
    x_codes, w_codes = torch.tensor([-128, 127], dtype=torch.int8), torch.tensor([-1, 0, 1], dtype=torch.int8)
    x, w = x_codes.view(M, 1).repeat(1, K), w_codes.view(N, 1).repeat(1, K)
    assert torch.equal(
        integers(x, w, 2, plan_for(algorithm, M, N, K, 2)), torch.outer(x_codes.int(), w_codes.int()) * K
    )


@pytest.mark.parametrize("split", [2, 4, 8])
def test_splitting_k_changes_nothing(split: int) -> None:
    M, N, K = 9, 70, 3000
    x, w = random_codes(M, N, K, 2)
    plan = dataclasses.replace(choose(M, N, K, 2, CPU, "tensor_core"), split=split, columns=64)
    assert torch.equal(integers(x, w, 2, plan), reference.integer_matmul(x, w, bits=2))


@pytest.mark.parametrize("algorithm", ["select", "four_lanes", "dot4", "tensor_core", "split", "dense"])
@pytest.mark.parametrize(("per_row", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_epilogue_rounds_as_torch(algorithm: str, per_row: bool, dtype: torch.dtype) -> None:
    M, N, K = 3, 30, 300
    x, (_, w) = torch.randn(M, K).to(dtype), random_codes(M, N, K, 2)
    scale = torch.rand(N, 1) if per_row else torch.rand(1, 1)
    bias, residual = torch.randn(N), torch.randn(M, N).to(dtype)
    packed = pack_codes(w, 2)
    plan = plan_for("tensor_core" if algorithm == "split" else algorithm, M, N, K, 2)
    if algorithm == "split":
        plan = dataclasses.replace(plan, split=2)
    codes, x_scale, total = quantize_activations(x)
    shared = {"bits": 2, "in_features": K, "dtype": dtype, "plan": plan}
    expected = reference.packed_linear(x, packed, scale, None, bits=2, in_features=K)
    assert torch.equal(product.product(codes, x_scale, total, packed, scale, **shared), expected)
    expected = reference.packed_linear(x, packed, scale, bias, bits=2, in_features=K)
    assert torch.equal(product.product(codes, x_scale, total, packed, scale, bias, **shared), expected)
    added = product.product(codes, x_scale, total, packed, scale, bias, residual, **shared)
    assert torch.equal(added, expected + residual)


def test_the_choice_covers_every_number_of_tokens() -> None:
    found = [choose(M, 2560, 2560, 2, CPU).algorithm for M in (1, 2, 3, 64, 1023, 1024, 4096)]
    assert found == ["dot4", "dot4", "tensor_core", "tensor_core", "tensor_core", "dense", "dense"]
    assert choose(5, 640, 2560, 2, CPU).split > 1
    assert choose(1000, 6912, 2560, 2, CPU).split == 1


@pytest.mark.parametrize("processors", [24, 108, 132, 170])
def test_some_lengths_have_every_plan(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_processors", lambda device: processors)
    for N, K, bits in [(50, 64, 2), (3840, 2560, 2), (2560, 6912, 2), (13824, 2560, 4), (2000, 256, 8)]:
        found = {choose(M, N, K, bits, CPU) for M in product.LENGTHS}
        assert found == {choose(M, N, K, bits, CPU) for M in range(1, 1100)}
        assert len(found) >= 5


@pytest.mark.parametrize("M", [1, 8, 200])
def test_tuning_keeps_the_fastest_plan(M: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    product._tuned_plans.cache_clear()
    N, K = 128, 256
    plans = list(product.candidates(M, N, K, 2, CPU))
    assert len(set(plans)) == len(plans) > 3
    calls = iter(range(len(plans), 0, -1))  # the last candidate is the fastest
    monkeypatch.setattr(language.triton.testing, "do_bench", lambda call, **_: next(calls))
    try:
        assert product.tune(M, N, K, 2, CPU) == plans[-1]
        assert product.tune(M, N, K, 2, CPU) == plans[-1]  # no further call of do_bench
        product._tuned_plans.cache_clear()
        assert choose(M, N, K, 2, CPU) == plans[-1]  # read from the file
        x, w = random_codes(M, N, K, 2)
        assert torch.equal(integers(x, w, 2, plans[-1]), reference.integer_matmul(x, w, bits=2))
    finally:
        product._tuned_plans.cache_clear()


OPERANDS = {
    "codes": lambda: torch.zeros(2, 256, dtype=torch.int8), "x_scale": lambda: torch.ones(2),
    "total": lambda: torch.zeros(2, dtype=torch.int32), "packed": lambda: torch.zeros(6, 64, dtype=torch.uint8),
    "w_scale": lambda: torch.ones(1), "bias": lambda: torch.ones(6), "residual": lambda: torch.ones(2, 6),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("packed", torch.zeros(6, 96, dtype=torch.uint8), r"packed is \[6, 96\]; it must be \[any, 64\]"),
        ("packed", torch.zeros(6, 63, dtype=torch.uint8), r"\[6, 63\]"),
        ("packed", torch.zeros(64, 6, dtype=torch.uint8).t(), "contiguous"),
        ("packed", torch.zeros(6, 64, dtype=torch.int8), "torch.uint8"),
        ("codes", torch.zeros(2, 200, dtype=torch.int8), r"\[2, 200\]"),
        ("codes", torch.zeros(2, 256), "torch.int8"),
        ("codes", torch.zeros(2, 256, dtype=torch.int8, device="meta"), "codes is on meta"),
        ("x_scale", torch.ones(3), r"\[3\]"),
        ("total", torch.zeros(2, dtype=torch.int64), "int64"),
        ("w_scale", torch.ones(5), r"\[5\]; it must be \[6\]"),
        ("w_scale", torch.ones(6).double(), "float64"),
        ("bias", torch.ones(5), r"bias is \[5\]"),
        ("residual", torch.ones(6, 2), r"residual is \[6, 2\]"),
        ("residual", torch.ones(6, 2).t(), "strides"),
    ],
)
def test_bad_input_raises_before_any_launch(
    name: str, value: Tensor, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*args: object, **options: object) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(product, "launch", launched)
    operands = {key: make() for key, make in OPERANDS.items()} | {name: value}
    with pytest.raises(ValueError, match=message):
        product.product(*operands.values(), bits=2, in_features=256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 2, "nonsense"), "nonsense"), ((1, 4, "four_lanes"), "4 bits"), ((5, 2, "dot4"), "at most 4 tokens"),
     ((65_536, 2, "select"), "at most 65535 tokens .* 65536; choose dense")],
)  # fmt: skip
def test_an_algorithm_that_cannot_raises(arguments: tuple[int, int, str], message: str) -> None:
    M, bits, algorithm = arguments
    with pytest.raises(ValueError, match=message):
        choose(M, 8, 8, bits, CPU, algorithm)


# The backend's functions


@pytest.fixture
def on_triton() -> Iterator[None]:
    with kernels.use_backend("triton"):
        yield


@pytest.mark.parametrize("quantizer", ["ternary", "binary", "int4", "int8"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0)])
def test_packed_linear(quantizer: str, leading: tuple[int, ...], on_triton: None) -> None:
    codes, scale = kernels.quantize_weight(torch.randn(9, 131), quantizer)
    bits = kernels.PACKED_BITS[quantizer]
    x, packed, bias = torch.randn(*leading, 131), pack_codes(codes, bits), torch.randn(9)
    y = kernels.packed_linear(x, packed, scale, bias, bits=bits, in_features=131)
    assert torch.equal(y, reference.packed_linear(x, packed, scale, bias, bits=bits, in_features=131))
    if leading:
        flipped = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(kernels.packed_linear(flipped, packed, scale, bias, bits=bits, in_features=131), y)


@pytest.mark.parametrize("quantizer", ["ternary-g64", "ternary-g128"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 9, 64), (3, 70, 131), (40, 5, 300)])
def test_groups_with_scales_of_their_own(quantizer: str, M: int, N: int, K: int, on_triton: None) -> None:
    """Sums within a group are exact, and the reference rounds once; here a float32 is added for each group."""
    codes, scale = kernels.quantize_weight(torch.randn(N, K), quantizer)
    x, packed, bias = torch.randn(M, K), pack_codes(codes, 2), torch.randn(N)
    options = {"bits": 2, "in_features": K, "group_size": kernels.GROUP_SIZES[quantizer]}
    y = kernels.packed_linear(x, packed, scale.half(), bias, **options)
    expected = reference.packed_linear(x, packed, scale, bias, **options)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6 * float(expected.std()))
    with pytest.raises(ValueError, match="the scale is"):
        kernels.packed_linear(x, packed, scale[:, :1].repeat(1, 9).half(), bias, **options)
    with pytest.raises(ValueError, match="the Triton kernel takes 64 or 128"):
        kernels.packed_linear(x, packed, scale, bias, **{**options, "group_size": 32})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operators_of_vllm_run_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its layers call on a GPU, where `_backend` is this one: q, k and v in one matrix, and integer sums."""
    monkeypatch.setattr(operators, "_backend", lambda x: backend)
    codes, scale = torch.randint(-1, 2, (24, 131), dtype=torch.int8), torch.tensor([0.3, 0.7, 1.1])
    x, packed, scale = torch.randn(5, 131).to(dtype), pack_codes(codes, 2), scale.repeat_interleave(8).view(24, 1)
    y = operators.packed_linear(x, packed, scale, None, 2, 131)
    assert torch.equal(y, reference.packed_linear(x, packed, scale, None, bits=2, in_features=131))
    sums = operators.packed_matmul(reference.quantize_activations(x)[0], packed, 2, 131)
    assert torch.equal(sums, reference.integer_matmul(reference.quantize_activations(x)[0], codes, bits=2))


def test_packed_linear_of_bad_input(on_triton: None) -> None:
    packed, scale = torch.zeros(9, packed_width(131, 2), dtype=torch.uint8), torch.ones(1, 1)
    call = {"bits": 2, "in_features": 131}
    with pytest.raises(ValueError, match="130"):
        kernels.packed_linear(torch.randn(2, 130), packed, scale, None, **call)
    with pytest.raises(ValueError, match="int64"):
        kernels.packed_linear(torch.ones(2, 131, dtype=torch.int64), packed, scale, None, **call)
    with pytest.raises(ValueError, match="meta"):
        kernels.packed_linear(torch.randn(2, 131), packed.to("meta"), scale, None, **call)


def test_activations_through_the_backend() -> None:
    x = torch.randn(2, 3, 50)
    codes, scale = backend.quantize_activations(x)
    expected, expected_scale = reference.quantize_activations(x)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_training_forward_and_gradients(leading: tuple[int, ...], biased: bool, on_triton: None) -> None:
    x, weight = torch.randn(*leading, 70), torch.randn(11, 70)
    bias, grad = torch.randn(11) if biased else None, torch.randn(*leading, 11)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    results = []
    for function in (kernels.fake_quant_linear, reference.fake_quant_linear):
        mine = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(mine[0], mine[1], mine[2] if biased else None, "ternary")
        y.backward(grad)
        results.append([y.detach(), *(tensor.grad for tensor in mine)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_training_error_rule_in_half_precision(on_triton: None) -> None:
    """At most twice the error of the reference in the same type, against float32."""
    x, weight, grad = torch.randn(30, 200), torch.randn(20, 200), torch.randn(30, 20)

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        mine = [tensor.half().to(dtype).requires_grad_() for tensor in (x, weight)]
        y = function(*mine, None, "ternary")
        y.backward(grad.half().to(dtype))
        return [y.detach().float(), *(tensor.grad.float() for tensor in mine)]

    truth = run(reference.fake_quant_linear, torch.float32)
    theirs, ours = run(reference.fake_quant_linear, torch.float16), run(kernels.fake_quant_linear, torch.float16)
    for exact, a, b in zip(truth, theirs, ours, strict=True):
        assert (b - exact).abs().max() <= 2 * (a - exact).abs().max() + 1e-3


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_requires_a_gradient_gets_one(frozen: str, on_triton: None) -> None:
    x = torch.randn(2, 8, requires_grad=frozen != "x")
    weight = torch.randn(3, 8, requires_grad=frozen != "weight")
    kernels.fake_quant_linear(x, weight, None, "ternary").sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("quantizer", ["binary", "int8", "int4", "none"])
def test_other_quantizers_train_on_the_reference(quantizer: str, on_triton: None) -> None:
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    y = kernels.fake_quant_linear(x, weight, None, quantizer)
    assert torch.equal(y, reference.fake_quant_linear(x, weight, None, quantizer))


def test_autocast_gives_its_type_and_float32_gradients(on_triton: None) -> None:
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        y = kernels.fake_quant_linear(x, weight, None, "ternary")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), reference.fake_quant_linear(x, weight, None, "ternary"), rtol=2e-3, atol=2e-3)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_operators_are_what_torch_asks_of_them() -> None:
    x, norm = torch.randn(3, 40), torch.rand(40)
    torch.library.opcheck(ops.quantize_op, (x, norm, 1e-5, "none"))
    codes, scale, total = quantize_activations(x)
    packed = pack_codes(torch.randint(-1, 2, (5, 40), dtype=torch.int8), 2)
    arguments = (codes, scale, total, packed, torch.ones(1), torch.randn(5), None, 2, 40, torch.float32)
    torch.library.opcheck(ops.product_op, arguments)
    weight, bias = torch.randn(5, 40, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(training.ternary_linear, (x.requires_grad_(), weight, bias, torch.float32))
    torch.library.opcheck(training.dequantize_op, (codes, scale, 40, torch.float32))


def test_modules_compile_into_one_graph(on_triton: None) -> None:
    layer = BitLinear(40, 9)
    packed = PackedLinear.from_linear(layer, "ternary")
    x = torch.randn(3, 40)
    for module in (packed, layer):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", dtype=torch.float16):
        half = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert half.dtype == torch.float16
        assert torch.equal(half, layer(x))
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    layer(x).sum().backward()
    assert gradient is not None
    assert torch.equal(gradient, layer.weight.grad)


# One token through a whole projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("bits", "N", "K", "norm", "gate", "added"),
    [(2, 5, 131, True, "none", True), (2, 33, 40, False, "silu", False), (2, 20, 130, True, "relu2", True),
     (4, 7, 300, False, "none", True), (4, 21, 65, True, "silu", False), (8, 9, 70, True, "none", False)],
)  # fmt: skip
def test_one_launch_for_one_token_is_what_two_give(
    bits: int, N: int, K: int, norm: bool, gate: str, added: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(1, K if gate == "none" else 2 * K).to(dtype)
    packed, scale = pack_codes(random_codes(1, N, K, bits)[1], bits), torch.rand(N) + 0.5
    weight = torch.rand(K) + 0.5 if norm else None
    residual = torch.randn(1, N).to(dtype) if added else None
    shared = {"bits": bits, "in_features": K, "dtype": dtype}
    y = project(x, weight, packed, scale, residual, eps=1e-5, gate=gate, **shared)
    codes = quantize_activations(x, weight, 1e-5, gate)
    expected = product.product(*codes, packed, scale, None, residual, **shared)
    assert torch.equal(y, expected)


def test_a_token_with_a_nan_gives_nan() -> None:
    x = torch.randn(1, 40)
    x[0, 3] = float("nan")
    y = project(x, None, pack_codes(torch.ones(5, 40, dtype=torch.int8), 2), torch.ones(5), bits=2, in_features=40)
    assert y.isnan().all()
    assert quantize_activations(x)[1].isnan().all()


def test_projections_of_bad_input() -> None:
    packed, scale, x = pack_codes(torch.ones(5, 40, dtype=torch.int8), 2), torch.ones(5), torch.randn(1, 40)
    with pytest.raises(ValueError, match="gelu"):
        project(x, None, packed, scale, bits=2, in_features=40, gate="gelu")
    with pytest.raises(ValueError, match="must be"):
        project(x.repeat(2, 1), None, packed, scale, bits=2, in_features=40)
    with pytest.raises(ValueError, match="do not fit one program"):
        project(x, None, packed, scale, bits=2, in_features=20_000)


def test_variants_to_compile_are_found_once_and_pickle() -> None:
    packed, scale, x = pack_codes(torch.ones(5, 40, dtype=torch.int8), 2), torch.ones(5), torch.randn(1, 40)
    calls = [lambda: project(x, None, packed, scale, bits=2, in_features=40)] * 2
    calls.append(lambda: [*quantize_activations(x), int("no number")])  # what stumbles over garbage
    variants = warm.variants_of(calls)
    assert [(name, kinds[0]) for _, name, kinds, *_ in variants] == [
        ("project_kernel", torch.float32), ("quantize_kernel", torch.float32)
    ]  # fmt: skip
    assert pickle.loads(pickle.dumps(variants)) == variants
    with pytest.raises(ValueError, match="no number"):
        warm.variants_of([lambda: int("no number")])


@pytest.mark.parametrize("bits", [2, 8])
def test_integer_products_of_codes_from_elsewhere(bits):
    x, w = random_codes(5, 40, 131, bits)
    found = backend.packed_matmul(x, pack_codes(w, bits), bits=bits, in_features=131)
    assert torch.equal(found, reference.packed_matmul(x, pack_codes(w, bits), bits=bits, in_features=131))
    with pytest.raises(ValueError, match="give int8 with 131"):
        backend.packed_matmul(x[:, :-1], pack_codes(w, bits), bits=bits, in_features=131)
