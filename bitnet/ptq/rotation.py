"""Rotations merged into a model's weights: the same function, with outliers spread over all channels (QuaRot,
arXiv 2404.00456; SpinQuant's R1 and R2, arXiv 2405.16406).

A rotation of x and its inverse in front of the weights cancel. Where nothing but linear maps and an RMSNorm without
weights lie between, both are merged and cost nothing when the model runs:

    residual stream   embedding E -> E R, head and q, k, v, gate, up W -> W R, o and down W -> R^T W
    values            each head of v W -> S^T W, and of o W -> W S: attention only mixes positions, and S is the same
                      for all heads, so shared heads and the norm behind attention see it as one

The weights of the norms go into the projections behind them first (input, post-attention and final norm, and the one
behind attention); a norm of weight 1 commutes with a rotation. The head must be a matrix of its own then, so a tied one
is untied. What would need products when the model runs is left out: queries and keys (behind the rotary positions) and
the input of down (behind the activation). R and S are random Hadamard matrices (`bitnet/quant/hadamard.py`).
"""

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM
from bitnet.model.transformer import DecoderLayer, RMSNorm
from bitnet.ptq.walk import projection
from bitnet.quant.hadamard import random_rotation

SEED = 0


def rotate(model: BitNetForCausalLM, seed: int = SEED) -> None:
    """Rotate a float model in place; its logits change by rounding errors of float32 alone."""
    generator = torch.Generator().manual_seed(seed)
    stream = random_rotation(model.config.hidden_size, generator)
    values = random_rotation(model.config.head_width, generator)
    _untie(model)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        _fold_norms(layer)
        attention, mlp = layer.self_attn, layer.mlp
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            _rotate_input(projection(layer, name), stream)
        _rotate_output(projection(mlp, "down_proj"), stream)
        _rotate_output(projection(attention, "o_proj"), stream)
        _rotate_output(projection(attention, "v_proj"), values)
        _rotate_input(projection(attention, "o_proj"), values)
    _rotate_input(model.lm_head, stream)
    _rotate_input(model.model.embed_tokens, stream)


def _untie(model: BitNetForCausalLM) -> None:
    """Give the model a head of its own, with the final norm's weight in it."""
    if model.lm_head is None:
        table = model.model.embed_tokens.weight
        model.lm_head = nn.Linear(table.shape[1], table.shape[0], bias=False, device=table.device)
        model.lm_head.weight = nn.Parameter(table.detach().clone())
        model.config = model.model.config = model.config.replace(tie_word_embeddings=False)
    _fold(model.model.norm, model.lm_head)


def _fold_norms(layer: DecoderLayer) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    _fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
    _fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    if isinstance(attention.attn_sub_norm, RMSNorm):
        _fold(attention.attn_sub_norm, attention.o_proj)


def _fold(norm: RMSNorm, *behind: nn.Linear) -> None:
    for linear in behind:
        linear.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


def _rotate_input(module: nn.Linear | nn.Embedding, rotation: Tensor) -> None:
    """W -> W R for every `len(R)` neighbours of the input (of an embedding: what it gives)."""
    weight = module.weight
    turned = weight.double().view(len(weight), -1, len(rotation)) @ rotation.to(weight.device)
    weight.copy_(turned.view_as(weight))


def _rotate_output(linear: nn.Linear, rotation: Tensor) -> None:
    """W -> R^T W for every `len(R)` neighbours of the output, and the bias with them."""
    rotation = rotation.to(linear.weight.device)
    size, columns = len(rotation), linear.in_features
    turned = rotation.t() @ linear.weight.double().view(-1, size, columns)
    linear.weight.copy_(turned.view_as(linear.weight))
    if linear.bias is not None:
        linear.bias.copy_((linear.bias.double().view(-1, size) @ rotation).view(-1))
