"""The GGUF block formats: ggml's bytes, the better search, torch against native code, mixtures against llama.cpp."""

import functools

import pytest
import torch
from torch import Tensor

from bitnet.kernels import blocks, use_backend
from bitnet.kernels.cpu import blocks as native_blocks
from bitnet.kernels.cpu import native
from bitnet.quant.blocks import (
    READ_ONLY,
    TYPES,
    dequantize_blocks,
    ggml_search,
    iquants,
    kquants,
    levels,
    quantize_blocks,
    simple,
    ternary,
)
from tests import oracles
from tests.oracles import ggml
from tests.quant.builders import noise, weights_for

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KINDS = list(TYPES)
FAMILY = {kind: family for family in (simple, kquants, levels, iquants, ternary) for kind in family.BITS}
GGUF_KINDS = [kind for kind in ggml.KINDS if kind not in ggml.NEWER] + list(READ_ONLY)
TERNARY = ("TQ1_0", "TQ2_0", "Q2_0", "PQ2_0")
BUILT = native_blocks.available()


# One instruction set for each build of blocks.cpp.
ISAS = [name for name in ("avx512_vnni", "avx2", "neon", "scalar") if name in native.instruction_sets() and BUILT]
needs_native = pytest.mark.skipif(not BUILT, reason="the native kernels were not built; install with a C++ compiler")
K, ROWS = 512, 3


def cases(seed: int = 0, columns: int = K) -> dict[str, Tensor]:
    """Rows of every sort, three of each."""
    x = noise(ROWS, columns, seed)
    place = torch.arange(columns)
    return {
        "gaussian": 0.02 * x,
        "heavy tails": 0.01 * x / noise(ROWS, columns, seed + 1).abs().clamp(min=1e-3),
        "wild": (x**5 * (1 + 99 * (place % 3 == 0))).clamp(-6e4, 6e4),
        "constant": torch.full((ROWS, columns), 0.37) * torch.tensor([[1.0], [-1.0], [1e-3]]),
        "zero": torch.zeros(ROWS, columns),
        "minus zero": -torch.zeros(ROWS, columns),
        "one value": torch.where(place == 5, 3.0, 0.0).repeat(ROWS, 1),
        "outlier": torch.where(place == 7, 50.0, 1e-3 * x),
        "denormal": 1e-40 * x,
        "inverse overflows": 1e-39 * x,
        "nearly denormal": 3e-38 * x,
        "float16 denormal": 1e-7 * x,
        "tiny": 1e-14 * x,
        "counts as zero": 1e-16 * x,
        "half zero": torch.where(place < columns // 2, 0.0, x),
        "positive": x.abs(),
        "negative": -x.abs(),
        "integers": (3 * x).round(),
        "ternary": x.sign() * (x.abs() > 0.5) * 0.7,
        "large": (1e4 * x).clamp(-65504, 65504),
        "rows apart": x * torch.tensor([[1e-8], [1e-3], [1e3]]),
        "columns apart": x * torch.logspace(-8, 3, columns),
    }


def importances(seed: int = 7, columns: int = K) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    even = torch.rand(columns, generator=generator)
    return {
        "none": None,
        "even": even,
        "heavy": torch.randn(columns, generator=generator) ** 4,
        "half of it 0": torch.where(torch.rand(columns, generator=generator) < 0.5, 0.0, even),
        "zero": torch.zeros(columns),
    }


def all_rows(seed: int = 0, columns: int = K) -> Tensor:
    return torch.cat(list(cases(seed, columns).values()))


def rows_for(kind: str) -> Tensor:
    """Rows that torch quantizes soon: for the types that look every vector up a block of each sort, two in a row."""
    return all_rows(columns=K // 2)[::ROWS].reshape(-1, K) if kind in iquants.BITS else all_rows()


D_AT = {
    "Q2_K": 80,
    "Q3_K": 108,
    "Q6_K": 208,
    "TQ1_0": 52,
    "TQ2_0": 64,
}  # byte of d in a block; 0 in the others


def random_bytes(kind: str, rows: int = 64, columns: int = K) -> Tensor:
    """Random blocks; d is infinite, NaN, denormal and 0 in some."""
    generator = torch.Generator().manual_seed(3)
    found = READ_ONLY.get(kind) or TYPES[kind]
    width = columns // found.block_size * found.bytes
    data = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 2.0**-24, 0.0, -0.0]).half()
    if kind == "IQ1_M":  # which has a nibble of d in the upper half of every second byte of the last eight
        bits = special.view(torch.int16).int().view(-1, 1) >> torch.tensor([0, 4, 8, 12]) & 15
        data[: len(special), 49:56:2] = (data[: len(special), 49:56:2] & 15) | (bits << 4).to(torch.uint8)
    else:
        data[: len(special), D_AT.get(kind, 0) :][:, :2] = special.view(torch.uint8).view(-1, 2)
    return data


