"""Llama 3, Mistral, Qwen2 and Qwen3 beside BitNet: from folders of transformers and GGUF files, and out to both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.inference.engine import beyond_kernels
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.inference.loading import open_model
from bitnet.model import BitNetForCausalLM, bit_linears
from bitnet.model.linear import codes_and_scale
from bitnet.model.transformer import rope_tables
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFError
from bitnet.storage.hf import write as hf_write
from bitnet.storage.hf.config import parse_config
from bitnet.storage.source import open_source
from tests import oracles
from tests.builders import random_ids
from tests.oracles.llama import LlamaModel
from tests.oracles.transformers import assert_same_text
from tests.storage.builders import SHAPE, gguf_model, rewritten
from tests.vocabularies import stdlib_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
BASE = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "llama, linear 1": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1.0}},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "mistral, window as long as the text": {"sliding_window": 128},
    "qwen2": {},
    "qwen2, window switched off": {"sliding_window": 8, "use_sliding_window": False},
    "qwen2, window behind the last layer": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3, llama3": {"head_dim": 6, "rope_parameters": LLAMA3},
    "bitnet": {"hidden_act": "silu"},
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return oracles.require("transformers")


@pytest.mark.parametrize("name", MODELS)
def test_folders_of_transformers_are_read_and_written(transformers, tmp_path: Path, name: str) -> None:
    """Logits within 1e-4, the same 64 greedy tokens, and through a folder of ours and a GGUF file the same weights."""
    kind = name.partition(",")[0]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **BASE, **MODELS[name])
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, engine = open_source(tmp_path / "theirs").model(), open_model(tmp_path / "theirs")
    ids = random_ids(ours.config, 2, 60)
    with torch.no_grad():
        expected, logits, native = theirs(ids).logits, ours(ids), engine(ids)
    assert expected.std() > 0.3
    for model, found in ((ours, logits), (engine, native)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert_same_text(model, theirs, ids[:, :40])

    hf_write.write(ours, tmp_path / "ours", "master")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert again.config.model_type == ("llama" if kind == "mistral" else kind)
    back = open_source(tmp_path / "ours").model()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(back(ids), logits, rtol=0, atol=1e-5)
    if kind == "qwen3" and ours.config.rope_factors:
        with pytest.raises(ValueError, match=r"rope_factors, for which llama\.cpp's architecture qwen3 has no place"):
            gguf_write.write(ours, tmp_path / "x.gguf", "F32")
    elif kind != "bitnet":  # whose head is not tied here
        gguf_write.write(ours, tmp_path / "x.gguf", "F32")
        assert_same_model(open_source(tmp_path / "x.gguf").model(), ours)


def assert_same_model(first: BitNetForCausalLM, second: BitNetForCausalLM) -> None:
    for a, b in zip(rope_tables(first.config), rope_tables(second.config), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert first.config.replace(rope_factors=()) == second.config.replace(
        rope_factors=(), head_dim=first.config.head_dim
    )
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())


def floats_of(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """The float model of the weights that a model computes with."""
    plain = BitNetForCausalLM(model.config.replace(quantizer="none")).eval()
    state = dict(model.state_dict())
    if model.config.quantizer != "none":
        for name, module in bit_linears(model):
            codes, scale = codes_and_scale(module)
            state[f"{name}.weight"] = codes * scale
    plain.load_state_dict(state)
    return plain


PARTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_factors": tuple(1.0 + i / 4 for i in range(32)), "tie_word_embeddings": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("quantizer", ["none", "ternary"])
@pytest.mark.parametrize("arch", PARTS)
def test_llama_cpp_computes_the_same(tmp_path: Path, arch: str, quantizer: str) -> None:
    torch.manual_seed(0)
    model = gguf_model(sub_norm=False, quantizer=quantizer, **PARTS[arch])
    gguf_write.write(model, tmp_path / "x.gguf", "F32", tokenizer=stdlib_tokenizer(SHAPE.vocab_size))
    back = open_source(tmp_path / "x.gguf")
    assert back.file is not None
    assert back.file.architecture == arch
    plain = floats_of(model)  # llama.cpp leaves the activations of float files alone
    ids = torch.arange(260, 340)
    with torch.no_grad(), LlamaModel(tmp_path / "x.gguf", 128) as loaded:
        theirs, ours = torch.tensor(loaded.logits(ids.tolist())), plain(ids[None])[0]
    assert (ours - theirs).square().mean().sqrt() < 2e-3 * theirs.std()  # keys and values are float16 there


@pytest.mark.parametrize("arch", PARTS)
def test_ternary_models_of_these_run_on_the_engine(tmp_path: Path, arch: str) -> None:
    model = gguf_model(sub_norm=False, **PARTS[arch])
    hf_write.write(model, tmp_path / "x", "packed-inverse")
    ids = random_ids(SHAPE, 1, 9)
    opened, packed = open_model(tmp_path / "x"), model.pack()
    with torch.no_grad():
        assert (opened(ids) - packed(ids)).norm() < 0.02 * packed(ids).norm()


def test_the_gpu_engine_names_what_it_does_not_compute() -> None:
    for part in ("qkv_bias", "qk_norm"):
        with pytest.raises(ValueError, match=f"Triton kernels do not compute {part}; run the model in torch"):
            GpuEngine(SHAPE.replace(**{part: True}), lambda name: torch.empty(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65_552}, r"hidden_size 65,552 \(at most 65,536\)"),
        ({"intermediate_size": 65_537}, r"intermediate_size 65,537 \(at most 65,536\)"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 4098}, "width of all heads 65,568"),
        ({"vocab_size": 8_388_481}, r"vocab_size 8,388,481 \(at most 8,388,480\)"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 1026}, "heads that share keys 32,768"),
        ({"num_attention_heads": 256, "num_key_value_heads": 1, "head_dim": 66}, "32,768.*at most 16,384"),
    ],
)
def test_the_gpu_engine_names_sizes_that_no_kernel_holds(changes: dict, message: str) -> None:
    """Before it reads a tensor; the loader then takes torch, as the message says."""
    config = SHAPE.replace(**changes)
    with pytest.raises(ValueError, match=f"Triton kernels do not compute .*{message}.*; run the model in torch"):
        GpuEngine(config, lambda name: torch.empty(0))
    assert len(beyond_kernels(config)) >= 1
    assert beyond_kernels(SHAPE) == []


LLAMA_VALUES = {**BASE, "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        *((kind, {"rope_scaling": {"type": each, "factor": 4.0}}, f"rope_scaling is .*{each}")
          for kind in ("llama", "qwen3") for each in ("linear", "dynamic", "yarn", "longrope", "su", "mrope")),
        ("llama", {"rope_scaling": {"factor": 4.0}}, "factor is not 1"),
        ("llama", {"rope_scaling": {**LLAMA3, "beta_fast": 32}}, "beta_fast is not understood for llama3"),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor < high_freq_factor"),
        ("llama", {"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor is '8'; it must be a number"),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1, 1]}}, "mrope_section is not understood"),
        ("llama", {"rope_parameters": {"full_attention": {"type": "default"}}}, "full_attention is not understood"),
        ("mistral", {}, "sliding_window is 4096"),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64; .* lower max_position_embeddings"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window is 8"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8,
                   "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is 8"),
        ("llama", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types is"),
        ("qwen3", {"attention_bias": True}, "attention_bias is set"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"norm_type": "layernorm"}, "norm_type is 'layernorm', which is not understood for llama"),
        ("llama", {"is_causal": False}, "is_causal is False"),
        *(("llama", {name: value}, f"{name} is {value}, which is not understood")
          for name, value in [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("clip_qkv", 8.0),
                              ("attention_multiplier", 0.1), ("residual_multiplier", 0.5), ("embedding_multiplier", 12),
                              ("logits_scaling", 8.0), ("scale_depth", 1.4), ("no_such_field", 1)]),
    ],
)  # fmt: skip
def test_fields_that_change_the_result_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    values = {**LLAMA_VALUES, "model_type": kind, "max_position_embeddings": 8192}
    with pytest.raises(ValueError, match=message):
        parse_config({**values, **changes})


def test_fields_that_change_nothing_are_accepted() -> None:
    """Those of real files: SmolLM2, Llama 3.2, Qwen2.5, tools that fine-tune, and switches of other models, off."""
    notes = {
        "architectures": ["LlamaForCausalLM"], "_name_or_path": "x", "torch_dtype": "bfloat16", "is_llama_config": True,
        "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "pretraining_tp": 1, "use_mrope": False,
        "unsloth_version": "2025.1", "residual_multiplier": 1.0, "embedding_multiplier": 1, "logit_softcap": None,
        "num_experts": 0, "is_causal": True, "rope_scaling": {"type": "linear", "factor": 1.0}, "layer_types": None,
    }  # fmt: skip
    assert parse_config({**LLAMA_VALUES, **notes}) == parse_config(LLAMA_VALUES)
    three = parse_config({**LLAMA_VALUES, "rope_scaling": LLAMA3, "rope_theta": 1e4})[0]
    assert three.rope_factors == (1.0, *three.rope_factors[1:-1], 8.0)


@pytest.mark.parametrize(
    "values",
    [
        {"llama.rope.scaling.factor": 4.0},  # without a type, as old converters wrote it
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.type": "longrope"},
        {"llama.rope.scaling.attn_factor": 1.2},
        {"llama.rope.dimension_sections": [8, 8, 8, 8]},
        {"llama.attention.sliding_window": 16},
        {"llama.attention.scale": 0.5},
        {"llama.final_logit_softcapping": 30.0},
        {"llama.residual_scale": 0.5},
        {"llama.embedding_scale": 12.0},
        {"llama.expert_used_count": 2},
        {"llama.no_such_key": 1},
    ],
    ids=lambda values: next(reversed(values)),
)
def test_metadata_that_change_the_result_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    gguf_write.write(gguf_model(quantizer="none", sub_norm=False, num_hidden_layers=1), tmp_path / "x.gguf", "F16")
    with pytest.raises(GGUFError, match=f"{next(reversed(values))} is "):
        open_source(rewritten(tmp_path / "x.gguf", values))


def test_metadata_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    """Among them what llama.cpp's own converter says of BitNet: linear scaling by 1."""
    for sub_norm, arch in ((True, "bitnet"), (False, "llama")):
        model = gguf_model(quantizer="none", sub_norm=sub_norm, num_hidden_layers=1)
        gguf_write.write(model, tmp_path / f"{arch}.gguf", "F32")
        for values in (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},  # which llama.cpp does not use either
            {"rope.scaling.finetuned": False, "rope.scaling.original_context_length": 64, "expert_count": 0},
        ):
            path = rewritten(tmp_path / f"{arch}.gguf", {f"{arch}.{key}": value for key, value in values.items()})
            assert_same_model(open_source(path).model(), model)


