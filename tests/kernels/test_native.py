"""The native CPU kernels against the reference: integer sums, activations, the packed product."""

import itertools

import pytest
import torch
from torch import Tensor

from bitnet import kernels
from bitnet.kernels import cpu, reference
from bitnet.quant import pack_codes
from tests.kernels.builders import BITS, LIMITS, both, lines_of, needs_library, operands, random_codes

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ONE_SCALE = [quantizer for quantizer in kernels.PACKED_BITS if quantizer not in kernels.GROUP_SIZES]
"""Of the matrix or of a row. Groups have float sums of their own: `test_linear.py`, `test_cpu_engine.py`."""


def integer_tokens(M: int, K: int) -> Tensor:
    """Tokens whose codes are their own values: integers with an absmax of 127, so the scale is 1."""
    x = torch.randint(-127, 128, (M, K)).float()
    x[torch.arange(M), torch.randint(K, (M,))] = 127 - 254 * torch.randint(2, (M,)).float()
    return x


def assert_exact(x: Tensor, codes: Tensor, codec: str, tokens: list[int]) -> None:
    """The sums of the first M tokens with the codes are the reference's, for every M."""
    lines = lines_of(codes, codec)
    expected = reference.integer_matmul(x.to(torch.int8), codes, bits=BITS[codec])
    for M in tokens:
        y = cpu.integer_matmul(x[:M], lines)
        assert torch.equal(y, expected[:M]), f"{codec}, N {codes.shape[0]}, K {codes.shape[1]}, {M} tokens"


# Integer sums

SHAPES = [
    (1, 1), (17, 1), (33, 2), (5, 3), (16, 4), (16, 5), (31, 15), (32, 16), (33, 17), (1, 19), (48, 20), (18, 21),
    (70, 31), (64, 32), (65, 33), (47, 39), (7, 63), (40, 64), (33, 65), (17, 79), (16, 80), (31, 81), (1, 127),
    (33, 128), (50, 129), (100, 200), (17, 255), (32, 256), (9, 257), (31, 319), (33, 321),
]  # fmt: skip


# Up to 4 and 8 tokens may take lines as they come; where tiles end: 12 and 6 tokens for vectors, 16 and 32 for AMX.
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100]


@pytest.mark.parametrize("codec", BITS)
def test_integer_sums_are_exact(isa: str, codec: str) -> None:
    for N, K in SHAPES:
        assert_exact(integer_tokens(100, K), random_codes(N, K, BITS[codec]), codec, TOKENS)


@pytest.mark.parametrize("codec", BITS)
def test_long_rows_are_exact(isa: str, codec: str) -> None:
    # AMX takes a panel in slices of 768 columns.
    for N, K in [(16, 767), (33, 768), (17, 769), (5, 1537), (16, 6912)]:
        assert_exact(integer_tokens(33, K), random_codes(N, K, BITS[codec]), codec, [1, 2, 17, 33])


