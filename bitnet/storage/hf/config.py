"""The configuration of Hugging Face folders: which models are understood, and in which form their weights are."""

from typing import Literal

from bitnet.files import JsonObject
from bitnet.model import ModelConfig

Form = Literal["dense", "master", "packed", "packed-inverse"]

# What a config.json leaves out has its class's default in transformers.
_DEFAULTS: dict[str, JsonObject] = {
    "bitnet": {"hidden_act": "relu2", "num_key_value_heads": 5, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "llama": {"hidden_act": "silu", "num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
_HEADS = ("lm_head", "lm_head.weight", "embed_tokens", "model.embed_tokens", "model.embed_tokens.weight")


def parse_config(values: JsonObject) -> tuple[ModelConfig, Form]:
    """Our configuration and the form of the weights, from the contents of config.json.

    Raises ValueError for every field that asks for something this engine doesn't compute.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ValueError(
            f"model_type is {kind!r}; the architectures that are understood are {' and '.join(_DEFAULTS)} "
            "(BitNetForCausalLM, LlamaForCausalLM)"
        )
    values = {**_DEFAULTS[kind], "tie_word_embeddings": False, "max_position_embeddings": 2048, **values}
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ValueError(f"{name} is set, and the projections here have no biases; no model of this kind loads")
    if values.get("sliding_window") is not None:
        raise ValueError(f"sliding_window is {values['sliding_window']!r}; attention here always sees the whole text")
    activation = values["hidden_act"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is unknown; there are {', '.join(_ACTIVATIONS)}")
    heads = _integer(values, "num_attention_heads")
    form = _form(values.get("quantization_config"))
    config = ModelConfig(
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=_integer(values, "hidden_size"),
        intermediate_size=_integer(values, "intermediate_size"),
        num_hidden_layers=_integer(values, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads if values["num_key_value_heads"] is None else _integer(values, "num_key_value_heads"),
        head_dim=None if values.get("head_dim") is None else _integer(values, "head_dim"),
        max_position_embeddings=_integer(values, "max_position_embeddings"),
        rope_theta=_rope_theta(values),
        rms_norm_eps=_number("rms_norm_eps", values["rms_norm_eps"]),
        hidden_act=_ACTIVATIONS[activation],
        sub_norm=kind == "bitnet",
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        quantizer="none" if form == "dense" else "ternary",
    )
    if config.sub_norm and config.num_attention_heads * config.head_width != config.hidden_size:
        raise ValueError(f"head_dim {config.head_width} times {heads} heads is not hidden_size, and attn_sub_norm is")
    return config, form


def _form(quantization: object) -> Form:
    if quantization is None:
        return "dense"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"quantization_config says quant_method {method!r}, and only 'bitnet' is understood; take the "
            "unquantized model"
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


def _rope_theta(values: JsonObject) -> float:
    """theta of plain rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope: JsonObject = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = values.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}; it must be an object")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default" or value.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"{name} is {value!r}; positions here are plain rotary (rope_type default), so the model would read "
                "long texts wrongly; take a model without scaling"
            )
        rope.update(value)
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {values['partial_rotary_factor']!r}; whole heads are rotated here")
    return _number("rope_theta", rope.get("rope_theta", values["rope_theta"]))


def _integer(values: JsonObject, name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e30:
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)
