"""The native kernels' layout of packed weights, and its cache."""

import gc

import pytest
import torch
from torch import Tensor

from bitnet import kernels
from bitnet.kernels import cpu
from bitnet.kernels.cpu import native
from bitnet.model.linear import PackedLinear
from bitnet.quant import pack_codes
from tests.kernels.builders import BITS, LIMITS, both, lines_of, needs_library, operands, random_codes

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
        expected = layer(x)
    if quantizer in kernels.GROUP_SIZES:  # whose sums are of floats
        torch.testing.assert_close(changed, expected)
    else:
        assert torch.equal(changed, expected)


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


@needs_library
@pytest.mark.parametrize("codec", ["base3", "two_bit"])
@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_no_code_is_refused(codec: str, bits: int) -> None:
    packed = pack_codes(random_codes(33, 150, bits), bits)
    match = "holds codes of 2 bits, and these have 4"
    if bits == 2:
        packed[32, 40] |= 3 << 4  # the last row, and in its padding
        match = "pattern 3, which is no ternary code; the file is damaged"
    with pytest.raises(ValueError, match=match):
        native.Lines(33, 150, codec).fill(packed, torch.ones(1, 1), bits)


def test_the_same_of_a_state_dict() -> None:
    layer = layer_of("ternary")
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["packed_weight"][3, 7] |= 3 << 2
    with pytest.raises(RuntimeError, match="pattern 3, which is no ternary code"):
        layer.load_state_dict(state)
    wrong = layer.state_dict() | {"packed_weight": layer.packed_weight.to(torch.int16)}
    with pytest.raises(RuntimeError, match=r"packed_weight is torch\.int16 and must be torch\.uint8"):
        layer.load_state_dict(wrong, assign=True)
