"""GGUF files, in: the model of one in our classes, with float32 embedding, head and norms.

Ternary tensors (TQ1_0, TQ2_0, Q1_0, Q2_0, I2_S, and float ones that hold {-s, 0, s}) become packed codes and a scale
without a detour through floats, where every projection of the model is ternary with one scale a matrix, or with those
of groups that the metadata say it was trained with (`names.QUANTIZER`). Otherwise the
model is a float one, and every type that `bitnet.quant` can dequantize is dequantized. Float tensors count as ternary
in the bitnet architectures and beside a `.scale`; elsewhere nobody means an activation to be quantized.

What the architectures of `names.py` do not have (experts, windows, scaled rotary positions, other biases, tensors or
activations) is refused with its name. No size is taken from the metadata that the tensors do not have.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from bitnet.kernels import GROUP_SIZES, blocks
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.quant import pack_codes, scale_of_columns
from bitnet.quant.blocks import ternary
from bitnet.quant.i2s import unpack_i2_s
from bitnet.storage.gguf.container import GGUFError, GGUFFile, TensorInfo
from bitnet.storage.gguf.names import (
    ARCHITECTURES,
    BITNET_ARCHITECTURES,
    PROJECTIONS,
    QUANTIZER,
    ROPE_FACTORS,
    bias_names,
    norm_names,
    projection_names,
    rotary_rows,
    table_names,
)

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TERNARY = (*ternary.SIZES, "I2_S")
"""Types whose codes are -1, 0 and 1."""
_GROUPED = ("Q2_0", "PQ2_0")
_PROJECTION_NAMES = tuple(PROJECTIONS.values())
_ZEROS = 0x55  # a byte of four codes of weight 0

# Metadata of an architecture, by the end of the key: those that are read below, those that change nothing about the
# logits, and the values at which those of other models change nothing. Any other is refused.
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "hidden_activation", "rope.scaling.type",
    QUANTIZER.partition(".")[2],
}  # fmt: skip
_HARMLESS = {
    "vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
    "attention.layer_norm_epsilon", "pooling_type",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_feed_forward_length"), (0,)),
    **dict.fromkeys(("leading_dense_block_count", "nextn_predict_layers", "attention.sliding_window"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.scale", "attention.max_alibi_bias"), (0.0,)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "router_logit_softcapping"), (0.0,)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), (0.0, 1.0)),
    # llama.cpp scales by these whatever the type says, but with the type none.
    **dict.fromkeys(("rope.scaling.factor", "rope.scale_linear"), (0.0, 1.0)),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}


@contextmanager
def _naming(file: GGUFFile) -> Iterator[None]:
    """Errors of the block say which file they are about."""
    try:
        yield
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from None


def read_model(file: GGUFFile, config: ModelConfig, *, i2_s: str = "x86") -> BitNetForCausalLM:
    """The model of a file, in evaluation mode: packed if it is ternary, else float. `config` is of `read_config`.

    i2_s: the order of the codes in I2_S tensors, "x86" or "arm", which a file does not tell. Raises GGUFError (a
    ValueError) for a damaged file.
    """
    with _naming(file):
        tensors = _float_tensors(file, config)
        if quantizer := trained_groups(file):
            grouped = _grouped_tensors(file, config, GROUP_SIZES[quantizer])
            return BitNetForCausalLM.from_tensors(config.replace(quantizer=quantizer), tensors | grouped)
        packed = _packed_tensors(file, config, i2_s)
        if packed is not None:
            return BitNetForCausalLM.from_tensors(config.replace(quantizer="ternary"), tensors | packed)
        return BitNetForCausalLM.from_tensors(config, tensors | _dense_tensors(file, config))


def read_config(file: GGUFFile) -> ModelConfig:
    """The configuration of a file, with quantizer "none", once its tensors have been found to be exactly that model's.

    Raises GGUFError naming what is missing, left over or not supported.
    """
    with _naming(file):
        return _read_config(file)


def _read_config(file: GGUFFile) -> ModelConfig:
    arch = file.architecture
    if arch not in ARCHITECTURES:
        raise GGUFError(f"its architecture is {arch!r}; {', '.join(ARCHITECTURES)} are understood")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise GGUFError("it is one part of a model in several files; join them with llama-gguf-split --merge")
    _check_metadata(file)
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise GGUFError("it has no matrix token_embd.weight")
    heads = _number(file, "attention.head_count")
    hidden, layers = _number(file, "embedding_length"), _number(file, "block_count")
    # Before anything of so many layers is made.
    if layers * len(PROJECTIONS) > len(file.tensors):
        raise GGUFError(f"it announces {layers} layers and has {len(file.tensors)} tensors")
    head_dim = _number(file, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _number(file, key, head_dim) != head_dim:
            raise GGUFError(
                f"{arch}.{key} is {_number(file, key)} and heads are {head_dim} wide; they must be the same"
            )
    activation = file.metadata.get(f"{arch}.hidden_activation", "relu2" if arch in BITNET_ARCHITECTURES[1:] else "silu")
    config = ModelConfig(
        vocab_size=table.shape[0],
        hidden_size=hidden,
        intermediate_size=_number(file, "feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_number(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_number(file, "context_length"),
        rope_theta=_real(file, "rope.freq_base", 10000.0),
        rope_factors=_rope_factors(file, head_dim),
        rms_norm_eps=_real(file, "attention.layer_norm_rms_epsilon"),
        hidden_act=str(activation),
        sub_norm="blk.0.attn_sub_norm.weight" in file.tensors,
        qkv_bias=arch == "qwen2" or (arch == "llama" and all(f"blk.0.attn_{x}.bias" in file.tensors for x in "qkv")),
        qk_norm=arch == "qwen3",
        tie_word_embeddings="output.weight" not in file.tensors,
        quantizer="none",
    )
    # Their tables are the one size that no tensor bounds: at most twice the file, or 32 MB.
    if config.max_position_embeddings * head_dim > max(2**22, file.size // 4):
        raise GGUFError(f"{arch}.context_length is {config.max_position_embeddings}, more than is supported")
    _check_tensors(file, config)
    return config


def _check_metadata(file: GGUFFile) -> None:
    """Raise GGUFError for metadata of the architecture that change what it computes, or might."""
    arch = file.architecture
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "linear")  # llama.cpp's default
    if kind not in ("none", "linear"):
        raise GGUFError(
            f"{arch}.rope.scaling.type is {kind!r:.40}; positions here are plain rotary or have a table of factors"
        )
    unused = {"rope.scaling.factor", "rope.scale_linear"} if kind == "none" else set()
    for name, value in file.metadata.items():
        if not name.startswith(f"{arch}."):
            continue
        key = name.removeprefix(f"{arch}.")
        if key not in _READ | _HARMLESS | unused and value not in _NEUTRAL.get(key, ()):
            raise GGUFError(
                f"{name} is {value!r:.40}, which is not understood and may change what the model computes; convert the "
                "model without it"
            )


def _rope_factors(file: GGUFFile, head_dim: int) -> tuple[float, ...]:
    """Divisors of the rotary frequencies, where the file has a table of them."""
    info = file.tensors.get(ROPE_FACTORS)
    if info is None or file.architecture != "llama":  # llama.cpp reads it there; elsewhere it is one too many
        return ()
    if info.shape != (head_dim // 2,) or info.type != "F32":
        raise GGUFError(f"{ROPE_FACTORS} is {info.type} {list(info.shape)}; it must be F32 [{head_dim // 2}]")
    factors = dequantize(file, ROPE_FACTORS).tolist()
    return () if all(factor == 1.0 for factor in factors) else tuple(factors)


def _check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    ours = config.tensor_shapes()
    names = [*projection_names(config), *table_names(config), *norm_names(config)]
    shapes = {f"{theirs}.weight": ours[f"{name}.weight"] for name, theirs in names}
    shapes |= {f"{theirs}.bias": ours[f"{name}.bias"] for name, theirs in bias_names(config)}
    if ROPE_FACTORS in file.tensors and file.architecture == "llama":
        shapes[ROPE_FACTORS] = (config.head_width // 2,)
    scales = (f"{theirs}.scale" for _, theirs in projection_names(config))
    shapes |= {name: (1,) for name in scales if name in file.tensors}
    for name, shape in shapes.items():
        info = file.tensors.get(name)
        if info is None:
            raise GGUFError(f"the tensor {name} is missing")
        if info.shape != shape:
            raise GGUFError(f"{name} is {list(info.shape)} and the metadata say {list(shape)}")
    left = [name for name in file.tensors if name not in shapes]
    if left:
        raise GGUFError(
            f"{len(left)} tensors are not of this model, among them {left[0]}; biases, experts and rotary "
            "factors are not supported there"
        )


def _number(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(f"{file.architecture}.{key}", default)
    if type(value) is not int or value < 1:
        raise GGUFError(f"{file.architecture}.{key} is {value!r:.40}; it must be a positive integer")
    return value


def _real(file: GGUFFile, key: str, default: float | None = None) -> float:
    value = file.metadata.get(f"{file.architecture}.{key}", default)
    if type(value) not in (int, float):
        raise GGUFError(f"{file.architecture}.{key} is {value!r:.40}; it must be a number")
    return float(str(np.float32(value)))  # float32 1e-5 is meant as 1e-5


def dequantize(file: GGUFFile, name: str) -> Tensor:
    """A tensor in float32, in its shape and memory of its own. Raises GGUFError for a type without a dequantizer."""
    info, data = file.tensors[name], torch.from_numpy(file.data(name))
    if info.type in FLOATS:
        return data.view(FLOATS[info.type]).to(torch.float32, copy=True).view(info.shape)
    if info.type not in blocks.TYPES and info.type not in blocks.READ_ONLY:
        raise GGUFError(f"{name} is {info.type}, which has no dequantizer here; convert the file to another type")
    # Blocks run along rows: as many bytes a row as its blocks have.
    rows = data.view(-1, info.nbytes // (info.parameters // info.shape[-1]))
    return blocks.dequantize(rows, info.type).view(info.shape)


def _float_tensors(file: GGUFFile, config: ModelConfig) -> dict[str, Tensor]:
    """Norms, embedding and head, and biases."""
    names = [*norm_names(config), *table_names(config)]
    tensors = {f"{name}.weight": dequantize(file, f"{theirs}.weight") for name, theirs in names}
    for name, theirs in bias_names(config):
        bias = dequantize(file, f"{theirs}.bias")
        tensors[f"{name}.bias"] = rotary_rows(config, file.architecture, name, bias, inverse=True)
    return tensors


def _dense_tensors(file: GGUFFile, config: ModelConfig) -> dict[str, Tensor]:
    tensors = {}
    for name, theirs in projection_names(config):
        weight = dequantize(file, f"{theirs}.weight")
        weight = rotary_rows(config, file.architecture, name, weight, inverse=True)
        tensors[f"{name}.weight"] = (
            weight.mul_(factor_of(file, theirs)) if f"{theirs}.scale" in file.tensors else weight
        )
    return tensors


def _packed_tensors(file: GGUFFile, config: ModelConfig, i2_s: str) -> dict[str, Tensor] | None:
    """Codes and scales of all projections, or None where one of them is not ternary with a single scale."""
    tensors = {}
    for name, theirs in projection_names(config):
        packed = read_ternary(file, theirs, i2_s)
        if packed is None:
            return None
        codes, scale = packed
        tensors[f"{name}.packed_weight"] = rotary_rows(config, file.architecture, name, codes, inverse=True)
        tensors[f"{name}.weight_scale"] = torch.tensor([[scale]], dtype=torch.float32)
    return tensors


def trained_groups(file: GGUFFile) -> str | None:
    """The quantizer of a model that was trained with scales of groups, where the file still holds them: one that was
    quantized again is a float model. Raises GGUFError for a quantizer that is not known."""
    quantizer = file.metadata.get(QUANTIZER)
    if quantizer is None:
        return None
    if quantizer not in GROUP_SIZES:
        raise GGUFError(f"{file.path}: {QUANTIZER} is {quantizer!r:.40}; known are {', '.join(GROUP_SIZES)}")
    kinds = {info.type for name, info in file.tensors.items() if name.rpartition(".")[0].endswith(_PROJECTION_NAMES)}
    return quantizer if kinds <= {*_GROUPED, "F16", "F32"} else None


def holds_ternary(file: GGUFFile) -> bool:
    """Whether a file's projections are ternary codes, in blocks or as floats, and, as far as one of them shows, have
    one scale a matrix or those that the metadata name, as models that were trained ternary: these have kernels, and
    `Source.model()` finds out the rest."""
    return bool(trained_groups(file)) or read_ternary(file, "blk.0.ffn_down") is not None


def _grouped_tensors(file: GGUFFile, config: ModelConfig, group_size: int) -> dict[str, Tensor]:
    """Codes and scales of all projections. Raises GGUFError for a matrix that has none for such groups."""
    tensors = {}
    for name, theirs in projection_names(config):
        codes, scale = _groups(file, f"{theirs}.weight", group_size)
        codes, scale = (rotary_rows(config, file.architecture, name, part, inverse=True) for part in (codes, scale))
        tensors[f"{name}.packed_weight"], tensors[f"{name}.weight_scale"] = pack_codes(codes, 2), scale.half()
    return tensors


def _groups(file: GGUFFile, name: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Ternary codes int8 `[N, K]` and scale float32 `[N, ceil(K / group_size)]` of a matrix."""
    info = file.tensors[name]
    rows, columns = _matrix(info)
    if info.type in _GROUPED:
        codes, scales = ternary.unpack_rows(torch.from_numpy(file.data(name)).view(rows, -1), info.type)
        scales = scales.repeat_interleave(ternary.SIZES[info.type][0], dim=1)
    else:
        weight = dequantize(file, name)
        codes, scales = weight.sign().to(torch.int8), weight.abs()
    padded = torch.nn.functional.pad(scales, (0, -columns % group_size)).view(rows, -1, group_size)
    scale = padded.amax(2)
    # A weight of 0 has any scale.
    differs = (scale_of_columns(scale, group_size, columns) != scales) & (codes != 0)
    if bool(differs.any()) or bool((codes > 1).any()):
        raise GGUFError(f"{name} does not hold ternary codes with a scale for each {group_size}, as {QUANTIZER} says")
    return codes, scale


