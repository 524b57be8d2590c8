"""Mixtures of tokenized corpora: weights, shares, and where documents begin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.data.corpus import Corpus
from bitnet.data.tokens import TokenArray, TokenizedCorpus
from bitnet.data.tokens_write import tokenize_corpus
from bitnet.tokenizer import BaseTokenizer

MAX_BLOCK = 1 << 16


@dataclass(frozen=True)
class Mixture:
    """Tokenized corpora by name, and how many of every sum(counts) samples come from each, in that order; and in words
    what of a corpus's folder is not read, by name."""

    corpora: dict[str, TokenizedCorpus]
    counts: tuple[int, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """The part of the samples that comes from each corpus."""
        return {name: count / sum(self.counts) for name, count in zip(self.corpora, self.counts, strict=True)}

    def split(self, split: str) -> dict[str, TokenArray]:
        """The tokens of "train" or "val" of each corpus, memory-mapped."""
        return {name: corpus.split(split) for name, corpus in self.corpora.items()}

    def tokens(self, split: str) -> int:
        """Tokens of a split in all corpora."""
        return sum(len(tokens) for tokens in self.split(split).values())

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token of a stream in which each corpus has its share of the tokens."""
        return sum(share * self.corpora[name].bytes_per_token(split) for name, share in self.shares.items())

    def losses(self) -> list[str]:
        """What of the corpora is not read, in words: files of a folder, records without a text."""
        words = [f"{name}: {left_out}" for name, left_out in self.left_out.items()]
        for name, corpus in self.corpora.items():
            skipped = corpus.meta.get("skipped", {})
            words += [
                f"{name}: {skipped[kind]:,} {what}"
                for kind, what in (("null", "records without a text skipped"), ("blank", "blank documents skipped"))
                if skipped.get(kind)
            ]
        return words

    @property
    def fingerprint(self) -> str | dict[str, str]:
        """What the samples of a run depend on: one fingerprint, or by name fingerprint and count of several."""
        prints = {name: str(corpus.meta["fingerprint"]) for name, corpus in self.corpora.items()}
        if len(prints) == 1:
            return next(iter(prints.values()))
        counts = zip(prints.items(), self.counts, strict=True)
        return {name: f"{fingerprint} {count}/{sum(self.counts)}" for (name, fingerprint), count in counts}


def tokenize_mixture(
    corpora: Mapping[str, Corpus],
    weights: Sequence[float],
    tokenizer: BaseTokenizer,
    out_dir: str | Path,
    *,
    val_fraction: float = 0.05,
) -> Mixture:
    """Tokenize the corpora of a mixture, each into a folder of its own (see `tokenize_corpus`)."""
    tokenized = {
        name: tokenize_corpus(corpus, tokenizer, out_dir, val_fraction=val_fraction) for name, corpus in corpora.items()
    }
    left_out = {name: corpus.left_out for name, corpus in corpora.items() if corpus.left_out}
    return Mixture(tokenized, counts_of(weights), left_out)


def document_borders(tokenizer: BaseTokenizer) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model's `document_ids` is set to, for a stream of this tokenizer's tokens as `tokenize_corpus` writes it.

    ValueError for a tokenizer that marks neither the begin nor the end of a document.
    """
    start = tokenizer.bos_id if tokenizer.adds_bos else None
    if start is None and tokenizer.eos_id is None:
        raise ValueError("the tokenizer has neither a begin nor an end of text token: leave the document mask off")
    return partial(document_ids, start=start, end=tokenizer.eos_id)


def counts_of(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of the weights, as these are written in decimals.

    Where their sum would be above 65536, they are rounded to that sum: the largest remainders up, none below 1.
    ValueError for a weight that is no positive number.
    """
    if not weights or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights of a mixture are {list(weights)}: give positive numbers")
    exact = [Fraction(str(weight)) for weight in weights]
    multiple = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * multiple) for w in exact]
    counts = [number // math.gcd(*whole) for number in whole]
    if sum(counts) <= MAX_BLOCK:
        return tuple(counts)
    quotas = [w / sum(exact) * MAX_BLOCK for w in exact]
    counts = [max(1, math.floor(quota)) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])  # the most that is missing first
    left = MAX_BLOCK - sum(counts)
    for i in by_remainder[: max(0, left)]:
        counts[i] += 1
    counts[counts.index(max(counts))] += min(0, left)  # pays for those that were raised to 1
    return tuple(counts)


def document_ids(input_ids: Tensor, start: int | None, end: int | None) -> Tensor:
    """Which document of its window each token is in, counted from 0, int64 `[B, T]`.

    A document begins at each token `start` (<s>) or, for a tokenizer that writes none, behind each `end` (</s>).
    """
    if start is not None:
        return (input_ids == start).cumsum(1)
    assert end is not None
    return F.pad((input_ids == end)[:, :-1].cumsum(1), (1, 0))
