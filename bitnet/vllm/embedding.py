"""Embedding and output head in INT8, as in this project's engine: a code a value, a scale a row.

A tied head is the embedding's own tensors. Every process holds some rows of the table and all columns, so its logits
are those that one process would compute.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from bitnet import kernels
from bitnet.kernels import ops
from bitnet.quant import pack_codes, packed_width, unpack_codes
from bitnet.vllm.drawable import DrawableRows


class Int8EmbeddingMethod(QuantizeMethodBase):
    """INT8 rows (`bitnet/quant/packing.py`), quantized by their absmax as they are read."""

    def __init__(self, unused: list[int]) -> None:
        """`unused`: ids that are not to be drawn."""
        super().__init__()
        self.drawable = DrawableRows(unused)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if layer.num_added_embeddings:
            raise ValueError(f"{layer.prefix} has {layer.num_added_embeddings} added tokens, which need a float table")
        self.columns, self.dtype = input_size, params_dtype
        rows = sum(output_partition_sizes)
        weight = nn.Parameter(torch.zeros(rows, packed_width(input_size, 8), dtype=torch.uint8), requires_grad=False)
        scale = nn.Parameter(torch.zeros(rows, 1, dtype=torch.float32), requires_grad=False)
        self.layer = layer
        weight.weight_loader = self._load  # type: ignore[attr-defined]
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", scale)

    def _load(self, param: Tensor, stored: Tensor) -> None:
        layer = self.layer
        if list(stored.shape) != [layer.org_vocab_size, self.columns] or not stored.is_floating_point():
            raise ValueError(
                f"{layer.prefix or 'embed_tokens'} is {stored.dtype} {list(stored.shape)} and config.json says floats "
                f"[{layer.org_vocab_size}, {self.columns}]"
            )
        mine = stored[layer.shard_indices.org_vocab_start_index : layer.shard_indices.org_vocab_end_index]
        codes, scale = kernels.quantize_weight(mine, "int8")
        param[: len(mine)].copy_(pack_codes(codes, 8, checked=False))
        layer.weight_scale[: len(mine)].copy_(scale)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        codes = unpack_codes(layer.weight[ids.flatten()], 8, self.columns)
        values = codes * layer.weight_scale[ids.flatten()]
        return values.to(self.dtype).view(*ids.shape, self.columns)

    def tie_weights(self, layer: Any, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        layer.weight, layer.weight_scale = embed_tokens.weight, embed_tokens.weight_scale
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = ops.packed_linear(x, layer.weight, layer.weight_scale, bias, 8, self.columns)
        return self.drawable.mask(layer, logits)
