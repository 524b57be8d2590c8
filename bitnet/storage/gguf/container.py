"""The GGUF container: a strict reader whose work is bounded by the file's size, and a writer that streams.

    magic "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata     key string | value type u32 | value            string: length u64, UTF-8 bytes
    tensor info  name string | dimensions u32 | sizes u64, the innermost first | type u32 | offset u64
    padding to general.alignment (32) | tensor data, each at its offset from here, padded likewise

Source: ggml's gguf.md. Everything is little-endian. The reader takes nothing on trust: every count is held against
the bytes that are left before anything is allocated, and a file with duplicate names, nested arrays, overlapping or
misaligned tensors, or text that is not UTF-8 is refused. Tensor data is mapped, not read.

Shapes are torch's, outermost first: `[out_features, in_features]` for a weight.
"""

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitnet.files import JsonObject, replacing

MAGIC = b"GGUF"
ALIGNMENT = 32
MAX_ITEMS = 1 << 21
"""Elements of all metadata arrays together; the largest vocabularies have 1.3 million, merges and scores included."""
MAX_ENTRIES = 1 << 16
"""Metadata values, and tensors; the largest models have some thousands."""

# Type number: name, weights in a block, bytes of a block. I2_S is bitnet.cpp's, in a number that ggml has retired.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 20: ("IQ4_NL", 32, 18), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    36: ("I2_S", 128, 32), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18), 142: ("PQ2_0", 128, 34),
    143: ("PTQ1_0", 128, 28),
}  # fmt: skip
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
I2_S_TAIL = 32  # bytes behind the codes of a whole I2_S tensor; the first four are its scale

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class GGUFError(ValueError):
    """A file that is not GGUF, is damaged, or holds what is not supported; the message says which."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: torch's shape, ggml's name of its type, and where its bytes are in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    nbytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises GGUFError where the rows are not a multiple of the type's block."""
    _, block, size = TYPES[NUMBERS[type_name]]
    # I2_S blocks run through the whole tensor, every other type's through one row.
    total = math.prod(shape)
    if (total if type_name == "I2_S" else shape[-1]) % block:
        raise GGUFError(f"a tensor of shape {list(shape)} cannot be {type_name}: rows are no multiple of {block}")
    return total // block * size + (I2_S_TAIL if type_name == "I2_S" else 0)


