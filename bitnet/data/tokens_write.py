"""From a corpus to tokens: tokenize it once into memory-mapped shards, and read held-out windows of them.

    corpus = open_corpus("stdlib")                            # documents, read lazily
    tokenized = tokenize_corpus(corpus, tokenizer, "data")    # data/stdlib-<fingerprint>/: shards and meta.json
    for input_ids, labels in iter_eval_batches(tokenized.split("val"), context=256, batch_size=32): ...

Batches for training are made in bitnet/data/batches.py.

A split is one long stream of tokens: <s>, the document's tokens, </s>, the next <s>, ... as LLaMA is trained, so that
a model knows where a text begins and says when it ends. Windows are cut from the stream without regard to documents.
Attention may look across </s><s>, or stay inside a document if the model is told where they begin
(`mixture.document_borders`).

Validation is held out by document: of every round(1 / val_fraction) documents in a row, one, chosen by a hash of
their number. A corpus of fewer documents than that (one long .txt file, say) is first cut at paragraphs into pieces
of at most 32 K characters, and pieces are held out.

Letters: B batch_size, T context, N tokens of a split.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from bitnet.console import progress_bar
from bitnet.data.corpus import Corpus, sha256_of
from bitnet.data.tokens import FORMAT_VERSION, SplitRecord, TokenizedCorpus
from bitnet.files import JsonObject, read_json, write_atomic
from bitnet.records import checked
from bitnet.tokenizer import BaseTokenizer

JOURNAL = "journal.json"  # in a folder that is being written: how far it is complete
FLUSH_BYTES = 64 << 20  # of text between two entries of the journal
HELD_OUT_CHARS = 32 * 1024  # largest piece when documents are cut for the validation split
_SPLIT_SEED = 20240227


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: BaseTokenizer,
    out_dir: str | Path,
    *,
    val_fraction: float = 0.05,
    workers: int | None = None,
    shard_tokens: int = 1 << 26,
    progress: bool = True,
) -> TokenizedCorpus:
    """Tokenize a corpus into `out_dir/<name>-<fingerprint>/`, or find that this has been done.

    Writes `train-00000.bin`, ..., `val-00000.bin`, ... (uint16 if the vocabulary fits, else uint32, native byte order),
    the tokenizer's file and `meta.json`. The folder appears whole or not at all. Memory holds the ids of about 1 MB of
    text, or of one document if that is larger. The next call continues a killed one, from the last 64 MB of text that
    were flushed to disk; two calls at once wait for each other.

    workers: the tokenizer's threads, default one per core; the files do not depend on them.

    ValueError for a corpus without text or too short to split, and for an earlier folder that is damaged.
    """
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction is {val_fraction}: give a number above 0 and at most 0.5, e.g. 0.05")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}: give a positive number of tokens per file, e.g. {1 << 26}")
    workers = workers or _cores()
    every = round(1 / val_fraction)
    corpus_fingerprint = corpus.fingerprint()
    fingerprint = sha256_of(f"{FORMAT_VERSION} {every}", corpus_fingerprint, tokenizer.fingerprint)
    folder = Path(out_dir) / f"{corpus.name}-{fingerprint[:12]}"
    if folder.exists():
        return TokenizedCorpus.load(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(folder) as work:
        if work is None:  # another call was faster
            return TokenizedCorpus.load(folder)
        tokenizer.save(work / tokenizer.file_name)
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        skipped: Counter[str] = Counter()
        splits = _write_splits(corpus, tokenizer, work, dtype, every, workers, shard_tokens, progress, skipped)
        meta = {
            "format_version": FORMAT_VERSION,
            "name": corpus.name,
            "fingerprint": fingerprint,
            "corpus_fingerprint": corpus_fingerprint,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name,
            "val_every": every,
            "skipped": skipped,
            "splits": splits,
        }
        write_atomic(work / "meta.json", json.dumps(meta, indent=2) + "\n")
        (work / JOURNAL).unlink(missing_ok=True)
        work.rename(folder)
    return TokenizedCorpus.load(folder)


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path | None]:
    """The folder that will be renamed to `folder`, locked, with what a killed call has left in it; None if `folder`
    exists by the time the lock is free. An error removes it, a kill does not."""
    work = folder.with_name(f".{folder.name}.tmp")
    while True:
        work.mkdir(exist_ok=True)
        with _locked(work) as held:
            if folder.exists():
                yield None
                return
            if not held:  # the lock's last holder renamed or removed this folder meanwhile
                continue
            try:
                yield work
            except Exception:
                shutil.rmtree(work, ignore_errors=True)
                raise
            return


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; yields whether the name still belongs to that folder. Without POSIX locks nothing is
    locked, and two calls at once must not happen."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except FileNotFoundError:
            same = False
        yield same
    finally:
        os.close(descriptor)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_splits(
    corpus: Corpus,
    tokenizer: BaseTokenizer,
    folder: Path,
    dtype: np.dtype,
    every: int,
    workers: int,
    shard_tokens: int,
    progress: bool,
    skipped: Counter[str],
) -> dict[str, JsonObject]:
    writers = {split: _ShardWriter(folder, split, dtype, shard_tokens) for split in ("train", "val")}
    bar = progress_bar(title=f"tokenizing {corpus.name}", total=corpus.total_bytes, unit="B", enabled=progress)
    bos = [] if tokenizer.bos_id is None or not tokenizer.adds_bos else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    settings = {"tokenizer": tokenizer.fingerprint, "shard_tokens": shard_tokens}
    done, flushed = _read_journal(folder, writers, settings), 0
    with bar:
        documents = _splittable_documents(corpus, every, skipped)
        for document in itertools.islice(documents, done):  # read again, which is quick beside tokenizing
            bar.update(len(document.encode()))
        index = done
        for batch in _batches(documents):
            for document, ids in zip(batch, tokenizer.encode_batch(batch, threads=workers), strict=True):
                size = len(document.encode())
                writer = writers["val" if is_validation(index, every) else "train"]
                writer.add([*bos, *ids, *eos], size)
                bar.update(size)
                index += 1
                flushed += size
            # Shards first, the journal after: it never names bytes that are not on disk.
            if flushed >= FLUSH_BYTES:
                flushed = 0
                state = {split: writer.flush() for split, writer in writers.items()}
                write_atomic(folder / JOURNAL, json.dumps({"documents": index, "splits": state, **settings}))
    return {split: writer.close() for split, writer in writers.items()}


def _read_journal(folder: Path, writers: dict[str, _ShardWriter], settings: JsonObject) -> int:
    """Return the writers to the last flush of a killed call, and the number of documents written by then."""
    try:
        journal = read_json(folder / JOURNAL)
        checked(dict[str, SplitRecord], journal["splits"], JOURNAL)  # its names are truncated below
        # Shards of another tokenizer or size cannot be continued.
        if any(journal[name] != value for name, value in settings.items()):
            return 0
        for split, writer in writers.items():
            writer.resume(journal["splits"][split])
        return checked(int, journal["documents"], JOURNAL)
    except (OSError, ValueError, KeyError):
        for writer in writers.values():
            writer.resume({"documents": 0, "bytes": 0, "shards": []})
        return 0


def is_validation(index: int, every: int) -> bool:
    """Whether document `index` is held out: one in each row of `every` is, at a place hashed from the row's number."""
    row, place = divmod(index, every)
    return place == int(sha256_of(f"{_SPLIT_SEED} {row}")[:16], 16) % every