def factor_of(file: GGUFFile, name: str) -> Tensor:
    if f"{name}.scale" not in file.tensors:
        return torch.ones(1)
    factor = dequantize(file, f"{name}.scale")
    if not torch.isfinite(factor).all():
        raise GGUFError(f"{name}.scale is {factor.item()}; the file is damaged")
    return factor


def read_ternary(file: GGUFFile, name: str, i2_s: str = "x86") -> tuple[Tensor, float] | None:
    """Codes of the matrix `name`.weight, packed to 2 bits (`bitnet/quant/packing.py`), and their scale; None where it
    is not ternary with one scale for the whole matrix."""
    info = file.tensors[f"{name}.weight"]
    factor = float(factor_of(file, name))
    if info.type == "I2_S":
        codes, scale = unpack_i2_s(torch.from_numpy(file.data(info.name)), _matrix(info), i2_s)
        found: tuple[Tensor, float] | None = (pack_codes(codes, 2), scale)
    elif info.type in ternary.SIZES:
        found = _from_blocks(torch.from_numpy(file.data(info.name)), info)
    elif info.type in FLOATS and (file.architecture in BITNET_ARCHITECTURES or f"{name}.scale" in file.tensors):
        found = _from_floats(dequantize(file, info.name))
    else:
        return None
    if found is None or not np.isfinite(found[1]):
        return None
    return found[0], float(np.float32(found[1]) * np.float32(factor))


