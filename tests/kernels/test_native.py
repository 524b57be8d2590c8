"""The native CPU kernels on every instruction set of this machine: the reference's results, bit for bit."""

import ctypes
import gc
import importlib.machinery
import itertools
import platform
import re
import runpy
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
import torch
from torch import Tensor

from bitnet import kernels
from bitnet.kernels import cpu, reference
from bitnet.kernels.cpu import native
from bitnet.model.linear import PackedLinear
from bitnet.quant import pack_codes
from tests import ROOT

pytestmark = pytest.mark.usefixtures("poisoned_memory")

COMPILERS = ["c++", "g++", "clang++"]
NOT_BUILT = "the native kernels were not built; install with a C++ compiler"
ISAS = native.instruction_sets() or [pytest.param("none", marks=pytest.mark.skip(reason=NOT_BUILT))]
BITS = {"base3": 2, "two_bit": 2, "four_bit": 4, "eight_bit": 8}
LIMITS = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}
needs_library = pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT)


# Known bugs; take the mark away with the bug.


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_instruction_set(request.param):
        yield request.param


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the library were not there."""
    remembered = (native._tables, kernels.native_available)
    monkeypatch.setattr(native, "library", lambda: None)
    for function in remembered:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


def random_codes(N: int, K: int, bits: int) -> Tensor:
    low, high = LIMITS[bits]
    return torch.randint(low, high + 1, (N, K), dtype=torch.int8)


def integer_tokens(M: int, K: int) -> Tensor:
    """Tokens whose codes are their own values: integers with an absmax of 127, so the scale is 1."""
    x = torch.randint(-127, 128, (M, K)).float()
    x[torch.arange(M), torch.randint(K, (M,))] = 127 - 254 * torch.randint(2, (M,)).float()
    return x


def lines_of(codes: Tensor, codec: str, scale: Tensor | None = None) -> native.Lines:
    lines = native.Lines(*codes.shape, codec)
    lines.fill(pack_codes(codes, BITS[codec]), torch.ones(1, 1) if scale is None else scale, BITS[codec])
    return lines


def assert_exact(x: Tensor, codes: Tensor, codec: str, tokens: list[int]) -> None:
    """The sums of the first M tokens with the codes are the reference's, for every M."""
    lines = lines_of(codes, codec)
    expected = reference.integer_matmul(x.to(torch.int8), codes, bits=BITS[codec])
    for M in tokens:
        y = cpu.integer_matmul(x[:M], lines)
        assert torch.equal(y, expected[:M]), f"{codec}, N {codes.shape[0]}, K {codes.shape[1]}, {M} tokens"


