"""The configuration of Hugging Face folders: which models are understood, and in which form their weights are."""

from dataclasses import dataclass
from typing import Literal

from bitnet.files import JsonObject
from bitnet.model import ModelConfig
from bitnet.quant.grouped import GPTQ_BITS
from bitnet.storage.hf.rope import parse_rope

Form = Literal["dense", "master", "packed", "packed-inverse", "gptq", "awq"]

# What a config.json leaves out has its class's default in transformers.
_DEFAULTS: dict[str, JsonObject] = {
    "bitnet": {"hidden_act": "relu2", "num_key_value_heads": 5, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "llama": {"num_key_value_heads": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
}
_COMMON: JsonObject = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
_HEADS = ("lm_head", "lm_head.weight", "embed_tokens", "model.embed_tokens", "model.embed_tokens.weight")
# Fields of quantization_config; rms_norm_eps is of a norm that is refused.
_QUANTIZATION = (
    "quant_method", "linear_class", "quantization_mode", "modules_to_not_convert", "use_rms_norm", "rms_norm_eps",
)  # fmt: skip
# The same of GPTQ and AWQ: what is read, what says how the codes were found or which kernel its makers like, and values
# at which another field changes nothing about the weights.
_GROUPS = {"quant_method", "bits", "group_size", "checkpoint_format", "version", "zero_point"}
_GROUP_NOTES = {
    "desc_act", "sym", "static_groups", "true_sequential", "damp_percent", "damp_auto_increment", "mse",
    "act_group_aware", "model_name_or_path", "model_file_base_name", "tokenizer", "dataset", "batch_size",
    "model_seqlen", "max_input_length", "modules_to_not_convert", "modules_in_block_to_quantize",
    "block_name_to_quantize", "module_name_preceding_first_block", "cache_block_outputs", "use_cuda_fp16",
    "use_exllama", "disable_exllama", "exllama_config", "pad_token_id", "backend", "meta", "quantizer", "do_fuse",
    "modules_to_fuse", "fuse_max_seq_len",
}  # fmt: skip
_GROUP_NEUTRAL: dict[str, tuple[object, ...]] = {
    "lm_head": (False,), "pack_dtype": ("int32",), "format": ("gptq", "gptq_v2"), "method": ("gptq",),
    "is_marlin_format": (False,), "rotation": (None,),
}  # fmt: skip
# Fields that the functions below read.
_READ = {
    *_COMMON, "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
    "num_attention_heads", "num_key_value_heads", "quantization_config", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "attention_bias", "mlp_bias",
}  # fmt: skip
# Fields that change nothing about the logits: of training, of generation, of the files, of other tasks.
_HARMLESS = {
    "architectures", "auto_map", "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "attn_implementation", "transformers_version",
    "torch_dtype", "dtype", "use_cache", "cache_implementation", "initializer_range", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout", "gradient_checkpointing", "pretraining_tp",
    "base_model_tp_plan",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "tokenizer_class", "prefix", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "torchscript", "use_bfloat16", "tf_legacy_loss", "return_dict", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "max_length", "min_length", "max_new_tokens",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "model_max_length",
    "max_sequence_length", "is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed",
    "fix_mistral_regex", "model_name", "license",
}  # fmt: skip
# Fields of other architectures, and the values at which they change nothing; null and what is empty never do.
_NEUTRAL: dict[str, object] = {
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "embedding_multiplier", "residual_multiplier"), 1),
    **dict.fromkeys(("logits_scaling", "logit_scale", "scale_emb", "lm_head_multiplier"), 1),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("chunk_size_feed_forward", "attn_logit_softcapping", "final_logit_softcapping"), 0),
    **dict.fromkeys(("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), False),
    **dict.fromkeys(("use_mrope", "rope_interleaved", "qk_layernorm", "use_qk_norm", "qk_norm", "use_bias"), False),
    **dict.fromkeys(("use_parallel_residual", "parallel_attn", "alibi", "use_moe", "qkv_bias"), False),
    **dict.fromkeys(("is_causal", "use_rope"), True),
}


def parse_config(values: JsonObject) -> tuple[ModelConfig, Form]:
    """Our configuration and the form of the weights, from the contents of config.json.

    Raises ValueError for every field that asks for something this engine doesn't compute, and for fields of which that
    is not known.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ValueError(
            f"model_type is {kind!r}; the architectures that are understood are bitnet and llama, and of those like "
            "llama mistral, qwen2 and qwen3"
        )
    for name, value in values.items():
        neutral = value in (None, "", [], {}) or (name in _NEUTRAL and value == _NEUTRAL[name])
        if not (neutral or name in _READ or name in _HARMLESS):
            raise ValueError(
                f"{name} is {value!r:.200}, which is not understood for {kind} and may change what the model computes; "
                "take a model without it, or remove it from config.json if it is a mere note"
            )
    values = {**_COMMON, **_DEFAULTS[kind], **values}
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name) and (kind, name) != ("qwen2", "attention_bias"):  # whose biases are read
            raise ValueError(
                f"{name} is set, and the projections here have no such biases; no model of this kind loads"
            )
    if not isinstance(tied := values["tie_word_embeddings"], bool | None):
        raise ValueError(f"tie_word_embeddings is {tied!r:.60}; it must be true or false")
    _check_window(kind, values)
    activation = values["hidden_act"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is unknown; there are {', '.join(_ACTIVATIONS)}")
    heads = _integer(values, "num_attention_heads")
    head_dim = None if values.get("head_dim") is None else _integer(values, "head_dim")
    theta, factors = parse_rope(values, head_dim or _integer(values, "hidden_size") // heads)
    form = parse_form(values.get("quantization_config"))
    config = ModelConfig(
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=_integer(values, "hidden_size"),
        intermediate_size=_integer(values, "intermediate_size"),
        num_hidden_layers=_integer(values, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads if values["num_key_value_heads"] is None else _integer(values, "num_key_value_heads"),
        head_dim=head_dim,
        max_position_embeddings=_integer(values, "max_position_embeddings"),
        rope_theta=theta,
        rope_factors=factors,
        rms_norm_eps=_number("rms_norm_eps", values["rms_norm_eps"]),
        hidden_act=_ACTIVATIONS[activation],
        sub_norm=kind == "bitnet",
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_word_embeddings=bool(tied),
        quantizer="none" if form in ("dense", "gptq", "awq") else "ternary",
    )
    if config.sub_norm and config.num_attention_heads * config.head_width != config.hidden_size:
        raise ValueError(f"head_dim {config.head_width} times {heads} heads is not hidden_size, and attn_sub_norm is")
    return config, form


def parse_form(quantization: object) -> Form:
    """The form of the weights, from the quantization_config of a config.json, or None where it has none. Raises
    ValueError for what is not understood."""
    if quantization is None:
        return "dense"
    if scheme := group_scheme(quantization):
        return scheme.method
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"quantization_config says quant_method {method!r}, and 'bitnet', 'gptq' and 'awq' are understood; "
            "take the unquantized model"
        )
    for name, value in quantization.items():
        if value is not None and name not in _QUANTIZATION:
            raise ValueError(
                f"quantization_config has {name} {value!r:.100}, which is not understood and may change the weights; "
                "take the unquantized model"
            )
    if quantization.get("use_rms_norm"):
        raise ValueError("quantization_config has use_rms_norm, a norm inside every linear layer; there is none here")
    float_modules = quantization.get("modules_to_not_convert")
    if float_modules is not None:
        if not isinstance(float_modules, list) or not any(name in _HEADS[:2] for name in float_modules):
            raise ValueError(f"modules_to_not_convert is {float_modules!r}: lm_head is quantized too; here it is float")
        if others := [name for name in float_modules if name not in _HEADS]:
            raise ValueError(f"modules_to_not_convert keeps {others[0]!r} in float; here all projections are ternary")
    linear, mode = quantization.get("linear_class", "bitlinear"), quantization.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise ValueError(f"linear_class {linear!r} with quantization_mode {mode!r} is unknown to transformers as well")
    if linear == "bitlinear":
        return "packed-inverse"
    return "master" if mode == "online" else "packed"


@dataclass(frozen=True)
class GroupScheme:
    """What a quantization_config of gptq or awq says of its tensors."""

    method: Literal["gptq", "awq"]
    bits: int
    group_size: int
    """-1: the whole row."""
    version: int
    """Of the zero points, as in `GroupLinear`."""


def group_scheme(quantization: object) -> GroupScheme | None:
    """The scheme of a quantization_config, None for another method than gptq and awq. Raises ValueError for what may
    change the weights and is not understood."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in ("gptq", "awq"):
        return None
    method = quantization["quant_method"]
    for name, value in quantization.items():
        neutral = value in (None, "", [], {}) or any(value == known for known in _GROUP_NEUTRAL.get(name, ()))
        if not (neutral or name in _GROUPS or name in _GROUP_NOTES):
            raise ValueError(
                f"quantization_config has {name} {value!r:.100}, which is not understood and may change the weights; "
                "take the unquantized model"
            )
    bits, size = quantization.get("bits"), quantization.get("group_size", 128)
    known = GPTQ_BITS if method == "gptq" else (4,)
    if not isinstance(bits, int) or bits not in known or isinstance(bits, bool):
        raise ValueError(f"quantization_config has bits {bits!r}; of {method} there are {', '.join(map(str, known))}")
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 1):
        raise ValueError(f"quantization_config has group_size {size!r}; it must be a whole number from 1, or -1")
    if method == "awq":
        if (
            str(quantization.get("version", "gemm")).lower() != "gemm"
            or quantization.get("zero_point", True) is not True
        ):
            raise ValueError(
                f"quantization_config has version {quantization.get('version')!r} and zero_point "
                f"{quantization.get('zero_point')!r}; of awq only gemm with zero points is understood"
            )
        return GroupScheme("awq", bits, size, 2)
    layouts = {"gptq": 1, "gptq_v2": 2}
    layout = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if layout not in layouts:
        raise ValueError(f"quantization_config has checkpoint_format {layout!r}; gptq and gptq_v2 are understood")
    return GroupScheme("gptq", bits, size, layouts[layout])