def _splittable_documents(corpus: Corpus, every: int, skipped: Counter[str]) -> Iterator[str]:
    """The corpus's documents; if they are fewer than `every`, pieces of them, at least `every` in all. Counts what is
    skipped, as `Corpus.documents` does."""
    # Counted in a pass of its own and read again: keeping them would need memory for `every` documents of any size.
    lengths = [len(document) for document in itertools.islice(corpus.documents(), every)]
    if not lengths:
        raise ValueError(f"corpus {corpus.name!r} holds no text, only whitespace: give a corpus that is not empty")
    if len(lengths) == every:
        yield from corpus.documents(skipped)
        return
    if sum(lengths) < every:
        raise ValueError(
            f"corpus {corpus.name!r} has {sum(lengths)} characters, too few to hold out one part in {every}: "
            "give more text"
        )
    target = max(1, min(HELD_OUT_CHARS, sum(lengths) // (2 * every)))
    for document in corpus.documents(skipped):
        yield from cut_text(document, target)


def cut_text(text: str, max_chars: int) -> Iterator[str]:
    """Pieces of at most `max_chars` that join to the text, cut at a blank line, newline or space where possible."""
    start = 0
    while start + max_chars < len(text):
        end = start + max_chars
        for separator, kept in (("\n\n", 2), ("\n", 1), (" ", 0)):  # a space begins the next word's piece
            found = text.rfind(separator, start + max_chars // 2 + 1, end)
            if found >= 0:
                end = found + kept
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(documents: Iterable[str], max_chars: int = 1_000_000) -> Iterator[list[str]]:
    """Lists of documents, about `max_chars` each: hundreds of segments to share among threads, yet little memory."""
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= max_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Writes one split's stream into files of `shard_tokens` tokens, cut wherever the count falls."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, shard_tokens
        self._shards: list[JsonObject] = []
        self._file: IO[bytes] | None = None
        self._documents = self._bytes = 0

    def add(self, ids: list[int], text_bytes: int) -> None:
        self._documents += 1
        self._bytes += text_bytes
        tokens = np.asarray(ids, dtype=self._dtype)
        while tokens.size:
            if self._file is None:
                name = f"{self._split}-{len(self._shards):05d}.bin"
                self._file = open(self._folder / name, "wb")  # noqa: SIM115  (open until the shard is full)
                self._shards.append({"file": name, "tokens": 0})
            room = self._limit - self._shards[-1]["tokens"]
            self._file.write(tokens[:room].tobytes())
            self._shards[-1]["tokens"] += min(room, tokens.size)
            tokens = tokens[room:]
            if self._shards[-1]["tokens"] == self._limit:
                self._close_file()

    def flush(self) -> JsonObject:
        """Write everything to disk, and return the state from which `resume` continues."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"documents": self._documents, "bytes": self._bytes, "shards": self._shards}

    def resume(self, state: JsonObject) -> None:
        """Return to a state that `flush` gave, cutting off what was written after it. OSError for shorter files."""
        self._close_file()
        for shard in state["shards"]:
            path, size = self._folder / shard["file"], shard["tokens"] * self._dtype.itemsize
            if path.stat().st_size < size:
                raise OSError(f"{path} is shorter than the {size} bytes that were flushed")
            os.truncate(path, size)
        self._documents, self._bytes, self._shards = state["documents"], state["bytes"], state["shards"]
        if self._shards and self._shards[-1]["tokens"] < self._limit:
            last = self._shards[-1]
            self._file = open(self._folder / last["file"], "r+b")  # noqa: SIM115  (open until the shard is full)
            self._file.seek(0, os.SEEK_END)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def close(self) -> JsonObject:
        """Finish; the split's entry in meta.json."""
        self._close_file()
        tokens = sum(shard["tokens"] for shard in self._shards)
        return {"tokens": tokens, "documents": self._documents, "bytes": self._bytes, "shards": self._shards}
