"""Tokenized corpora as they are read: memory-mapped shards of a split, and windows for evaluation."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from bitnet.files import JsonObject, read_json
from bitnet.records import Bounds, Form, checked

FORMAT_VERSION = 1
IGNORE_INDEX = -100  # label that cross_entropy skips


Count = Annotated[int, Bounds(0, 2**53)]


@dataclass(frozen=True)
class ShardRecord:
    """A file of tokens, in meta.json."""

    file: Annotated[str, Form(r"(train|val)-\d{5,9}\.bin", "the name of a file of tokens, like train-00000.bin")]
    tokens: Count


@dataclass(frozen=True)
class SplitRecord:
    """A split, in meta.json and in the journal of one that is being written."""

    documents: Count
    bytes: Count
    shards: list[ShardRecord]
    tokens: Count = 0


class TokenArray:
    """Arrays (memory-mapped shards) that read as one: `len(tokens)`, `tokens.read(start, length)`."""

    def __init__(self, parts: Sequence[np.ndarray]):
        """parts: 1-d integer arrays, of one dtype, in order."""
        self._parts = [part for part in parts if len(part)]
        self._starts = [0, *itertools.accumulate(len(part) for part in self._parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length, [length], in the shards' dtype (a view when they lie in one shard)."""
        if start < 0 or length < 0 or start + length > len(self):
            raise ValueError(f"cannot read {length} tokens from {start}: there are {len(self)}")
        pieces = []
        part = bisect_right(self._starts, start) - 1
        # From shard to shard, where the window lies across a border.
        while length > 0:
            inside = start - self._starts[part]
            pieces.append(self._parts[part][inside : inside + length])
            start, length, part = start + len(pieces[-1]), length - len(pieces[-1]), part + 1
        if not pieces:
            return np.zeros(0, dtype=self._parts[0].dtype if self._parts else np.uint16)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class TokenizedCorpus:
    """A folder written by `tokenize_corpus`. Attributes: `folder`, `meta` (the contents of meta.json)."""

    def __init__(self, folder: Path, meta: JsonObject):
        self.folder = folder
        self.meta = meta

    @classmethod
    def load(cls, folder: str | Path) -> TokenizedCorpus:
        """Open a folder and check its files' sizes; ValueError if it is not complete."""
        folder = Path(folder)
        remedy = "delete the folder, it will be built again"
        if not (folder / "meta.json").is_file():
            raise ValueError(
                f"{str(folder)!r} is no tokenized corpus: it has no meta.json; {remedy} by tokenize_corpus"
            )
        try:
            meta = read_json(folder / "meta.json")
            if (version := meta.get("format_version")) != FORMAT_VERSION:
                raise ValueError(f"it has format {version!r}, this program has {FORMAT_VERSION}")
            dtype = checked(str, meta.get("dtype"), "dtype")
            if dtype not in ("uint16", "uint32"):
                raise ValueError(f"dtype is {dtype!r}, and tokens are uint16 or uint32")
            splits = checked(dict[str, SplitRecord], meta.get("splits"), "splits")
            checked(dict[str, int], meta.get("skipped", {}), "skipped")
            if missing := {"train", "val"} - splits.keys():
                raise ValueError(f"there is no split {missing.pop()!r}")
        except ValueError as error:
            raise ValueError(f"{str(folder / 'meta.json')!r} is damaged ({error}); {remedy}") from error
        shards = [shard for split in splits.values() for shard in split.shards]
        expected = {shard.file: shard.tokens * np.dtype(dtype).itemsize for shard in shards}
        for name, size in expected.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(f"{str(folder / name)!r} {state}, meta.json says {size} bytes; {remedy}")
        return cls(folder, meta)

    def _entry(self, split: str) -> JsonObject:
        if split not in self.meta["splits"]:
            raise ValueError(f"there is no split {split!r}: the splits are {', '.join(self.meta['splits'])}")
        return self.meta["splits"][split]

    def split(self, split: str) -> TokenArray:
        """The tokens of "train" or "val", memory-mapped."""
        dtype = np.dtype(self.meta["dtype"])
        return TokenArray(
            [np.memmap(self.folder / s["file"], dtype=dtype, mode="r") for s in self._entry(split)["shards"]]
        )

    def bytes_of_ids(self, split: str, surfaces: Sequence[bytes]) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, float64 [V], such that those of the split's ids are its text's.

        surfaces: the bytes of each id by the tokenizer. They are the text's themselves, unless the tokenizer changes
        texts (a space in front, letters that it does not know); then all are taken by the factor between the two.
        """
        lengths = np.array([len(surface) for surface in surfaces], dtype=np.float64)
        tokens, block = self.split(split), 1 << 20
        total = sum(lengths[tokens.read(i, min(block, len(tokens) - i))].sum() for i in range(0, len(tokens), block))
        if not total:
            return np.full(len(lengths), self.bytes_per_token(split))
        return lengths * (self._entry(split)["bytes"] / total)

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token of the stream, <s> and </s> counted: bits per byte = loss / ln 2 / this."""
        entry = self._entry(split)
        return entry["bytes"] / entry["tokens"]


def samples_of(step: int, batch_size: int, rank: int, world: int) -> range:
    """The numbers, counted from the run's start, of the samples that one of `world` ranks (or, the same thing in time,
    micro-batches) has of a step. ValueError for a step, rank or world that there cannot be."""
    if step < 0:
        raise ValueError(f"step is {step}: steps count from 0")
    if world < 1 or not 0 <= rank < world or batch_size % world:
        raise ValueError(
            f"rank {rank} of {world} cannot have its part of batch_size {batch_size}: "
            f"use a batch_size divisible by world, and a rank from 0 to world - 1"
        )
    count = batch_size // world
    first = step * batch_size + rank * count
    return range(first, first + count)


def iter_eval_batches(
    tokens: TokenArray, context: int, batch_size: int, max_batches: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels), int64 [<= B, T]: the stream in order, every token but the first a label exactly once.

    The last window is padded with id 0 and label -100, which cross_entropy ignores; the last batch may have fewer
    rows. max_batches: stop after so many batches, which are then the beginning of the stream. ValueError for fewer
    than 2 tokens.
    """
    check_window(tokens, context, batch_size)
    if len(tokens) < 2:
        raise ValueError(f"the split has {len(tokens)} token(s), and a score needs 2: give more text")
    # A window's last label is the next one's first input: every token but the very first is predicted once.
    starts = range(0, len(tokens) - 1, context)
    batches = -(-len(starts) // batch_size)
    for b in range(batches if max_batches is None else min(batches, max_batches)):
        rows = starts[b * batch_size : (b + 1) * batch_size]
        input_ids = np.zeros((len(rows), context), dtype=np.int64)
        labels = np.full((len(rows), context), IGNORE_INDEX, dtype=np.int64)
        for row, start in enumerate(rows):
            window = tokens.read(start, min(context + 1, len(tokens) - start))
            input_ids[row, : len(window) - 1] = window[:-1]
            labels[row, : len(window) - 1] = window[1:]
        yield torch.from_numpy(input_ids), torch.from_numpy(labels)


def check_window(tokens: TokenArray, context: int, batch_size: int) -> None:
    """ValueError for a split without tokens, or windows and batches of no size."""
    if context < 1 or batch_size < 1:
        raise ValueError(f"context is {context} and batch_size is {batch_size}: both must be at least 1")
    if not len(tokens):
        raise ValueError("the split holds no tokens: give a corpus with text in it")
