"""Conversations as training data, of which only the answers count.

    chats = tokenize_chats("chats.jsonl", template, "data")      # data/chats-<fingerprint>/: token arrays and meta.json
    rows = ChatRows(chats, "train", context=256)                 # whole conversations, as many as fit into a row
    input_ids, labels, documents = ChatSampler(rows, 32, seed=0).batch(step)      # a pure function of the step

The records of the files are conversations in any of the forms of `bitnet/data/conversations.py`. The model's chat
template turns one into tokens. A label is the token that comes next, where that one belongs to an answer that is learnt
or ends it (`ChatTemplate.encode_answers`), and -100 elsewhere, so the loss is the mean over what the model has to write
itself.

A row holds whole conversations, longest first and each in the fullest row that still has room for it (best fit
decreasing), padded at its end; attention stays inside each. One that is longer than a row loses its last turns, and is
left out where not even the first answer fits. Validation is held out by conversation, as `bitnet/data/tokens_write.py`
does it by document.

Letters: B batch_size, T context, R rows.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from bitnet.data.conversations import CHAT_SUFFIXES, chat_files, read_conversations
from bitnet.data.corpus import file_name, sha256_of
from bitnet.data.tokens import IGNORE_INDEX, samples_of
from bitnet.data.tokens_write import is_validation
from bitnet.data.unpack import unpacked_name
from bitnet.files import JsonObject, new_folder, read_json, write_atomic
from bitnet.records import checked
from bitnet.tokenizer import ChatTemplate

FORMAT_VERSION = 2
_ARRAYS = {"tokens": "tokens", "loss_mask": "counted", "starts": "starts", "held_out": "held_out"}
"""Attributes of TokenizedChats, and the names of their files."""


def chat_texts(path: str | Path, field: str | None = None) -> Iterator[str]:
    """The conversations as plain texts, roles and all, to train a tokenizer on."""
    for _, conversation in read_conversations(path, field):
        if conversation:
            yield "\n".join(f"{message['role']}\n{message['content']}" for message in conversation.messages)


def name_of(path: str | Path) -> str:
    """A file's or folder's name, fit for a folder in the cache."""
    name = unpacked_name(Path(path).resolve().name)
    name = name[: name.rindex(".")] if name.lower().endswith(CHAT_SUFFIXES) else name
    return file_name(name) or "chats"


def fingerprint_of(path: str | Path, field: str | None = None) -> str:
    """sha256 hex of the files' contents, and of the field that is read, if it is not one of the usual ones."""
    digests = []
    for file in chat_files(path)[0]:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return sha256_of(*digests, *([f"field {field}"] if field else []))