@pytest.mark.parametrize(
    ("codec", "K"),
    [
        ("base3", 6912), ("base3", 32765), ("base3", 32767), ("two_bit", 6912), ("two_bit", 40000), ("four_bit", 6912),
        ("four_bit", 40000), ("eight_bit", 6912),
        ("eight_bit", 66400),  # the sum of unsigned codes passes 2^31 here and comes back
    ],
)  # fmt: skip
def test_sums_of_extreme_codes(isa: str, codec: str, K: int) -> None:
    low, high = LIMITS[BITS[codec]]
    x = torch.full((33, K), 127.0)
    x[1] = -127
    x[2, ::2] = -127
    x[3, K // 2 :] = -127
    codes = torch.full((16, K), high, dtype=torch.int8)
    codes[1], codes[2], codes[3, ::2], codes[4, K // 3 :] = low, 0, low, low
    assert_exact(x, codes, codec, [1, 2, 4, 33])
    assert_exact(x[1:3], codes, codec, [1, 2])


@pytest.mark.parametrize("codec", BITS)
def test_rows_and_tokens_of_zeros(isa: str, codec: str) -> None:
    codes = random_codes(20, 150, BITS[codec])
    codes[[0, 15, 16, 19]] = 0
    x = integer_tokens(20, 150)
    x[[0, 7, 19]] = 0
    assert_exact(x, codes, codec, [1, 2, 20])
    assert not cpu.integer_matmul(x, lines_of(codes, codec))[:, [0, 15, 16, 19]].any()


@pytest.mark.parametrize("codec", BITS)
def test_a_product_writes_its_rows_and_columns_and_nothing_else(isa: str, codec: str) -> None:
    store, add, int32 = 0, 1, 4  # layout.h
    for N, M in itertools.product((1, 15, 16, 17, 33), (1, 3, 13, 33)):
        codes, x = random_codes(N, 70, BITS[codec]), integer_tokens(M, 70)
        lines, expected = lines_of(codes, codec), reference.integer_matmul(x.to(torch.int8), codes)
        for out, dtype in ((int32, torch.int32), (store, torch.float32), (add, torch.float32)):
            memory = torch.full((M + 1, N + 40), 77, dtype=dtype)
            y = memory[:M, 3 : N + 3]
            cpu._matmul(lines, *cpu._quantize(x), M, None, y, out)
            assert torch.equal(y, (expected + 77 * (out == add)).to(dtype)), (N, M, out)
            y.fill_(77)
            assert (memory == 77).all(), (N, M, out)


# Activations

# Zeros, a denormal, far below the least absmax of 1e-5, around it, and up to the largest float.
SPECIAL = [0.0, -0.0, 1e-42, 1e-20, 1e-7, 9.9e-6, 1e-5, 1.01e-5, 1e-3, 1e3, 1e20, 3.4e38]


def test_quantized_activations_are_the_references(isa: str) -> None:
    special = torch.tensor(SPECIAL).view(-1, 1)
    for K in (1, 3, 15, 16, 17, 64, 127, 128, 129, 257, 1000):
        x = torch.cat([torch.randn(20, K), (2 * torch.rand(len(SPECIAL), K) - 1) * special, special.expand(-1, K)])
        before = x.clone()
        codes, scale = cpu.quantize_activations(x)
        expected_codes, expected_scale = reference.quantize_activations(x)
        assert torch.equal(codes, expected_codes), K
        assert torch.equal(scale, expected_scale), K
        assert torch.equal(x, before)
        padded, _, total = cpu._quantize(x)
        assert torch.equal(total.long(), expected_codes.long().sum(1)), K
        assert padded.stride(0) >= K + 20
        assert not padded[:, K:].any(), K  # what a product reads past the end


def test_ties_go_to_the_even_code(isa: str) -> None:
    x = torch.arange(-127, 127.5, 0.5)
    x = x[torch.randperm(len(x))].expand(3, -1)  # scale 1, so every other value is a tie
    codes, scale = cpu.quantize_activations(x)
    assert (scale == 1).all()
    assert codes[0].tolist() == [round(v) for v in x[0].tolist()]  # Python rounds half to even, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shapes_and_dtypes_of_quantized_activations(isa: str, dtype: torch.dtype) -> None:
    for shape in [(5,), (2, 3, 5), (0, 5), (2, 0, 5), (1, 1, 5)]:
        x = torch.randn(shape).to(dtype)
        for ours, theirs in zip(cpu.quantize_activations(x), reference.quantize_activations(x), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_shows_in_its_token_only(isa: str, bad: float) -> None:
    for M in (1, 2, 13, 40):
        x, packed, scale, bias = operands((M,), 37, 150, "ternary")
        clean, _ = both(x, packed, scale, bias, 2)
        for position in (0, 15, 149):
            hit = M // 2
            x_bad = x.clone()
            x_bad[hit, position] = bad
            y, _ = both(x_bad, packed, scale, bias, 2)
            assert y[hit].isnan().all()
            others = [m for m in range(M) if m != hit]
            assert torch.equal(y[others], clean[others])


# The packed product


@pytest.mark.parametrize("quantizer", ONE_SCALE)
def test_packed_linear_is_the_reference_bit_for_bit(isa: str, quantizer: str) -> None:
    leading = [(), (1,), (5,), (2, 3), (13,), (33,), (2, 0), (0,)]
    for shape, (N, K) in itertools.product(leading, [(1, 1), (37, 129), (48, 250)]):
        x, packed, scale, bias = operands(shape, N, K, quantizer)
        inputs = [x, packed, scale, bias]
        before = [tensor.clone() for tensor in inputs]
        for added in (bias, None):
            y, expected = both(x, packed, scale, added, kernels.PACKED_BITS[quantizer])
            assert y.shape == (*shape, N)
            assert y.dtype == torch.float32
            assert torch.equal(y, expected), (shape, N, K)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("quantizer", ONE_SCALE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_packed_linear_of_other_dtypes(isa: str, quantizer: str, dtype: torch.dtype) -> None:
    x, packed, scale, bias = operands((2, 3), 21, 70, quantizer)
    for given in (bias, bias.to(dtype)):
        y, expected = both(x.to(dtype), packed, scale, given, kernels.PACKED_BITS[quantizer])
        assert y.dtype == dtype
        assert torch.equal(y, expected)


def test_a_scale_for_every_row(isa: str) -> None:
    # Also for two-bit codes, whose quantizers give one for the matrix.
    for bits in LIMITS:
        scale = torch.rand(35, 1) + 0.1
        packed = pack_codes(random_codes(35, 90, bits), bits)
        for M in (1, 4):
            y, expected = both(torch.randn(M, 90), packed, scale, None, bits)
            assert torch.equal(y, expected)


def test_non_contiguous_operands(isa: str) -> None:
    x, packed, scale, bias = operands((3, 5), 21, 70, "ternary")
    strided = torch.randn(4, 140)[:, ::2]
    wide = torch.zeros(21, 2 * packed.shape[1], dtype=torch.uint8)
    wide[:, ::2] = packed
    for tokens in (x.transpose(0, 1), strided, x[:, 1], x[0, :1].expand(6, 70)):
        for weights in (packed, wide[:, ::2]):
            for added in (bias, torch.stack([bias, bias], 1)[:, 0]):
                y, expected = both(tokens, weights, scale, added, 2)
                assert torch.equal(y, expected)


def test_no_gradient_flows_through_the_product(isa: str) -> None:
    x, packed, scale, bias = operands((2,), 6, 64, "ternary")
    y, expected = both(x.requires_grad_(), packed, scale, bias.requires_grad_(), 2)
    assert torch.equal(y, expected)
    assert not y.requires_grad


def test_inside_autocast_and_inference_mode(isa: str) -> None:
    x, packed, scale, bias = operands((4,), 6, 200, "ternary")
    _, expected = both(x, packed, scale, bias, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cpu.packed_linear(x, packed, scale, bias, bits=2, in_features=200), expected)
    with torch.inference_mode():
        assert torch.equal(cpu.packed_linear(x, packed.clone(), scale, bias, bits=2, in_features=200), expected)


def test_more_columns_than_base3_can_sum(isa: str) -> None:
    x, packed, scale, bias = operands((2,), 16, 40000, "binary")
    y, expected = both(x, packed, scale, bias, 2)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("codec", BITS)
def test_the_number_of_threads_changes_nothing(isa: str, codec: str, set_threads: None) -> None:
    for N, K, M in [(1040, 512, 1), (70, 300, 33)]:
        assert N * K * M >= cpu._PARALLEL_FROM  # else one thread does it all
        x, codes = integer_tokens(M, K), random_codes(N, K, BITS[codec])
        lines, expected = lines_of(codes, codec), reference.integer_matmul(x.to(torch.int8), codes)
        for count in (1, 2, 3, 4):  # with 4, a thread has no panel of the 3
            torch.set_num_threads(count)
            assert torch.equal(cpu.integer_matmul(x, lines), expected), (N, count)
            assert torch.equal(lines_of(codes, codec).memory, lines.memory), (N, count)


def test_activations_shared_by_threads(isa: str, set_threads: None) -> None:
    x = torch.randn(37, 14500)
    assert x.numel() >= cpu._PARALLEL_FROM
    expected = reference.quantize_activations(x)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        codes, scale = cpu.quantize_activations(x)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])


X, SCALE = torch.ones(2, 400), torch.ones(1, 1)
PACKED = pack_codes(torch.zeros(5, 400, dtype=torch.int8), 2)


@needs_library
@pytest.mark.parametrize(
    ("x", "packed", "scale", "bias"),
    [
        pytest.param(X[:, :-1], PACKED, SCALE, None, id="x of another width"),
        pytest.param(X.int(), PACKED, SCALE, None, id="integer x"),
        pytest.param(X, PACKED[:, :64], SCALE, None, id="packed of another width"),
        pytest.param(X, PACKED.to(torch.int16), SCALE, None, id="packed of another dtype"),
        pytest.param(X, PACKED[0], SCALE, None, id="packed of another rank"),
        pytest.param(X, PACKED.to("meta"), SCALE, None, id="packed without memory"),
        pytest.param(X, PACKED, SCALE.expand(3, 1), None, id="scale of another length"),
        pytest.param(X, PACKED, SCALE, torch.ones(3), id="bias of another length"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"x is|packed|scale|bias"):
        cpu.packed_linear(x, packed, scale, bias, bits=2, in_features=400)
