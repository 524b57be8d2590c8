"""The texts that a model is evaluated and calibrated on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.data.corpus import open_corpora
from bitnet.data.mixture import Mixture, tokenize_mixture
from bitnet.data.tokens import iter_eval_batches
from bitnet.storage.safetensors import CONFIG, CheckpointError
from bitnet.storage.source import Source

DEFAULT_DATA = {"corpus": None, "max_bytes": None, "cache": "data", "val_fraction": 0.05}
"""What `open_text` takes for a model that is no run."""


def open_text(source: Source, text: str | None = None, context: int | None = None) -> tuple[Mixture, int]:
    """The corpora that a model is evaluated and calibrated on, in its tokens, and the tokens of a window.

    They are those that a run was trained with, unless given; another model needs `text`, and its windows have at most
    512 tokens. Raises CheckpointError or ValueError for a corpus that isn't there.
    """
    config: dict[str, Any] = {}
    if source.kind == "run":
        config = source.settings if text else run_config(source)
    data = dict(config.get("data") or DEFAULT_DATA)
    if text is not None:
        data.update(corpus=text, max_bytes=None)
    elif data.get("chat"):
        raise ValueError(f"{source.path} was trained on conversations; give a text with --text, e.g. sotu")
    if data["corpus"] is None:
        raise ValueError(f"{source.path} does not say what text it was trained on; give one with --text, e.g. sotu")
    corpora, weights = open_corpora(data["corpus"], max_bytes=data["max_bytes"])
    mixture = tokenize_mixture(corpora, weights, source.tokenizer, data["cache"], val_fraction=data["val_fraction"])
    positions = source.config.max_position_embeddings
    trained = (config.get("context") or positions) if config else 512
    return mixture, min(context or trained, positions)


def run_config(source: Source) -> dict[str, Any]:
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
    return torch.from_numpy(np.stack(sequences))