def operands(shape: tuple[int, ...], N: int, K: int, quantizer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the packed weight, its scale and a bias."""
    codes, scale = kernels.quantize_weight(torch.randn(N, K), quantizer)
    return torch.randn(*shape, K), pack_codes(codes, kernels.PACKED_BITS[quantizer]), scale, torch.randn(N)


def both(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """The product on the native kernels and on the reference."""
    options = {"bits": bits, "in_features": x.shape[-1]}
    return cpu.packed_linear(x, packed, scale, bias, **options), reference.packed_linear(
        x, packed, scale, bias, **options
    )


# Integer sums

SHAPES = [
    (1, 1), (17, 1), (33, 2), (5, 3), (16, 4), (16, 5), (31, 15), (32, 16), (33, 17), (1, 19), (48, 20), (18, 21),
    (70, 31), (64, 32), (65, 33), (47, 39), (7, 63), (40, 64), (33, 65), (17, 79), (16, 80), (31, 81), (1, 127),
    (33, 128), (50, 129), (100, 200), (17, 255), (32, 256), (9, 257), (31, 319), (33, 321),
]  # fmt: skip


# Where tiles end: 12 and 6 tokens for vectors, 16 and 32 for AMX.
TOKENS = [1, 2, 3, 5, 11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100]


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
    assert_exact(x, codes, codec, [1, 2, 33])
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


@pytest.mark.parametrize("quantizer", kernels.PACKED_BITS)
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


@pytest.mark.parametrize("quantizer", kernels.PACKED_BITS)
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


# The run-time layout and its cache


def decode(lines: native.Lines) -> tuple[Tensor, Tensor]:
    """Unsigned codes `[rows padded to 32, columns padded]` of the lines by the drawing in layout.h, and the bytes
    `[blocks, lines, 16, 4]`."""
    data = lines.memory.view(lines.struct.N // 16, lines.struct.lines_per_block, 16, 4)
    value = data.int()
    if lines.codec == "base3":
        parts = []
        for _ in range(5):
            following = 3 * value % 256
            parts.append((3 * value - following) // 256)
            value = following
    elif lines.codec == "two_bit":
        parts = [value >> shift & 3 for shift in (0, 2, 4, 6)]
    elif lines.codec == "four_bit":
        parts = [value & 15, value >> 4]
    else:
        parts = [value]
    c = torch.stack(parts)  # [i, block, l, row, j]; column (l * parts + i) * 4 + j
    return c.permute(1, 3, 2, 0, 4).reshape(lines.struct.N, -1), data


@needs_library
@pytest.mark.parametrize("codec", BITS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 20), (17, 21), (33, 129), (64, 256), (40, 67)])
def test_lines_are_the_drawing_of_layout_h(codec: str, N: int, K: int) -> None:
    codes = random_codes(N, K, BITS[codec])
    lines = lines_of(codes, codec)
    unsigned, data = decode(lines)
    assert lines.struct.N == -(-N // 32) * 32
    assert lines.struct.K == K
    columns = {"base3": 20, "two_bit": 16, "four_bit": 8, "eight_bit": 4}[codec]
    assert lines.struct.lines_per_block == -(-K // columns)
    assert lines.memory.nbytes == native.Lines.size(N, K, codec) == lines.struct.N * -(-K // columns) * 4
    assert torch.equal(unsigned[:N, :K], codes.int() - LIMITS[BITS[codec]][0])
    if codec == "base3":
        c = unsigned.view(-1, 16, data.shape[1], 5, 4).permute(0, 2, 1, 4, 3).double()  # [block, l, row, j, i]
        fraction = 256 / 243 * (c @ torch.tensor([81.0, 27.0, 9.0, 3.0, 1.0], dtype=torch.float64))
        rows = torch.arange(lines.struct.N).view(-1, 1, 16, 1).expand(data.shape) < N
        assert torch.equal(data[rows].double(), (fraction - 1e-9).ceil()[rows])


@needs_library
def test_base3_holds_every_group_of_five() -> None:
    digits = torch.cartesian_prod(*[torch.arange(3)] * 5)  # [243, 5]
    codes = torch.zeros(243, 20, dtype=torch.int8)
    codes[:, ::4] = digits - 1  # the codes of byte 0
    lines = lines_of(codes, "base3")
    unsigned, data = decode(lines)
    assert torch.equal(unsigned[:243, ::4], digits.int())
    assert data[:, 0, :, 0].flatten()[:243].unique().numel() == 243


@needs_library
@pytest.mark.parametrize("codec", BITS)
def test_parts_of_one_matrix_take_turns(codec: str) -> None:
    # As gate and up lie in the engine: row n of a part is at + n // 16 * step * 16 + n % 16.
    bits, N, K = BITS[codec], 40, 50
    parts, scales = [random_codes(N, K, bits) for _ in range(2)], [torch.rand(N, 1), torch.rand(1, 1)]
    lines = native.Lines(2 * 48, K, codec)
    for turn, (codes, scale) in enumerate(zip(parts, scales, strict=True)):
        lines.fill(pack_codes(codes, bits), scale, bits, at=16 * turn, step=2)
    unsigned, _ = decode(lines)
    for turn, (codes, scale) in enumerate(zip(parts, scales, strict=True)):
        places = torch.tensor([16 * turn + n // 16 * 32 + n % 16 for n in range(N)])
        assert torch.equal(unsigned[places, :K], codes.int() - LIMITS[bits][0])
        assert torch.equal(lines.scale[places], scale.expand(N, 1).flatten())
    assert int((lines.scale == 0).sum()) == 16  # rows that no part has


@needs_library
def test_lines_in_given_memory() -> None:
    codes = random_codes(20, 50, 2)
    arena = torch.full((native.Lines.size(20, 50, "two_bit") + 64,), 9, dtype=torch.uint8)
    lines = native.Lines(20, 50, "two_bit", arena[:-64])
    lines.fill(pack_codes(codes, 2), torch.ones(1, 1), 2)
    assert torch.equal(decode(lines)[0][:20, :50], codes.int() + 1)
    assert (arena[-64:] == 9).all()
    for wrong in (arena, arena[:-64].view(torch.int8), arena[:-65]):
        with pytest.raises(ValueError, match="contiguous bytes"):
            native.Lines(20, 50, "two_bit", wrong)
    with pytest.raises(ValueError, match="32768 columns are too many for base3"):
        native.Lines(16, 32768, "base3")


@needs_library
def test_the_layout_of_ternary_codes_is_the_instruction_sets(isa: str) -> None:
    names = {number: name for name, number in native.CODECS.items()}
    assert native.codec_of(2, 32767) == names[native.kernels().codec]
    assert native.codec_of(2, 32768) == "two_bit"


def layer_of(quantizer: str) -> PackedLinear:
    return PackedLinear.from_linear(torch.nn.Linear(70, 21), quantizer)


@pytest.mark.parametrize("quantizer", kernels.PACKED_BITS)
def test_weights_that_change_in_place_are_noticed(isa: str, quantizer: str) -> None:
    layer, other, x = layer_of(quantizer), layer_of(quantizer), torch.randn(3, 70)
    with kernels.use_backend("native"):
        first = layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        assert not torch.equal(layer(x), first)
        layer.packed_weight.zero_()
        layer.packed_weight += layer_of(quantizer).packed_weight
        changed = layer(x)
    with kernels.use_backend("reference"):
        assert torch.equal(layer(x), changed)


@needs_library
def test_a_scale_that_changes_is_noticed() -> None:
    layer, x = layer_of("ternary"), torch.randn(3, 70)
    layer.bias = None
    with kernels.use_backend("native"):
        first = layer(x)
        layer.weight_scale.mul_(2)
        assert torch.equal(layer(x), 2 * first)
    x, packed, scale, _ = operands((2,), 21, 70, "int8")
    for factor in (1, 4, 0.5):
        y, expected = both(x, packed, factor * scale, None, 8)
        assert torch.equal(y, expected)


@needs_library
def test_layouts_die_with_their_tensors() -> None:
    gc.collect()
    before = len(cpu._lines)
    layers = [layer_of("ternary") for _ in range(5)]
    x = torch.randn(1, 70)
    with kernels.use_backend("native"):
        for layer in layers:
            layer(x)
            layer.packed_weight.add_(0)  # another version: laid out again, in the same entry
            layer(x)
        assert len(cpu._lines) == before + 5
        del layers[1:], layer
        gc.collect()
        assert len(cpu._lines) == before + 1
        layers[0](x)
        assert len(cpu._lines) == before + 1
    layers.clear()
    gc.collect()
    assert len(cpu._lines) == before


@needs_library
def test_tensors_do_not_mix() -> None:
    # One after the other, so that the allocator and id() may hand out the same places again; and two at once.
    x = torch.randn(2, 70)
    kept = []
    for turn in range(30):
        layer = layer_of(("ternary", "binary", "int4", "int8")[turn % 4])
        kept = [*kept[-2:], layer]
        for each in kept:
            with kernels.use_backend("native"):
                y = each(x)
            with kernels.use_backend("reference"):
                assert torch.equal(y, each(x))
        del layer, each


@needs_library
def test_one_tensor_under_several_instruction_sets_and_widths() -> None:
    packed, scale = pack_codes(random_codes(21, 100, 2), 2), torch.ones(1, 1)
    for K in (100, 128, 97):
        x = torch.randn(3, K)
        for name in [*native.instruction_sets(), *native.instruction_sets()]:
            with native.use_instruction_set(name):
                y, expected = both(x, packed, scale, None, 2)
                assert torch.equal(y, expected), (name, K)


# The choice of backend and instruction set


@needs_library
def test_backends_by_name() -> None:
    x = torch.randn(2, 8)
    assert kernels.BACKENDS["native"] is cpu
    with kernels.use_backend("auto"):
        assert kernels.select_backend(x) is cpu
        assert kernels.native_wanted(torch.device("cpu"))
        assert not kernels.native_wanted(torch.device("meta"))
        assert kernels.select_backend(x.to("meta")) is reference
    with kernels.use_backend("native"):
        assert kernels.select_backend(x) is cpu
        with pytest.raises(ValueError, match="runs on the CPU and the activations are on meta"):
            kernels.select_backend(x.to("meta"))
    with kernels.use_backend("reference"):
        assert kernels.select_backend(x) is reference
        assert not kernels.native_wanted(torch.device("cpu"))
    with kernels.use_backend("cuda9"), pytest.raises(ValueError, match=r"'cuda9'.*auto or one of reference, native"):
        kernels.select_backend(x)


def test_both_backends_have_the_references_functions() -> None:
    for name in ("quantize_activations", "quantize_weight", "packed_linear", "fake_quant_linear"):
        assert all(callable(getattr(backend, name)) for backend in kernels.BACKENDS.values()), name


@needs_library
def test_what_dynamo_traces_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    with kernels.use_backend("auto"):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert kernels.select_backend(x) is reference
        monkeypatch.undo()
        assert kernels.select_backend(x) is cpu


@needs_library
def test_unknown_instruction_sets_are_refused_with_the_list() -> None:
    before = native.kernels().name
    listed = ", ".join(native.instruction_sets())
    with (
        pytest.raises(ValueError, match=rf"'pentium' is not here; choose auto or one of {listed}"),
        native.use_instruction_set("pentium"),
    ):
        pass
    assert native.kernels().name == before
    for name in native.instruction_sets():
        with native.use_instruction_set(name):
            assert native.kernels().name.decode() == name
            with native.use_instruction_set("auto"):
                assert native.kernels().name.decode() == native.instruction_sets()[0]
            assert native.kernels().name.decode() == name


@needs_library
def test_environment_variables_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_CPU_ISA", "pentium")
    monkeypatch.setenv("BITNET_BACKEND", "cuda9")
    fresh = runpy.run_path(native.__file__)  # the modules as a new process would see them
    with pytest.raises(ValueError, match=r"'pentium' is not here; choose auto or one of .*scalar"):
        fresh["kernels"]()
    with pytest.raises(ValueError, match="backend 'cuda9' is not available"):
        runpy.run_path(kernels.__file__)["select_backend"](torch.ones(1))
    monkeypatch.setenv("BITNET_CPU_ISA", "scalar")
    monkeypatch.setenv("BITNET_BACKEND", "native")
    assert runpy.run_path(native.__file__)["kernels"]().name == b"scalar"
    assert runpy.run_path(kernels.__file__)["select_backend"](torch.ones(1)) is cpu


def test_without_the_library_the_automatic_choice_warns_once(not_built: None) -> None:
    x, packed, scale, bias = operands((3,), 6, 40, "ternary")
    expected = reference.packed_linear(x, packed, scale, bias, bits=2, in_features=40)
    with kernels.use_backend("auto"):
        with pytest.warns(RuntimeWarning, match="native CPU kernels were not built.*pip install -e") as caught:
            y = kernels.packed_linear(x, packed, scale, bias, bits=2, in_features=40)
        assert len(caught) == 1
        assert torch.equal(y, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(kernels.packed_linear(x, packed, scale, bias, bits=2, in_features=40), expected)
            assert not kernels.native_wanted(torch.device("cpu"))


def test_without_the_library_an_explicit_request_raises(not_built: None) -> None:
    x, packed, scale, bias = operands((3,), 6, 40, "ternary")
    assert native.instruction_sets() == []
    assert not cpu.available()
    with kernels.use_backend("native"):
        with pytest.raises(ValueError, match="were not built; install with a C\\+\\+ compiler, or use the reference"):
            kernels.packed_linear(x, packed, scale, bias, bits=2, in_features=40)
        with pytest.raises(ValueError, match="were not built"):
            kernels.native_wanted(torch.device("cpu"))


def test_a_file_that_is_no_library_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.library.__wrapped__() is None
    (tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"nonsense")
    assert native.library.__wrapped__() is None


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("Cache", (ctypes.Structure,), {"_fields_": [("keys", ctypes.c_void_p)]})
    monkeypatch.setattr(native, "Cache", other)
    with pytest.raises(RuntimeError, match=r"other sources.*Cache differs.*pip install -e"):
        native.library.__wrapped__()


# The build


def test_the_extension_is_built_where_there_is_a_compiler() -> None:
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler here, and the package does without")
    assert native.library() is not None, "the native kernels were not built; run: pip install -e ."
    assert cpu.available()
    assert native.instruction_sets()[-1] == "scalar"
    assert len(set(native.instruction_sets())) == len(native.instruction_sets())


@needs_library
def test_every_instruction_set_of_the_processor_is_used() -> None:
    if platform.machine() in ("aarch64", "arm64"):
        assert native.instruction_sets() == ["neon", "scalar"]
        return
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        pytest.skip(f"cannot tell what a {platform.machine()} under {platform.system()} has")
    flags = set(re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE)[1].split())
    asks = {
        "amx": {"amx_tile", "amx_int8", "avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_vnni": {"avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx_vnni": {"avx_vnni", "avx2", "fma", "f16c"},
        "avx2": {"avx2", "fma", "f16c"},
        "scalar": set(),
    }
    assert native.instruction_sets() == [name for name, needed in asks.items() if needed <= flags]


def test_the_neon_source_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    flags = [*build["FLAGS"], *build["INSTRUCTION_SETS"]["aarch64"]["neon"], "-fsyntax-only"]
    probe = tmp_path / "probe.cpp"
    probe.write_text(
        "#include <arm_neon.h>\n#include <atomic>\n#include <math.h>\n#include <stdlib.h>\nint main() {}\n"
    )
    for command in (["aarch64-linux-gnu-g++"], ["clang++", "--target=aarch64-linux-gnu"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, *flags, str(probe)], capture_output=True).returncode == 0:
            done = subprocess.run(
                [*command, *flags, f"{build['FOLDER']}/isa_neon.cpp"], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            return
    pytest.skip("isa_neon.cpp was not checked: no aarch64-linux-gnu-g++, and no clang++ with headers for aarch64")