def test_llama_cpp_reads_the_factor_as_this_page_says(tmp_path: Path) -> None:
    """Why a factor without a type is refused, and one with the type none is not: what llama.cpp makes of them."""
    tokenizer = stdlib_tokenizer(SHAPE.vocab_size)
    gguf_write.write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F32", tokenizer=tokenizer)
    ids, logits = list(range(260, 300)), {}
    for kind, values in {"plain": {}, "none": {"type": "none", "factor": 4.0}, "bare": {"factor": 4.0}}.items():
        path = rewritten(tmp_path / "x.gguf", {f"llama.rope.scaling.{key}": value for key, value in values.items()})
        with LlamaModel(path, 64) as loaded:
            logits[kind] = loaded.logits(ids)
    assert (logits["plain"] == logits["none"]).all()
    assert abs(logits["plain"] - logits["bare"]).max() > 0.1


def test_parts_that_no_architecture_has_together_are_refused(tmp_path: Path) -> None:
    for changes, words in (({"qkv_bias": True}, "sub_norm and qkv_bias"), ({"qk_norm": True}, "sub_norm and qk_norm")):
        model = gguf_model(**changes)
        with pytest.raises(ValueError, match=words):
            hf_write.write(model, tmp_path / "x")
        with pytest.raises(ValueError, match=f"{next(iter(changes))}, for which llama.cpp's architecture bitnet"):
            gguf_write.write(model, tmp_path / "x.gguf")


def test_a_table_of_factors_survives_every_way(tmp_path: Path) -> None:
    """Any table, not only those that parameters of Llama 3 give, through JSON, a GGUF file and a folder."""
    model = gguf_model(quantizer="none", sub_norm=False, **PARTS["llama"])
    gguf_write.write(model, tmp_path / "x.gguf", "F32")
    first = open_source(tmp_path / "x.gguf").model()
    hf_write.write(first, tmp_path / "x", "master")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["rope_parameters"]["rope_type"] == "longrope"
    second = open_source(tmp_path / "x").model()
    assert first.config.rope_factors == second.config.rope_factors == model.config.rope_factors
    assert_same_model(second, first)
