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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from bitnet import checkpoint
from bitnet.chat_data import TokenizedChats, tokenize_chats
from bitnet.corpus import open_corpora
from bitnet.data import IGNORE_INDEX, TokenArray, iter_eval_batches
from bitnet.loading import OpenModel, find, kind_of, open_model
from bitnet.model import BitNetForCausalLM
from bitnet.model.transformer import cross_entropy
from bitnet.plots import draw_loss
from bitnet.runtime import pick_device, pick_dtype
from bitnet.sampling import Mixture, document_borders, tokenize_mixture
from bitnet.tokenizer.chat import require
from bitnet.tracking import read_metrics

DEFAULT_DATA = {"corpus": None, "max_bytes": None, "cache": "data", "val_fraction": 0.05}
"""What `open_text` takes for a model that is no run."""


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

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: Any,
    tokens: TokenArray,
    *,
    context: int,
    bytes_per_token: float,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Evaluate over non-overlapping windows of `context` tokens, the first `max_tokens` tokens of the split or all.

    `model` is a torch model or an engine. `dtype` bfloat16 or float16 runs the products under autocast, as training
    does. The model's mode is restored.
    """
    max_batches = None if max_tokens is None else max(1, max_tokens // (batch_size * context))
    batches = iter_eval_batches(tokens, context, batch_size, max_batches)
    return evaluate_batches(model, batches, batch_size=batch_size, bytes_per_token=bytes_per_token, dtype=dtype)


@torch.no_grad()
def evaluate_batches(
    model: Any,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    batch_size: int,
    bytes_per_token: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Evaluate over (input_ids, labels), int64 `[B, T]` with B at most `batch_size`, and where attention must not cross
    some borders also documents (see `BitNetForCausalLM.loss`), which only a torch model takes; else as `evaluate`."""
    device = model.device
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    window_losses: list[Tensor] = []
    window_tokens: list[Tensor] = []
    for input_ids, labels, *documents in batches:
        # The last batch is filled up with rows that do not count: one shape, one compilation.
        missing = batch_size - len(labels)
        input_ids = F.pad(input_ids, (0, 0, 0, missing)).to(device)
        labels = F.pad(labels, (0, 0, 0, missing), value=IGNORE_INDEX).to(device)
        documents = [F.pad(each, (0, 0, 0, missing)).to(device) for each in documents]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if isinstance(model, BitNetForCausalLM):
                losses = model.loss(input_ids, labels, "none", *documents)
            else:
                assert not documents
                losses = cross_entropy(model(input_ids), labels, "none")
        window_losses.append(losses.sum(1).double().cpu())
        window_tokens.append((labels != IGNORE_INDEX).sum(1).cpu())
    if was_training:
        model.train()
    sums, counts = torch.cat(window_losses), torch.cat(window_tokens)
    sums, counts = sums[counts > 0], counts[counts > 0]
    loss, error = ratio_and_error(sums, counts)
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    return Evaluation(loss, error, bits, int(counts.sum()))


