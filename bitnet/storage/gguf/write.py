"""GGUF files, out: `write(model, path, "TQ2_0", tokenizer=tokenizer)`.

    type                          model                        engine
    TQ1_0, TQ2_0, F16, BF16, F32  ternary, binary              llama.cpp, architecture bitnet
    I2_S                          ternary, binary              bitnet.cpp (x86 order), bitnet or bitnet-b1.58
    Q2_0, Q1_0                    ternary, binary (and float)  every backend of llama.cpp; PQ2_0: PrismML's
    Q2_0, PQ2_0, F16, F32         ternary in groups            llama.cpp
    F32 .. Q2_K and mixtures      float (quantizer none)       llama.cpp; bitnet (sub-norms), llama, qwen2, qwen3

The codes of a ternary matrix are stored as they are, -1, 0 and 1 with block scale 1, and the float32 scale in a tensor
`.scale` beside them (I2_S: behind the codes), so nothing is rounded or quantized again. In Q2_0 and Q1_0, and in the
architecture qwen2, the scale is in the blocks instead, as float16; what the rounding takes is given to the norm before
the matrix, where that has one of its own (sub-norms), and is reported for the others. Scales of groups are float16
numbers, which the blocks hold as they are; a key of the metadata (`names.QUANTIZER`) says that they were trained, on
activations with one scale a token, as which the file is then read here. llama.cpp quantizes activations
in its own way (8 bits for each 32 to 256 values, where the training had 8 bits a token), so its logits are close, not
equal; in F16 and F32 it leaves activations alone.

What an engine cannot express is refused with the reason and the alternative.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.files import JsonObject
from bitnet.kernels import GROUP_SIZES, PACKED_BITS, blocks, dequantize_weight
from bitnet.model import BitNetForCausalLM, ModelConfig, PackedEmbedding, PackedLinear
from bitnet.model.linear import codes_and_scale
from bitnet.model.weight_only import BlockLinear
from bitnet.quant import pack_codes, unpack_codes
from bitnet.quant.blocks import mixtures, ternary
from bitnet.quant.i2s import pack_i2_s
from bitnet.storage.gguf.container import NUMBERS, TYPES, TensorToWrite, write_file
from bitnet.storage.gguf.names import (
    QUANTIZER,
    ROPE_FACTORS,
    bias_names,
    norm_names,
    projection_names,
    rotary_rows,
    table_names,
)
from bitnet.storage.sampling import sampling_metadata
from bitnet.tokenizer import BaseTokenizer
from bitnet.tokenizer.gguf_write import vocabulary

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TERNARY = ("TQ2_0", "TQ1_0", "I2_S")
SCALED = ("Q2_0", "Q1_0", "PQ2_0")
"""Types that hold floats as well as ternary codes, with their scale in the blocks."""
# llama.cpp's number for the type of most tensors, which it prints and otherwise ignores.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K": 11,
    "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K": 16, "Q5_K_M": 17,
    "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "I2_S": 40,
    "IQ3_S": 26, "IQ3_M": 27, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ2_M": 29,
    "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24,
    "Q1_0": 40, "Q2_0": 41, "PQ2_0": 41,
}  # fmt: skip


def write(
    model: BitNetForCausalLM,
    path: str | os.PathLike[str],
    type: str = "TQ2_0",
    *,
    tokenizer: BaseTokenizer | JsonObject | None = None,
    chat_template: str | None = None,
    embedding_type: str | None = None,
    name: str = "bitnet",
    sampling: Mapping[str, float] | None = None,
) -> float:
    """Write a model, whole or not at all, one tensor in memory at a time. Returns by which part of itself the scale of
    a ternary matrix was rounded at most: 0 where each is kept in float32, or where a norm has what was rounded.

    type:            of the projections, or a mixture such as Q4_K_M; see the top of this file.
    tokenizer:       one of sentencepiece's or a tokenizer.json's, or the `tokenizer.*` metadata of another GGUF file.
    chat_template:   its jinja source.
    embedding_type:  of embedding and head: by default F16 beside I2_S, Q6_K beside TQ1_0, TQ2_0 and the types below
                     six bits (Q8_0 or F16 where its rows do not fit), else the type itself or what the mixture says.
                     An INT8 embedding is written as the floats it stands for.
    name:            what the file says the model is called.
    sampling:        how its tokens want to be drawn, as in `Source.sampling`.

    Raises ValueError, with the reason and the alternative, for what the engine cannot express, and OSError.
    """
    config = model.config
    arch = architecture(config, type)
    types = tensor_types(config, type, embedding_type)
    metadata = metadata_of(config, arch, type, name)
    if config.quantizer in GROUP_SIZES:
        metadata[QUANTIZER] = config.quantizer
    if tokenizer is not None:
        metadata |= vocabulary(tokenizer, config.vocab_size)
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    metadata |= sampling_metadata(sampling or {})
    rounded = [0.0]
    write_file(path, metadata, sorted(_tensors(model, arch, types, rounded), key=lambda tensor: _layer(tensor.name)))
    return max(rounded)


def architecture(config: ModelConfig, type: str) -> str:
    """The architecture under which a type of file holds a model. Raises ValueError where none does."""
    is_ternary = PACKED_BITS.get(config.quantizer) == 2
    if type not in FILE_TYPES:
        raise ValueError(f"GGUF type {type!r} is unknown; choose one of {', '.join(FILE_TYPES)}")
    if config.quantizer in GROUP_SIZES:
        _check_groups(config.quantizer, type)
    elif config.quantizer not in ("none", "ternary", "binary"):
        raise ValueError(
            f"the quantizer is {config.quantizer!r}, with a scale for each row, and no GGUF type has that; load the "
            "model with quantizer none and export its floats, or keep it as packed weights"
        )
    if is_ternary and type not in TERNARY and type not in SCALED and type not in FLOATS:
        raise ValueError(
            f"{type} would quantize ternary weights again; choose TQ2_0, TQ1_0, I2_S or F16, which hold them exactly, "
            "or Q2_0, which rounds their scales to float16"
        )
    if not is_ternary and type in TERNARY:
        raise ValueError(f"the weights are floats and {type} holds ternary ones; choose F16 or a type such as Q4_K_M")
    if config.hidden_act != "silu" and type != "I2_S":
        raise ValueError(
            f"hidden_act is {config.hidden_act!r} and llama.cpp's architectures compute SiLU whatever a file says; "
            + ("export I2_S for bitnet.cpp" if is_ternary else "train with hidden_act silu")
            + ", or a Hugging Face folder"
        )
    if not config.sub_norm:
        if type == "I2_S":
            raise ValueError("the model has no sub-norms, which bitnet.cpp's architectures need; choose TQ2_0")
        arch = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
        extra = {
            "qkv_bias": config.qkv_bias and config.qk_norm,
            "rope_factors": config.rope_factors and arch != "llama",
        }
        _refuse_parts(arch, extra)
        return arch
    _refuse_parts("bitnet", {name: getattr(config, name) for name in ("qkv_bias", "qk_norm", "rope_factors")})
    if not config.tie_word_embeddings:
        raise ValueError(
            "embedding and head are not tied, and the architecture bitnet has no head of its own; train with "
            "tie_word_embeddings, or export a Hugging Face folder"
        )
    width = config.num_attention_heads * config.head_width
    if width != config.hidden_size:
        raise ValueError(
            f"{config.num_attention_heads} heads of {config.head_width} are {width} wide and hidden_size is "
            f"{config.hidden_size}; the architecture bitnet wants them equal. Train with head_dim = hidden_size / heads"
        )
    return "bitnet" if config.hidden_act == "silu" else "bitnet-b1.58"


def _check_groups(quantizer: str, type: str) -> None:
    """Raise ValueError for a type that does not hold these groups as they are."""
    block = TYPES[NUMBERS[type]][1] if type in ("Q2_0", "PQ2_0") else 0
    if type in ("F16", "F32") or (block and GROUP_SIZES[quantizer] % block == 0):
        return
    raise ValueError(
        f"{quantizer} has a float16 scale for each {GROUP_SIZES[quantizer]} weights, which {type} does not hold; "
        "choose Q2_0 or F16, which hold codes and scales exactly"
    )


def _refuse_parts(arch: str, parts: JsonObject) -> None:
    """Raise ValueError for what a model has (by name, whether it does) and an architecture has no place for."""
    if found := [name for name, there in parts.items() if there]:
        raise ValueError(
            f"the model has {' and '.join(found)}, for which llama.cpp's architecture {arch} has no place; export a "
            "Hugging Face folder"
        )


def tensor_types(config: ModelConfig, type: str, embedding_type: str | None = None) -> dict[str, str]:
    """The type of every matrix, by its name in the file without ".weight". Raises ValueError for rows that do not
    fit."""
    ours = config.tensor_shapes()
    projections = {theirs: ours[f"{name}.weight"] for name, theirs in projection_names(config)}
    tables = [theirs for _, theirs in table_names(config)]
    if type not in NUMBERS:
        shapes = projections | dict.fromkeys(tables, (config.vocab_size, config.hidden_size))
        types = mixtures.tensor_types(type, {f"{name}.weight": shape for name, shape in shapes.items()})
        types = {name.removesuffix(".weight"): kind for name, kind in types.items()}
    else:
        for name, (_, columns) in projections.items():
            block = TYPES[NUMBERS[type]][1]
            if columns % block:
                fallback = "F16" if config.quantizer != "none" or columns % 32 else "Q8_0"
                raise ValueError(
                    f"{name} has rows of {columns} weights, no multiple of {type}'s {block}; choose {fallback}, or "
                    f"train with sizes that are multiples of {block}"
                )
        _, block, size = TYPES[NUMBERS[type]]
        # Embedding and head keep six bits or more; beside I2_S they are F16.
        table_type = "F16" if type == "I2_S" else "Q6_K" if 8 * size / block < 6.5 else type
        types = dict.fromkeys(projections, type) | dict.fromkeys(tables, table_type)
    for table in tables:
        if embedding_type is not None:
            types[table] = embedding_type
        if types[table] in TERNARY or types[table] not in (*FLOATS, *blocks.TYPES):
            raise ValueError(f"embedding type {types[table]!r} is not one of F32, F16, BF16 and the block types")
        for fallback in ("Q8_0", "F16"):
            if config.hidden_size % TYPES[NUMBERS[types[table]]][1]:
                types[table] = fallback
    return types


def metadata_of(config: ModelConfig, arch: str, type: str, name: str) -> JsonObject:
    """The metadata of a model of this shape without a tokenizer's."""
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[type],
        "general.quantization_version": 2,
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_width,
        f"{arch}.attention.value_length": config.head_width,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.dimension_count": config.head_width,
        f"{arch}.rope.freq_base": config.rope_theta,
    }


