"""bitnet.data: corpora of every kind, bad input, tokenizing once, splits, windows."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitnet.data import tokens_write
from bitnet.data.corpus import Corpus, open_corpus
from bitnet.data.feed import TextFeed
from bitnet.data.tokens import IGNORE_INDEX, TokenArray, TokenizedCorpus, iter_eval_batches
from bitnet.data.tokens_write import cut_text, is_validation, tokenize_corpus
from bitnet.tokenizer import Tokenizer
from tests.vocabularies import stdlib_tokenizer


def corpus_of(documents: list[str], name: str = "made") -> Corpus:
    return Corpus(name, read=lambda: iter(documents), identify=lambda: json.dumps(documents))


def numbered(count: int) -> list[str]:
    return [f"Document {i} says {'something ' * (i % 7)}and ends.\n" for i in range(count)]


def documents_of(tokens: TokenArray, tokenizer: Tokenizer) -> list[str]:
    """The texts between <s> and </s>; asserts that the stream is made of such documents only."""
    ids = tokens.read(0, len(tokens)).tolist()
    texts, current = [], None
    for i in ids:
        if i == tokenizer.bos_id:
            assert current is None
            current = []
        elif i == tokenizer.eos_id:
            texts.append(tokenizer.decode(current))
            current = None
        else:
            current.append(i)
    assert current is None
    return texts


def test_empty_file_and_folders(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.txt' is empty"):
        open_corpus(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="is empty"):
        open_corpus(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.txt, \.jsonl or \.parquet"):
        open_corpus(tmp_path / "nothing")
    (tmp_path / "nothing" / "book.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"it has 'book\.pdf'"):
        open_corpus(tmp_path / "nothing")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    with pytest.raises(ValueError, match="'blank' holds no text"):
        tokenize_corpus(open_corpus(tmp_path / "blank.txt"), tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_corpus_too_short_to_split(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="has 5 characters, too few"):
        tokenize_corpus(corpus_of(["short"]), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"val_fraction": 0}, {"val_fraction": 0.9}, {"shard_tokens": 0}])
def test_bad_settings(tmp_path, tokenizer, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tokenize_corpus(corpus_of(numbered(30)), tokenizer, tmp_path, **bad)


def test_split_is_by_document_and_loses_nothing(tmp_path, tokenizer):
    texts = numbered(200)
    tokenized = tokenize_corpus(corpus_of(texts), tokenizer, tmp_path)
    train, val = (documents_of(tokenized.split(split), tokenizer) for split in ("train", "val"))
    assert len(val) == 10
    assert len(train) == 190
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(texts)
    assert train == [t for i, t in enumerate(texts) if not is_validation(i, 20)]  # in order
    for split, documents in (("train", train), ("val", val)):
        entry = tokenized.meta["splits"][split]
        assert entry["documents"] == len(documents)
        assert entry["bytes"] == sum(len(d.encode()) for d in documents)
        assert entry["tokens"] == len(tokenized.split(split))
        assert tokenized.bytes_per_token(split) == entry["bytes"] / entry["tokens"]


@pytest.mark.parametrize("every", [2, 3, 20, 100])
def test_every_row_of_documents_has_one_held_out(every):
    chosen = [[i for i in range(row * every, (row + 1) * every) if is_validation(i, every)] for row in range(50)]
    assert all(len(row) == 1 for row in chosen)
    assert len({row[0] % every for row in chosen}) > 1  # not always at the same place


@pytest.mark.parametrize("texts", [["word " * 5000], ["Line.\n\nNext.\n" * 300], numbered(5), ["\u00e9" * 40]])
def test_few_documents_are_cut_for_the_split(tmp_path, tokenizer, texts):
    tokenized = tokenize_corpus(corpus_of(texts), tokenizer, tmp_path)
    train, val = (documents_of(tokenized.split(split), tokenizer) for split in ("train", "val"))
    assert train
    assert val
    assert sum(map(len, train + val)) == sum(map(len, texts))
    assert sum(map(len, val)) < 0.15 * sum(map(len, texts))


def test_val_fraction_is_respected(tmp_path, tokenizer):
    tokenized = tokenize_corpus(corpus_of(numbered(400)), tokenizer, tmp_path, val_fraction=0.25)
    assert tokenized.meta["splits"]["val"]["documents"] == 100


@pytest.mark.parametrize("text", ["", "x" * 1000, "a b " * 300, "para\n\n" * 200, "line\n" * 200, "\n" * 500])
@pytest.mark.parametrize("size", [1, 2, 7, 100, 5000])
def test_cut_text_joins_and_is_bounded(text, size):
    pieces = list(cut_text(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces) or text == ""


def test_files_do_not_depend_on_workers(tmp_path, tokenizer):
    texts = [*numbered(100), "long " * 5000]
    folders = [
        tokenize_corpus(corpus_of(texts), tokenizer, tmp_path / str(workers), workers=workers).folder
        for workers in (1, 2, 5)
    ]
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    assert len({folder.name for folder in folders}) == 1


def test_shards_read_as_one_array(tmp_path, tokenizer):
    texts = numbered(60)
    whole = tokenize_corpus(corpus_of(texts), tokenizer, tmp_path / "whole")
    parts = tokenize_corpus(corpus_of(texts), tokenizer, tmp_path / "parts", shard_tokens=37)
    assert [s["tokens"] for s in parts.meta["splits"]["train"]["shards"][:-1]] == [37] * (
        len(whole.split("train")) // 37
    )
    for split in ("train", "val"):
        one, many = whole.split(split), parts.split(split)
        everything = one.read(0, len(one))
        assert len(many) == len(one)
        assert np.array_equal(many.read(0, len(many)), everything)
        for start in (0, 1, 36, 37, 38, len(one) - 5):
            for length in (0, 1, 2, 37, 80):
                if start + length <= len(one):
                    assert np.array_equal(many.read(start, length), everything[start : start + length])


def test_dtype_follows_the_vocabulary(tmp_path, tokenizer):
    class Big:
        """A tokenizer with ids that need 32 bits."""

        vocab_size, bos_id, eos_id, fingerprint = 70_000, 1, 2, "big"
        adds_bos, file_name = True, "tokenizer.model"

        def save(self, path):
            path.write_bytes(b"model")

        def encode_batch(self, texts, threads=1):
            return [[69_999] * len(text) for text in texts]

    wide = tokenize_corpus(corpus_of(numbered(30)), Big(), tmp_path)  # type: ignore[arg-type]
    assert wide.split("train").read(0, 2).tolist() == [1, 69_999]
    assert wide.split("train").read(0, 2).dtype == np.uint32
    narrow = tokenize_corpus(corpus_of(numbered(30)), tokenizer, tmp_path)
    assert narrow.split("train").read(0, 2).dtype == np.uint16


def test_second_call_reuses_and_a_change_makes_another_folder(tmp_path, tokenizer, monkeypatch):
    first = tokenize_corpus(corpus_of(numbered(50)), tokenizer, tmp_path)
    assert first.folder.name == f"made-{first.meta['fingerprint'][:12]}"
    assert Tokenizer.load(first.folder / "tokenizer.model").fingerprint == tokenizer.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", lambda *a, **k: pytest.fail("tokenized again"))
        again = tokenize_corpus(corpus_of(numbered(50)), tokenizer, tmp_path)
    assert again.folder == first.folder
    assert again.meta == first.meta
    other = stdlib_tokenizer(501)
    folders = {
        first.folder,
        tokenize_corpus(corpus_of(numbered(51)), tokenizer, tmp_path).folder,
        tokenize_corpus(corpus_of(numbered(50)), other, tmp_path).folder,
        tokenize_corpus(corpus_of(numbered(50)), tokenizer, tmp_path, val_fraction=0.1).folder,
        tokenize_corpus(corpus_of(numbered(50)), Tokenizer(tokenizer.model_proto, adds_bos=False), tmp_path).folder,
    }
    assert len(folders) == 5
    assert set(tmp_path.iterdir()) == folders


def killed(corpus, tokenizer, folder, monkeypatch, encoding, **options):
    """The work of a call, flushed text by text, until `encoding` raises KeyboardInterrupt: what a kill leaves."""
    monkeypatch.setattr(tokens_write, "_batches", lambda documents: ([d] for d in documents))
    monkeypatch.setattr(tokens_write, "FLUSH_BYTES", 1)
    monkeypatch.setattr(Tokenizer, "encode_batch", encoding)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, tokenizer, folder, **options)
    (work,) = folder.iterdir()
    return work


@pytest.mark.parametrize("stop_at", [0, 1, 17, 49])
def test_a_killed_call_is_gone_on_with(tmp_path, tokenizer, monkeypatch, stop_at):
    corpus, encode, texts = corpus_of(numbered(50)), Tokenizer.encode_batch, []
    expected = tokenize_corpus(corpus, tokenizer, tmp_path / "straight", shard_tokens=100).folder

    def encoding(self, batch, threads=1):
        if len(texts) == stop_at:
            raise KeyboardInterrupt  # leaves behind what a kill leaves
        texts.extend(batch)
        return encode(self, batch, threads)

    work = killed(corpus, tokenizer, tmp_path / "killed", monkeypatch, encoding, shard_tokens=100)
    stop_at = -1
    assert work.name.startswith(".")
    for file in work.glob("*.bin"):  # written later than the journal's last entry, perhaps in part
        with open(file, "ab") as stream:
            stream.write(b"\1\2\3")
    found = tokenize_corpus(corpus, tokenizer, tmp_path / "killed", shard_tokens=100).folder
    assert texts == numbered(50)  # nothing was tokenized twice
    assert [p.name for p in (tmp_path / "killed").iterdir()] == [found.name]
    for file in expected.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("lost", ["missing", "short"])
def test_a_killed_call_whose_shards_are_lost_is_begun_anew(tmp_path, tokenizer, monkeypatch, split, lost):
    corpus = corpus_of(numbered(50))
    expected = tokenize_corpus(corpus, tokenizer, tmp_path / "straight").folder
    encode, count = Tokenizer.encode_batch, itertools.count()

    def encoding(self, batch, threads=1):
        if next(count) == 49:
            raise KeyboardInterrupt
        return encode(self, batch, threads)

    work = killed(corpus, tokenizer, tmp_path / "killed", monkeypatch, encoding)
    shard = work / f"{split}-00000.bin"
    assert shard.stat().st_size > 1
    shard.unlink() if lost == "missing" else shard.write_bytes(b"")
    found = tokenize_corpus(corpus, tokenizer, tmp_path / "killed").folder
    for file in expected.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_error_leaves_nothing(tmp_path, tokenizer):
    def failing():
        yield from numbered(30)
        raise ValueError("line 31 is not text")

    with pytest.raises(ValueError, match="line 31"):
        tokenize_corpus(Corpus("made", failing, lambda: "x"), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_runs_remains_are_not_taken_for_complete(tmp_path, tokenizer):
    corpus = corpus_of(numbered(50))
    complete = tokenize_corpus(corpus, tokenizer, tmp_path / "a").folder
    remains = tmp_path / "b" / f".{complete.name}-dead.tmp"
    remains.mkdir(parents=True)
    (remains / "train-00000.bin").write_bytes(b"\1\0")
    built = tokenize_corpus(corpus, tokenizer, tmp_path / "b").folder
    assert (built / "train-00000.bin").read_bytes() == (complete / "train-00000.bin").read_bytes()


def test_two_calls_at_once_wait_for_each_other(tmp_path, tokenizer):
    texts = numbered(50)

    def reading():
        for text in texts:
            time.sleep(0.002)
            yield text

    slow = Corpus("made", reading, lambda: json.dumps(texts))
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(tokenize_corpus(slow, tokenizer, tmp_path).folder))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert len(folders) == 3
    assert set(folders) == set(tmp_path.iterdir()) == {folders[0]}


def test_damaged_folders_name_the_remedy(tmp_path, tokenizer):
    corpus = corpus_of(numbered(50))
    folder = tokenize_corpus(corpus, tokenizer, tmp_path).folder
    shard, meta = folder / "train-00000.bin", folder / "meta.json"
    good_shard, good_meta = shard.read_bytes(), meta.read_text()
    shard.write_bytes(good_shard[:-2])
    with pytest.raises(ValueError, match=rf"train-00000\.bin' has {len(good_shard) - 2} bytes.*delete the folder"):
        tokenize_corpus(corpus, tokenizer, tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.bin' is missing.*delete the folder"):
        TokenizedCorpus.load(folder)
    shard.write_bytes(good_shard)
    for broken in ("{", "[]", "{}", good_meta.replace('"tokens"', '"toks"'), "[" * 10**5, '{"format_version": 1}'):
        meta.write_text(broken)
        with pytest.raises(ValueError, match=r"meta\.json' is damaged.*delete the folder"):
            TokenizedCorpus.load(folder)
    meta.write_text(good_meta.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match=r"format 99.*delete the folder"):
        TokenizedCorpus.load(folder)
    meta.unlink()
    with pytest.raises(ValueError, match=r"no meta\.json"):
        TokenizedCorpus.load(folder)
    with pytest.raises(ValueError, match=r"no meta\.json"):
        TokenizedCorpus.load(tmp_path / "nowhere")
    meta.write_text(good_meta)
    with pytest.raises(ValueError, match="no split 'test': the splits are train, val"):
        TokenizedCorpus.load(folder).split("test")


def test_progress_is_silent_without_a_terminal(tmp_path, tokenizer, capfd):
    tokenize_corpus(corpus_of(numbered(50)), tokenizer, tmp_path, progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    texts = numbered(50)
    corpus = Corpus("made", lambda: texts, lambda: "x", total_bytes=sum(map(len, texts)))
    tokenize_corpus(corpus, tokenizer, tmp_path / "a", progress=True)
    shown = capsys.readouterr().err
    assert "tokenizing made: 100%" in shown
    assert "B/s]" in shown
    tokenize_corpus(corpus, tokenizer, tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""


def test_documents_are_tokenized_as_they_are_read(tmp_path, tokenizer, monkeypatch):
    document = "Some words of a paragraph, over and over. " * 1000  # 42 KB
    read = waiting = most = 0

    def documents():
        nonlocal read, waiting, most
        for _ in range(60):
            read += 1
            waiting += len(document)
            most = max(most, waiting)
            yield document

    class Counting:
        vocab_size, bos_id, eos_id, fingerprint, save = 500, 1, 2, "counting", tokenizer.save
        adds_bos, file_name = True, tokenizer.file_name

        def encode_batch(self, texts, threads=1):
            nonlocal waiting
            waiting -= sum(map(len, texts))
            return [[5]] * len(texts)

    tokenize_corpus(Corpus("long", documents, lambda: "long"), Counting(), tmp_path)  # type: ignore[arg-type]
    assert read == 60 + 20  # the first 20 once more, to see whether documents must be cut
    assert most - 20 * len(document) < 1_100_000  # of 2.5 MB, no more than a batch is held


def tokens_of(count: int, parts: int = 3) -> TokenArray:
    return TokenArray(np.array_split(np.arange(count, dtype=np.uint16), parts))


def test_token_array_refuses_reads_outside():
    tokens = tokens_of(10)
    for start, length in ((-1, 2), (9, 2), (0, 11), (3, -1)):
        with pytest.raises(ValueError, match="there are 10"):
            tokens.read(start, length)
    assert tokens.read(10, 0).size == 0
    assert len(TokenArray([])) == 0


@pytest.mark.parametrize("count", [2, 3, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_eval_scores_every_token_but_the_first_once(count, batch_size):
    scored = []
    for input_ids, labels in iter_eval_batches(tokens_of(count), 16, batch_size):
        assert input_ids.shape == labels.shape
        assert input_ids.shape[1] == 16
        assert 1 <= len(input_ids) <= batch_size
        assert input_ids.dtype == labels.dtype == torch.int64
        real = labels != IGNORE_INDEX
        assert torch.equal(labels[real], input_ids[real] + 1)
        assert not input_ids[~real].any()
        scored += labels[real].tolist()
    assert scored == list(range(1, count))


def test_eval_stops_after_max_batches():
    assert len(list(iter_eval_batches(tokens_of(1000), 16, 2, max_batches=3))) == 3
    assert len(list(iter_eval_batches(tokens_of(20), 16, 2, max_batches=3))) == 1
    with pytest.raises(ValueError, match="1 token"):
        next(iter_eval_batches(tokens_of(1, 1), 16, 2))


def test_a_sample_begins_as_documents_do(tokenizer):
    """Behind a <s> only where the stream has one."""
    encoded = tokenizer.encode("def f")
    for adds_bos, begin in ((True, tokenizer.bos_id), (False, tokenizer.eos_id)):
        feed = SimpleNamespace(tokenizer=Tokenizer(tokenizer.model_proto, adds_bos=adds_bos))
        assert TextFeed.prompt(feed, "") == [begin]
        assert TextFeed.prompt(feed, "def f") == [*[begin] * adds_bos, *encoded]
