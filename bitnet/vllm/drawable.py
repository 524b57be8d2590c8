"""Rows of a head that vLLM is not to draw: those without a token, and `suppress_tokens` of a generation_config.json.

vLLM itself cuts off only rows that it adds, and gives texts a row that no token has as nothing. The head's products are
where rows are masked, so that probabilities too are of what can be drawn, as in our engine.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.tokenizers import cached_tokenizer_from_config


def unused_ids(config: ModelConfig) -> list[int]:
    """Ids of a model's rows that are not to be drawn; none where vLLM runs without a tokenizer."""
    tokenizer = cached_tokenizer_from_config(config)
    if tokenizer is None:
        return []
    stored = config.try_get_generation_config() or {}
    ends = stored.get("eos_token_id")
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    rows = range(config.get_vocab_size())
    unused = (set(rows) - set(tokenizer.get_vocab().values())).union(stored.get("suppress_tokens") or ())
    return sorted(unused.intersection(rows) - ends)


class DrawableRows:
    """The mask of a head of which a process holds some rows."""

    def __init__(self, unused: list[int]) -> None:
        self._unused = unused
        self._places: Tensor | None = None

    def mask(self, layer: Any, logits: Tensor) -> Tensor:
        """Logits `[.., rows here]` in which what is not to be drawn has no share of the softmax."""
        if not self._unused:
            return logits
        if self._places is None or self._places.device != logits.device:
            first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
            here = [i - first for i in self._unused if first <= i < end]
            self._places = torch.tensor(here, dtype=torch.int64, device=logits.device)
        return logits.index_fill_(-1, self._places, torch.finfo(logits.dtype).min)


class FloatEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Embedding and head in the model's own type, vLLM's, but for the rows that are not to be drawn."""

    def __init__(self, unused: list[int]) -> None:
        super().__init__()
        self.drawable = DrawableRows(unused)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.drawable.mask(layer, super().apply(layer, x, bias))
