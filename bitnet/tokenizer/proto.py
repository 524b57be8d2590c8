"""The bytes of sentencepiece models: protobuf, of which only what is needed here is read and written.

    ModelProto: pieces 1 (piece 1, score 2, type 3), trainer_spec 2, normalizer_spec 3      (sentencepiece_model.proto)

Messages behind each other are one message, in which the last value of a field counts; so a model is changed by writing
behind it, without reading what is in front. Piece types are ggml's token types too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_NAMES = {"unknown": 45, "bos": 46, "eos": 47, "padding": 48}  # fields of trainer_spec that name a piece


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a message: int for a varint, bytes for everything else."""
    offset = 0

    def varint() -> int:
        nonlocal offset
        value = shift = 0
        while True:
            byte = data[offset]
            offset, value, shift = offset + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while offset < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        # Wire types: 1 and 5 are of fixed length, 2 has its length in front.
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[offset : offset + size]
        offset += size


def section(proto: bytes, number: int) -> bytes:
    """The message in a field, whole."""
    return b"".join(value for field, value in fields(proto) if field == number)


def user_defined(proto: bytes) -> set[int]:
    """Ids of user-defined pieces, the one kind that the sentencepiece library does not tell."""
    entries = (value for number, value in fields(proto) if number == 1)
    return {i for i, entry in enumerate(entries) if dict(fields(entry)).get(3) == USER_DEFINED}


def new_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    names: Mapping[str, str],
    *,
    add_dummy_prefix: bool,
) -> bytes:
    """A serialized model of byte-pair kind that leaves the text as it is, up to the dummy prefix.

    `names` are the pieces that are "unknown", "bos", "eos" and "padding".
    """
    parts = [_piece(*each) for each in zip(pieces, scores, types, strict=True)]
    trainer = _field(3, 2) + _field(35, BYTE in types)  # model_type BPE, byte_fallback
    trainer += b"".join(_field(number, names.get(name, "").encode()) for name, number in _NAMES.items())
    normalizer = _field(1, b"identity") + _field(3, add_dummy_prefix) + _field(4, False) + _field(5, True)
    return b"".join([*parts, _field(2, trainer), _field(3, normalizer)])


def with_pieces(
    proto: bytes, pieces: Sequence[tuple[str, int]], types: Mapping[int, int], names: Mapping[str, str]
) -> bytes:
    """A model with more pieces behind its own, (piece, type), other types of its own by id, and other `names`."""
    parts, index = [], 0
    for number, value in fields(proto):
        if number == 1:
            value += _field(3, types[index]) if index in types else b""
            index += 1
        parts.append(_field(number, value))
    parts += [_piece(piece, 0.0, kind) for piece, kind in pieces]
    changed = b"".join(_field(_NAMES[name], piece.encode()) for name, piece in names.items())
    return b"".join([*parts, _field(2, changed)] if changed else parts)


def without_dummy_prefix(proto: bytes) -> bytes:
    """A model that puts no space in front of a text."""
    return proto + _field(3, _field(3, False))


def _piece(piece: str, score: float, kind: int) -> bytes:
    return _field(1, _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind))


def _field(number: int, value: int | bytes) -> bytes:
    """One field: a varint for a number, length-delimited for bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