def _check_window(kind: str, values: JsonObject) -> None:
    """Raise ValueError where attention would not see the whole text."""
    window, types = values.get("sliding_window"), values.get("layer_types") or []
    if not isinstance(types, list) or any(name not in ("full_attention", "sliding_attention") for name in types):
        raise ValueError(f"layer_types is {types!r:.200}; layers here are full_attention")
    if kind.startswith("qwen"):  # theirs is off unless it is switched on, and then begins at a layer
        sliding = values.get("use_sliding_window") and (
            "sliding_attention" in types
            or (not types and _integer(values, "num_hidden_layers") > _integer(values, "max_window_layers", 28))
        )
        window = window if sliding else None
    elif "sliding_attention" in types:
        raise ValueError("layer_types has sliding_attention; attention here always sees the whole text")
    if window is None:
        return
    # A window as long as the model's longest text is none. llama and bitnet have no such field at all.
    if kind in ("llama", "bitnet") or _integer(values, "sliding_window") < _integer(values, "max_position_embeddings"):
        raise ValueError(
            f"sliding_window is {window!r}; attention here always sees the whole text. To use the model for texts of "
            "up to that length, lower max_position_embeddings to it in config.json"
        )


def _integer(values: JsonObject, name: str, default: int | None = None) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e30:
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)
