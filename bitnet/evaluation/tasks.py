"""Tasks of our own that need no network, and the accuracy of a model on them.

    cloze         the last word of a sentence of the held-out text, all of it the likeliest continuation (no choices)
    grammar       of two sentences, the right one is the likelier (`bitnet/evaluation/grammar.py`); by chance 50 %
    definitions   of four definitions of a noun, its own is the likeliest for its length (WordNet); by chance 25 %

They are ours and bear no public benchmark's name: their numbers compare models here and nothing else.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitnet.data.tokens import IGNORE_INDEX
from bitnet.evaluation import definitions, grammar
from bitnet.model.loss import cross_entropy
from bitnet.tokenizer import BaseTokenizer

ROWS = 16
"""Texts that are scored at once."""
MIN_CONTEXT = 16
"""Tokens before the last word of a sentence, at least."""
_LAST_WORD = re.compile(rb"(?<=[a-z,;] )[A-Za-z][a-z]{2,}(?=[.!?](?:\s|$))")


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, and its standard error over the questions."""

    share: float
    error: float
    count: int

    @classmethod
    def of(cls, right: int, count: int) -> "Accuracy | None":
        """None without a question."""
        share = right / count if count else 0.0
        return cls(share, math.sqrt(share * (1 - share) / count), count) if count else None


@dataclass(frozen=True)
class Question:
    """Texts that begin alike, the right one first, as token ids; `scored` is the first token that may differ."""

    rows: tuple[tuple[int, ...], ...]
    scored: int
    lengths: tuple[int, ...] | None
    """By which the log-likelihoods are divided; None: by nothing."""


@dataclass(frozen=True)
class Task:
    """A name and questions that fit a model."""

    name: str
    questions: list[Question]

    @torch.inference_mode()
    def accuracy(self, model: Callable[[Tensor], Tensor], unused: Tensor | None = None) -> Accuracy | None:
        """Of a model: ids int64 `[B, T]` to logits `[B, T, V]`, whose unused rows have no share of the softmax. None
        where no question fits."""
        texts = [(row, q.scored) for q in self.questions for row in q.rows]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            for i, value in zip(batch, _log_likelihoods(model, [texts[i] for i in batch], unused), strict=True):
                scores[i] = value
        right, at = 0, 0
        for question in self.questions:
            found = scores[at : at + len(question.rows)]
            at += len(question.rows)
            if question.lengths:
                found = [score / length for score, length in zip(found, question.lengths, strict=True)]
            right += all(found[0] > other for other in found[1:])
        return Accuracy.of(right, len(self.questions))


def make_tasks(tokenizer: BaseTokenizer, positions: int, count: int, wordnet: Path | None = None) -> list[Task]:
    """The tasks with choices, of `count` questions each, less those that are longer than a model's `positions`.

    wordnet: the folder of its data files; None: Debian's, where that is there. Raises ValueError for a folder without
    them.
    """
    if count < 1:
        return []
    asked = {"grammar": [("", list(pair), False) for pair in grammar.pairs(count)]}
    folder = wordnet or (definitions.DEBIAN if definitions.DEBIAN.is_dir() else None)
    if folder is not None:
        meanings = definitions.read_meanings(folder)
        asked["definitions"] = [(text, ends, True) for text, ends in definitions.questions(meanings, count)]
    return [
        Task(
            name, [q for q in (_question(tokenizer, *each) for each in found) if len(max(q.rows, key=len)) < positions]
        )
        for name, found in asked.items()
    ]


def last_words(labels: Tensor, tokenizer: BaseTokenizer) -> list[tuple[int, int]]:
    """Where in a window's labels int64 `[T]` the last words of sentences stand: the first token and the one behind the
    last, counted without labels that do not count. Words that share a token with what surrounds them are left out."""
    ids = [i for i in labels.tolist() if i != IGNORE_INDEX]
    pieces = [tokenizer.surface_bytes(i) for i in ids]
    starts, at = {}, 0
    for place, piece in enumerate(pieces):
        if piece:
            starts[at] = place
        at += len(piece)
    found = []
    for match in _LAST_WORD.finditer(b"".join(pieces)):
        first = starts.get(match.start() - 1, starts.get(match.start()))  # with the space in front, or without
        behind = starts.get(match.end())
        if first is not None and behind is not None and first >= MIN_CONTEXT:
            found.append((first, behind))
    return found


def _question(tokenizer: BaseTokenizer, start: str, ends: Sequence[str], by_length: bool) -> Question:
    front = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
    rows = [tuple(front + ids) for ids in tokenizer.encode_batch([start + end for end in ends])]
    scored = next((i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), len(min(rows, key=len)))
    return Question(tuple(rows), max(scored, 1), tuple(len(end.encode()) for end in ends) if by_length else None)


def _log_likelihoods(
    model: Callable[[Tensor], Tensor], texts: list[tuple[tuple[int, ...], int]], unused: Tensor | None
) -> list[float]:
    """Of the tokens of each text from its first scored one on."""
    longest = max(len(ids) for ids, _ in texts)
    batch = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, (ids, _) in zip(batch, texts, strict=True):
        row[: len(ids)] = torch.tensor(ids)  # what is behind it changes nothing before
    logp = -cross_entropy(model(batch)[:, :-1], batch[:, 1:], "none", unused).double()
    return [float(row[first - 1 : len(ids) - 1].sum()) for row, (ids, first) in zip(logp, texts, strict=True)]
