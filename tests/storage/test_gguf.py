"""bitnet.storage.gguf.container: the container against other readers, models against llama.cpp and transformers."""

import ctypes
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bitnet import kernels
from bitnet.data.corpus import open_corpus
from bitnet.kernels import blocks, reference
from bitnet.model import BitNetForCausalLM, ModelConfig, PackedLinear, bit_linears
from bitnet.quant import quantize_ternary, unpack_codes
from bitnet.quant.i2s import pack_i2_s, unpack_i2_s
from bitnet.storage.gguf import read as gguf_read
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import NUMBERS, TYPES, GGUFError, GGUFFile, TensorToWrite, write_file
from bitnet.storage.gguf.read import read_metadata, read_ternary
from bitnet.storage.gguf.write import FILE_TYPES, architecture
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.tokenizer.gguf_write import vocabulary
from tests import oracles
from tests.oracles import ggml as ggml_oracle
from tests.oracles.llama import LlamaModel, quantize

SHAPE = ModelConfig(
    vocab_size=400, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
EXACT = ["TQ2_0", "TQ1_0", "F16", "BF16", "F32", "I2_S"]


def text(size: int) -> str:
    pieces, total = [], 0
    for document in open_corpus("stdlib").documents():
        pieces.append(document[:8000])
        total += len(pieces[-1])
        if total > size:
            break
    return "".join(pieces)[:size]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text(150_000)], SHAPE.vocab_size, threads=1)


