"""BitNetForCausalLM for vLLM: its Llama with a norm before o_proj and down_proj, and relu2 or silu as the gate.

The formulas are those of `bitnet/model/transformer.py`. vLLM's own classes serve ternary Llama, Qwen2 and Qwen3 shapes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM

from bitnet.kernels.sharded import row_parallel_norm


class SubNorm(nn.Module):
    """RMSNorm of rows that are spread over processes, `[.., width / processes]` in and out: the same bits in any
    number of them."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        processes = get_tensor_model_parallel_world_size()
        self.width, self.eps, self.mine = width, eps, width // processes
        self.group = get_tp_group().device_group.group_name if processes > 1 else ""
        self.weight = nn.Parameter(torch.ones(self.mine), requires_grad=False)
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]

    def _load(self, param: Tensor, stored: Tensor) -> None:
        if list(stored.shape) != [self.width]:
            raise ValueError(f"a sub-norm is {list(stored.shape)} and config.json says [{self.width}]")
        param.data.copy_(stored[get_tensor_model_parallel_rank() * self.mine :][: self.mine])

    def forward(self, x: Tensor) -> Tensor:
        return row_parallel_norm(x, self.weight, self.eps, self.width, self.group)


class BitNetAttention(LlamaAttention):
    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.attn_sub_norm = SubNorm(self.total_num_heads * self.head_dim, config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn_sub_norm(self.attn(q, k, v)))
        return output


class BitNetMLP(nn.Module):
    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.ffn_sub_norm = SubNorm(inner, config.rms_norm_eps)
        if config.hidden_act not in ("relu2", "silu"):
            raise ValueError(f"hidden_act is {config.hidden_act!r}; BitNet's are relu2 and silu")
        self.relu2 = config.hidden_act == "relu2"

    def forward(self, x: Tensor) -> Tensor:
        both, _ = self.gate_up_proj(x)
        gate, up = both.chunk(2, dim=-1)
        gate = torch.relu(gate).square() if self.relu2 else torch.nn.functional.silu(gate)
        output, _ = self.down_proj(self.ffn_sub_norm(gate * up))
        return output


class BitNetDecoderLayer(nn.Module):
    forward = LlamaDecoderLayer.forward

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__()
        config = config or vllm_config.model_config.hf_config
        self.hidden_size = config.hidden_size
        self.self_attn = BitNetAttention(
            config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = BitNetMLP(config, vllm_config.quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BitNetForCausalLM(LlamaForCausalLM):
    """The language model, under the module names of transformers' class of this name."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=BitNetDecoderLayer)
