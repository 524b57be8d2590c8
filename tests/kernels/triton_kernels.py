"""Quantization of activations and weights in Triton's interpreter, against the reference. Run by `test_triton.py`."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.bench.gpu_gate import GATES
from bitnet.inference.options import SamplingConfig
from bitnet.inference.sampling import choose
from bitnet.kernels import reference
from bitnet.kernels.triton import activations, attention, language, product, sampling, weights
from bitnet.quant import pack_codes, quantize_ternary, unpack_codes
from tests.kernels.interpreter import hasten

pytestmark = pytest.mark.usefixtures("poisoned_memory")
assert language.INTERPRETED, "run by test_triton.py, with TRITON_INTERPRET=1"
hasten()


def assert_is_quantized(x: Tensor, codes: Tensor, scale: Tensor, total: Tensor) -> None:
    """The results are the reference's for x, to the last bit, with zeros behind each row."""
    expected, expected_scale = reference.quantize_activations(x)
    assert torch.equal(codes[:, : x.shape[1]], expected)
    assert not codes[:, x.shape[1] :].any()
    assert torch.equal(scale, expected_scale.view(-1))
    assert torch.equal(total, expected.sum(1, dtype=torch.int32))


# Activations


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize(  # every two of M, which are programs, K and the type
    ("M", "K", "dtype"),
    [
        ((1, 3, 9)[(i + j) % 3], K, dtype)
        for i, K in enumerate((1, 127, 128, 129, 1000))
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_activations_are_the_reference(M: int, K: int, dtype: torch.dtype) -> None:
    x = torch.randn(M, K).to(dtype)
    before = x.clone()
    assert_is_quantized(x, *activations.quantize_activations(x))
    assert torch.equal(x, before)


def test_activations_at_ties_zeros_and_extremes() -> None:
    x = torch.randn(7, 300)
    x[0] = 0
    x[1] = (torch.arange(300) % 255 - 127) + 0.5  # absmax 127.5
    x[2] = torch.arange(300) % 128 * 0.5  # many halves after the division
    x[2, 0] = 127
    x[3], x[4] = 1e-30, 1e30
    x[5] = -1  # all codes -127
    x[6, 0] = -3e38
    assert_is_quantized(x, *activations.quantize_activations(x))


def test_a_row_of_6912_values() -> None:
    x = torch.randn(2, 6912)
    assert_is_quantized(x, *activations.quantize_activations(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_visible(bad: float) -> None:
    x = torch.randn(2, 40)
    x[0, 3] = bad
    codes, scale, _ = activations.quantize_activations(x)
    assert not scale[0].isfinite()
    # y = sum * scale: NaN either way, since an infinite scale leaves no code but 0
    assert (codes[0].int().sum() * scale[0]).isnan()
    assert torch.equal(scale[1], reference.quantize_activations(x)[1].view(-1)[1])


def gated(x: Tensor, gate: str) -> Tensor:
    if gate == "none":
        return x
    first, up = x.chunk(2, dim=-1)
    return (F.silu(first) if gate == "silu" else F.relu(first).square()) * up


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm as in `bitnet/model/transformer.py`."""
    if weight is None:
        return x
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize(  # every two of them
    ("gate", "norm", "K"),
    [
        (gate, (i + j) % 2 == 0, K)
        for i, gate in enumerate(("none", "silu", "relu2"))
        for j, K in enumerate((1, 96, 333))
    ],
)
def test_gate_and_norm_come_before_the_quantization(gate: str, norm: bool, K: int) -> None:
    x = torch.randn(9, K if gate == "none" else 2 * K)
    x[0] = 0
    weight = torch.rand(K) + 0.5 if norm else None
    codes, scale, total = activations.quantize_activations(x, weight, 1e-5, gate)
    v = normed(gated(x, gate), weight, 1e-5)
    expected, expected_scale = reference.quantize_activations(v)
    torch.testing.assert_close(scale, expected_scale.view(-1), rtol=1e-5, atol=0)
    # Another order of additions moves v by a rounding: only codes on a border may differ, by one.
    border = ((v / expected_scale).frac().abs() - 0.5).abs() < 1e-3
    difference = (codes[:, :K].int() - expected.int()).abs()
    assert not difference[~border].any()
    assert difference.max() <= 1
    assert border.float().mean() < 0.05
    assert torch.equal(total, codes.sum(1, dtype=torch.int32))


def test_norm_in_half_precision_rounds_where_torch_stores() -> None:
    x, weight = torch.randn(40, 64).half(), (torch.rand(64) + 0.5).half()
    codes, scale, _ = activations.quantize_activations(x, weight, 1e-5)
    v = normed(x, weight, 1e-5)
    assert v.dtype == torch.float16
    expected, expected_scale = reference.quantize_activations(v)
    # Without the roundings one scale in three differs.
    assert (scale == expected_scale.view(-1)).float().mean() > 0.9
    assert (codes[:, :64].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activations.quantize_activations(torch.ones(4, 6).t()), "strides"),
        (lambda: activations.quantize_activations(torch.ones(4, 6, dtype=torch.int32)), "int32"),
        (lambda: activations.quantize_activations(torch.ones(6)), r"\[6\]"),
        (lambda: activations.quantize_activations(torch.ones(1, 65537)), "65537"),
        (lambda: activations.quantize_activations(torch.ones(2, 0)), "0 values"),
        (lambda: activations.quantize_activations(torch.ones(2, 7), gate="silu"), "7 columns"),
        (lambda: activations.quantize_activations(torch.ones(2, 8), gate="gelu"), "gelu"),
        (lambda: activations.quantize_activations(torch.ones(2, 8), torch.ones(7)), r"norm_weight is \[7\]"),
        (lambda: activations.quantize_activations(torch.ones(2, 8), torch.ones(8, device="meta")), "meta"),
        (lambda: activations.quantize_activations(torch.ones(2, 8, device="meta")), "meta"),
        (lambda: weights.quantize_ternary(torch.ones(4, 6).t()), "strides"),
        (lambda: weights.quantize_ternary(torch.ones(4, 6, dtype=torch.int8)), "int8"),
        (lambda: weights.quantize_ternary(torch.ones(0, 6)), "no mean"),
        (lambda: weights.unpack(torch.ones(4, 33, dtype=torch.uint8), 2, 128), "33"),
        (lambda: weights.unpack(torch.ones(4, 32, dtype=torch.int8), 2, 128), "int8"),
        (lambda: weights.dequantize(torch.ones(4, 128, dtype=torch.int8), torch.ones(3), 7, torch.float32), r"\[3\]"),
        (lambda: weights.dequantize(torch.ones(4, 99, dtype=torch.int8), torch.ones(4), 7, torch.float32), "99"),
    ],
)
def test_bad_input_raises_before_any_launch(call, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*args: object, **options: object) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(activations, "launch", launched)
    monkeypatch.setattr(weights, "launch", launched)
    with pytest.raises(ValueError, match=message):
        call()


# Weights


@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 127), (3, 128), (7, 129), (40, 333), (130, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ternary_weights_packed_and_as_codes(N: int, K: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K).to(dtype)
    before = weight.clone()
    packed, scale = weights.quantize_ternary(weight)
    expected, expected_scale = quantize_ternary(weight)
    torch.testing.assert_close(scale.view(()), expected_scale, rtol=1e-6, atol=0)
    if dtype == torch.float32:  # halves lie on borders, which the last bit of the scale decides
        assert torch.equal(packed, pack_codes(expected, 2))
    by_formula = (weight.float() / scale).round().clamp(-1, 1).to(torch.int8)
    assert torch.equal(packed, pack_codes(by_formula, 2))
    codes, same_scale = weights.quantize_ternary(weight, packed=False)
    assert torch.equal(codes[:, :K], by_formula)
    assert not codes[:, K:].any()
    assert torch.equal(scale, same_scale)
    assert torch.equal(weight, before)
    assert torch.equal(packed, weights.quantize_ternary(weight)[0])


def test_the_mean_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MAX_PARTIALS", 3)
    weight = torch.randn(49, 1000)  # 12 tiles
    _, scale = weights.quantize_ternary(weight, packed=False)
    torch.testing.assert_close(scale.double().view(()), weight.double().abs().mean(), rtol=1e-6, atol=0)


def test_zero_and_nan_weights() -> None:
    packed, scale = weights.quantize_ternary(torch.zeros(2, 128))
    assert scale.item() == torch.tensor(1e-5).item()
    assert (packed == 0x55).all()  # four codes 1
    weight = torch.randn(2, 128)
    weight[0, 0] = float("nan")
    codes, scale = weights.quantize_ternary(weight, packed=False)
    assert scale.isnan().all()
    assert not codes.any()


def test_the_comparison_is_the_rounded_quotient() -> None:
    # Around scale / 2, for many scales: the kernel compares where the formula divides and rounds.
    scale = torch.cat(
        [torch.rand(100) * 10 ** torch.randint(-4, 5, (100,)).float(), torch.tensor([1e-5, 1.0, 1 / 3])]
    ).clamp(min=1e-5)
    half = 0.5 * scale
    border = [half, *(torch.nextafter(half, half * t) for t in (0.0, 2.0)), torch.nextafter(half * 1.0001, half * 2)]
    values = torch.stack([*border, *(-b for b in border), 1.5 * scale, torch.zeros_like(scale)], 1)  # [scales, 10]
    for s, w in zip(scale, values, strict=True):
        codes = torch.empty(1, 128, dtype=torch.int8)
        # With one value counted the mean is the partial sum.
        language.launch(
            weights.codes_kernel, (1,), w, s.reshape(1), codes, torch.empty(1), N=1, K=10, WIDTH=128, SIZE=1,
            PARTIALS=1, P2=1, TILE=128, SMALLEST=1e-5,
        )  # fmt: skip
        assert torch.equal(codes[0, :10].float(), (w / s).round().clamp(-1, 1)), float(s)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -1, 1), (4, -8, 7), (8, -128, 127)])
@pytest.mark.parametrize("K", [1, 100, 129, 1300])
def test_unpack_and_dequantize(bits: int, low: int, high: int, K: int) -> None:
    codes = torch.randint(low, high + 1, (5, K), dtype=torch.int8)
    packed = pack_codes(codes, bits)
    unpacked = weights.unpack(packed, bits, K)
    assert torch.equal(unpacked[:, :K], unpack_codes(packed, bits, K))
    assert not unpacked[:, K:].any()
    for scale in (torch.rand(1, 1), torch.rand(5)):
        values = weights.dequantize(unpacked, scale, K, torch.float32)
        assert torch.equal(values, codes * (scale if scale.numel() == 1 else scale[:, None]))
    assert weights.dequantize(unpacked, scale, K, torch.float16).dtype == torch.float16


SHORT = ["activations", "weights", "projections", "groups", "sampling", "training"]
LONG = ["products", "engine", "caches"] if os.environ.get("BITNET_LONG") == "1" else []


@pytest.mark.parametrize("name", SHORT + LONG)
def test_gates_of_the_benchmark_turn_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gate = torch.device("cpu"), GATES[name]
    assert list(gate(cpu, True)) == []
    original = language.launch

    def off_by_one(kernel, grid, *tensors, **options) -> None:
        """Every kernel writes one number too large into its first code or id."""
        original(kernel, grid, *tensors, **options)
        for tensor in tensors[1:]:
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.int8, torch.uint8, torch.int64):
                tensor.view(-1)[0] += 1

    for module in (activations, attention, product, sampling, weights):
        monkeypatch.setattr(module, "launch", off_by_one)
    assert list(gate(cpu, True)) != []


# The draw


@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.2), (0.5, 0.0), (0.95, 0.05)])
def test_tokens_are_drawn_as_specified(top_p: float, min_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", 64)  # lists of several blocks
    logits = (3 * torch.randn(5, 120))[:, :100]
    logits[1] = logits[1].round()  # equal ones
    logits[2] = 0  # the top-p set ends between equal ones
    uniform = torch.rand(5, dtype=torch.float64)
    uniform[3:] = torch.tensor([0, 1 - 2**-53], dtype=torch.float64)
    wanted = choose(logits, SamplingConfig(0.8, top_p=top_p, min_p=min_p), uniform[:, None])
    assert sampling.draw(logits, uniform, temperature=0.8, top_p=top_p, min_p=min_p, not_finite=-2).equal(wanted)
    logits[0, 99], logits[4, 0] = float("nan"), float("inf")
    wanted[[0, 4]] = -2
    assert sampling.draw(logits, uniform, temperature=0.8, top_p=top_p, min_p=min_p, not_finite=-2).equal(wanted)


def test_a_draw_refuses_what_it_cannot_read() -> None:
    uniform = torch.rand(2, dtype=torch.float64)
    for logits in (torch.randn(2, 9).half(), torch.randn(9, 2).T):
        with pytest.raises(ValueError, match="give float32, a row in one piece"):
            sampling.draw(logits, uniform, temperature=1.0, not_finite=-2)
    with pytest.raises(ValueError, match=r"temperature 0, .* draw nothing"):
        sampling.draw(torch.randn(2, 9), uniform, temperature=0, not_finite=-2)
    with pytest.raises(ValueError, match="uniform"):
        sampling.draw(torch.randn(2, 9), uniform.float(), temperature=1.0, not_finite=-2)