def evaluate_mixture(
    model: Any,
    mixture: Mixture,
    *,
    context: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Evaluate on the held-out parts of all corpora of a mixture, of `max_tokens` tokens on the share of each.

    The loss is the mean of the corpora's, by their shares of the training samples, and bits per byte is that loss over
    the bytes of an average token in these shares.
    """
    parts = {}
    for name, share in mixture.shares.items():
        corpus = mixture.corpora[name]
        parts[name] = evaluate(
            model, corpus.split("val"), context=context, bytes_per_token=corpus.bytes_per_token("val"),
            batch_size=batch_size, max_tokens=None if max_tokens is None else round(share * max_tokens), dtype=dtype,
        )  # fmt: skip
    if len(parts) == 1:
        return next(iter(parts.values()))
    shares = [(share, parts[name]) for name, share in mixture.shares.items()]
    loss = sum(share * part.loss for share, part in shares)
    error = math.hypot(*(share * part.standard_error for share, part in shares))
    bits = loss / math.log(2) / mixture.bytes_per_token("val")
    return Evaluation(loss, error, bits, sum(part.tokens for _, part in shares), parts)


def evaluate_chats(
    model: Any,
    chats: TokenizedChats,
    *,
    context: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Evaluate on the answers of held-out conversations, in rows of which `max_tokens` tokens are read, or all."""
    max_batches = None if max_tokens is None else max(1, max_tokens // (batch_size * context))
    batches = chats.rows("val", context).batches(batch_size, max_batches)
    return evaluate_batches(model, batches, batch_size=batch_size, dtype=dtype)


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

    def score(self, model: Any) -> Score:
        """Score a model of the same vocabulary."""
        losses, gaps, counts, kl, agree, at = [], [], [], 0.0, 0, 0
        for logp, labels in predictions(model, self.windows, self.logp.shape[1]):
            float_logp = torch.from_numpy(self.logp[at : at + len(logp)])
            at += len(logp)
            kl += float((float_logp.exp() * (float_logp - logp)).sum(1).double().sum())
            agree += int((float_logp.argmax(1) == logp.argmax(1)).sum())
            of_labels = logp.gather(1, labels[:, None]).double()
            losses.append(-float(of_labels.sum()))
            gaps.append(float((float_logp.gather(1, labels[:, None]).double() - of_labels).sum()))
            counts.append(len(labels))
        loss, error = ratio_and_error(torch.tensor(losses).double(), torch.tensor(counts))
        gap, gap_error = ratio_and_error(torch.tensor(gaps).double(), torch.tensor(counts))
        return Score(loss, error, gap, gap_error, kl / at, agree / at)


def ratio_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean a token and its standard error, from the sums over windows and the tokens in each: the ratio estimator, as
    tokens inside one window are far from independent."""
    count = int(counts.sum())
    mean = float(sums.sum()) / count
    deviations = sums - mean * counts
    return mean, math.sqrt(float(deviations.square().sum()) * len(sums) / max(1, len(sums) - 1)) / count


@torch.inference_mode()
def predictions(model: Any, windows: list[tuple[Tensor, Tensor]], vocab: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities float32 `[T, vocab]` and labels `[T]` of each window, tokens without a label left out."""
    for ids, labels in windows:
        logits = model(ids)[0, :, :vocab].float()
        counted = labels[0] != IGNORE_INDEX
        yield logits[counted].log_softmax(-1), labels[0][counted]


def open_text(opened: OpenModel, text: str | None = None, context: int | None = None) -> tuple[Mixture, int]:
    """The corpora that a model is evaluated and calibrated on, in its tokens, and the tokens of a window.

    They are those that a run was trained with, unless given; another model needs `text`, and its windows have at most
    512 tokens. Raises CheckpointError or ValueError for a corpus that isn't there.
    """
    config: dict[str, Any] = {}
    if opened.kind == "run":
        config = checkpoint.load_json(opened.folder / checkpoint.CONFIG) if text else run_config(opened.folder)
    data = dict(config.get("data") or DEFAULT_DATA)
    if text is not None:
        data.update(corpus=text, max_bytes=None)
    elif data.get("chat"):
        raise ValueError(f"{opened.folder} was trained on conversations; give a text with --text, e.g. sotu")
    if data["corpus"] is None:
        raise ValueError(f"{opened.folder} does not say what text it was trained on; give one with --text, e.g. sotu")
    corpora, weights = open_corpora(data["corpus"], max_bytes=data["max_bytes"])
    mixture = tokenize_mixture(corpora, weights, opened.tokenizer, data["cache"], val_fraction=data["val_fraction"])
    positions = opened.model.config.max_position_embeddings
    trained = (config.get("context") or positions) if config else 512
    return mixture, min(context or trained, positions)


def run_config(folder: Path) -> dict[str, Any]:
    """The training configuration in a checkpoint's folder. Raises CheckpointError where it isn't one."""
    config = checkpoint.load_json(folder / checkpoint.CONFIG)
    if not isinstance(config.get("data"), dict):
        raise checkpoint.CheckpointError(
            f"{folder / checkpoint.CONFIG} has no 'data' section; is it a run of train.py?"
        )
    return config


def held_out_windows(mixture: Mixture, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """About `count` windows (input_ids, labels), int64 `[1, context]`: by its share, the first ones of each corpus's
    held-out part."""
    return [
        window
        for name, share in mixture.shares.items()
        for window in iter_eval_batches(mixture.corpora[name].split("val"), context, 1, max(1, round(share * count)))
    ]


def calibration_sequences(mixture: Mixture, context: int, count: int) -> Tensor:
    """About `count` tokens of the corpora's training parts by their shares, int64 `[B, context]`, spread over the whole
    of each."""
    sequences = []
    for name, share in mixture.shares.items():
        tokens = mixture.corpora[name].split("train")
        rows = min(round(share * count), len(tokens)) // context
        starts = [i * (len(tokens) - context) // rows for i in range(rows)]
        sequences += [tokens.read(start, context).astype(np.int64) for start in starts]
    if not sequences:
        raise ValueError(
            f"calibration needs {context} tokens or more of a corpus; there are {mixture.tokens('train')} and {count} "
            "are asked for"
        )
    return torch.from_numpy(np.stack(sequences))


def evaluate_model(
    path: str, device: torch.device, dtype: torch.dtype, text: str | None = None
) -> tuple[str, Evaluation]:
    """Weight quantizer and held-out evaluation of a model, over the whole validation split: of a run at its best
    checkpoint, as it was trained; anything else as generate.py runs it.

    Raises CheckpointError or ValueError for a model or corpus that isn't there.
    """
    latent = kind_of(find(path)) == "run"
    if latent:
        run_config(checkpoint.resolve(path, "best"))  # before anything large is read
    opened = open_model(path, device=device, pack=not latent)
    if latent and text is None and run_config(opened.folder)["data"].get("chat"):
        return opened.model.config.quantizer, _evaluate_answers(opened, dtype)
    mixture, context = open_text(opened, text)
    masked = latent and run_config(opened.folder)["data"].get("document_mask")
    if masked and isinstance(opened.model, BitNetForCausalLM):
        opened.model.document_ids = document_borders(opened.tokenizer)
    result = evaluate_mixture(opened.model, mixture, context=context, dtype=dtype)
    return opened.model.config.quantizer, result


def _evaluate_answers(opened: OpenModel, dtype: torch.dtype) -> Evaluation:
    """A run of conversations, on the answers of its held-out ones."""
    config, template = run_config(opened.folder), require(opened.chat_template, opened.folder)
    data = config["data"]
    chats = tokenize_chats(data["chat"], template, data["cache"], val_fraction=data["val_fraction"])
    context = config.get("context") or opened.model.config.max_position_embeddings
    return evaluate_chats(opened.model, chats, context=context, dtype=dtype)


@dataclass(frozen=True)
class Options:
    """Held-out loss of one or several models; of a run of train.py, at its best checkpoint."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs or models of any kind; the last one is the baseline of the gaps."""
    text: str | None = None
    """Corpus to evaluate on, its held-out part; a run's own unless given."""
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
        results = [(run, *evaluate_model(run, device, pick_dtype(options.dtype, device), options.text)) for run in runs]
        if options.picture:
            draw_loss({run: read_metrics(Path(run) / "metrics.jsonl") for run in runs}, options.picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    width = max(3, *(len(run) for run in runs), *(2 + len(name) for *_, result in results for name in result.corpora))
    gap_column = "  gap" if len(runs) > 1 else ""
    print(f"{'run':{width}}  quantizer  held-out loss    perplexity  bits/byte{gap_column}")
    for run, quantizer, result in results:
        gap = result.loss / results[-1][2].loss - 1
        bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        print(
            f"{run:{width}}  {quantizer:9}  {result.loss:.4f} ± {result.standard_error:.4f}  "
            f"{result.perplexity:10.2f}  {bits:>9}" + (f"  {gap:+.2%}" if len(runs) > 1 else "")
        )
        for name, part in result.corpora.items():
            print(f"  {name:{width - 2}}  {'':9}  {part.loss:.4f} ± {part.standard_error:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