def _tensors(
    model: BitNetForCausalLM, arch: str, types: dict[str, str], rounded: list[float]
) -> Iterator[TensorToWrite]:
    """Every tensor; `rounded` gets what the scales of ternary matrices lose, as they are made."""
    config, shapes = model.config, model.config.tensor_shapes()
    # Norms that stand before one matrix alone, to that matrix: its scale may be theirs.
    projections, norms = dict(projection_names(config)), {}
    if config.sub_norm and config.quantizer in ("ternary", "binary"):
        for layer in (f"model.layers.{index}" for index in range(config.num_hidden_layers)):
            norms[f"{layer}.self_attn.attn_sub_norm"] = f"{layer}.self_attn.o_proj"
            norms[f"{layer}.mlp.ffn_sub_norm"] = f"{layer}.mlp.down_proj"
    scales: dict[str, Tensor] = {}  # from the one quantization that a weight gets when its turn comes, just before

    def entry(
        name: str, shape: tuple[int, ...], type: str, tensor: Callable[[Any], Tensor], ours: str
    ) -> TensorToWrite:
        def make() -> np.ndarray:
            try:
                return tensor(model.get_submodule(ours)).contiguous().view(torch.uint8).flatten().numpy()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        return TensorToWrite(name, shape, type, make)

    def weight(type: str, name: str, module: Any) -> Tensor:
        if config.quantizer == "none":
            if isinstance(module, BlockLinear) and module.block_type == type:
                return rotary_rows(config, arch, name, module.data.cpu())
            return encode(rotary_rows(config, arch, name, _floats(module.weight)), type)
        if config.quantizer in GROUP_SIZES:
            codes, groups = (rotary_rows(config, arch, name, part.cpu()) for part in codes_and_scale(module))
            return encode_groups(codes, groups, type, config.quantizer)
        codes, scales[name] = codes_and_scale(module)
        if not scales[name].isfinite().all():
            raise ValueError("its weights are NaN or infinite; did the model's training diverge?")
        codes = rotary_rows(config, arch, name, codes.cpu())
        inside = not scale_beside(arch, type)
        if inside and name not in norms.values():
            rounded.append(abs(stored_scale(float(scales[name]), type) / float(scales[name]) - 1))
        return encode_ternary(codes, float(scales[name]), type, inside=inside)

    def norm(name: str, type: str, module: Any) -> Tensor:
        if name not in norms or scale_beside(arch, type) or type in EXACT_SCALES:
            return _floats(module.weight)
        scale = float(codes_and_scale(model.get_submodule(norms[name]))[1])
        return _floats(module.weight) * (scale / stored_scale(scale, type))

    def bias(name: str, module: Any) -> Tensor:
        return rotary_rows(config, arch, name, _floats(module.bias))

    def scale(name: str, module: Any) -> Tensor:
        return scales.pop(name).view(1).cpu()

    for ours, theirs in table_names(config):
        type = types[theirs]
        yield entry(f"{theirs}.weight", shapes[f"{ours}.weight"], type, partial(_table, type), ours)
    for ours, theirs in norm_names(config):
        type = types[projections[norms[ours]]] if ours in norms else "F32"
        yield entry(f"{theirs}.weight", shapes[f"{ours}.weight"], "F32", partial(norm, ours, type), ours)
    if config.rope_factors:
        factors = torch.tensor(config.rope_factors)
        yield entry(ROPE_FACTORS, tuple(factors.shape), "F32", lambda module: factors, "model")
    for ours, theirs in bias_names(config):
        yield entry(f"{theirs}.bias", shapes[f"{ours}.bias"], "F32", partial(bias, ours), ours)
    for ours, theirs in projection_names(config):
        type = types[theirs]
        yield entry(f"{theirs}.weight", shapes[f"{ours}.weight"], type, partial(weight, type, ours), ours)
        if config.quantizer in ("ternary", "binary") and scale_beside(arch, type):
            yield entry(f"{theirs}.scale", (1,), "F32", partial(scale, ours), ours)


