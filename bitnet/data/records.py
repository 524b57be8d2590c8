"""Records of files: lines of JSON, arrays of JSON, rows of parquet; by any name, compressed or not, one at a time.

    kind = kind_of(path)                         # "text", "json" or "parquet", by the file's contents
    for where, record in read_records(path): ... # dict, list, str, ...; `where` says where it stands

A file is JSON if its name says so (.json, .jsonl, .ndjson) or its first bytes do: an object that begins with a name, or
an array of these. Its values may stand one on a line, behind each other in any layout, or in one array, minified or
not; they are read as they come, so that only one is in memory. Memory is bounded whatever the file holds: a record of
more than 16 MiB is refused, as are parquet files that unpack to a hundred times their size.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from bitnet.data.unpack import HEAD_BYTES, check_no_foreign_kind, compression_of, open_unpacked, unpacked_name

if TYPE_CHECKING:
    import pyarrow

Kind = Literal["text", "json", "parquet"]
RECORD_BYTES = 16 << 20
"""Most of one record."""
_PARTS = 1 << 21  # objects and arrays in one record: an empty one is 2 bytes of JSON, and 64 in memory
_READ = 1 << 20
_EXPANSION = 100
_UNPACKED = 64 << 20

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines", ".jl")
TEXT_SUFFIXES = (".txt", ".text")
DATA_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")
_TABLES = (".csv", ".tsv", ".psv", ".xls", ".xlsx", ".ods")
_STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
_ENDS = (*", ]\t\r\n",)
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_JSON_START = re.compile(rf"\s*(?:\{{\s*{_STRING}\s*:|\[[\s\[]*(?:\{{\s*{_STRING}\s*:|{_STRING}\s*,))")


def suffix_of(name: str) -> str:
    """The suffix that says what a file holds, in small letters, without those of compression."""
    return Path(unpacked_name(name)).suffix.lower()


def kind_of(file: Path) -> Kind:
    """What a file holds, by its name and its first bytes. Raises ValueError, naming the file and the remedy, for what
    is neither text nor records, and for what cannot be read."""
    suffix = suffix_of(file.name)
    if suffix in _TABLES:
        raise ValueError(
            f"{str(file)!r} is a table ({suffix}), of which nobody says which column holds the text; write it as "
            "parquet or JSON lines, e.g. with pandas: read_csv(...).to_parquet(...), and name the column with "
            "--data.field"
        )
    with open_unpacked(file) as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    check_no_foreign_kind(head, file)
    start = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    return "json" if suffix in JSON_SUFFIXES or _JSON_START.match(start) else "text"


def read_records(file: Path, field: str | None = None) -> Iterator[tuple[str, object]]:
    """The records of a file of the kind "json" or "parquet", each behind the words that say where it stands.

    field: the one column that is wanted of a parquet file, which must hold strings. Raises ValueError naming the place
    of what is damaged, too large, no JSON or no UTF-8.
    """
    if kind_of(file) == "parquet":
        yield from _parquet_rows(file, field)
        return
    with open_unpacked(file) as stream:
        yield from _json_values(stream, file)


def decode(raw: bytes, file: Path, offset: int) -> str:
    """Bytes of a file from `offset` on as text, without a byte order mark. Raises ValueError naming the first that is
    no UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(raw, error, file, offset) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def not_utf8(raw: bytes, error: UnicodeDecodeError, file: Path, offset: int) -> ValueError:
    """What is said of bytes that are no UTF-8."""
    packed = compression_of(file) is not None
    return ValueError(
        f"{str(file)!r} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        f"{' of the unpacked text' if packed else ''} ({error.reason}); {'unpack it and ' if packed else ''}convert "
        f"it, e.g. iconv -f latin1 -t utf-8 {unpacked_name(file.name)} > new-{unpacked_name(file.name)}, or drop the "
        "bad bytes: iconv -c -f utf-8 -t utf-8"
    )


def _json_values(stream: BinaryIO, file: Path) -> Iterator[tuple[str, object]]:
    """Lines, where the first one holds a whole value, else values in any layout; or the elements of an array."""
    offset, number, line = 0, 1, stream.readline(_READ)
    while line and not line.removeprefix(codecs.BOM_UTF8).strip():
        offset, number, line = offset + len(line), number + 1, stream.readline(_READ)
        _check_blank(offset, file)
    start = line.removeprefix(codecs.BOM_UTF8).strip()
    if start[:1] == b"[" or (start[:1] == b"{" and not _is_json(start)):  # or the line goes on
        yield from _Values(line, stream, file, offset).read()
    else:
        yield from _json_lines(line, stream, file, offset, number)


def _check_blank(size: int, file: Path) -> None:
    if size > _READ:
        raise ValueError(f"{str(file)!r} has more than {_READ:,} bytes of blank lines in a row; is it damaged?")


def _is_json(line: bytes) -> bool:
    try:
        return bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _json_lines(line: bytes, stream: BinaryIO, file: Path, offset: int, number: int) -> Iterator[tuple[str, object]]:
    name, blank = repr(str(file)), 0
    while line:
        where = f"{name} line {number}"
        if len(line) > RECORD_BYTES:
            raise _too_large(where)
        text = decode(line, file, offset)
        if not text.strip():
            blank += len(line)
            _check_blank(blank, file)
        else:
            blank = 0
            _check_parts(text, where)
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error}); each line must be an object") from error
        offset, number = offset + len(line), number + 1
        line = stream.readline(RECORD_BYTES + 1)


