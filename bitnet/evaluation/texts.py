"""What a model is evaluated and calibrated on."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from bitnet.console import note
from bitnet.data.feed import DataConfig, Feed, TextFeed, open_feed
from bitnet.data.mixture import Mixture
from bitnet.data.tokens import iter_eval_batches
from bitnet.files import JsonObject
from bitnet.storage.json_files import checked
from bitnet.storage.safetensors import CONFIG, CheckpointError
from bitnet.storage.source import Source
from bitnet.tokenizer.chat import require

UNTRAINED_WINDOW = 512
"""Most tokens in a window of a model that is no run, which does not say what it was trained with."""


def open_held_out(source: Source, text: str | None = None, context: int | None = None) -> Feed:
    """What a model is evaluated on, in its tokens: texts or conversations that a run was trained with, or `text`, a
    corpus, which another model needs.

    context: tokens of a window, if not those of the run's training. Raises CheckpointError or ValueError for data that
    isn't there.
    """
    data, window = _data_of(source, text, context)
    template = require(source.chat_template, source.path) if data.chat else source.chat_template
    feed = open_feed(data, source.tokenizer, template, window=window)
    for what in feed.mixture.losses() if text and isinstance(feed, TextFeed) else ():
        note(what)
    return feed


def open_text(source: Source, text: str | None = None, context: int | None = None) -> TextFeed:
    """`open_held_out` of a model that reads texts. Raises ValueError where a run of conversations is given no text."""
    if _data_of(source, text, context)[0].chat:
        raise ValueError(f"{source.path} was trained on conversations; give a text with --text, e.g. sotu")
    feed = open_held_out(source, text, context)
    assert isinstance(feed, TextFeed)
    return feed


def _data_of(source: Source, text: str | None, context: int | None) -> tuple[DataConfig, int]:
    """What to read, and in windows of how many tokens."""
    config: JsonObject = {}
    if source.kind == "run":
        config = source.settings if text else run_config(source)
    try:
        data = checked(DataConfig, config["data"], f"{source.path / CONFIG}: data") if config.get("data") else None
        window = checked(int | None, config.get("context"), f"{source.path / CONFIG}: context")  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if text is not None:
        data = dataclasses.replace(data or DataConfig(), corpus=text, chat=None, field=None, max_bytes=None)
    if data is None:
        raise ValueError(f"{source.path} does not say what text it was trained on; give one with --text, e.g. sotu")
    if context is not None and context < 1:
        raise ValueError(f"context is {context}; give the tokens of a window, at least 1")
    positions = source.config.max_position_embeddings
    if context is not None and context > positions:
        raise ValueError(f"context is {context}, and {source.path} has {positions} positions; give at most that")
    trained = (window or positions) if config else UNTRAINED_WINDOW
    return data, min(context or trained, positions)


def run_config(source: Source) -> JsonObject:
    """The training configuration of a run. Raises CheckpointError where it isn't one."""
    if not isinstance(source.settings.get("data"), dict):
        raise CheckpointError(f"{source.path / CONFIG} has no 'data' section; is it a run of train.py?")
    return source.settings


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
    if count > mixture.tokens("train"):
        note(f"calibrated on the {sum(map(len, sequences)):,} tokens that there are, and not on {count:,}")
    return torch.from_numpy(np.stack(sequences))
