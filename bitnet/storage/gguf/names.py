"""What a model is called in a GGUF file: architectures, tensors, and llama.cpp's order of rotary dimensions.

    architecture     engine        model
    bitnet           llama.cpp     sub-norms, SiLU, tied embeddings; ternary or float        (bitnet.cpp too, with I2_S)
    bitnet-b1.58     bitnet.cpp    sub-norms, squared ReLU, tied embeddings; ternary
    llama            llama.cpp     no sub-norms, SiLU, tied or not; Llama 3.1's rotary factors in rope_freqs.weight
    qwen2            llama.cpp     the same with biases behind q, k and v
    qwen3            llama.cpp     the same with norms of every head of q and k

A projection `X.weight` may have a factor `X.scale` (float32 [1]) beside it. All but llama rotate halves, as this
project does. In files of architecture llama the rotation pairs neighbours, so that the rows of q and k, and their
biases, stand in another order: row 2i + h of a head is row i + h * D / 2 of ours.

Letters: N out_features, K in_features, D head_dim.
"""

from collections.abc import Iterator

from einops import rearrange
from torch import Tensor

from bitnet.model import ModelConfig

BITNET_ARCHITECTURES = ("bitnet", "bitnet-b1.58", "bitnet-25")
ARCHITECTURES = (*BITNET_ARCHITECTURES, "llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
QUANTIZER = "bitnet.weight_quantizer"
"""Metadata of this project: the weight quantizer of a model that was trained with scales of groups."""

# Names inside a layer, ours to GGUF's.
PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def projection_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Every projection: our module's name and GGUF's, both without ".weight", layer by layer."""
    for layer in range(config.num_hidden_layers):
        for ours, theirs in PROJECTIONS.items():
            yield f"model.layers.{layer}.{ours}", f"blk.{layer}.{theirs}"


def norm_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Every norm, likewise."""
    yield "model.norm", "output_norm"
    for layer in range(config.num_hidden_layers):
        for ours in config.norms():
            yield f"model.layers.{layer}.{ours}", f"blk.{layer}.{NORMS[ours]}"


def bias_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Every projection with a bias, likewise."""
    for layer in range(config.num_hidden_layers):
        for ours in config.biases():
            yield f"model.layers.{layer}.{ours}", f"blk.{layer}.{PROJECTIONS[ours]}"


def table_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Embedding and, where it is a matrix of its own, output head."""
    yield "model.embed_tokens", "token_embd"
    if not config.tie_word_embeddings:
        yield "lm_head", "output"


def rotary_rows(config: ModelConfig, architecture: str, name: str, rows: Tensor, *, inverse: bool = False) -> Tensor:
    """The rows `[N, ..]` of our projection `name`, or its bias, in the order of the architecture, or back with
    `inverse`."""
    if architecture != "llama" or not name.endswith(("q_proj", "k_proj")):
        return rows
    heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
    halves, pairs = "(heads half i) ...", "(heads i half) ..."
    pattern = f"{pairs} -> {halves}" if inverse else f"{halves} -> {pairs}"
    return rearrange(rows, pattern, heads=heads, half=2)