def tokenize_chats(
    path: str | Path,
    template: ChatTemplate,
    out_dir: str | Path,
    *,
    val_fraction: float = 0.05,
    field: str | None = None,
) -> TokenizedChats:
    """Tokenize conversations into `out_dir/<name>-<fingerprint>/`, or find that this has been done.

    Every round(1 / val_fraction) conversations one is held out, of fewer than that one. Memory holds the tokens of all
    of them. `field` names the list of messages (`read_conversations`). Raises ValueError for fewer than two with an
    answer, for a template that does not take one of them, and for an earlier folder that is damaged.
    """
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction is {val_fraction}: give a number above 0 and at most 0.5, e.g. 0.05")
    tokenizer = template.tokenizer
    fingerprint = sha256_of(
        f"chats {FORMAT_VERSION} {val_fraction}",
        fingerprint_of(path, field),
        template.source,
        tokenizer.fingerprint,
        f"{tokenizer.adds_bos} {tokenizer.eos_ids}",
    )
    folder = Path(out_dir) / f"{name_of(path)}-{fingerprint[:12]}"
    if folder.exists():
        return TokenizedChats(folder)
    ids: list[np.ndarray] = []
    loss_mask: list[np.ndarray] = []
    skipped: Counter[str] = Counter()
    for where, conversation in read_conversations(path, field):
        if conversation is None:
            skipped["null"] += 1
            continue
        messages, learnt = conversation
        if not any(learnt):
            skipped["unanswered"] += 1
            continue
        try:
            pieces = template.encode_answers(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        answers = [one for one, message in zip(learnt, messages, strict=True) if message["role"] == "assistant"]
        counted = [part for one in answers for part in (False, one)]
        ids.append(np.concatenate([np.asarray(piece, dtype=np.uint32) for piece in pieces]))
        loss_mask.append(np.repeat(counted, [len(piece) for piece in pieces]))
    if len(ids) < 2:
        raise ValueError(
            f"{str(path)!r} holds {len(ids)} conversations with an answer; two are needed, one to hold out"
        )
    # With few conversations the fraction would hold out none.
    every = min(round(1 / val_fraction), len(ids))
    # Half the bytes, where ids fit into 16 bits.
    small = tokenizer.vocab_size <= 1 << 16
    arrays = {
        "tokens": np.concatenate(ids).astype(np.uint16 if small else np.uint32),
        "loss_mask": np.concatenate(loss_mask),
        "starts": np.cumsum([0, *(len(one) for one in ids)], dtype=np.int64),
        "held_out": np.array([is_validation(index, every) for index in range(len(ids))]),
    }
    meta = {
        "name": name_of(path), "fingerprint": fingerprint, "conversations": len(ids),
        "unanswered": skipped["unanswered"], "null": skipped["null"],
    }  # fmt: skip
    _write(folder, arrays, meta)
    return TokenizedChats(folder)


def _write(folder: Path, arrays: dict[str, np.ndarray], meta: JsonObject) -> None:
    """Write a folder whole or not at all; one that another program finished first stays."""
    try:
        with new_folder(folder, "conversations") as work:
            for name, array in arrays.items():
                np.save(work / f"{_ARRAYS[name]}.npy", array, allow_pickle=False)
            write_atomic(work / "meta.json", json.dumps(meta, indent=2) + "\n")
    except OSError:
        if not folder.exists():
            raise


class TokenizedChats:
    """A folder written by `tokenize_chats`.

    Attributes: `folder`; `meta` (meta.json); and memory-mapped `tokens` of all conversations joined, `loss_mask` bool,
    which of them are the model's to write, `starts` int64 of the conversations and the end, `held_out` bool of the
    conversations.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    starts: np.ndarray
    held_out: np.ndarray

    def __init__(self, folder: Path):
        """Open a folder; ValueError if it is not complete."""
        self.folder = folder
        self._packed: dict[tuple[str, int], ChatRows] = {}
        try:
            self.meta: JsonObject = read_json(folder / "meta.json")
            for name, kind in (
                ("name", str),
                ("fingerprint", str),
                *((n, int) for n in ("conversations", "unanswered", "null")),
            ):
                checked(kind, self.meta.get(name), f"{name} in meta.json")
            for name, file in _ARRAYS.items():
                setattr(self, name, np.load(folder / f"{file}.npy", mmap_mode="r", allow_pickle=False))
            whole = len(self.tokens) == len(self.loss_mask) == self.starts[-1] and len(self.held_out) + 1 == len(
                self.starts
            )
        except (OSError, ValueError, IndexError, EOFError) as error:
            raise ValueError(
                f"{str(folder)!r} is damaged ({error}); delete the folder, it will be built again"
            ) from error
        if not whole:
            raise ValueError(
                f"{str(folder)!r} is damaged (its arrays do not fit together); delete the folder, it will be "
                "built again"
            )

    @property
    def fingerprint(self) -> str:
        """Of the files, the template and the tokenizer."""
        return str(self.meta["fingerprint"])

    def rows(self, split: str, context: int) -> ChatRows:
        """A split packed into rows of T tokens; made once."""
        key = (split, context)
        if key not in self._packed:
            self._packed[key] = ChatRows(self, split, context)
        return self._packed[key]

    def describe(self, context: int) -> str:
        """The data in a line."""
        splits = [self.rows(split, context) for split in ("train", "val")]
        train, val = (int(rows.counts.sum()) for rows in splits)
        losses = {
            "cut behind an answer": sum(rows.cut for rows in splits),
            "left out (their first answer is too far back)": sum(rows.dropped for rows in splits),
            "left out (no answer)": self.meta["unanswered"],
            "left out (no conversation in the record)": self.meta["null"],
        }
        return (
            f"{self.meta['name']}: {self.meta['conversations']:,} conversations in {sum(map(len, splits)):,} rows of "
            f"{context} tokens; tokens of answers: {train:,} training, {val:,} validation"
        ) + "".join(f"; {count:,} {what}" for what, count in losses.items() if count)


class ChatRows:
    """The conversations of a split, "train" or "val", packed into rows of T tokens.

    Attributes: `context`; `counts`, int64 `[R]`, the labels that count in each row; `cut` and `dropped`, how many
    conversations have lost their last turns, or do not fit at all.
    """

    def __init__(self, chats: TokenizedChats, split: str, context: int):
        """Raises ValueError where no conversation fits."""
        if context < 1:
            raise ValueError(f"context is {context}: it must be at least 1")
        self.context, self._chats = context, chats
        self.cut = self.dropped = 0
        lengths, counts = {}, {}
        for index in np.flatnonzero(chats.held_out == (split == "val")).tolist():
            start, end = int(chats.starts[index]), int(chats.starts[index + 1])
            loss_mask = chats.loss_mask[start:end]
            length = end - start - 1  # the last token is a label only
            if length > context:
                ends = np.flatnonzero(loss_mask[: context + 1] & ~loss_mask[1 : context + 2])  # of answers that fit
                length = int(ends[-1]) if len(ends) else 0
                self.cut += length > 0
            count = int(loss_mask[1 : length + 1].sum())
            if count:
                lengths[index], counts[index] = length, count
            else:
                self.dropped += 1
        if not lengths:
            raise ValueError(
                f"no conversation of the {split} split fits into {context} tokens up to the end of its first answer; "
                "raise --context, or give more or shorter conversations"
            )
        self._lengths = lengths
        self._rows = _best_fit(lengths, context)
        self.counts = np.array([sum(counts[index] for index in row) for row in self._rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, documents), int64 `[rows, T]` each, padded with id 0, label -100 and a document of its
        own; documents number the conversations of a row from 0, for attention not to cross them."""
        chosen = list(rows)
        input_ids = np.zeros((len(chosen), self.context), dtype=np.int64)
        labels = np.full((len(chosen), self.context), IGNORE_INDEX, dtype=np.int64)
        documents = np.zeros((len(chosen), self.context), dtype=np.int64)
        for place, row in enumerate(chosen):
            at = 0
            for number, index in enumerate(self._rows[row], start=1):
                start, length = self._chats.starts[index], self._lengths[index]
                # One token more than the row has inputs: the last one is a label only.
                tokens = self._chats.tokens[start : start + length + 1].astype(np.int64)
                loss_mask = self._chats.loss_mask[start + 1 : start + length + 1]
                input_ids[place, at : at + length] = tokens[:-1]
                labels[place, at : at + length][loss_mask] = tokens[1:][loss_mask]
                at += length
                documents[place, at:] = number
        return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(documents)

    def prompt(self) -> list[int]:
        """The tokens in front of the first answer."""
        input_ids, labels, _ = self.read([0])
        first = int((labels[0] != IGNORE_INDEX).nonzero()[0])
        return input_ids[0, : first + 1].tolist()

    def batches(self, batch_size: int, max_batches: int | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        """The rows in order, at most `batch_size` at a time and `max_batches` times, for validation."""
        for first in range(0, len(self), batch_size)[:max_batches]:
            yield self.read(range(first, min(first + batch_size, len(self))))


def _best_fit(lengths: dict[int, int], room: int) -> list[list[int]]:
    """Rows of the keys whose lengths, at most `room` each, add up to `room` at most."""
    rows: list[list[int]] = []
    # Best fit, decreasing: the longest first, each into the fullest row that has room for it.
    spaces: list[int] = []  # that some row has left, ascending
    with_space: dict[int, list[int]] = {}
    for key in sorted(lengths, key=lambda key: (-lengths[key], key)):
        at = bisect_left(spaces, lengths[key])
        if at == len(spaces):
            row, space = len(rows), room
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(key)
        left = space - lengths[key]
        # `spaces` holds each size once, so a search in it stays short however many rows there are.
        if left not in with_space:
            with_space[left] = []
            insort(spaces, left)
        with_space[left].append(row)
    return rows


class ChatSampler:
    """Shuffled rows of conversations, as a pure function of the step number.

    Sample g of the run is row g % R of shuffle g // R, and step s has samples s B to s B + B - 1, as in
    `batches.BatchSampler`. Attributes: `rows`, `batch_size`.
    """

    def __init__(self, rows: ChatRows, batch_size: int, seed: int):
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size is {batch_size} and seed {seed}: give at least 1, and at least 0")
        self.rows, self.batch_size = rows, batch_size
        # Two epochs, as a batch may lie across a border.
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)))

    def epochs(self, steps: int) -> dict[str, float]:
        """How often the conversations are seen in so many steps."""
        return {"conversations": steps * self.batch_size / len(self.rows)}

    def _rows_of(self, step: int, rank: int, world: int) -> list[int]:
        samples = (divmod(sample, len(self.rows)) for sample in samples_of(step, self.batch_size, rank, world))
        return [int(self._order(epoch)[place]) for epoch, place in samples]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, documents) of a step, int64 `[B / world, T]` each: the part of one of `world` ranks or,
        the same thing in time, micro-batches."""
        return self.rows.read(self._rows_of(step, rank, world))

    def weight(self, step: int, rank: int = 0, world: int = 1) -> float:
        """What the part's mean loss must be multiplied by, so that the mean of all parts is the mean over the labels of
        the step: its labels over the mean of the parts' labels."""
        mine = self.rows.counts[self._rows_of(step, rank, world)].sum()
        return float(mine * world / self.rows.counts[self._rows_of(step, 0, 1)].sum())
