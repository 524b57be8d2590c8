"""Files as they are found: compressed or not, told by their first bytes and never by their name.

    with open_unpacked(path) as stream: ...      # the bytes inside gzip, bzip2, xz, zstd or lz4, or those of the file
    check_no_foreign_kind(head, path)            # a zip archive, a PDF, UTF-16: refused by name

Nothing is unpacked into memory: whoever reads `n` bytes costs about `n`, however far a file expands. Several
compressed streams behind each other are one file, as the tools of each format write and read them; one that ends early
or goes on with something else is an error and not the end.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

HEAD_BYTES = 1 << 16
"""Of a file, that are looked at to tell what it is."""
_BLOCK = 1 << 16
_XZ_MEMORY = 256 << 20

SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4")
"""Of compressed files that are read, behind the suffix of what is in them."""

_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x5d\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip
_SKIPPABLE = tuple(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))  # a zstd or lz4 frame that holds no data

_FOREIGN = {
    b"PK\x03\x04": "a zip archive (or an office document)", b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a rar archive", b"LZIP": "an lzip file",
    b"\x1f\x9d": "a file of `compress` (.Z)", b"%PDF": "a PDF", b"SQLite format 3\0": "an SQLite database",
    b"ARROW1": "an Arrow file", b"FEA1": "a Feather file", b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF model", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle", b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"{\\rtf": "an RTF text",
    b"ORC": "an ORC file", b"Obj\x01": "an Avro file",
}  # fmt: skip
_REMEDY = {
    "a PDF": "extract its text, e.g. with pdftotext",
    "an RTF text": "save it as plain text",
    "an Arrow file": "write it as parquet",
    "a Feather file": "write it as parquet",
}


class _Streams(io.RawIOBase):
    """The streams of bz2 or lzma decompressors in a file, joined. The libraries' own files take no limit of memory, and
    what follows a stream for its end."""

    def __init__(self, file: BinaryIO, make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]):
        self._file, self._make, self._decompressor = file, make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._decompressor.eof:
                rest = self._decompressor.unused_data.lstrip(b"\0")  # xz allows zeros in between
                while not rest:
                    if not (rest := self._file.read(_BLOCK)):
                        return 0
                    rest = rest.lstrip(b"\0")
                self._decompressor = self._make()
            else:
                rest = self._file.read(_BLOCK) if self._decompressor.needs_input else b""
                if not rest and self._decompressor.needs_input:
                    raise EOFError("it ends inside its compressed data")
            if data := self._decompressor.decompress(rest, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


def compression_of(file: Path) -> str | None:
    """The name of a file's compression, by its first bytes. Raises ValueError for one that its name promises and its
    bytes are not, and for what is no regular file, which would be waited for. OSError."""
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is no regular file (a pipe, a device or a link to nothing); give a file")
    with open(file, "rb") as stream:
        head = stream.read(8)
        if head[:4] in _SKIPPABLE:
            return "zstd" if _first_frame(stream, head) != b"\x04\x22\x4d\x18" else "lz4"
    name = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if name is None and head and file.suffix.lower() in SUFFIXES:
        raise ValueError(
            f"cannot read {str(file)!r}: it is called {file.suffix} and begins with {head!r}, so it is not compressed "
            f"like that; rename it, or fetch it again if it is damaged"
        )
    return name


def _first_frame(stream: BinaryIO, head: bytes) -> bytes:
    """The first bytes behind skippable frames; a few of them are looked at."""
    for _ in range(16):
        if head[:4] not in _SKIPPABLE or len(head) < 8:
            break
        stream.seek(int.from_bytes(head[4:8], "little"), io.SEEK_CUR)
        head = stream.read(8)
    return head[:4]


@contextmanager
def open_unpacked(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked while they are read. Raises ValueError, naming the file, also for what goes wrong
    with reading inside the block."""
    kind = None
    try:
        kind = compression_of(file)
        with open(file, "rb") as packed:
            yield packed if kind is None else _unpacked(packed, kind, file)
    except lzma.LZMAError as error:
        hint = "; pack it again with `xz -6`" if "limit" in str(error).lower() else ""
        raise _damaged(file, kind, f"{error}{hint}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(file, kind, str(error)) from error


def _damaged(file: Path, kind: str | None, reason: str) -> ValueError:
    return ValueError(
        f"cannot read {str(file)!r}{f' as {kind}' if kind else ''}: {reason}; check its permissions, or fetch it again "
        "if it is damaged"
    )


def _unpacked(packed: BinaryIO, kind: str, file: Path) -> BinaryIO:
    if kind == "gzip":
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=packed)), _BLOCK)
    if kind == "bzip2":
        return io.BufferedReader(_Streams(packed, bz2.BZ2Decompressor), _BLOCK)
    if kind in ("xz", "lzma"):
        return io.BufferedReader(_Streams(packed, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)), _BLOCK)
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{str(file)!r} is {kind}-compressed, and unpacking it needs pyarrow: pip install pyarrow, or unpack it "
            f"with `{kind} -d`"
        ) from error
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), kind), _BLOCK)


def unpacked_name(name: str) -> str:
    """A file's name without the suffixes of compression."""
    while name.lower().endswith(SUFFIXES):
        name = name[: name.rindex(".")]
    return name


def check_no_foreign_kind(head: bytes, file: Path) -> None:
    """Raise ValueError for the beginning of a file, unpacked, that is neither text nor parquet, saying what it is."""
    what = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None)
    inner = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    remedy = _REMEDY.get(what or "", "unpack it, and give the texts that are in it")
    if what is None and inner is not None:
        what, remedy = f"{inner} data inside other compressed data", "unpack it once"
    elif what is None and head[257:262] == b"ustar":
        what, remedy = "a tar archive", "unpack it with `tar -xf`, and give the folder"
    elif what is None and (head.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in head and _wide(head))):
        what, remedy = "text in UTF-16 or UTF-32", f"convert it: iconv -f utf-16 -t utf-8 {file.name} > new-{file.name}"
    elif what is None and b"\0" in head:
        what, remedy = f"binary data (it begins with {head[:8]!r} and has a zero byte)", "give the text in it"
    if what is not None:
        raise ValueError(f"{str(file)!r} is {what}, not text; {remedy}")


def _wide(head: bytes) -> bool:
    """Whether the bytes look like Latin letters of two bytes each."""
    zeros = [head[place::2].count(0) for place in (0, 1)]
    return max(zeros) > len(head) // 4 and min(zeros) < len(head) // 16