def random_model(**changes: object) -> BitNetForCausalLM:
    """A model whose every tensor matters: norms are not 1, logits have a spread of about 1."""
    model = BitNetForCausalLM(SHAPE.replace(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim == 2 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def trained_model(tokenizer: Tokenizer, **changes: object) -> tuple[BitNetForCausalLM, torch.Tensor]:
    """A model after some steps on text, and sequences of that text."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(SHAPE.replace(**changes))
    ids = tokenizer.encode(text(60_000))
    data = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    for step in range(30):
        batch = data[torch.arange(8) + 8 * step % (len(data) - 8)]
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), data[:8]


@pytest.fixture(scope="module")
def ternary(tokenizer):
    return trained_model(tokenizer)


@pytest.fixture(scope="module")
def twin(tokenizer):
    return trained_model(tokenizer, quantizer="none")


def projections(model: BitNetForCausalLM) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scale of every projection, from a latent or packed model."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            found[name] = (
                (module.codes(), module.weight_scale.view(()))
                if isinstance(module, PackedLinear)
                else quantize_ternary(module.weight.detach())
            )
    return found


# The container


def small_file(path: Path) -> dict[str, np.ndarray]:
    """A file with every kind of value that we write, and some tensors; returns their bytes."""
    rng = np.random.default_rng(0)
    shapes = {"a": ((3, 256), "TQ2_0"), "b": ((5,), "F32"), "c": ((2, 3, 32), "Q8_0"), "d": ((1, 7), "F16")}
    data = {}
    for name, (shape, kind) in shapes.items():
        _, block, size = TYPES[NUMBERS[kind]]
        data[name] = rng.integers(0, 256, int(np.prod(shape)) // block * size, dtype=np.uint8)
    values = {
        "general.architecture": "llama", "s": "grüße", "u": 7, "i": -3, "f": 0.5, "t": True, "n": False, "empty": "",
        "strings": ["a", "", "ü"], "ints": [1, -2], "floats": [0.5, -1.25], "bools": [True, False],
    }  # fmt: skip
    write_file(path, values, [TensorToWrite(n, s, k, lambda n=n: data[n]) for n, (s, k) in shapes.items()])
    return data


def test_our_files_open_here(tmp_path):
    data = small_file(tmp_path / "x.gguf")
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.architecture == "llama"
    assert file.metadata["s"] == "grüße"
    assert [file.metadata[key] for key in ("u", "i", "f", "t", "n", "empty")] == [7, -3, 0.5, True, False, ""]
    assert file.metadata["strings"] == ["a", "", "ü"]
    assert file.metadata["ints"] == [1, -2]
    assert file.metadata["floats"] == [0.5, -1.25]
    assert file.metadata["bools"] == [True, False]
    assert file.metadata["t"] is True
    assert next((t.name, t.shape, t.type) for t in file.tensors.values()) == ("a", (3, 256), "TQ2_0")
    for name, expected in data.items():
        assert np.array_equal(file.data(name), expected)


def test_our_files_open_in_gguf_py(tmp_path):
    reader = oracles.require("gguf").GGUFReader
    data = small_file(tmp_path / "x.gguf")
    theirs, ours = reader(tmp_path / "x.gguf"), GGUFFile(tmp_path / "x.gguf")
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value, key
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name) == (info.start, info.nbytes, info.type)
        assert tuple(int(n) for n in reversed(tensor.shape)) == info.shape
        assert np.array_equal(np.asarray(tensor.data).view(np.uint8).ravel(), data[tensor.name])


class GgmlParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def test_our_files_open_in_ggml(tmp_path):
    """ggml's own C reader."""
    ggml = ggml_oracle.library()
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, GgmlParams]
    ggml.gguf_get_tensor_name.restype = ctypes.c_char_p
    for name in ("n_tensors", "n_kv", "data_offset", "tensor_name", "tensor_offset"):
        function = getattr(ggml, f"gguf_get_{name}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64][: 1 + name.startswith("tensor")]
        if name != "tensor_name":
            function.restype = ctypes.c_int64
    data = small_file(tmp_path / "x.gguf")
    context = ggml.gguf_init_from_file(str(tmp_path / "x.gguf").encode(), GgmlParams(True, None))
    assert context
    assert ggml.gguf_get_n_tensors(context) == len(data)
    assert ggml.gguf_get_n_kv(context) == 12
    base = ggml.gguf_get_data_offset(context)
    for i, info in enumerate(GGUFFile(tmp_path / "x.gguf").tensors.values()):
        assert ggml.gguf_get_tensor_name(context, i) == info.name.encode()
        assert base + ggml.gguf_get_tensor_offset(context, i) == info.start
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    ggml.gguf_free(context)


def test_files_of_gguf_py_open_here(tmp_path):
    library = oracles.require("gguf")
    writer = library.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -5)
    writer.add_int32("i32", -5)
    writer.add_uint64("u64", 1 << 60)
    writer.add_int64("i64", -(1 << 60))
    writer.add_float64("f64", 0.1)
    writer.add_array("words", ["x", "yz"])
    writer.add_array("numbers", [1.5, 2.5])
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("w", weight)
    writer.add_tensor("h", weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    found = [file.metadata[key] for key in ("u8", "i8", "u16", "i16", "i32", "u64", "i64", "f64", "words", "numbers")]
    assert found == [255, -128, 65535, -5, -5, 1 << 60, -(1 << 60), 0.1, ["x", "yz"], [1.5, 2.5]]
    assert np.array_equal(file.data("w").view(np.float32).reshape(4, 64), weight)
    assert np.array_equal(file.data("h").view(np.float16).reshape(4, 64), weight.astype(np.float16))


def test_sizes_of_types_are_those_of_gguf_py():
    sizes = oracles.require("gguf").GGML_QUANT_SIZES
    assert {kind.value: (kind.name, *size) for kind, size in sizes.items()}.items() <= TYPES.items()


def string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def raw(
    *, magic=b"GGUF", version=3, kv=(), infos=(), tensors=None, values=None, tail=b"", alignment=32
) -> bytes:  # fmt: skip
    """A file from its parts, right or wrong: metadata as bytes, tensors as (name, sizes, type, offset)."""
    header = magic + struct.pack("<IQQ", version, len(infos) if tensors is None else tensors,
                                 len(kv) if values is None else values) + b"".join(kv)  # fmt: skip
    for name, sizes, kind, offset in infos:
        header += string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return header + bytes(-len(header) % alignment) + tail


U32 = struct.pack("<II", 4, 1)
HOSTILE = {
    "nothing": (b"", "no GGUF"),
    "short": (b"GGUF\3\0\0\0", "no GGUF"),
    "magic": (raw(magic=b"GGML"), "begins with"),
    "version 1": (raw(version=1), "version is 1"),
    "version 4": (raw(version=4), "version is 4"),
    "big-endian": (raw(version=3 << 24), "big-endian"),
    "tensors": (raw(tensors=1 << 40), "announces 1099511627776 tensors"),
    "values": (raw(values=1 << 60), "metadata values"),
    "key length": (raw(kv=[struct.pack("<Q", 1 << 62) + bytes(40)]), "ends inside"),
    "array length": (raw(kv=[string(b"a") + struct.pack("<IIQ", 9, 4, 1 << 61)], tail=bytes(64)), "elements of a"),
    "string array": (raw(kv=[string(b"a") + struct.pack("<IIQ", 9, 8, 1 << 61)], tail=bytes(64)), "elements of a"),
    "nested": (raw(kv=[string(b"a") + struct.pack("<IIQ", 9, 9, 1)], tail=bytes(64)), "array of arrays"),
    "value type": (raw(kv=[string(b"a") + struct.pack("<II", 13, 1)]), "unknown value type 13"),
    "element type": (raw(kv=[string(b"a") + struct.pack("<IIQ", 9, 77, 1)], tail=bytes(64)), "unknown value type 77"),
    "key not UTF-8": (raw(kv=[string(b"\xff") + U32]), "a metadata key is not UTF-8"),
    "value not UTF-8": (raw(kv=[string(b"a") + struct.pack("<I", 8) + string(b"\xc3")]), "string of a is not UTF-8"),
    "same key": (raw(kv=[string(b"a") + U32] * 2), "'a' appears twice"),
    "alignment 0": (raw(kv=[string(b"general.alignment") + struct.pack("<II", 4, 0)]), "alignment is 0"),
    "alignment 24": (raw(kv=[string(b"general.alignment") + struct.pack("<II", 4, 24)]), "alignment is 24"),
    "alignment text": (raw(kv=[string(b"general.alignment") + struct.pack("<I", 8) + string(b"x")]), "alignment is"),
    "name not UTF-8": (raw(infos=[(b"\xfe", [4], 0, 0)], tail=bytes(64)), "name is not UTF-8"),
    "same name": (raw(infos=[(b"w", [4], 0, 0), (b"w", [4], 0, 32)], tail=bytes(64)), "same name"),
    "type": (raw(infos=[(b"w", [4], 99, 0)], tail=bytes(64)), "unknown type 99"),
    "no dimensions": (raw(infos=[(b"w", [], 0, 0)], tail=bytes(64)), "0 dimensions"),
    "5 dimensions": (raw(infos=[(b"w", [1] * 5, 0, 0)], tail=bytes(64)), "5 dimensions"),
    "empty": (raw(infos=[(b"w", [0], 0, 0)], tail=bytes(64)), "empty"),
    "huge": (raw(infos=[(b"w", [1 << 62, 1 << 62], 0, 0)], tail=bytes(64)), "truncated or damaged"),
    "rows": (raw(infos=[(b"w", [33, 2], 8, 0)], tail=bytes(99)), "no multiple of 32"),
    "offset": (raw(infos=[(b"w", [4], 0, 1 << 40)], tail=bytes(64)), "truncated or damaged"),
    "offset wraps": (raw(infos=[(b"w", [4], 0, (1 << 64) - 32)], tail=bytes(64)), "truncated or damaged"),
    "misaligned": (raw(infos=[(b"w", [4], 0, 4)], tail=bytes(64)), "no multiple of the alignment"),
    "overlap": (raw(infos=[(b"v", [16], 0, 0), (b"w", [16], 0, 32)], tail=bytes(128)), "v and w overlap"),
    "same place": (raw(infos=[(b"v", [16], 0, 0), (b"w", [16], 0, 0)], tail=bytes(128)), "overlap"),
    "data short": (raw(infos=[(b"w", [16], 0, 0)], tail=bytes(63)), "truncated or damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_the_reason(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


def test_raw_makes_files_that_open(tmp_path):
    """The builder of the hostile files is not what makes them fail."""
    (tmp_path / "x.gguf").write_bytes(raw(kv=[string(b"a") + U32], infos=[(b"w", [16], 0, 0)], tail=bytes(64)))
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata == {"a": 1}
    assert file.tensors["w"].shape == (16,)


def test_every_truncation_is_refused(tmp_path):
    small_file(tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    last = max(info.start + info.nbytes for info in GGUFFile(tmp_path / "x.gguf").tensors.values())
    for size in [*range(0, 700, 7), *range(700, last, 97), last - 1]:
        (tmp_path / "y.gguf").write_bytes(whole[:size])
        with pytest.raises(GGUFError):
            GGUFFile(tmp_path / "y.gguf")


@pytest.mark.parametrize("path", ["absent.gguf", "."])
def test_a_path_that_is_no_file_is_named(tmp_path, path):
    with pytest.raises(GGUFError, match=r"cannot be read"):
        GGUFFile(tmp_path / path)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    good = TensorToWrite("w", (2,), "F32", lambda: np.zeros(8, np.uint8))
    for bad in (TensorToWrite("v", (2,), "F32", lambda: np.zeros(7, np.uint8)),
                TensorToWrite("w", (2,), "F32", lambda: np.zeros(8, np.uint8))):  # fmt: skip
        with pytest.raises(GGUFError, match=r"announced|same name"):
            write_file(path, {}, [good, bad])
    with pytest.raises(GGUFError, match="empty"):
        write_file(path, {"a": []}, [good])
    with pytest.raises(GGUFError, match="dict"):
        write_file(path, {"a": {}}, [good])
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


# Ternary models


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("sub_norm", [True, False], ids=["sub-norm", "plain"])
@pytest.mark.parametrize("kind", EXACT)
def test_codes_and_scales_come_back_exactly(tmp_path, kind, sub_norm, packed):
    if kind == "I2_S" and not sub_norm:
        pytest.skip("bitnet.cpp has no architecture without sub-norms")
    model = random_model(sub_norm=sub_norm, tie_word_embeddings=sub_norm)
    expected = {name: (codes.clone(), scale.clone()) for name, (codes, scale) in projections(model).items()}
    head = {n: p.detach().clone() for n, p in model.named_parameters() if "norm" in n or "embed" in n or "head" in n}
    if packed:
        model.pack(embeddings=False)
    gguf_write.write(model, tmp_path / "x.gguf", kind, embedding_type="F32")
    back = gguf_read.read(tmp_path / "x.gguf")
    assert back.config == model.config.replace(head_dim=64, quantizer="ternary")
    assert back.is_packed
    for name, (codes, scale) in projections(back).items():
        assert torch.equal(codes, expected[name][0]), name
        assert scale == expected[name][1], name
    for name, value in head.items():
        assert torch.equal(dict(back.named_parameters())[name], value), name


@pytest.mark.parametrize("kind", ["TQ2_0", "F16", "I2_S"])
def test_a_matrix_is_quantized_once(tmp_path, monkeypatch, kind):
    seen = []

    def counted(weight, quantizer):
        seen.append(weight.data_ptr())
        return reference.quantize_weight(weight, quantizer)

    monkeypatch.setattr(kernels, "quantize_weight", counted)
    model = random_model()
    gguf_write.write(model, tmp_path / "x.gguf", kind)
    assert sorted(seen) == sorted(layer.weight.data_ptr() for _, layer in bit_linears(model))


def test_reading_and_writing_again_gives_the_same_file(tmp_path):
    gguf_write.write(random_model(), tmp_path / "a.gguf", "TQ1_0", embedding_type="F16")
    gguf_write.write(gguf_read.read(tmp_path / "a.gguf"), tmp_path / "b.gguf", "TQ1_0", embedding_type="F16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_logits_of_a_read_model_are_the_packed_model_s(tmp_path):
    model = random_model(hidden_act="relu2").pack(embeddings=False)
    gguf_write.write(model, tmp_path / "x.gguf", "I2_S", embedding_type="F32")
    ids = torch.arange(60).view(2, 30)
    assert GGUFFile(tmp_path / "x.gguf").architecture == "bitnet-b1.58"
    assert torch.equal(gguf_read.read(tmp_path / "x.gguf")(ids), model(ids))


def test_binary_weights_are_ternary_ones_without_zeros(tmp_path):
    model = random_model(quantizer="binary").pack(embeddings=False)
    gguf_write.write(model, tmp_path / "x.gguf", "TQ2_0", embedding_type="F32")
    back = gguf_read.read(tmp_path / "x.gguf")
    assert back.config.quantizer == "ternary"
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(back(ids), model(ids))


def test_an_int8_embedding_is_written_as_the_floats_it_stands_for(tmp_path):
    model = random_model(tie_word_embeddings=False, sub_norm=False).pack()
    gguf_write.write(model, tmp_path / "x.gguf", "TQ2_0", embedding_type="F32")
    back = gguf_read.read(tmp_path / "x.gguf")
    ids = torch.arange(64)
    assert torch.equal(back.model.embed_tokens(ids), model.model.embed_tokens(ids))
    head = model.lm_head
    assert torch.equal(back.lm_head.weight, unpack_codes(head.packed_weight, 8, head.in_features) * head.weight_scale)


def literal_i2_s(codes: np.ndarray, block: int) -> np.ndarray:
    """The loop of bitnet.cpp's quantizer over one matrix: 128-blocks on x86, 64-blocks on Arm."""
    flat, step = codes.ravel() + 1, block // 4
    out = np.zeros(flat.size // 4, np.uint8)
    for i in range(flat.size // block):
        for j in range(block):
            out[i * step + j % step] |= flat[i * block + j] << (6 - 2 * (j // step))
    return out


@pytest.mark.parametrize(("layout", "block"), [("x86", 128), ("arm", 64)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (3, 256), (5, 384)])
def test_i2_s_has_bitnet_cpp_s_bytes(layout, block, rows, columns):
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    data = pack_i2_s(codes, 0.125, layout)
    assert np.array_equal(data[:-32].numpy(), literal_i2_s(codes.numpy(), block))
    assert data[-32:-28].view(torch.float32).item() == 0.125
    assert not data[-28:].any()
    back, scale = unpack_i2_s(data, (rows, columns), layout)
    assert torch.equal(back, codes)
    assert scale == 0.125


def test_i2_s_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="no multiple of 128"):
        pack_i2_s(torch.zeros(2, 64, dtype=torch.int8), 1.0)
    with pytest.raises(ValueError, match="layout 'mips' is unknown"):
        pack_i2_s(torch.zeros(2, 128, dtype=torch.int8), 1.0, "mips")
    with pytest.raises(ValueError, match="code 3"):
        unpack_i2_s(torch.full((64 + 32,), 255, dtype=torch.uint8), (2, 128))
    with pytest.raises(ValueError, match=r"uint8 \[96\]"):
        unpack_i2_s(torch.zeros(64, dtype=torch.uint8), (2, 128))


def test_i2_s_of_an_arm_file_is_read_on_request(tmp_path):
    model = random_model()
    gguf_write.write(model, tmp_path / "x.gguf", "I2_S", embedding_type="F32")
    whole = bytearray((tmp_path / "x.gguf").read_bytes())
    for name, info in GGUFFile(tmp_path / "x.gguf").tensors.items():
        if info.type == "I2_S":
            codes, scale = unpack_i2_s(
                torch.frombuffer(whole, dtype=torch.uint8)[info.start :][: info.nbytes], info.shape
            )
            whole[info.start : info.start + info.nbytes] = pack_i2_s(codes, scale, "arm").numpy().tobytes()
            assert name.startswith("blk.")
    (tmp_path / "y.gguf").write_bytes(whole)
    expected = projections(model)
    for name, (codes, scale) in projections(gguf_read.read(tmp_path / "y.gguf", i2_s="arm")).items():
        assert torch.equal(codes, expected[name][0])
        assert scale == expected[name][1]


def one_tensor(path: Path, kind: str, data: np.ndarray, shape: tuple[int, int], arch: str = "llama") -> GGUFFile:
    write_file(path, {"general.architecture": arch}, [TensorToWrite("w.weight", shape, kind, lambda: data)])
    return GGUFFile(path)


def tq2_rows(scales: list[float], codes: list[int]) -> np.ndarray:
    """TQ2_0 blocks of one repeated code each."""
    parts = []
    for scale, code in zip(scales, codes, strict=True):
        parts += [np.full(64, 0x55 * code, np.uint8), np.array([scale], np.float16).view(np.uint8)]
    return np.concatenate(parts)


def test_a_block_scale_is_the_scale_where_all_blocks_agree(tmp_path):
    file = one_tensor(tmp_path / "x.gguf", "TQ2_0", tq2_rows([0.5, 0.0, 0.5], [2, 2, 0]), (3, 256))
    packed, scale = read_ternary(file, "w")
    codes = unpack_codes(packed, 2, 256)
    assert scale == 0.5
    # A block with scale 0 holds zeros, whatever its codes say.
    assert [row.unique().tolist() for row in codes] == [[1], [0], [-1]]


@pytest.mark.parametrize(
    ("scales", "codes"),
    [([0.5, 0.25], [2, 0]), ([1.0, 1.0], [2, 3]), ([float("nan"), 1.0], [0, 1]), ([float("inf")] * 2, [0, 1])],
    ids=["two scales", "code 3", "NaN", "infinite"],
)
def test_blocks_that_are_not_ternary_with_one_scale_stay_floats(tmp_path, scales, codes):
    assert read_ternary(one_tensor(tmp_path / "x.gguf", "TQ2_0", tq2_rows(scales, codes), (2, 256)), "w") is None


def test_floats_are_ternary_only_where_that_is_meant(tmp_path):
    weight = torch.tensor([[0.0, 0.25, -0.25, 0.25]])
    data = weight.half().view(torch.uint8).numpy().ravel()
    found = read_ternary(one_tensor(tmp_path / "a.gguf", "F16", data, (1, 4), "bitnet"), "w")
    assert found is not None
    assert unpack_codes(found[0], 2, 4).tolist() == [[0, 1, -1, 1]]
    assert found[1] == 0.25
    assert read_ternary(one_tensor(tmp_path / "b.gguf", "F16", data, (1, 4), "llama"), "w") is None
    other = torch.tensor([[0.0, 0.25, -0.5, 0.25]]).half().view(torch.uint8).numpy().ravel()
    assert read_ternary(one_tensor(tmp_path / "c.gguf", "F16", other, (1, 4), "bitnet"), "w") is None


# What cannot be written or read


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"hidden_act": "relu2"}, "TQ2_0", "SiLU whatever.*I2_S for bitnet.cpp"),
        ({"hidden_act": "relu2", "quantizer": "none"}, "F16", "SiLU whatever.*Hugging Face"),
        ({"tie_word_embeddings": False}, "TQ2_0", "not tied.*Hugging Face"),
        ({"head_dim": 32}, "TQ2_0", "128 wide and hidden_size is 256"),
        ({}, "Q4_0", "quantize ternary weights again; choose TQ2_0"),
        ({"quantizer": "none"}, "TQ2_0", "weights are floats.*choose F16"),
        ({"quantizer": "int8"}, "F16", "a scale for each row.*quantizer none"),
        ({"quantizer": "int4"}, "TQ2_0", "a scale for each row"),
        ({"sub_norm": False}, "I2_S", "no sub-norms.*choose TQ2_0"),
        (
            {"intermediate_size": 384},
            "TQ2_0",
            "ffn_down has rows of 384 weights, no multiple of TQ2_0's 256; choose F16",
        ),
        ({"intermediate_size": 192}, "I2_S", "rows of 192 weights, no multiple of I2_S's 128"),
        ({"intermediate_size": 48, "quantizer": "none"}, "Q8_0", "rows of 48 weights.*choose F16"),
        ({}, "Q9_9", "'Q9_9' is unknown; choose one of F32"),
    ],
)
def test_what_a_target_cannot_express_is_refused_with_the_alternative(tmp_path, changes, kind, message):
    with pytest.raises(ValueError, match=message):
        gguf_write.write(BitNetForCausalLM(SHAPE.replace(**changes)), tmp_path / "x.gguf", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({}, "TQ2_0", "bitnet"), ({}, "I2_S", "bitnet"), ({"hidden_act": "relu2"}, "I2_S", "bitnet-b1.58"),
        ({"quantizer": "none"}, "F16", "bitnet"), ({"quantizer": "none", "sub_norm": False}, "Q4_K", "llama"),
        ({"sub_norm": False, "tie_word_embeddings": False, "head_dim": 32}, "TQ1_0", "llama"),
    ],
)  # fmt: skip
def test_architecture(changes, kind, expected):
    assert architecture(SHAPE.replace(**changes), kind) == expected


def rewritten(path: Path, values: dict[str, object] | None = None, tensors=lambda list: list) -> Path:
    """A copy of a file with other metadata or tensors."""
    file = GGUFFile(path)
    metadata = {**file.metadata, **(values or {})}
    entries = [TensorToWrite(i.name, i.shape, i.type, lambda n=i.name: file.data(n)) for i in file.tensors.values()]
    write_file(path.with_suffix(".new"), {k: v for k, v in metadata.items() if v is not None}, tensors(entries))
    return path.with_suffix(".new")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture is 'gemma'; bitnet, "),
        ({"general.architecture": 7}, "architecture is ''"),
        ({"llama.block_count": 1000000000}, "announces 1000000000 layers"),
        ({"llama.block_count": 3}, "announces 3 layers and has 20 tensors"),
        ({"llama.block_count": 1}, "tensors are not of this model, among them blk.1"),
        ({"llama.block_count": "2"}, "block_count is '2'; it must be a positive integer"),
        ({"llama.attention.head_count": None}, "head_count is None"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 3}, "does not divide|and the metadata say"),
        ({"llama.embedding_length": 512}, "and the metadata say"),
        ({"llama.context_length": 1 << 31}, r"max_position_embeddings is 2147483648; it must be"),
        ({"llama.context_length": 1 << 17}, "context_length is 131072, more than"),
        ({"llama.context_length": 1 << 20}, "max_position_embeddings 1048576 would take a table of"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32 and heads are 64"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon is 'x'; it must be a number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"llama.rope.freq_base": -1.0}, "rope_theta is -1.0"),
        ({"llama.hidden_activation": "gelu"}, "'gelu' is unknown"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.feed_forward_length": [512, 512]}, "feed_forward_length is"),
    ],
)
def test_metadata_that_this_model_does_not_have_are_refused(tmp_path, values, message):
    gguf_write.write(random_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F16")
    with pytest.raises(GGUFError, match=message) as caught:
        gguf_read.read(rewritten(tmp_path / "x.gguf", values))
    assert "x.new" in str(caught.value)


def test_tensors_that_this_model_does_not_have_are_refused(tmp_path):
    gguf_write.write(random_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F16")
    bias = TensorToWrite("blk.0.attn_q.bias", (256,), "F32", lambda: np.zeros(1024, np.uint8))
    strange = TensorToWrite("blk.0.attn_q.weight", (256, 256), "IQ2_S", lambda: np.zeros(256 * 82, np.uint8))
    changes = {
        "attn_q.bias; biases, experts": lambda entries: [*entries, bias],
        "blk.1.ffn_norm.weight is missing": lambda entries: [e for e in entries if e.name != "blk.1.ffn_norm.weight"],
        "attn_q.weight is IQ2_S, which has no dequantizer": lambda entries: [
            strange if e.name == strange.name else e for e in entries
        ],
    }
    for message, change in changes.items():
        with pytest.raises(GGUFError, match=message):
            gguf_read.read(rewritten(tmp_path / "x.gguf", tensors=change))


# Vocabularies


TEXTS = [
    "", " ", "  ", "a", " a", "\n\n", "\tdef f(x):\n        return x  # why\n", "0123 45.6e-7", "naïve café — “ok”",
    "\U0001f600 \u4f60\u597d \u0416", "a\u0301", "<s> </s> <unk> <0x41>", "x" * 300, "end ", "\r\n", "\u00a0\u3000",
    "[PAD400]", "\x01\x7f", "\ufffd",
]  # fmt: skip


@pytest.fixture(scope="module")
def llama_tokenizer(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "x.gguf"
    model = random_model(vocab_size=tokenizer.vocab_size + 5)
    gguf_write.write(model, path, "TQ2_0", tokenizer=tokenizer, chat_template="{{ messages }}", embedding_type="F16")
    with LlamaModel(path, 128) as loaded:
        yield loaded


def test_llama_cpp_tokenizes_as_we_do(tokenizer, llama_tokenizer):
    whole = text(150_000)
    for piece in [*TEXTS, *(whole[i : i + 3000] for i in range(0, len(whole), 3000))]:
        assert llama_tokenizer.tokenize(piece) == tokenizer.encode(piece), piece[:80]
        assert llama_tokenizer.tokenize(piece, special=True) == tokenizer.encode(piece, bos=True), piece[:80]
    assert llama_tokenizer.detokenize(tokenizer.encode(whole[:2000])) == whole[:2000]


def test_llama_cpp_sees_the_special_tokens_and_the_template(tokenizer, llama_tokenizer):
    assert llama_tokenizer.vocab_size == tokenizer.vocab_size + 5
    assert (llama_tokenizer.bos_id, llama_tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert llama_tokenizer.adds_bos
    assert llama_tokenizer.chat_template == "{{ messages }}"
    assert llama_tokenizer.tokenize("<s>", parse_special=True) == [tokenizer.bos_id]


def test_a_vocabulary_of_another_file_goes_through(tokenizer, tmp_path):
    gguf_write.write(random_model(), tmp_path / "a.gguf", "TQ2_0", tokenizer=tokenizer, embedding_type="F16")
    metadata = read_metadata(tmp_path / "a.gguf")
    gguf_write.write(random_model(), tmp_path / "b.gguf", "TQ2_0", tokenizer=metadata, embedding_type="F16")
    again = read_metadata(tmp_path / "b.gguf")
    assert {k: v for k, v in again.items() if k.startswith("tokenizer")} == vocabulary(metadata, 400)


def train_sentencepiece(**options: object) -> Tokenizer:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text(30_000).split("\n")), model_writer=model, vocab_size=350, minloglevel=3,
        num_threads=1, hard_vocab_limit=False, **{"model_type": "bpe", "normalization_rule_name": "identity",
        "byte_fallback": True, "remove_extra_whitespaces": False, **options},
    )  # fmt: skip
    return Tokenizer.from_bytes(model.getvalue())


def test_a_dummy_prefix_and_user_defined_pieces_are_told(tmp_path):
    tokenizer = train_sentencepiece(user_defined_symbols=["<|turn|>"])
    assert tokenizer.adds_space_prefix
    gguf_write.write(random_model(), tmp_path / "x.gguf", "TQ2_0", tokenizer=tokenizer, embedding_type="F16")
    metadata = read_metadata(tmp_path / "x.gguf")
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    user = metadata["tokenizer.ggml.tokens"].index("<|turn|>")
    assert metadata["tokenizer.ggml.token_type"][user] == 4
    with LlamaModel(tmp_path / "x.gguf", 64) as loaded:
        for sample in ("def f(x):", " two  spaces", "x = 3\n"):
            assert loaded.tokenize(sample, special=True) == tokenizer.encode(sample, bos=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "not of byte-pair kind"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes its text"),
        ({"remove_extra_whitespaces": True}, "normalizes its text"),
        ({"byte_fallback": False}, "no byte pieces"),
    ],
)
def test_vocabularies_that_llama_cpp_would_run_differently_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vocabulary(train_sentencepiece(**options), 400)


def test_a_vocabulary_of_another_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="400 tokens and the model 300 rows"):
        vocabulary(tokenizer, 300)
    with pytest.raises(ValueError, match=r"no tokenizer.ggml.tokens"):
        vocabulary({"general.name": "x"}, 300)


# llama.cpp and transformers


def compare(model: BitNetForCausalLM, data: torch.Tensor, path: Path) -> tuple[float, float]:
    """Share of positions with the same most probable token, and the ratio of the perplexities minus 1."""
    with torch.no_grad():
        ours = model(data)
    with LlamaModel(path, 128) as loaded:
        theirs = torch.stack([torch.tensor(loaded.logits(row.tolist())) for row in data])
    losses = [cross_entropy(logits[:, :-1].flatten(0, 1), data[:, 1:].flatten()) for logits in (ours, theirs)]
    return float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()), float((losses[1] - losses[0]).exp()) - 1


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F16"])
def test_llama_cpp_runs_a_ternary_model(tmp_path, ternary, tokenizer, kind):
    model, data = ternary
    gguf_write.write(model, tmp_path / "x.gguf", kind, tokenizer=tokenizer, embedding_type="F16")
    agreement, excess = compare(model, data, tmp_path / "x.gguf")
    assert agreement >= 0.95
    assert abs(excess) < 0.01


def test_llama_cpp_runs_a_float_twin(tmp_path, twin, tokenizer):
    model, data = twin
    gguf_write.write(model, tmp_path / "x.gguf", "F16", tokenizer=tokenizer)
    agreement, excess = compare(model, data, tmp_path / "x.gguf")
    assert agreement >= 0.99
    assert abs(excess) < 0.002


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": False}, {"head_dim": 32, "rope_theta": 5e5}],
    ids=["grouped", "mha", "untied", "narrow heads"],
)
@pytest.mark.parametrize("quantizer", ["none", "ternary"])
def test_llama_cpp_runs_models_without_sub_norms(tmp_path, tokenizer, quantizer, changes):
    """The order of the rotary rows, the head, and the ternary scales in the architecture llama."""
    model = random_model(sub_norm=False, quantizer=quantizer, **changes)
    gguf_write.write(model, tmp_path / "x.gguf", "F32", tokenizer=tokenizer)
    back = gguf_read.read(tmp_path / "x.gguf")
    ids = torch.arange(260, 300).view(1, 40)
    # llama.cpp leaves the activations of float files alone.
    plain = BitNetForCausalLM(model.config.replace(quantizer="none"))
    plain.load_state_dict(
        {
            n: v * 1.0 if not n.endswith("_proj.weight") or quantizer == "none" else fake(v)
            for n, v in model.state_dict().items()
        }
    )
    with torch.no_grad(), LlamaModel(tmp_path / "x.gguf", 128) as loaded:
        theirs = torch.tensor(loaded.logits(ids[0].tolist()))
        assert (plain(ids)[0] - theirs).abs().max() < 0.03  # llama.cpp keeps keys and values in float16
        assert (back(ids) - model(ids)).abs().max() < (1e-5 if quantizer == "none" else 0.2)


def fake(weight: torch.Tensor) -> torch.Tensor:
    codes, scale = quantize_ternary(weight)
    return codes * scale


def logits_of_both(path: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and llama.cpp's of one file."""
    with torch.no_grad(), LlamaModel(path, 64) as loaded:
        return gguf_read.read(path)(ids[None])[0], torch.tensor(loaded.logits(ids.tolist()))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.mark.parametrize("kind", [kind for kind in blocks.TYPES if not kind.startswith("TQ")])
def test_llama_cpp_runs_every_block_type(tmp_path, tokenizer, kind):
    """Both compute with the same weights; llama.cpp quantizes activations to 8 bits a block, which is the distance."""
    model = random_model(quantizer="none", sub_norm=kind in ("Q4_0", "Q4_K"), num_hidden_layers=1)
    gguf_write.write(model, tmp_path / "x.gguf", kind, tokenizer=tokenizer)
    stored = {info.type for info in GGUFFile(tmp_path / "x.gguf").tensors.values()}
    assert stored == {"F32", kind, kind if kind == "Q8_0" else "Q6_K"}
    ids = torch.arange(260, 300)
    ours, theirs = logits_of_both(tmp_path / "x.gguf", ids)
    assert distance(ours, theirs) < 0.04
    with torch.no_grad():
        loss = distance(ours, model(ids[None])[0])
    assert loss < {"Q2_K": 1.0, "Q3_K": 0.6}.get(kind, 0.35)  # random weights, no structure to exploit


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_L", "Q4_K_M", "Q5_1", "IQ4_NL"])
def test_files_that_llama_cpp_quantized_are_read(tmp_path, tokenizer, kind):
    gguf_write.write(random_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F32", tokenizer=tokenizer)
    quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", FILE_TYPES[kind])
    ours, theirs = logits_of_both(tmp_path / "y.gguf", torch.arange(260, 300))
    assert distance(ours, theirs) < 0.05


def test_smollm2_agrees_with_transformers(tmp_path):
    """A real model in Q4_1, its weights dequantized independently, in transformers' own class."""
    library, transformers = oracles.require("gguf"), oracles.require("transformers")
    path = oracles.smollm2()
    model = gguf_read.read(path)
    reader = library.GGUFReader(path)
    weights = {t.name: torch.from_numpy(library.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    names = {"attn_output": "self_attn.o_proj", "attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    for layer in range(30):
        for short, name in names.items():
            state[f"model.layers.{layer}.{name}.weight"] = weights[f"blk.{layer}.{short}.weight"]
        for short, heads in (("q", 9), ("k", 3)):
            rows = weights[f"blk.{layer}.attn_{short}.weight"].view(heads, 32, 2, 576)
            state[f"model.layers.{layer}.self_attn.{short}_proj.weight"] = rows.transpose(1, 2).reshape(-1, 576)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    ids = torch.randint(0, 49152, (1, 24))
    with torch.no_grad():
        assert (model(ids) - theirs.eval()(ids).logits).abs().max() < 2e-3