def _matrix(info: TensorInfo) -> tuple[int, int]:
    return info.shape[0], info.shape[1]


def _from_blocks(data: Tensor, info: TensorInfo) -> tuple[Tensor, float] | None:
    rows, columns = _matrix(info)
    size, nbytes = ternary.SIZES[info.type]
    if info.type == "TQ2_0":  # its quants have our bit layout
        raw = data.view(rows, columns // size, nbytes)
        packed, scales = raw[..., :64].clone(), raw[..., 64:].clone().view(torch.float16).float()
    else:
        codes, scales = ternary.unpack_rows(data.view(rows, -1), info.type)
        if codes.max() > 1:  # the weight 2
            return None
        packed, scales = pack_codes(codes, 2).view(rows, -1, size // 4), scales.view(rows, -1, 1)
    used = scales[scales != 0]  # a block with scale 0 is a block of zeros, whatever its codes
    if used.numel() and not bool((used == used[0]).all()):
        return None
    packed[(scales == 0).squeeze(-1)] = _ZEROS
    if (packed & (packed >> 1) & _ZEROS).any():  # the code 3 stands for the weight 2
        return None
    return packed.view(rows, -1), float(used[0]) if used.numel() else 1.0


def _from_floats(weight: Tensor) -> tuple[Tensor, float] | None:
    magnitude = weight.abs()
    largest = magnitude.max()
    # Ternary is what has one magnitude beside 0.
    if not bool(((magnitude == 0) | (magnitude == largest)).all()):
        return None
    return pack_codes(weight.sign().to(torch.int8), 2), float(largest) or 1.0
