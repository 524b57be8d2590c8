"""Ternary projections as a method of vLLM's linear layers.

A layer keeps `weight`, uint8 `[N, packed_width(K, 2)]` (`bitnet/quant/packing.py`), and `weight_scale`, float32
`[N, 1]`, since q, k and v, or gate and up, have one scale each. Parts are cut and packed as they are read, so no more
than one matrix is in memory in another form.

    layer        over processes   product
    qkv, gate_up  rows            bitnet::packed_linear
    o, down       columns         bitnet::row_parallel_linear: a largest value, then int32 sums, then the scales

vLLM would add the floats of the second kind over processes, so the method asks the layer not to (`reduce_results`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from bitnet.kernels import check_columns, ops
from bitnet.kernels.sharded import row_parallel_linear
from bitnet.quant.packing import packed_width
from bitnet.storage.hf.config import Form
from bitnet.vllm.shards import Part, exact_bias, packed_part, quantized_part, read_scale

_LAYERS = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear)


class TernaryLinearMethod(LinearMethodBase):
    """Packed ternary weights of a folder's form in one of vLLM's linear layers."""

    def __init__(self, form: Form) -> None:
        self.form = form

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
        if type(layer) not in _LAYERS:
            raise ValueError(f"{layer.prefix} is a {type(layer).__name__}, whose parts are not known here")
        check_columns(input_size, 2)
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        self.columns, self.group = columns, ""
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            if not layer.reduce_results:
                raise ValueError(f"{layer.prefix} leaves its sums to others, which would add rounded ones")
            layer.reduce_results = False
            self.group = get_tp_group().device_group.group_name
        # Code 0 is a valid one, for models without a checkpoint (`--load-format dummy`).
        _register(layer, "weight", torch.zeros(rows, packed_width(columns, 2), dtype=torch.uint8), self._load_weight)
        _register(layer, "weight_scale", torch.zeros(rows, 1, dtype=torch.float32), self._load_scale)
        if layer.has_bias:
            _register(layer, "stored_bias", torch.zeros(rows, dtype=torch.float64), self._load_bias)
        self.layer, self.sizes, self.loaded = layer, output_partition_sizes, set[tuple[str, int]]()
        self.dummy = get_current_vllm_config().load_config.load_format == "dummy"

    def _part(self, shard: str | int | None) -> tuple[int, Part]:
        """The number of a stored matrix among those of the layer, and the part of it that this process holds."""
        layer = self.layer
        index = {"q": 0, "k": 1, "v": 2}.get(shard, shard) or 0  # type: ignore[arg-type]
        assert isinstance(index, int)
        if shard is None and len(self.sizes) > 1:
            raise ValueError(f"{layer.prefix}: its matrices are stored as one, which no export of ours does")
        rank, rows = layer.tp_rank, self.sizes[index]
        if isinstance(layer, RowParallelLinear):
            return index, Part(0, rows, rank * self.columns, self.columns)
        if isinstance(layer, ReplicatedLinear):
            rank = 0
        elif isinstance(layer, QKVParallelLinear) and index:
            rank //= layer.num_kv_head_replicas
        return index, Part(rank * rows, rows, 0, self.columns, at=sum(self.sizes[:index]))

    def _load_weight(self, param: Tensor, stored: Tensor, shard: str | int | None = None) -> None:
        index, part = self._part(shard)
        layer = self.layer
        try:
            if self.form == "master":
                if not stored.is_floating_point():
                    raise ValueError(f"its weight is {stored.dtype} and config.json says latent floats")
                packed, scale = quantized_part(stored, part)
                part.place(layer.weight_scale).copy_(scale)
                self.loaded.add(("weight_scale", index))
            else:
                packed = packed_part(stored, part)
        except ValueError as error:
            raise ValueError(f"{layer.prefix} ({shard}): {error}") from error
        part.place(param).copy_(packed)
        self.loaded.add(("weight", index))

    def _load_scale(self, param: Tensor, stored: Tensor, shard: str | int | None = None) -> None:
        index, part = self._part(shard)
        try:
            part.place(param).copy_(read_scale(stored, self.form))
        except ValueError as error:
            raise ValueError(f"{self.layer.prefix} ({shard}): {error}") from error
        self.loaded.add(("weight_scale", index))

    def _load_bias(self, param: Tensor, stored: Tensor, shard: str | int | None = None) -> None:
        index, part = self._part(shard)
        part.place(param).copy_(stored[part.first_row :][: part.rows])
        self.loaded.add(("stored_bias", index))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError where a tensor of the layer was not in the folder."""
        wanted = {
            (name, index)
            for name in ("weight", "weight_scale", *(["stored_bias"] if layer.has_bias else []))
            for index in range(len(self.sizes))
        }
        if not self.dummy and (missing := sorted(wanted - self.loaded)):
            raise ValueError(
                f"{layer.prefix} lacks {missing[0][0]} of its matrix {missing[0][1]}; the folder is damaged"
            )
        if layer.has_bias:
            layer.bias.data.copy_(exact_bias(layer.stored_bias, layer.weight_scale, self.form))
            del layer.stored_bias

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.group:
            # vLLM gives the bias to one process, for its sum; here every process has the sum.
            bias = None if layer.skip_bias_add else layer.bias
            return row_parallel_linear(x, layer.weight, layer.weight_scale, bias, 2, self.columns, self.group)
        return ops.packed_linear(x, layer.weight, layer.weight_scale, bias, 2, self.columns)


def _register(layer: Any, name: str, data: Tensor, loader: Any) -> None:
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)