def _too_large(where: str) -> ValueError:
    return ValueError(
        f"{where} is more than {RECORD_BYTES >> 20} MiB long; cut its text into several records, or give it as a .txt "
        "file, which may have any size"
    )


def _check_parts(text: str, where: str) -> None:
    if len(text) > _READ and text.count("[") + text.count("{") > _PARTS:
        raise ValueError(f"{where} has more than {_PARTS:,} objects and arrays; keep the text of it and little else")


class _Values:
    """JSON values behind each other, or in an array, from a window of the text that grows with the longest one."""

    def __init__(self, start: bytes, stream: BinaryIO, file: Path, offset: int):
        self._start, self._stream, self._file, self._offset = start, stream, file, offset
        self._decoder, self._json = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self._text, self._at, self._count = "", 0, 0
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def _more(self) -> bool:
        """Read on, as much again as there is, up to the size of a record; False at the end."""
        left = len(self._text) - self._at
        raw = self._start or self._stream.read(min(max(_READ, left), max(_READ, RECORD_BYTES + 1 - left)))
        self._start = b""
        pending = self._decoder.getstate()[0]
        try:
            more = self._decoder.decode(raw, not raw)
        except UnicodeDecodeError as error:
            raise not_utf8(pending + raw, error, self._file, self._offset - len(pending)) from error
        self._offset += len(raw)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(raw)

    def _next(self) -> str:
        """The next character that is no space, not taken; "" at the end."""
        while True:
            found = _NO_SPACE.search(self._text, self._at)
            self._at = found.start() if found else len(self._text)
            if found or not self._more():
                return found[0] if found else ""

    def read(self) -> Iterator[tuple[str, object]]:
        array = self._next() == "["
        self._at += array
        while True:
            character = self._next()
            if not array and not character:
                return
            if array and (character == "]" or (self._count and character != ",")):
                break
            if array and self._count:
                self._at += 1
                self._next()
            self._count += 1
            yield self._where(), self._value()
        if character != "]":
            reason = "ends inside its array" if not character else f"has {character!r} where a comma or ] should be"
            raise ValueError(
                f"{str(self._file)!r} {reason}, behind {self._count} records; it is truncated or damaged, fetch it "
                "again"
            )
        self._at += 1
        if self._next():
            raise ValueError(
                f"{str(self._file)!r} goes on behind its array; put all records into one, or one on a line"
            )

    def _where(self) -> str:
        return f"{str(self._file)!r} record {self._count}"

    def _value(self) -> object:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                # A number at the end of what was read may go on.
                if isinstance(value, dict | list | str) or self._text[end : end + 1] in _ENDS or not self._more():
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                place = getattr(error, "pos", 0)
                cut = len(self._text) - place < 16 or "Unterminated string" in str(error)
                if cut and len(self._text) - self._at > RECORD_BYTES:
                    raise _too_large(self._where()) from error
                if not cut or not self._more():
                    raise ValueError(f"{self._where()} is not JSON ({error}); a record must be an object") from error
                _check_parts(self._text, self._where())


def _parquet_rows(file: Path, field: str | None) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading {str(file)!r} needs pyarrow, which is not installed: pip install pyarrow") from error
    with open_unpacked(file) as stream, tempfile.TemporaryFile() as unpacked:
        if compression_of(file):  # parquet is read from its end, and a stream cannot seek
            limit = file.stat().st_size * _EXPANSION + _UNPACKED
            while block := stream.read(_READ):
                unpacked.write(block)
                if unpacked.tell() > limit:
                    raise ValueError(f"{str(file)!r} unpacks to more than {limit:,} bytes; unpack it yourself first")
            stream = cast(BinaryIO, unpacked)
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            if field:
                _check_column(table.schema_arrow, field)
                # As a dictionary, a value that many rows have is in memory once.
                table = pyarrow.parquet.ParquetFile(stream, metadata=table.metadata, read_dictionary=[field])
            number = 0
            for group in range(table.num_row_groups):
                rows = _rows_at_once(table.metadata.row_group(group), field, group)
                for batch in table.iter_batches(rows, [group], [field] if field else None):
                    names = batch.schema.names
                    for values in zip(*batch.columns, strict=True):
                        number += 1
                        record = {name: value.as_py() for name, value in zip(names, values, strict=True)}
                        yield f"{str(file)!r} row {number}", record
        except (ValueError, OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"cannot read {str(file)!r} as parquet: {error}") from error


def _check_column(schema: pyarrow.Schema, field: str) -> None:
    if field not in schema.names:
        raise ValueError(
            f"it has no column {field!r} but {schema.names}; name the one that holds the text with --data.field"
        )
    kind = schema.field(field).type
    held = str(kind.value_type if hasattr(kind, "value_type") and hasattr(kind, "index_type") else kind)
    if held not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null"):
        raise ValueError(f"its column {field!r} holds {held}, not strings; name another one with --data.field")


def _rows_at_once(group: Any, field: str | None, number: int) -> int:
    """Rows whose values fit into little memory, of a row group. Raises ValueError for one that expands beyond reason:
    its pages would be unpacked whole."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if field in (None, chunk.path_in_schema)]
    full = sum(chunk.total_uncompressed_size for chunk in chunks)
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    if full > _UNPACKED and full > packed * _EXPANSION:
        raise ValueError(
            f"its row group {number} unpacks from {packed:,} to {full:,} bytes; if that is no accident, write it again "
            "with smaller row groups"
        )
    # A row of several columns, which are no dictionaries in memory, may hold as much as the whole group unpacks to.
    return min(1024, max(1, (group.num_rows * _READ if field else _UNPACKED // 4) // max(1, full)))
