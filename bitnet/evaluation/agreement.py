"""How far a model's predictions are from a float model's, window by window."""

import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bitnet.data.tokens import IGNORE_INDEX
from bitnet.evaluation.loss import ratio_and_error
from bitnet.evaluation.tasks import Accuracy
from bitnet.inference.engine import LanguageModel
from bitnet.model.loss import drawable_logits

ROWS = 64
"""Tokens whose divergences are worked out together: float64 takes twice the memory."""
Predictor = Callable[[Tensor], Tensor]
"""A model: token ids int64 `[B, T]` to logits `[B, T, V]`."""


@dataclass(frozen=True)
class Score:
    """A model against the float one on the same windows; losses in nats a token, standard errors over windows."""

    loss: float
    error: float
    gap: float
    """Loss above the float model's."""
    gap_error: float
    """Standard error of the gap. Windows that are hard for one model are hard for the other, so it is far below
    `error`."""
    kl: float
    """KL divergence from the float model."""
    top1: float
    """Share of tokens with the float model's most likely one."""
    cloze: Accuracy | None = None
    """Last words of sentences that are the most likely ones; None where none was looked for."""


def with_cache(model: LanguageModel, chunk: int = 32) -> Predictor:
    """A model that reads its keys and values from the cache that it makes, `chunk` tokens at a time, as a long text is
    written: all of what stands before a chunk was stored."""

    def predict(ids: Tensor) -> Tensor:
        cache = model.new_cache(len(ids), ids.shape[1])
        return torch.cat([model(part, cache) for part in ids.split(chunk, 1)], 1)

    return predict


class Reference:
    """Log-probabilities of the float model on the held-out windows, in a temporary file."""

    def __init__(
        self,
        model: nn.Module,
        windows: list[tuple[Tensor, Tensor]],
        vocab: int,
        words: Sequence[Sequence[tuple[int, int]]] = (),
        unused: Tensor | None = None,
    ) -> None:
        """words: of each window, where `last_words` found the last words of sentences; unused: rows of the head that
        are never drawn, int64 `[U]`, which have no share of any softmax. Raises OSError where the disk has no room."""
        self.windows, self.unused = windows, unused
        self.words = words or [()] * len(windows)
        rows = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in windows)
        # Tokens times vocabulary is gigabytes for a real model: the float model runs once, and its predictions wait on
        # disk.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this object
        _take_room(self._file.fileno(), rows * vocab * 4)
        self.logp = np.memmap(self._file, np.float32, "r+", shape=(rows, vocab))
        at = 0
        for logp, _ in predictions(model, windows, vocab, unused):
            self.logp[at : at + len(logp)] = logp.numpy()
            at += len(logp)

    def score(self, model: Predictor) -> Score:
        """Score a model of the same vocabulary. Raises ValueError where its predictions are no numbers: a table cannot
        rank it."""
        losses, gaps, counts, kl, agree, at = [], [], [], 0.0, 0, 0
        read = 0
        found = predictions(model, self.windows, self.logp.shape[1], self.unused)
        for (logp, labels), words in zip(found, self.words, strict=True):
            float_logp = torch.from_numpy(self.logp[at : at + len(logp)])
            at += len(logp)
            kl += sum(map(_divergence, float_logp.split(ROWS), logp.split(ROWS)))
            agree += int((float_logp.argmax(1) == logp.argmax(1)).sum())
            of_labels = logp.gather(1, labels[:, None]).double()
            losses.append(-float(of_labels.sum()))
            gaps.append(float((float_logp.gather(1, labels[:, None]).double() - of_labels).sum()))
            counts.append(len(labels))
            hits = logp.argmax(1) == labels
            read += sum(bool(hits[first:behind].all()) for first, behind in words)
        loss, error = ratio_and_error(torch.tensor(losses).double(), torch.tensor(counts))
        gap, gap_error = ratio_and_error(torch.tensor(gaps).double(), torch.tensor(counts))
        if not math.isfinite(loss + kl):
            raise ValueError(
                f"its predictions are no finite numbers (loss {loss:g}, KL {kl:g}); activations or weights went beyond "
                "what the method's numbers hold"
            )
        cloze = Accuracy.of(read, sum(map(len, self.words)))
        return Score(loss, error, gap, gap_error, kl / at, agree / at, cloze)


def _take_room(file: int, size: int) -> None:
    """Give a file so many bytes on disk. Written through a mapping, a disk without them would end the program (SIGBUS).

    Raises OSError, with the place and the size.
    """
    os.truncate(file, size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:  # a file system that cannot tell
            return
        raise OSError(
            f"the float model's predictions take {size / 1e9:.1f} GB in {tempfile.gettempdir()}, which has no room; "
            "give fewer --tokens, or another folder in TMPDIR"
        ) from error


def _divergence(logp: Tensor, logq: Tensor) -> float:
    """Sum over tokens of KL(p || q), of log-probabilities `[T, V]`.

    In float64, and normalized there: the rounding of both to float32 is then no more than a change of their
    distributions, which the divergence follows to second order, and a sum that is 1e-7 off would be one to first.
    """
    p, q = (each.double().log_softmax(-1) for each in (logp, logq))
    return float((p.exp() * (p - q)).sum())


@torch.inference_mode()
def predictions(
    model: Predictor, windows: list[tuple[Tensor, Tensor]], vocab: int, unused: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities float32 `[T, vocab]` and labels `[T]` of each window, tokens without a label left out."""
    for ids, labels in windows:
        counted = labels[0] != IGNORE_INDEX
        logits, tokens = model(ids)[0, :, :vocab][counted], labels[0][counted]
        yield drawable_logits(logits, tokens, unused).log_softmax(-1), tokens