def _layer(name: str) -> int:
    """The layer of a tensor, so that a file has its tensors in the order of use; -1 for those of no layer."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def encode(weight: Tensor, type: str) -> Tensor:
    """A float matrix `[N, K]` in a type of file: its bytes or the tensor that has them. Raises ValueError for weights
    that the type does not hold."""
    if type not in FLOATS:
        return blocks.quantize(weight, type)
    stored = weight.to(FLOATS[type])
    if not bool(stored.isfinite().all()):
        largest = float(weight.abs().max())
        raise ValueError(f"a weight of {largest:g} is beyond {type}; choose BF16 or F32")
    return stored


def scale_beside(arch: str, type: str) -> bool:
    """Whether the scale of a ternary matrix has a tensor of its own, in float32. In llama.cpp's architecture qwen2 the
    feed-forward layers do not look at it (v0.5.0), and I2_S keeps it behind the codes."""
    return type != "I2_S" and type not in SCALED and arch != "qwen2"


EXACT_SCALES = ("F32", "I2_S")
"""Types that keep a matrix's scale in float32."""


def stored_scale(scale: float, type: str) -> float:
    """A scale above 0 as the blocks or floats of a type hold it. Raises ValueError where that is 0 or infinite."""
    if type in EXACT_SCALES:
        return scale
    stored = float(torch.tensor(scale, dtype=FLOATS.get(type, torch.float16)))
    if not 0 < stored < float("inf"):
        raise ValueError(
            f"a matrix has the scale {scale:g}, which float16 does not hold; choose another type than {type}"
        )
    return stored