class GGUFFile:
    """An opened file: `metadata` (key to int, float, bool, str or list), `tensors` (name to TensorInfo, in the file's
    order), `alignment`, `version`, and `data(name)`, the bytes of a tensor as a view of the mapped file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises GGUFError, naming the file, for anything but a well-formed file."""
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise GGUFError(f"{self.path} has {self.size} bytes and is no GGUF file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise GGUFError(f"{self.path} cannot be read: {error.strerror or error}") from error
        try:
            self._parse()
        except GGUFError as error:
            raise GGUFError(f"{self.path}: {error}") from None

    @property
    def architecture(self) -> str:
        """`general.architecture`, or "" where the file names none."""
        value = self.metadata.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `[nbytes]`: a private view of the mapped file, read from disk when touched."""
        info = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.start)

    def _parse(self) -> None:
        cursor = _Cursor(self._map)
        magic = cursor.take(4)
        if magic != MAGIC:
            raise GGUFError(f"it begins with {magic!r} and not with {MAGIC!r}: it is no GGUF file")
        self.version = cursor.unpack("<I")
        if self.version not in (2, 3):
            # Version 3 in the other byte order reads as 0x03000000.
            swapped = self.version & 0xFFFF == 0
            raise GGUFError(
                "it is big-endian, and only little-endian files are read"
                if swapped
                else f"its version is {self.version}, and 2 and 3 are read; convert it again with a newer llama.cpp"
            )
        # Counts from the file: each is held against the bytes that are left before a loop of that length runs.
        tensors, values = cursor.unpack("<Q"), cursor.unpack("<Q")
        cursor.expect(values, 13, "metadata values", MAX_ENTRIES)  # an empty key, a type and one byte
        self.metadata: JsonObject = {}
        for _ in range(values):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                raise GGUFError(f"the metadata key {key!r} appears twice")
            self.metadata[key] = cursor.value(key)
        self.alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(self.alignment) is not int or self.alignment not in (1 << i for i in range(3, 21)):
            raise GGUFError(f"general.alignment is {self.alignment!r:.40}; it must be a power of two from 8 on")
        cursor.expect(tensors, 32, "tensors", MAX_ENTRIES)
        infos = [_tensor_info(cursor) for _ in range(tensors)]
        base = -(-cursor.offset // self.alignment) * self.alignment
        infos = self._told_apart(infos, base)
        self.tensors = {info.name: info for info in (self._placed(info, base) for info in infos)}
        if len(self.tensors) != len(infos):
            raise GGUFError("two tensors have the same name")
        self._check_overlap()

    def _told_apart(self, infos: list[TensorInfo], base: int) -> list[TensorInfo]:
        """The tensors, those of number 42 as PQ2_0 where it is that type's bytes that fill the file.

        PrismML's files have blocks of 128 weights under the number that llama.cpp gave to blocks of 64.
        """
        starts = [*sorted(info.start for info in infos), self.size - base]
        following = dict(pairwise(starts))

        def fits(info: TensorInfo, kind: str) -> bool:
            whole = info.shape[-1] % TYPES[NUMBERS[kind]][1] == 0
            return whole and 0 <= following[info.start] - info.start - tensor_bytes(kind, info.shape) < self.alignment

        unclear = [info for info in infos if info.type == "Q2_0"]
        if all(fits(info, "Q2_0") for info in unclear) or not all(fits(info, "PQ2_0") for info in unclear):
            return infos
        return [
            replace(info, type="PQ2_0", nbytes=tensor_bytes("PQ2_0", info.shape)) if info.type == "Q2_0" else info
            for info in infos
        ]

    def _placed(self, info: TensorInfo, base: int) -> TensorInfo:
        """The tensor at its absolute place, once that is known to lie in the file."""
        if info.start % self.alignment:
            raise GGUFError(f"the offset {info.start} of {info.name} is no multiple of the alignment {self.alignment}")
        if base + info.start + info.nbytes > self.size:
            raise GGUFError(
                f"{info.name} ends at byte {base + info.start + info.nbytes} of a file of {self.size}: "
                "the file is truncated or damaged; download or write it again"
            )
        return TensorInfo(info.name, info.shape, info.type, base + info.start, info.nbytes)

    def _check_overlap(self) -> None:
        end, previous = 0, ""
        for info in sorted(self.tensors.values(), key=lambda info: info.start):
            if info.start < end:
                raise GGUFError(f"the tensors {previous} and {info.name} overlap")
            end, previous = info.start + info.nbytes, info.name


class _Cursor:
    """Reads forward through a buffer and never past its end."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.offset, self.items = buffer, 0, 0

    def take(self, count: int) -> bytes:
        if count > len(self.buffer) - self.offset:
            raise GGUFError(
                f"it ends inside its header: {count} bytes are needed at byte {self.offset} of {len(self.buffer)}"
            )
        self.offset += count
        return self.buffer[self.offset - count : self.offset]

    def unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def expect(self, count: int, smallest: int, what: str, most: int = MAX_ITEMS) -> None:
        """Refuse a count that the bytes which are left cannot hold, or that no file has: reading them takes time."""
        if count > most:
            raise GGUFError(f"it announces {count} {what}, and {most} is the most that is read; it is damaged")
        if count * smallest > len(self.buffer) - self.offset:
            raise GGUFError(f"it announces {count} {what}, more than {len(self.buffer)} bytes can hold")

    def string(self, what: str) -> str:
        length = self.unpack("<Q")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{what} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.unpack("<I")
        if kind != _ARRAY:
            return self._scalar(kind, key)
        kind, count = self.unpack("<I"), self.unpack("<Q")
        if kind == _ARRAY:
            raise GGUFError(f"{key} is an array of arrays, which no tool reads")
        size = struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else 8
        self.expect(count, size, f"elements of {key}")
        # All arrays together: many small ones cost as much as a large one.
        self.items += count
        if self.items > MAX_ITEMS:
            raise GGUFError(f"its metadata arrays have over {MAX_ITEMS} elements")
        if kind == _STRING:
            return self._strings(count, key)
        if kind not in _SCALARS:
            raise GGUFError(f"{key} has the unknown value type {kind}")
        if kind == _BOOL:
            return (np.frombuffer(self.take(count), np.uint8) != 0).tolist()
        return np.frombuffer(self.take(count * size), _SCALARS[kind]).tolist()

    def _strings(self, count: int, key: str) -> list[str]:
        """`string` that often; written out, since vocabularies are long."""
        buffer, offset, length_at, strings = self.buffer, self.offset, struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                start = offset + 8
                offset = start + length_at(buffer, offset)[0]
                text = buffer[start:offset]
                if len(text) != offset - start:
                    break
                strings.append(text.decode("utf-8"))
        except struct.error:
            pass
        except UnicodeDecodeError:
            raise GGUFError(f"a string of {key} is not UTF-8") from None
        if len(strings) != count:
            raise GGUFError(f"it ends inside its header, in string {len(strings)} of {key}")
        self.offset = offset
        return strings

    def _scalar(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"a string of {key}")
        if kind not in _SCALARS:
            raise GGUFError(f"{key} has the unknown value type {kind}")
        if kind == _BOOL:
            return self.unpack("<B") != 0
        return self.unpack(_SCALARS[kind])


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """A tensor's entry, with `start` still relative to the data section."""
    name = cursor.string("a tensor's name")
    dimensions = cursor.unpack("<I")
    if not 1 <= dimensions <= 4:
        raise GGUFError(f"{name} has {dimensions} dimensions, and 1 to 4 are possible")
    sizes = [cursor.unpack("<Q") for _ in range(dimensions)]
    number, start = cursor.unpack("<I"), cursor.unpack("<Q")
    if number not in TYPES:
        raise GGUFError(f"{name} has the unknown type {number}; known are {', '.join(NUMBERS)}")
    shape = tuple(reversed(sizes))
    if 0 in shape:
        raise GGUFError(f"{name} has the shape {list(shape)}, which is empty")
    return TensorInfo(name, shape, TYPES[number][0], start, tensor_bytes(TYPES[number][0], shape))


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor for `write_file`; `make` returns its bytes, uint8, when their turn comes."""

    name: str
    shape: tuple[int, ...]
    type: str
    make: Callable[[], np.ndarray]


def write_file(
    path: str | os.PathLike[str], metadata: JsonObject, tensors: Iterable[TensorToWrite], alignment: int = ALIGNMENT
) -> None:
    """Write a file, whole or not at all, one tensor in memory at a time.

    An int becomes UINT32 (INT32 if negative), a float FLOAT32, and a list an array of INT32, FLOAT32, BOOL or STRING
    after its first element. Raises GGUFError for names that appear twice or a `make` of the wrong length, and OSError.
    """
    tensors = list(tensors)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError("two tensors have the same name")
    sizes = [tensor_bytes(tensor.type, tensor.shape) for tensor in tensors]
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    header += [_packed_string(key) + _packed_value(key, value) for key, value in metadata.items()]
    offset = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        header.append(_packed_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
        header.append(struct.pack(f"<{len(tensor.shape)}QIQ", *reversed(tensor.shape), NUMBERS[tensor.type], offset))
        offset += size + -size % alignment
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        _write_padded(file, b"".join(header), alignment)
        for tensor, size in zip(tensors, sizes, strict=True):
            data = tensor.make()
            if data.dtype != np.uint8 or data.size != size:
                raise GGUFError(f"{tensor.name}: {size} bytes were announced, {data.nbytes} of {data.dtype} made")
            _write_padded(file, np.ascontiguousarray(data).data, alignment)


def _write_padded(file: BinaryIO, data: bytes | memoryview, alignment: int) -> None:
    file.write(data)
    file.write(bytes(-len(data) % alignment if isinstance(data, bytes) else -data.nbytes % alignment))


def _packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_value(key: str, value: Any) -> bytes:
    if isinstance(value, list):
        if not value:
            raise GGUFError(f"the list {key} is empty, so its type is unknown; leave the key out")
        kind = 5 if type(value[0]) is int else _kind(key, value[0])
        if kind == _STRING:
            body = b"".join(_packed_string(item) for item in value)
        else:
            body = struct.pack(f"<{len(value)}{_SCALARS[kind][1]}", *value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body
    kind = _kind(key, value)
    body = _packed_string(value) if kind == _STRING else struct.pack(_SCALARS[kind], value)
    return struct.pack("<I", kind) + body


def _kind(key: str, value: object) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return 4 if value >= 0 else 5
    if isinstance(value, (float, str)):
        return 6 if isinstance(value, float) else _STRING
    raise GGUFError(f"{key} is a {type(value).__name__}, which GGUF metadata cannot hold")
