"""The model: its configuration, BitLinear, the transformer and the key/value cache."""

from bitnet.model.config import PRESETS, ModelConfig
from bitnet.model.kv_cache import KVCache
from bitnet.model.linear import BitLinear, PackedEmbedding, PackedLinear, bit_linears, pack, replace_linear
from bitnet.model.transformer import BitNetForCausalLM

__all__ = [
    "PRESETS",
    "BitLinear",
    "BitNetForCausalLM",
    "KVCache",
    "ModelConfig",
    "PackedEmbedding",
    "PackedLinear",
    "bit_linears",
    "pack",
    "replace_linear",
]