def encode_ternary(codes: Tensor, scale: float, type: str, *, inside: bool) -> Tensor:
    """Ternary codes int8 `[N, K]`; with `inside` times their scale, which blocks round to float16, the floats to
    themselves. Otherwise exactly: block scales are 1, and the scale of the matrix has a tensor of its own."""
    if type == "I2_S":
        return pack_i2_s(codes, scale)
    scale = scale if inside else 1.0
    if type in FLOATS:
        return (codes * scale).to(FLOATS[type])
    if type != "TQ2_0":
        return ternary.pack_rows(codes, scale, type)
    packed = pack_codes(codes, 2).view(codes.shape[0], -1, 64)  # TQ2_0's quants have our bit layout
    d = torch.full((*packed.shape[:2], 1), scale, dtype=torch.float16).view(torch.uint8)
    return torch.cat([packed, d], dim=-1)


def encode_groups(codes: Tensor, scale: Tensor, type: str, quantizer: str) -> Tensor:
    """Ternary codes int8 `[N, K]` with scales of groups `[N, G]`, numbers that float16 holds: exactly."""
    if type in FLOATS:
        return dequantize_weight(codes, scale, quantizer).to(FLOATS[type])
    block = ternary.SIZES[type][0]
    scale = scale.repeat_interleave(GROUP_SIZES[quantizer] // block, dim=1)
    return ternary.pack_rows(codes, scale[:, : codes.shape[1] // block], type)


def _table(type: str, module: Any) -> Tensor:
    """Embedding or head in a type of file."""
    if isinstance(module, (PackedEmbedding, PackedLinear)):
        columns = module.embedding_dim if isinstance(module, PackedEmbedding) else module.in_features
        return encode((unpack_codes(module.packed_weight, 8, columns) * module.weight_scale).cpu(), type)
    if isinstance(module, BlockLinear) and module.block_type == type:
        return module.data.cpu()
    return encode(_floats(module.weight), type)


def _floats(weight: Tensor) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise ValueError("its weights are NaN or infinite; did the model's training diverge?")
    return weight.detach().float().cpu()
