"""GGUF files as containers, against other readers, and hostile ones."""

import ctypes
import struct
from pathlib import Path

import numpy as np
import pytest

from bitnet.storage.gguf.container import NUMBERS, TYPES, GGUFError, GGUFFile, TensorToWrite, write_file
from tests import oracles
from tests.oracles import ggml as ggml_oracle
from tests.timing import within


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


def array(kind: int, count: int, content: bytes) -> bytes:
    return string(b"k") + struct.pack("<IIQ", 9, kind, count) + content


MILLIONS = {
    "tensors": (3_000_000, 0, bytes(96_000_000), "announces 3000000 tensors, and 65536 is the most"),
    "values": (0, 3_000_000, bytes(40_000_000), "announces 3000000 metadata values, and 65536 is the most"),
    "strings": (0, 1, array(8, 3_000_000, bytes(24_000_000)), "announces 3000000 elements of k"),
    "together": (0, 2, array(7, 2_000_000, bytes(2_000_000)) + array(7, 10**5, bytes(10**5)), "k' appears twice"),
    "a length": (0, 1, array(8, 2, string(b"a") + struct.pack("<Q", 1 << 63)), "in string 1 of k"),
}


@pytest.mark.parametrize("case", MILLIONS)
def test_headers_of_millions_of_entries_take_no_time(tmp_path, case):
    tensors, values, body, message = MILLIONS[case]
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + body)

    def refused() -> None:
        with pytest.raises(GGUFError, match=message):
            GGUFFile(tmp_path / "x.gguf")

    within(1, refused)


def test_a_vocabulary_as_large_as_any_is_read_at_once(tmp_path):
    words = [f"\u2581{i}" for i in range(300_000)]
    write_file(tmp_path / "x.gguf", {"tokens": words, "flags": [True, False] * 1000}, [])
    file = within(2, lambda: GGUFFile(tmp_path / "x.gguf"))
    assert file.metadata["tokens"] == words
    assert file.metadata["flags"] == [True, False] * 1000
