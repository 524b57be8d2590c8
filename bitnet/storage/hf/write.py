"""Hugging Face folders, out: what `AutoModelForCausalLM` and `AutoTokenizer` of transformers load.

    write(model, "folder", "packed", tokenizer_files=sentencepiece_files(proto))

`form` names the dialect, drawn in `bitnet/storage/hf/read.py`: packed and packed-inverse hold codes with their scale or
its reciprocal, master the latent floats, to be quantized online, and a float model is a plain dense one. A model with
sub-norms becomes a BitNetForCausalLM, one with biases behind q, k and v a Qwen2ForCausalLM, one with norms of the heads
of q and k a Qwen3ForCausalLM, any other a LlamaForCausalLM. Codes and scales come from the model's one quantization;
1 / scale is kept in float64, from which the same float32 scale comes back.

A tokenizer becomes a tokenizer.json with sentencepiece's pieces and its merges in sentencepiece's order, and is
compared with the original before it is given out.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bitnet.files import JsonObject, new_folder, write_atomic
from bitnet.kernels import GROUP_SIZES, PACKED_BITS
from bitnet.model import BitLinear, BitNetForCausalLM, ModelConfig, PackedEmbedding, PackedLinear
from bitnet.model.linear import codes_and_scale
from bitnet.model.lora import dense_weight
from bitnet.model.transformer import check_finite
from bitnet.model.weight_only import StoredLayer, WeightOnlyLayer
from bitnet.storage.folders import CONFIG, MODEL, TOKENIZER
from bitnet.storage.hf.card import CARD, Origin, model_card
from bitnet.storage.hf.read import PACKED_ROWS, pack_rows
from bitnet.storage.hf.rope import rope_parameters
from bitnet.storage.safetensors import save_tensors
from bitnet.tokenizer.added import GENERATION

CLASSES = {
    "bitnet": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FORMS = ("packed", "packed-inverse", "master")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    TOKENIZER,
    GENERATION,
)


def write(
    model: BitNetForCausalLM,
    folder: str | Path,
    form: str = "packed",
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    origin: Origin | None = None,
) -> None:
    """Write a folder that transformers loads, whole or not at all.

    form: packed, packed-inverse or master. tokenizer_files: contents by name, from `sentencepiece_files` or
    `Source.tokenizer_files`, or none. origin: what the model card, README.md, says of the training. An INT8 embedding,
    and weights that were quantized after training, are written as the floats that they stand for. Raises ValueError,
    with the reason and the alternative, for what transformers' classes cannot express and for weights that are NaN or
    infinite, and OSError for a folder that exists or a disk that is full.
    """
    files = dict(tokenizer_files or {})
    if unknown := sorted(set(files) - set(TOKENIZER_FILES)):
        raise ValueError(f"{unknown[0]!r} is no tokenizer file; there are {', '.join(TOKENIZER_FILES)}")
    check_expressible(model, form)
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (BitLinear, PackedLinear)) and form != "master" and name != "lm_head":
            codes, scale = codes_and_scale(module)
            tensors[f"{name}.weight"] = pack_rows(codes)
            scale = scale.detach().float().view(1).cpu()
            # In float64: 1 / (1 / scale) in float32 loses the last bit of some scales.
            tensors[f"{name}.weight_scale"] = scale if form == "packed" else 1 / scale.double()
        elif isinstance(module, (PackedEmbedding, PackedLinear, WeightOnlyLayer)):
            tensors[f"{name}.weight"] = dense_weight(module)
        elif f"{name}.weight" in state:
            tensors[f"{name}.weight"] = state[f"{name}.weight"].detach()
        if f"{name}.bias" in state:
            bias, factor = state[f"{name}.bias"].detach(), tensors.get(f"{name}.weight_scale")
            # transformers multiplies it with the scale in this form. In float64, so that it comes back to the bit.
            tensors[f"{name}.bias"] = bias.cpu().double() / factor if form == "packed" and factor is not None else bias
    config = config_of(model, form) | special_ids(files)
    with new_folder(Path(folder), "Hugging Face folder") as temporary:
        save_tensors(temporary / MODEL, tensors)
        write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
        write_atomic(temporary / CARD, model_card(model.config, _described(model, form), origin))
        for file, content in files.items():
            write_atomic(temporary / file, content)


def _described(model: BitNetForCausalLM, form: str) -> str:
    """The weights of a form in a few words, for the model card."""
    if model.config.quantizer == "none":
        kinds = {type(module).__name__ for module in model.modules() if isinstance(module, WeightOnlyLayer)}
        return "dense floats" + (", made from weights of few bits" if kinds - {"FloatLinear", "FloatEmbedding"} else "")
    return {
        "packed": "2-bit codes, four rows a byte, and their scale (form packed)",
        "packed-inverse": "2-bit codes, four rows a byte, and the reciprocal of their scale (form packed-inverse)",
        "master": "latent floats, quantized while the model runs (form master)",
    }[form]


def check_expressible(model: BitNetForCausalLM, form: str) -> None:
    """Raise ValueError, with the reason and the alternative, for a model that `form` cannot hold."""
    config = model.config
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    check_class(config)
    if config.quantizer in GROUP_SIZES:
        raise ValueError(
            f"transformers' BitNet has one scale a matrix and the quantizer is {config.quantizer!r}; write GPTQ's "
            "layout (bitnet export --to gptq) or GGUF's Q2_0, which hold codes and scales exactly"
        )
    check_finite(model)
    for name, module in model.named_modules():
        if isinstance(module, StoredLayer) and not isinstance(module, WeightOnlyLayer):
            raise ValueError(
                f"{name} multiplies INT8 activations ({type(module).__name__}), which no class of transformers does; "
                "quantize weights alone (bitnet quantize --list), or write the float model"
            )
    if form == "master":
        if model.is_packed:
            raise ValueError("the model is packed and has no latent floats; write it as packed or from its run")
        if config.quantizer not in ("ternary", "none"):
            raise ValueError(
                f"transformers quantizes online to ternary and the quantizer is {config.quantizer!r}; "
                + ("write it as packed" if config.quantizer == "binary" else "it has no class for this one")
            )
        return
    if PACKED_BITS.get(config.quantizer) != 2:
        alternative = "write its floats with form master" if config.quantizer == "none" else "use GGUF for other widths"
        raise ValueError(
            f"transformers' BitNet holds 2-bit codes and the quantizer is {config.quantizer!r}; {alternative}"
        )
    for name, module in model.named_modules():
        if isinstance(module, (BitLinear, PackedLinear)) and name != "lm_head" and module.out_features % PACKED_ROWS:
            raise ValueError(
                f"{name} has {module.out_features} rows, and in transformers' format four share a byte; choose sizes "
                "that are multiples of 4, or write the latent floats with form master"
            )


def check_class(config: ModelConfig) -> None:
    """Raise ValueError, with the reason and the alternative, for a model that no class of transformers computes."""
    width = config.num_attention_heads * config.head_width
    if config.sub_norm and width != config.hidden_size:
        raise ValueError(
            f"{config.num_attention_heads} heads of {config.head_width} are {width} wide and hidden_size is "
            f"{config.hidden_size}; transformers' attn_sub_norm has hidden_size weights. Train with head_dim = "
            "hidden_size / num_attention_heads"
        )
    if sum(parts := (config.sub_norm, config.qkv_bias, config.qk_norm)) > 1:
        names = [name for name, part in zip(("sub_norm", "qkv_bias", "qk_norm"), parts, strict=True) if part]
        raise ValueError(
            f"the model has {' and '.join(names)}, and no class of transformers has them together; train with one of "
            "them"
        )
    if kind_of(config) == "llama" and config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} heads, as transformers' "
            "LlamaConfig wants it; choose a divisor"
        )


def kind_of(config: ModelConfig) -> str:
    """The model_type of a configuration."""
    parts = {"bitnet": config.sub_norm, "qwen3": config.qk_norm, "qwen2": config.qkv_bias}
    return next((kind for kind, part in parts.items() if part), "llama")


def special_ids(files: Mapping[str, bytes]) -> JsonObject:
    """The ids that begin and end a text, which transformers takes from config.json too; `files` are the tokenizer's."""
    special = json.loads(files.get(GENERATION, b"{}"))
    return {f"{name}_token_id": special.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}


def config_of(model: BitNetForCausalLM, form: str) -> JsonObject:
    """The contents of config.json: every field written, since the classes' defaults are other models'."""
    config = model.config
    floats = model.model.norm.weight.dtype
    rope = rope_parameters(config.rope_theta, config.rope_factors, config.head_width, config.max_position_embeddings)
    scaled = rope["rope_type"] != "default"
    result: JsonObject = {
        "architectures": [CLASSES[kind_of(config)]],
        "model_type": kind_of(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_width,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,  # transformers 5
        "rope_theta": config.rope_theta,  # its predecessors, and llama.cpp's converter
        "rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"} if scaled else None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "dtype": str(floats).removeprefix("torch."),
    }
    if config.quantizer != "none":
        result["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if form == "packed-inverse" else "autobitlinear",
            "quantization_mode": "online" if form == "master" else "offline",
            "modules_to_not_convert": ["lm_head"],
        }
    return result
