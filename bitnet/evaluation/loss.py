"""Held-out loss of a model: cross-entropy, perplexity and bits per byte.

    loss = mean of -ln p(token | tokens before it)      perplexity = exp(loss)
    bits per byte = sum of -log2 p / UTF-8 bytes of the text      p of what can be drawn: padded rows have no share

The bytes are those of the tokens that were predicted, over a part of a split too. Bits per byte does not depend on the
tokenizer; loss and perplexity compare only models that share one.

    bitnet evaluate runs/demo runs/demo-float      one line a run, and the gap to the last one
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet.console import progress_bar
from bitnet.data.feed import Feed, HeldOut
from bitnet.data.tokens import IGNORE_INDEX, TokenArray, iter_eval_batches
from bitnet.evaluation.texts import open_held_out, run_config
from bitnet.inference.engine import LanguageModel
from bitnet.inference.loading import open_model
from bitnet.kernels import use_backend
from bitnet.model import BitNetForCausalLM
from bitnet.model.loss import cross_entropy
from bitnet.storage.adapters import Adapter
from bitnet.storage.source import open_source
from bitnet.tokenizer import BaseTokenizer

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    loss: float
    """Mean negative log-likelihood, nats per token."""
    standard_error: float
    """Standard error of `loss` over the evaluated windows."""
    bits_per_byte: float | None
    """None where the labels are not the tokens of a text, as those of a conversation's answers."""
    tokens: int
    """Number of predicted tokens."""
    corpora: "dict[str, Evaluation]" = field(default_factory=dict)
    """Of a mixture, the result on each corpus."""
    text_bytes: float | None = None
    """UTF-8 bytes of the predicted tokens; None as for `bits_per_byte`, and for a mixture."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: LanguageModel,
    tokens: TokenArray,
    *,
    context: int,
    bytes_per_token: float | Tensor,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    unused: Tensor | None = None,
) -> Evaluation:
    """Evaluate over non-overlapping windows of `context` tokens, the first `max_tokens` tokens of the split or all.

    `model` is a torch model or an engine. `bytes_per_token` are the UTF-8 bytes that each id stands for, `[V]`, or
    those of a token on average, with which bits per byte is only near for a part of a split. `dtype` bfloat16 or
    float16 runs the products under autocast, as training does. `unused`: as `unused_rows` gives them. The
    model's mode is restored.
    """
    max_batches = None if max_tokens is None else max(1, max_tokens // (batch_size * context))
    batches = iter_eval_batches(tokens, context, batch_size, max_batches)
    tally = Tally(model, batch_size=batch_size, bytes_per_token=bytes_per_token, dtype=dtype, unused=unused)
    tally.read(batches)
    return tally.result()


def unused_rows(tokenizer: BaseTokenizer, rows: int) -> Tensor | None:
    """Of a head of so many rows those that are not to be drawn, padding included: ids int64 `[U]`; None: all are."""
    found = [i for i in range(rows) if i >= tokenizer.vocab_size or i in tokenizer.unused]
    return torch.tensor(found) if found else None


class Tally:
    """The loss of a model over batches that are read a few at a time; parameters as those of `evaluate`."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_size: int,
        bytes_per_token: float | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        unused: Tensor | None = None,
    ) -> None:
        self.model, self.batch_size, self.bytes_per_token, self.dtype = model, batch_size, bytes_per_token, dtype
        self._unused = None if unused is None else unused.to(model.device)
        self._losses: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._bytes = 0.0

    @torch.no_grad()
    def read(self, batches: Iterable[tuple[Tensor, ...]], bar: "tqdm[Any] | None" = None) -> None:
        """Go on with (input_ids, labels), int64 `[B, T]` with B at most `batch_size`, and where attention must not
        cross some borders also documents (see `BitNetForCausalLM.loss`), which only a torch model takes. `bar` is told
        of the labels."""
        model, device, count_bytes = self.model, self.model.device, self.bytes_per_token
        in_training = model if isinstance(model, nn.Module) and model.training else None
        if in_training is not None:
            in_training.eval()
        for input_ids, labels, *documents in batches:
            predicted = labels[labels != IGNORE_INDEX]
            if count_bytes is not None:
                each = count_bytes[predicted] if isinstance(count_bytes, Tensor) else count_bytes
                self._bytes += float(each.sum() if isinstance(each, Tensor) else each * len(predicted))
            # The last batch is filled up with rows that do not count: one shape, one compilation.
            missing = self.batch_size - len(labels)
            input_ids = F.pad(input_ids, (0, 0, 0, missing)).to(device)
            labels = F.pad(labels, (0, 0, 0, missing), value=IGNORE_INDEX).to(device)
            documents = [F.pad(each, (0, 0, 0, missing)).to(device) for each in documents]
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                if isinstance(model, BitNetForCausalLM):
                    losses = model.loss(
                        input_ids, labels, "none", documents[0] if documents else None, unused=self._unused
                    )
                else:
                    assert not documents
                    losses = cross_entropy(model(input_ids), labels, "none", self._unused)
            self._losses.append(losses.sum(1).double().cpu())
            self._tokens.append((labels != IGNORE_INDEX).sum(1).cpu())
            if bar is not None:
                bar.update(len(predicted))
        if in_training is not None:
            in_training.train()

    @property
    def batches(self) -> int:
        """How many were read."""
        return len(self._losses)

    def result(self) -> Evaluation:
        """Over all that was read."""
        sums, counts = torch.cat(self._losses), torch.cat(self._tokens)
        # Rows that only filled up a batch are no windows.
        sums, counts = sums[counts > 0], counts[counts > 0]
        loss, error = ratio_and_error(sums, counts)
        tokens = int(counts.sum())
        if self.bytes_per_token is None:
            return Evaluation(loss, error, None, tokens)
        return Evaluation(loss, error, _bits(loss, self._bytes / tokens), tokens, text_bytes=self._bytes)


