"""Records of files under any name, in any layout and compression: the same documents, and bounded memory."""

import bz2
import gzip
import json
import lzma
import os
import random
import tracemalloc
from collections import Counter

import pytest

from bitnet.data import records, unpack
from bitnet.data.corpus import open_corpora, open_corpus
from bitnet.data.records import kind_of, read_records
from bitnet.data.unpack import open_unpacked
from tests import oracles

TEXTS = ["the cat \u2603 sat", 'a "quoted" {brace} [x] \\ text', "line\nline", "\U0001f600 last"]
ROWS = [{"text": text, "url": f"https://example.org/{i}", "meta": {"n": [i]}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LAYOUTS = {
    "lines": LINES,
    "unescaped lines": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
    "blank lines": "\n\n" + LINES.replace("\n", "\n\n  \n"),
    "no last newline": LINES.rstrip("\n"),
    "array": json.dumps(ROWS),
    "minified array": json.dumps(ROWS, separators=(",", ":"), ensure_ascii=False),
    "array over lines": json.dumps(ROWS, indent=1),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects without a gap": "".join(json.dumps(row, indent=2) for row in ROWS),
}


def zstd(data: bytes) -> bytes:
    return oracles.require("pyarrow").compress(data, codec="zstd", asbytes=True)


def lz4(data: bytes) -> bytes:
    return oracles.require("pyarrow").compress(data, codec="lz4", asbytes=True)


PACKED = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd, "lz4": lz4,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
}  # fmt: skip


def documents(path, **options) -> list[str]:
    return list(open_corpus(path, **options).documents())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt", "train-00000-of-00002"])
def test_json_is_read_as_records_under_any_name(tmp_path, layout, name):
    for begin in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(begin + LAYOUTS[layout].encode())
        assert kind_of(tmp_path / name) == "json"
        assert documents(tmp_path / name) == TEXTS


@pytest.mark.parametrize("kind", PACKED)
def test_compression_is_told_by_the_bytes(tmp_path, kind):
    packed = PACKED[kind](LINES.encode())
    for name in (f"a.json.{kind}", f"a.txt.{kind}", "a.jsonl", f"c4.00000-of-01024.json.{kind}", "a"):
        (tmp_path / name).write_bytes(packed)
        assert documents(tmp_path / name) == TEXTS
    # Streams behind each other are one file.
    (tmp_path / "a").write_bytes(PACKED[kind](LINES.encode()[:50]) + PACKED[kind](LINES.encode()[50:]))
    assert documents(tmp_path / "a") == TEXTS
    assert open_corpus(tmp_path / f"a.json.{kind}").name == "a"
    damaged = {"half": packed[: len(packed) // 2], "tail": packed[:-1], "more": packed + b"something else"}
    if kind == "lzma":  # its end is known by its length only
        damaged.pop("tail")
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}' as .*damaged"):
            documents(tmp_path / name)


def test_a_folder_of_compressed_files(tmp_path):
    for kind, pack in PACKED.items():
        (tmp_path / f"{kind}.jsonl.{kind}").write_bytes(pack(LINES.encode()))
    assert documents(tmp_path) == TEXTS * len(PACKED)


FOREIGN = {
    "zip": (b"PK\x03\x04" + bytes(40), "a zip archive"),
    "docx": (b"PK\x03\x04" + bytes(40), "a zip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "a 7z archive"),
    "pdf": (b"%PDF-1.7\n" + bytes(40), "a PDF.*pdftotext"),
    "db": (b"SQLite format 3\0" + bytes(40), "SQLite"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(600), "tar archive.*tar -xf"),
    "tar.gz": (gzip.compress(b"name" + bytes(253) + b"ustar\x0000" + bytes(600)), "tar archive"),
    "utf16.txt": ("\ufeffA text".encode("utf-16-le"), "UTF-16.*iconv -f utf-16"),
    "utf16-without-a-mark.txt": ("A text that goes on.".encode("utf-16-le"), "UTF-16.*iconv -f utf-16"),
    "bin": (b"\x01\x02\0\x03\x04\x05\0", "binary data"),
    "gz.gz": (gzip.compress(gzip.compress(b"text")), "gzip data inside other compressed data"),
    "csv": (b"text,label\nhello,1\n", r"table \(\.csv\).*parquet"),
    "tsv.gz": (gzip.compress(b"text\tlabel\n"), r"table \(\.tsv\)"),
    "arrow": (b"ARROW1\0\0", "an Arrow file.*parquet"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path, name):
    content, message = FOREIGN[name]
    (tmp_path / f"a.{name}").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        documents(tmp_path / f"a.{name}")
    assert "latin1" not in str(error.value)


def test_what_only_looks_like_json_is_text(tmp_path):
    for text in (
        "[1] A reference\n",
        "{ x := 5 }\n",
        "[[Category]] text",
        '"A quote."',
        "{}",
        "[]",
        '["Stop!" he said',
    ):
        (tmp_path / "a.txt").write_text(text)
        assert kind_of(tmp_path / "a.txt") == "text"
        assert documents(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["one", "two"]', r'record 1 has no string in a field "text" \(it is a str\)'),
        ('[{"text": "a"}, 5]', 'record 2 has no string in a field "text" .it is a int'),
        ('[{"text": "a"} {"text": "b"}]', "'{' where a comma or ] should be, behind 1 records"),
        ('[{"text": "a"},', r"record 2 is not JSON"),
        ('[{"text": "a"}', "ends inside its array, behind 1 records; it is truncated"),
        ('[{"text": "a"}] []', "goes on behind its array"),
        ('[{"text": "a', "record 1 is not JSON.*Unterminated"),
        ('{"data": [{"text": "a"}]}', r"\(it is an object with \['data'\]\).*--data.field"),
        ('{"text": "a"}\n{"text": "b"', "line 2 is not JSON"),
        ('{\n"text": "a"}\n{"text": "b"', "record 2 is not JSON"),
        ("[" * 100_000, "record 1 is not JSON"),
        ('{"text": ' + "[" * 100_000, "not JSON"),
        ('{"text": 1' + "0" * 5000 + "}", "not JSON"),
        ('[{"text": "\\udc00"}]', "record 1 holds half a surrogate pair"),
        ("plain words", "line 1 is not JSON"),
        ('[{"text": {"nested": "x"}}]', r'no string in a field "text" \(it is a dict\)'),
        ("\n" * (3 << 19), "bytes of blank lines in a row"),
        ('{"text": "a"}' + "\n" * (3 << 19), "bytes of blank lines in a row"),
    ],
)
def test_bad_json_names_the_place(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / "a.json")


def test_bytes_that_are_no_utf8_name_their_offset(tmp_path):
    head = b'[{"text": "' + b"x" * 3_000_000
    (tmp_path / "a.json").write_bytes(head + b'\xff"}]')
    with pytest.raises(ValueError, match=f"byte 0xff at offset {len(head)} "):
        documents(tmp_path / "a.json")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(head + b'\xff"}]'))
    with pytest.raises(ValueError, match=f"byte 0xff at offset {len(head)} of the unpacked text.*unpack it"):
        documents(tmp_path / "b.json.gz")


def test_values_across_the_borders_of_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_READ", 7)
    for layout, content in LAYOUTS.items():
        (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert documents(tmp_path / "a.json") == TEXTS, layout
    (tmp_path / "numbers.json").write_text("[123456789, 1.5e10, true, null, -7]")
    assert [value for _, value in read_records(tmp_path / "numbers.json")] == [123456789, 1.5e10, True, None, -7]


def peak_of(function) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_minified_array_is_streamed(tmp_path):
    row = json.dumps({"text": "word " * 200}, separators=(",", ":"))
    with gzip.open(tmp_path / "a.json.gz", "wt", compresslevel=1) as file:
        file.write(f"[{row}" + f",{row}" * 12_000 + "]")  # 12 MB on one line
    count = []
    peak = peak_of(lambda: count.append(sum(1 for _ in open_corpus(tmp_path / "a.json.gz").documents())))
    assert count == [12_001]
    assert peak < 10 << 20


@pytest.mark.parametrize("layout", ['{"text": "%s"}\n', '[{"text": "%s"}]', '{\n"text": "%s"}'])
def test_a_record_of_any_size_costs_little_memory(tmp_path, layout):
    begin, end = layout.split("%s")
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(begin.encode())
        for _ in range(64):
            file.write(b"a" * (1 << 20))
        file.write(end.encode())

    def read():
        with pytest.raises(ValueError, match=r"(line|record) 1 is more than 16 MiB long; cut its text"):
            documents(tmp_path / "a.jsonl.gz")

    assert peak_of(read) < 110 << 20


@pytest.mark.parametrize("layout", ["[%s]", "%s\n{}"])
def test_a_record_of_many_parts_is_refused(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(records, "_PARTS", 1 << 13)
    monkeypatch.setattr(records, "_READ", 1 << 15)
    (tmp_path / "a.json").write_text(layout % ('{"text": "x", "rest": [' + "[]," * 20_000 + "0]}"))
    with pytest.raises(ValueError, match=r"(record|line) 1 has more than 8,192 objects and arrays"):
        documents(tmp_path / "a.json")


def test_a_long_text_is_cut_like_a_file(tmp_path):
    text = "A paragraph.\n\n" * 200_000
    (tmp_path / "a.json").write_text(json.dumps([{"text": text}]))
    (tmp_path / "a.txt").write_text(text)
    pieces = documents(tmp_path / "a.json")
    assert len(pieces) == 3
    assert pieces == documents(tmp_path / "a.txt")


def test_null_texts_are_skipped_and_counted(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": "  "}, {"text": "b"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pa = oracles.require("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for path in tmp_path.iterdir():
        skipped = Counter()
        assert list(open_corpus(path).documents(skipped)) == ["a", "b"]
        assert skipped == {"null": 2, "blank": 1}


def test_the_field_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one", "text": "other"}\n')
    (tmp_path / "b.txt").write_text("words")
    assert documents(tmp_path / "a.jsonl", field="content") == ["one"]
    named, usual = (open_corpus(tmp_path / "a.jsonl", field=field).fingerprint() for field in ("content", None))
    assert named != usual
    (tmp_path / "a.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert documents(tmp_path / "a.json") == ["other"]
    open_corpora([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], field="content")
    with pytest.raises(ValueError, match="'content' is given, and 'b' is plain text"):
        open_corpora(str(tmp_path / "b.txt"), field="content")
    with pytest.raises(ValueError, match=r'no string in a field "body".*\[\'content\', \'text\'\].*--data.field'):
        documents(tmp_path / "a.jsonl", field="body")


def test_columns_of_parquet_that_hold_text_in_other_ways(tmp_path):
    pa = oracles.require("pyarrow")
    import pyarrow.parquet as pq

    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
    for number, kind in enumerate(kinds):
        column = pa.array([*TEXTS, None]).cast(kind)
        pq.write_table(pa.table({"n": range(len(column)), "body": column}), tmp_path / f"{number}.dat")
        assert documents(tmp_path / f"{number}.dat", field="body") == TEXTS, kind  # by its bytes, not its name
        (tmp_path / f"{number}.parquet.zst").write_bytes(zstd((tmp_path / f"{number}.dat").read_bytes()))
        assert documents(tmp_path / f"{number}.parquet.zst", field="body") == TEXTS
    pq.write_table(pa.table({"body": pa.array([None, None], pa.null())}), tmp_path / "null.parquet")
    assert documents(tmp_path / "null.parquet", field="body") == []
    pq.write_table(pa.table({"body": pa.array([["a"]])}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=r"'body' holds list.*not strings"):
        documents(tmp_path / "list.parquet", field="body")


def test_parquet_that_expands_beyond_reason(tmp_path, monkeypatch):
    pa = oracles.require("pyarrow")
    import pyarrow.parquet as pq

    # The same text a thousand times is one entry of a dictionary: read one at a time, it costs little.
    pq.write_table(pa.table({"text": ["word " * 8_000] * 1024}), tmp_path / "same.parquet")
    before = pa.default_memory_pool().max_memory()
    assert sum(1 for _ in open_corpus(tmp_path / "same.parquet").documents()) == 1024
    assert pa.default_memory_pool().max_memory() <= max(before, 16 << 20)
    # One that unpacks to a hundred times its size is refused before it does.
    monkeypatch.setattr(records, "_UNPACKED", 1 << 20)
    pq.write_table(
        pa.table({"text": ["a" * (2 << 20)]}), tmp_path / "large.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(ValueError, match=r"row group 0 unpacks from .* to 2,097,"):
        documents(tmp_path / "large.parquet")
    (tmp_path / "bomb.parquet.gz").write_bytes(gzip.compress(b"PAR1" + bytes(2 << 20)))
    with pytest.raises(ValueError, match="unpacks to more than"):
        documents(tmp_path / "bomb.parquet.gz")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_unpacking_costs_what_is_read(tmp_path, kind):
    (tmp_path / "a").write_bytes(PACKED[kind](bytes(16 << 20)))

    def read():
        with open_unpacked(tmp_path / "a") as unpacked:
            assert len(unpacked.read(1000)) == 1000

    assert peak_of(read) < 12 << 20  # 8 MiB are the window of xz


@pytest.mark.parametrize("kind", PACKED)
def test_noise_behind_magic_bytes_is_told_as_damage_of_their_kind(tmp_path, kind):
    """A zstd frame may then want a dictionary, which nobody has; zstd itself says the same."""
    for seed in range(20):
        (tmp_path / f"text.jsonl.{kind}").write_bytes(
            PACKED[kind](b"x")[: 6 if kind == "xz" else 4] + random.Random(seed).randbytes(4000)
        )
        with pytest.raises(ValueError, match=r"cannot read .* as (gzip|bzip2|xz|lzma|zstd|lz4)"):
            documents(tmp_path / f"text.jsonl.{kind}")


def test_an_xz_file_that_wants_much_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "_XZ_MEMORY", 1 << 20)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"some text"))
    with pytest.raises(ValueError, match=r"as xz: .*limit.*xz -6"):
        documents(tmp_path / "a.txt.xz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_would_be_waited_for_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "endless.txt").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.txt", tmp_path / "folder", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="no regular file"):
            open_corpus(path)


def test_what_of_a_folder_is_left_out_is_said(tmp_path):
    for name in ("a.txt", "b.md", "c.md", "d.csv", ".hidden.txt", "LICENSE", "sub/e.py", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    corpus = open_corpus(tmp_path)
    assert list(corpus.documents()) == ["words"]
    assert corpus.left_out.startswith("7 files of the folder left out (2 .md, ")
    for what in ("1 .csv", "1 hidden", "1 without a suffix", "1 .py", "1 dataset_info.json"):
        assert what in corpus.left_out
    (tmp_path / "sub" / "e.py").unlink()
    assert open_corpus(tmp_path / "a.txt").left_out == ""