def differing_rows(a: Tensor, b: Tensor) -> list[str]:
    """Names of the cases whose bytes differ."""
    kinds = list(cases())
    names = [name for name in kinds for _ in range(len(a) // len(kinds))]
    names = names or [f"{left} or {right}" for left, right in zip(kinds[::2], kinds[1::2], strict=True)]
    return [name for name, same in zip(names, (a == b).all(dim=1).tolist(), strict=True) if not same]


def errors(x: Tensor, data: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of each block, float64 `[N, blocks]`."""
    weight = torch.ones(x.shape[1]) if importance is None else importance
    difference = dequantize_blocks(data, kind).double() - x.double()
    return (difference**2 * weight.double()).view(len(x), -1, TYPES[kind].block_size).sum(dim=2)


# ggml


def same_floats(a: Tensor, b: Tensor) -> bool:
    """Equal bits, of NaN only that it is NaN: its sign depends on the order of the operands."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("kind", ggml.KINDS)
def test_dequantizers_give_ggml_s_floats(kind):
    data = random_bytes(kind)
    ours = dequantize_blocks(data, kind)
    assert ours.isnan().any()
    assert ours.isinf().any()
    assert same_floats(ours, ggml.dequantize(data, kind))


@pytest.mark.parametrize("kind", READ_ONLY)
def test_four_bit_floats_are_read_as_ggml_does(kind):
    """Every exponent and every scale, beside every code, on both paths."""
    found = READ_ONLY[kind]
    data = torch.randint(0, 256, (256, found.bytes), dtype=torch.uint8)
    data[:, : 1 if kind == "MXFP4" else 4] = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    expected = ggml.dequantize(data, kind)
    assert same_floats(dequantize_blocks(data, kind), expected)
    assert same_floats(blocks.dequantize(data, kind), expected)
    with pytest.raises(ValueError, match=f"block type '{kind}' is unknown"):
        blocks.quantize(torch.zeros(2, 64), kind)


def test_prism_s_blocks_are_pairs_of_ggml_s():
    """PQ2_0 is Q2_0 with one scale for two blocks: of rows whose pairs have one largest weight ggml gives its bytes."""
    x = all_rows().view(-1, 2, 64)
    x[:, :, 0] = x.abs().amax(dim=(1, 2)).unsqueeze(1)
    x = x.view(-1, K)
    ours = blocks.quantize(x, "PQ2_0", compatible=True).view(-1, 34)
    theirs = ggml.quantize(x, "Q2_0", None).view(-1, 2, 18)
    assert torch.equal(theirs[:, 0, :2], theirs[:, 1, :2])
    assert torch.equal(ours, torch.cat([theirs[:, 0], theirs[:, 1, 2:]], dim=1))
    data = random_bytes("PQ2_0").view(-1, 34)
    pairs = torch.cat([data[:, :18], data[:, :2], data[:, 18:]], dim=1)
    assert same_floats(dequantize_blocks(data, "PQ2_0"), ggml.dequantize(pairs, "Q2_0"))


@pytest.mark.parametrize("kind", GGUF_KINDS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_dequantizers_give_gguf_py_s_floats(kind):
    gguf = oracles.require("gguf")
    data = random_bytes(kind)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    assert same_floats(dequantize_blocks(data, kind), torch.from_numpy(theirs.copy()))
    found = READ_ONLY.get(kind) or TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(found.number)] == (found.block_size, found.bytes)


@pytest.mark.parametrize("importance", importances())
@pytest.mark.parametrize("kind", ggml.QUANTIZED_KINDS)
def test_torch_gives_ggml_s_bytes(kind, importance):
    x, weight = rows_for(kind), weights_for(kind, importances()[importance])
    theirs = ggml.quantize(x, kind, weight)
    assert differing_rows(quantize_blocks(x, kind, weight, compatible=True), theirs) == []


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ggml.QUANTIZED_KINDS)
def test_native_code_gives_ggml_s_bytes(kind, isa):
    with native.use_instruction_set(isa):
        for seed in (0,) if kind in iquants.BITS else (0, 10, 20):
            x = all_rows(seed)
            for name, given in importances(seed).items():
                weight = weights_for(kind, given)
                ours = blocks.quantize(x, kind, weight, compatible=True)
                assert differing_rows(ours, ggml.quantize(x, kind, weight)) == [], (seed, name)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q5_K"])
def test_a_slope_below_zero_wraps_as_in_ggml(kind):
    """With importance 0 here and there, rounding makes scales below 0, whose codes ggml keeps in an unsigned byte."""
    x, weight = (noise(300, K) / noise(300, K, 1).abs().clamp(min=1e-3)).clamp(-6e4, 6e4), noise(1, K, 2)[0]
    weight = torch.where(weight < 0, 0.0, weight)
    groups = kquants.GROUPS[kind]
    columns = kquants.by_group(x.view(-1, 256).t().contiguous(), groups)
    both = kquants.by_group(weight.view(-1, 256).repeat(300, 1).t().contiguous(), groups)
    scales, _, _ = ggml_search.affine(columns, both, 2 ** kquants.BITS[kind] - 1, -0.9, 0.05, 36)
    assert bool((scales < 0).any()) or kind != "Q4_K"  # what this test is about
    assert torch.equal(quantize_blocks(x, kind, weight, compatible=True), ggml.quantize(x, kind, weight))


# The default search


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["none", "heavy", "half of it 0"])
def test_the_default_is_never_worse_than_ggml(kind, importance):
    x, weight = all_rows(), weights_for(kind, importances()[importance])
    ours = errors(x, blocks.quantize(x, kind, weight), kind, weight)
    theirs = errors(x, blocks.quantize(x, kind, weight, compatible=True), kind, weight)
    # Both errors were compared in float32, which also has no number for what is left of denormal weights.
    assert (ours <= theirs * (1 + 1e-6) + 1e-37).all()


# Error against ggml's on Gaussian weights, and with a heavy-tailed importance. Measured 2026-11-25, rounded up.
BETTER = {
    "Q4_0": (0.89, 0.95), "Q4_1": (0.80, 0.94), "Q5_0": (0.89, 0.90), "Q5_1": (0.80, 0.93), "Q8_0": (0.85, 0.60),
    "Q2_K": (0.78, 0.85), "Q3_K": (0.91, 0.94), "Q4_K": (0.96, 0.94), "Q5_K": (0.93, 0.90), "Q6_K": (0.90, 0.82),
    "IQ4_NL": (0.94, 0.93), "IQ4_XS": (0.94, 0.84), "TQ1_0": (0.32, 0.32), "TQ2_0": (0.32, 0.32),
    "IQ3_S": (0.61, 0.61), "IQ3_XXS": (0.70, 0.59), "IQ2_S": (0.82, 0.71), "IQ2_XS": (0.91, 0.68),
    "IQ2_XXS": (0.91, 0.35), "IQ1_M": (0.51, 0.78), "IQ1_S": (0.84, 0.79),
    "Q1_0": (1.0001, 0.93), "Q2_0": (0.25, 0.18), "PQ2_0": (0.23, 0.19),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_is_better_on_ordinary_weights(kind):
    x = 0.02 * noise(64, 1024)
    for given, limit in zip((None, noise(1, 1024, 5)[0] ** 4), BETTER[kind], strict=True):
        weight = weights_for(kind, given, 1024)
        ours = errors(x, blocks.quantize(x, kind, weight), kind, weight).sum()
        theirs = errors(x, blocks.quantize(x, kind, weight, compatible=True), kind, weight).sum()
        assert ours < limit * theirs, float(ours / theirs)


@pytest.mark.parametrize("kind", TERNARY)
def test_ternary_weights_keep_their_codes(kind):
    codes = torch.randint(-1, 2, (5, 512), dtype=torch.int8)
    codes[1] = 0
    for compatible in (False, True):
        data = blocks.quantize(codes * 0.37, kind, compatible=compatible)
        found, d = ternary.unpack_rows(data, kind)
        assert torch.equal(found, codes)
        expected = torch.full((5, 512 // TYPES[kind].block_size), 0.37).half().float()
        expected[1] = 0
        assert torch.equal(d, expected)


# Torch and native code


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_native_code_gives_the_bytes_of_torch(kind, isa):
    x, everything = rows_for(kind), importances()
    for given in (everything["heavy"], None, everything["half of it 0"])[: 1 if kind in iquants.BITS else 3]:
        weight = weights_for(kind, given)
        expected = reference_bytes(kind, None if weight is None else tuple(weight.tolist()))
        with native.use_instruction_set(isa):
            assert differing_rows(blocks.quantize(x, kind, weight), expected) == []
    data = random_bytes(kind)
    with native.use_instruction_set(isa):
        assert same_floats(blocks.dequantize(data, kind), dequantize_blocks(data, kind))


@functools.cache
def reference_bytes(kind: str, weight: tuple[float, ...] | None) -> Tensor:
    return quantize_blocks(rows_for(kind), kind, None if weight is None else torch.tensor(weight))


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows_and_threads_gives_the_same_bytes(kind, monkeypatch):
    monkeypatch.setattr(native_blocks, "_PARALLEL_FROM", 0)
    size = TYPES[kind].block_size
    x, weight = noise(37, 3 * size), noise(1, 3 * size, 1)[0].abs()
    expected = torch.cat([blocks.quantize(row[None], kind, weight) for row in x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for rows in (0, 1, 5, 16, 17, 37):
                data = blocks.quantize(x[:rows], kind, weight)
                assert torch.equal(data, expected[:rows])
                assert torch.equal(blocks.dequantize(data, kind), dequantize_blocks(expected[:rows], kind))
    finally:
        torch.set_num_threads(before)


def test_the_backend_that_was_asked_for_is_taken(monkeypatch):
    x, seen = noise(2, 256), []
    monkeypatch.setattr(blocks, "quantize_blocks", lambda *a, **o: seen.append("torch") or quantize_blocks(*a, **o))
    for backend in ("reference", "auto"):
        with use_backend(backend):
            blocks.quantize(x, "Q4_K")
    assert seen == (["torch"] if BUILT else ["torch", "torch"])
    monkeypatch.setattr(native_blocks, "available", lambda: False)
    blocks.quantize(x, "Q4_K")
    assert seen[-1] == "torch"


@pytest.mark.parametrize("make", [Tensor.half, Tensor.bfloat16, Tensor.double, lambda x: x.t().contiguous().t()])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_other_floats_and_strides_are_the_same_weights(make, backend):
    x = make(noise(4, 256))
    before = x.clone()
    with use_backend(backend):
        data = blocks.quantize(x, "Q4_K", torch.rand(512)[::2])
        assert torch.equal(x, before)
        assert torch.equal(blocks.quantize(x, "Q4_0"), blocks.quantize(x.float().contiguous(), "Q4_0"))
        wide = torch.zeros(4, 2 * data.shape[1], dtype=torch.uint8)
        wide[:, ::2] = data
        assert torch.equal(blocks.dequantize(wide[:, ::2], "Q4_K"), blocks.dequantize(data, "Q4_K"))
        odd = torch.cat([torch.zeros(1, dtype=torch.uint8), data.flatten()])[1:].view(data.shape)
        assert torch.equal(blocks.dequantize(odd, "Q4_K"), blocks.dequantize(data, "Q4_K"))


def test_a_weight_with_a_gradient_is_taken():
    weight = torch.nn.Parameter(noise(2, 256))
    assert not blocks.quantize(weight, "Q6_K").requires_grad


# Layouts


@pytest.mark.parametrize("kind", KINDS)
def test_pack_is_the_inverse_of_unpack(kind):
    family, raw = FAMILY[kind], random_bytes(kind, 32, TYPES[kind].block_size)
    if kind == "TQ1_0":  # 256 patterns stand for 243 codes: take those that a packer makes
        raw = family.pack(family.unpack(raw, kind), kind)
    assert torch.equal(family.pack(family.unpack(raw, kind), kind), raw)


@pytest.mark.parametrize(("pack", "unpack", "kind"), [
    (ternary.pack_tq1, ternary.unpack_tq1, "TQ1_0"), (ternary.pack_tq2, ternary.unpack_tq2, "TQ2_0"),
    *((functools.partial(ternary.pack_rows, kind=kind), functools.partial(ternary.unpack_rows, kind=kind), kind)
      for kind in ("Q2_0", "PQ2_0", "Q1_0")),
])  # fmt: skip
def test_ternary_codes_go_in_and_come_out(pack, unpack, kind):
    codes, size = torch.randint(-1, 2, (3, 512), dtype=torch.int8), TYPES[kind].block_size
    if kind == "Q1_0":
        with pytest.raises(ValueError, match="codes are 0; Q1_0 holds -1 and 1, use Q2_0"):
            pack(codes, 1.0)
        codes[codes == 0] = 1
    for scale in (1.0, 0.37, torch.rand(3, 512 // size).half().float()):
        data = pack(codes, scale)
        found, d = unpack(data)
        assert torch.equal(found, codes)
        assert torch.equal(d, torch.as_tensor(scale).half().float().expand(3, 512 // size))
        assert torch.equal(dequantize_blocks(data, kind), codes * d.repeat_interleave(size, dim=1))


def test_tq2_0_lies_as_it_is_drawn():
    codes = torch.randint(-1, 2, (1, 256), dtype=torch.int8)
    data = ternary.pack_tq2(codes)[0].tolist()
    for place in range(256):
        group, lane, byte = place // 128, place % 128 // 32, place % 32
        assert (data[32 * group + byte] >> (2 * lane) & 3) - 1 == codes[0, place]


@pytest.mark.parametrize("kind", ["Q2_0", "PQ2_0", "Q1_0"])
def test_newer_types_lie_as_they_are_drawn(kind):
    size, lanes = TYPES[kind].block_size, 8 if kind == "Q1_0" else 4
    codes = torch.randint(0, 2, (1, size), dtype=torch.int8) * 2 - 1
    data = ternary.pack_rows(codes, 1.0, kind)[0].tolist()
    assert data[:2] == [0, 0x3C]
    for place in range(size):
        found = data[2 + place // lanes] >> (place % lanes * 8 // lanes)
        assert (2 * (found & 1) - 1 if kind == "Q1_0" else (found & 3) - 1) == codes[0, place]


# Bad input


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("x", "kind", "importance", "message"), [
    (torch.zeros(2, 256), "Q4_X", None, "'Q4_X' is unknown; choose one of Q4_0"),
    (torch.zeros(2, 288), "Q4_K", None, "288 weights are no multiple of 256, the block of Q4_K; use Q5_0"),
    (torch.zeros(2, 288), "TQ2_0", None, "use Q4_0"),
    (torch.zeros(2, 40), "Q8_0", None, "40 weights are no multiple of 32, the block of Q8_0; keep it in F16"),
    (torch.zeros(2, 40), "Q6_K", None, "keep it in F16"),
    (torch.zeros(256), "Q4_K", None, r"float matrix \[N, K\], got torch.float32 \[256\]"),
    (torch.zeros(2, 256, dtype=torch.int8), "Q4_K", None, "got torch.int8"),
    (torch.tensor([[float("nan"), float("inf")] * 16]), "Q4_0", None, "32 of 32 weights are NaN or infinite"),
    (torch.tensor([[0.0] * 31 + [float("nan")]]), "Q4_0", None, "1 of 32 weights are NaN or infinite"),
    (torch.tensor([[float("-inf")] + [0.0] * 31]), "Q4_0", None, "1 of 32 weights are NaN or infinite"),
    (torch.full((1, 32), 1e5), "Q4_0", None, "100000 is beyond float16"),
    (torch.full((1, 32), -1e5), "Q4_0", None, "100000 is beyond float16"),
    (torch.zeros(2, 256), "Q4_K", torch.ones(2), r"shape \[2\]; it must be \[256\]"),
    (torch.zeros(2, 256), "Q4_K", torch.ones(2, 256), r"it must be \[256\]"),
    *((torch.zeros(2, 256), kind, None, f"{kind} needs the importance of the columns: calibrate on .*{kind.lower()}")
      for kind in iquants.NEEDS_IMPORTANCE),
    (torch.zeros(2, 32), "Q4_0", -torch.ones(32), "at least 0"),
    (torch.zeros(2, 32), "Q4_0", torch.full((32,), float("nan")), "finite"),
])  # fmt: skip
def test_what_cannot_be_quantized_is_refused_with_the_remedy(x, kind, importance, message, backend):
    with use_backend(backend), pytest.raises(ValueError, match=message):
        blocks.quantize(x, kind, importance)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("data", "kind"), [
    (torch.zeros(2, 100, dtype=torch.uint8), "Q4_K"), (torch.zeros(144, dtype=torch.uint8), "Q4_K"),
    (torch.zeros(2, 144, dtype=torch.int8), "Q4_K"), (torch.zeros(2, 144, dtype=torch.uint8), "Q9"),
])  # fmt: skip
def test_rows_that_are_no_blocks_are_refused(data, kind, backend):
    with use_backend(backend), pytest.raises(ValueError, match=kind):
        blocks.dequantize(data, kind)


@pytest.mark.parametrize(("codes", "scale", "message"), [
    (torch.zeros(2, 100, dtype=torch.int8), 1.0, "multiple of 256"), (torch.zeros(2, 256), 1.0, "must be int8"),
    (torch.full((2, 256), 2, dtype=torch.int8), 1.0, r"span \[2, 2\]"),
    (torch.zeros(2, 256, dtype=torch.int8), 1e6, "does not fit into float16"),
    (torch.zeros(2, 256, dtype=torch.int8), torch.ones(3), r"give one number or \[2, 1\]"),
])  # fmt: skip
def test_codes_that_are_not_ternary_are_refused(codes, scale, message):
    with pytest.raises(ValueError, match=message):
        ternary.pack_tq2(codes, scale)
    with pytest.raises(ValueError, match="rows must be uint8"):
        ternary.unpack_tq2(codes)