def evaluate_up_to(
    model: LanguageModel,
    feed: Feed,
    limits: Sequence[int | None],
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Evaluation]:
    """Evaluate on the held-out parts of a feed, in one pass up to each of the ascending limits: a number of tokens, of
    each part its share, or None for all of each. Every result is worked out when it is asked for. Shows its `progress`.
    Behind the first result `stop` is asked before every batch, and where it says so there are no more results.

    The loss of several corpora is their mean by their shares of the training samples, and bits per byte is that loss
    over the bytes of an average token in these shares.
    """
    tallies: dict[str, Tally] = {}
    unused = unused_rows(feed.tokenizer, model.config.vocab_size)
    stopped = False

    def unless_stopped(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        nonlocal stopped
        for batch in batches:
            stopped = stopped or stop()
            if stopped:
                return
            yield batch

    for number, limit in enumerate(limits):
        parts = feed.held_out(batch_size, limit)
        total = min(feed.held_out_tokens, limit or feed.held_out_tokens)
        done = sum(tally.result().tokens for tally in tallies.values())
        with progress_bar(
            title="validation", total=total, done=done, unit=" tokens", enabled=progress, leave=False
        ) as bar:
            for part in parts:
                tally = Tally(
                    model, batch_size=batch_size, bytes_per_token=part.bytes_per_token, dtype=dtype, unused=unused
                )
                tally = tallies.setdefault(part.name, tally)
                batches = islice(part.batches, tally.batches, None)
                tally.read(unless_stopped(batches) if number else batches, bar)
        if stopped:
            return
        yield _mixed(parts, {name: tally.result() for name, tally in tallies.items()})


def evaluate_feed(
    model: LanguageModel,
    feed: Feed,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """The result of `evaluate_up_to` with one limit."""
    return next(evaluate_up_to(model, feed, [max_tokens], batch_size=batch_size, dtype=dtype))


def _mixed(held_out: list[HeldOut], parts: dict[str, Evaluation]) -> Evaluation:
    if len(parts) == 1:
        return next(iter(parts.values()))
    pairs = [(part.share, parts[part.name]) for part in held_out]
    loss = sum(share * result.loss for share, result in pairs)
    error = math.hypot(*(share * result.standard_error for share, result in pairs))
    bits = _bits(loss, sum(share * (result.text_bytes or 0.0) / result.tokens for share, result in pairs))
    return Evaluation(loss, error, bits, sum(result.tokens for _, result in pairs), parts)


def _bits(loss: float, bytes_per_token: float) -> float:
    """Bits per byte; infinite where what was predicted has no text, as one token that ends a document."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else math.inf


def ratio_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean a token and its standard error, from the sums over windows and the tokens in each: the ratio estimator, as
    tokens inside one window are far from independent."""
    count = int(counts.sum())
    mean = float(sums.sum()) / count
    deviations = sums - mean * counts
    return mean, math.sqrt(float(deviations.square().sum()) * len(sums) / max(1, len(sums) - 1)) / count


class HeldOutResult(NamedTuple):
    """A model's evaluation, and what it was made on."""

    quantizer: str
    """Of the weights."""
    evaluation: Evaluation
    feed: Feed
    """What was read."""
    on_engine: bool
    """It ran on an engine, whose products have types of their own."""

    def reads_like(self, other: "HeldOutResult") -> bool:
        """Whether both have read the same texts in the same tokens, so that their losses are of one thing."""
        same = self.feed.texts == other.feed.texts and self.evaluation.tokens == other.evaluation.tokens
        return same and self.feed.tokenizer.difference(other.feed.tokenizer) is None


def evaluate_model(
    path: str, device: torch.device, dtype: torch.dtype, text: str | None = None, lora: Adapter | None = None
) -> HeldOutResult:
    """Held-out evaluation of a model, over the whole validation split: of a run at its best checkpoint, as it was
    trained, in torch with products in `dtype`; anything else, and a model with an adapter, as generate.py runs it, but
    in torch where attention must not cross some borders.

    Raises CheckpointError or ValueError for a model or corpus that isn't there.
    """
    source = open_source(path)
    is_run = source.kind == "run"
    if is_run:
        run_config(source)  # before anything large is read
    feed = open_held_out(source, text)
    if is_run and lora is None:
        model: LanguageModel = source.model(device=device)
    else:
        with use_backend("reference") if feed.has_borders else nullcontext():
            model = open_model(source, device=device, lora=lora)
    if isinstance(model, BitNetForCausalLM):
        model.document_ids = feed.document_ids
    result = evaluate_feed(model, feed, dtype=dtype)
    return HeldOutResult(model.config.quantizer, result, feed, not isinstance(model, BitNetForCausalLM))
