"""Held-out loss of a model: cross-entropy, perplexity and bits per byte.

    loss = mean of -ln p(token | tokens before it)      perplexity = exp(loss)
    bits per byte = sum of -log2 p / UTF-8 bytes of the text

Over a part of a split, the bytes are its tokens times the whole split's average. Bits per byte does not depend on the
tokenizer; loss and perplexity compare only models that share one.

    python -m bitnet.evaluate runs/demo runs/demo-float      one line a run, and the gap to the last one
"""

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from bitnet import checkpoint
from bitnet.corpus import open_corpus
from bitnet.data import IGNORE_INDEX, TokenArray, iter_eval_batches, tokenize_corpus
from bitnet.model import BitNetForCausalLM
from bitnet.plots import draw_loss
from bitnet.runtime import pick_device, pick_dtype
from bitnet.tokenizer import Tokenizer
from bitnet.tracking import read_metrics


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    loss: float
    """Mean negative log-likelihood, nats per token."""
    standard_error: float
    """Standard error of `loss` over the evaluated windows."""
    bits_per_byte: float
    tokens: int
    """Number of predicted tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: BitNetForCausalLM,
    tokens: TokenArray,
    *,
    context: int,
    bytes_per_token: float,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Evaluate over non-overlapping windows of `context` tokens, the first `max_tokens` tokens of the split or all.

    `dtype` bfloat16 or float16 runs the products under autocast, as training does. The model's mode is restored.
    """
    device = next(iter(model.state_dict().values())).device
    was_training = model.training
    model.eval()
    max_batches = None if max_tokens is None else max(1, max_tokens // (batch_size * context))
    window_losses: list[Tensor] = []
    window_tokens: list[Tensor] = []
    for input_ids, labels in iter_eval_batches(tokens, context, batch_size, max_batches):
        # The last batch is filled up with rows that do not count: one shape, one compilation.
        missing = batch_size - len(labels)
        input_ids = F.pad(input_ids, (0, 0, 0, missing)).to(device)
        labels = F.pad(labels, (0, 0, 0, missing), value=IGNORE_INDEX).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            losses = model.loss(input_ids, labels, "none")
        window_losses.append(losses.sum(1).double().cpu())
        window_tokens.append((labels != IGNORE_INDEX).sum(1).cpu())
    model.train(was_training)
    sums, counts = torch.cat(window_losses), torch.cat(window_tokens)
    sums, counts = sums[counts > 0], counts[counts > 0]
    count = int(counts.sum())
    loss = float(sums.sum()) / count
    # Ratio estimator over windows: tokens inside one window are far from independent.
    deviations = sums - loss * counts
    error = math.sqrt(float(deviations.square().sum()) * len(sums) / max(1, len(sums) - 1)) / count
    return Evaluation(loss, error, loss / math.log(2) / bytes_per_token, count)


class Reference:
    """Log-probabilities of the float model on the held-out windows, in a temporary file."""

    def __init__(self, model: nn.Module, windows: list[tuple[Tensor, Tensor]], vocab: int) -> None:
        self.windows = windows
        rows = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in windows)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this object
        self._file.truncate(rows * vocab * 4)
        self.logp = np.memmap(self._file, np.float32, "r+", shape=(rows, vocab))
        at = 0
        for logp, _ in predictions(model, windows, vocab):
            self.logp[at : at + len(logp)] = logp.numpy()
            at += len(logp)

    def score(self, model: Any) -> tuple[float, float, float, float]:
        """Loss, its standard error over windows, KL divergence from the float model, and top-1 agreement."""
        sums, counts, kl, agree, at = [], [], 0.0, 0, 0
        for logp, labels in predictions(model, self.windows, self.logp.shape[1]):
            float_logp = torch.from_numpy(self.logp[at : at + len(logp)])
            at += len(logp)
            kl += float((float_logp.exp() * (float_logp - logp)).sum(1).double().sum())
            agree += int((float_logp.argmax(1) == logp.argmax(1)).sum())
            sums.append(-float(logp.gather(1, labels[:, None]).double().sum()))
            counts.append(len(labels))
        loss = sum(sums) / at
        deviations = sum((s - loss * c) ** 2 for s, c in zip(sums, counts, strict=True))
        error = math.sqrt(deviations * len(sums) / max(1, len(sums) - 1)) / at
        return loss, error, kl / at, agree / at


@torch.inference_mode()
def predictions(model: Any, windows: list[tuple[Tensor, Tensor]], vocab: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities float32 `[T, vocab]` and labels `[T]` of each window, tokens without a label left out."""
    for ids, labels in windows:
        logits = model(ids)[0, :, :vocab].float()
        counted = labels[0] != IGNORE_INDEX
        yield logits[counted].log_softmax(-1), labels[0][counted]


def evaluate_run(run: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Evaluation]:
    """Weight quantizer and held-out evaluation of a run's best checkpoint, over its whole validation split.

    Raises CheckpointError or ValueError for a run or corpus that isn't there.
    """
    folder = checkpoint.resolve(run, "best")
    config = checkpoint.load_json(folder / checkpoint.CONFIG)
    data = config.get("data")
    if not isinstance(data, dict):
        raise checkpoint.CheckpointError(
            f"{folder / checkpoint.CONFIG} has no 'data' section; is it a run of train.py?"
        )
    corpus = tokenize_corpus(
        open_corpus(data["corpus"], max_bytes=data["max_bytes"]),
        Tokenizer.load(folder / checkpoint.TOKENIZER),
        data["cache"],
        val_fraction=data["val_fraction"],
    )
    model = checkpoint.load_model(folder, device)
    context = config["context"] or model.config.max_position_embeddings
    bytes_per_token = corpus.bytes_per_token("val")
    result = evaluate(model, corpus.split("val"), context=context, bytes_per_token=bytes_per_token, dtype=dtype)
    return model.config.quantizer, result


@dataclass(frozen=True)
class Options:
    """Held-out loss of one or several runs of train.py, each at its best checkpoint."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders; the last one is the baseline of the gaps."""
    picture: Path | None = None
    """Draw the loss curves of all runs into this PNG."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products, as in train.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a run; the gap is the run's loss against the last run's."""
    options = tyro.cli(Options, prog="python -m bitnet.evaluate", args=argv)
    runs = options.runs
    try:
        if not runs:
            raise ValueError("no run was given; name a folder made by train.py")
        device = pick_device(options.device)
        results = [(run, *evaluate_run(run, device, pick_dtype(options.dtype, device))) for run in runs]
        if options.picture:
            draw_loss({run: read_metrics(Path(run) / "metrics.jsonl") for run in runs}, options.picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    width = max(3, *(len(run) for run in runs))
    gap_column = "  gap" if len(runs) > 1 else ""
    print(f"{'run':{width}}  quantizer  held-out loss    perplexity  bits/byte{gap_column}")
    for run, quantizer, result in results:
        gap = result.loss / results[-1][2].loss - 1
        print(
            f"{run:{width}}  {quantizer:9}  {result.loss:.4f} ± {result.standard_error:.4f}  "
            f"{result.perplexity:10.2f}  {result.bits_per_byte:9.4f}" + (f"  {gap:+.2%}" if len(runs) > 1 else "")
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
