"""Static key/value cache for generation: allocated once, written in place, no allocation per token."""

import torch
from torch import Tensor

from bitnet.model.config import ModelConfig


class KVCache:
    """Keys and values of all layers for up to `max_length` positions of `batch_size` sequences.

    Each layer holds two tensors `[B, G, max_length, D]` in `dtype`. `length` counts the positions that are filled; the
    model appends to every layer in one forward pass and advances it once. All sequences of a batch have one length.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 1 <= max_length <= config.max_position_embeddings:
            raise ValueError(
                f"a cache of {max_length} positions does not fit a model of {config.max_position_embeddings}; "
                "shorten the prompt or generate fewer tokens"
            )
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `[B, G, T, D]` behind the filled positions of a layer; return views of all S + T of them."""
        if keys.shape[0] != self.keys.shape[1]:
            raise ValueError(f"the cache is for {self.keys.shape[1]} sequences and the input has {keys.shape[0]}")
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions and {end} are needed; make it longer")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` new positions as filled, after every layer has appended them."""
        self.length += tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the filled part, which one decoding step reads."""
        return 2 * self.keys[:, :, :, : self.length].numel() * self.keys.element_size()
