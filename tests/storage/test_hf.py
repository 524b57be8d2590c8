"""Hugging Face folders, both ways: transformers is the oracle for logits, text, packing and tokenization."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitnet import kernels
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import open_model
from bitnet.model import BitNetForCausalLM, ModelConfig, PackedLinear
from bitnet.storage.folders import save_packed
from bitnet.storage.hf.config import parse_config
from bitnet.storage.hf.read import pack_rows, unpack_rows
from bitnet.storage.hf.write import write
from tests import oracles
from tests.builders import random_ids, random_model
from tests.oracles.transformers import SHAPES, TINY, assert_same_logits, assert_same_text, class_of, load, oracle
from tests.storage.builders import edit_config, inference_form, read

pytestmark = pytest.mark.usefixtures("reference_backend")
BASE = TINY.replace(max_position_embeddings=80)
FORMS = ["packed", "packed-inverse", "master"]


# Out


OUT_SHAPES = ["gqa", "mha", "mqa", "relu2", "untied", "theta", "head_dim 2", "llama", "llama, wide heads"]
OUT_SHAPES += ["llama, rotary factors", "qwen2", "qwen3"]


@pytest.mark.parametrize("shape", OUT_SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_what_is_written(transformers, tmp_path: Path, form: str, shape: str) -> None:
    config = BASE.replace(**SHAPES[shape])
    model = inference_form(random_model(config), form)
    write(model, tmp_path / "out", form)
    theirs = load(transformers, tmp_path / "out")
    assert type(theirs).__name__ == f"{class_of(config)}ForCausalLM"
    assert_same_logits(model, theirs, random_ids(config, 16, 5))


@pytest.mark.parametrize("form", FORMS)
def test_transformers_writes_the_same_text(transformers, tmp_path: Path, form: str) -> None:
    model = inference_form(random_model(BASE), form)
    write(model, tmp_path / "out", form)
    assert_same_text(model, load(transformers, tmp_path / "out"), random_ids(BASE, 2, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_float_models_are_written_dense(transformers, tmp_path: Path, shape: str) -> None:
    config = BASE.replace(quantizer="none", **SHAPES[shape])
    model = random_model(config)
    write(model, tmp_path / "out", "master")
    theirs = load(transformers, tmp_path / "out")
    assert_same_logits(model, theirs, random_ids(config, 2, 9))
    assert_same_text(model, theirs, random_ids(config, 2, 5))
    back = read(tmp_path / "out")
    assert back.config == config.replace(head_dim=config.head_width)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["packed", "packed-inverse"])
def test_binary_codes_fit_the_ternary_format(transformers, tmp_path: Path, form: str) -> None:
    model = random_model(BASE.replace(quantizer="binary")).pack(embeddings=False)
    write(model, tmp_path / "out", form)
    assert_same_logits(model, load(transformers, tmp_path / "out"), random_ids(BASE, 16, 5))


def test_config_names_every_field_that_defaults_get_wrong(transformers, tmp_path: Path) -> None:
    for sub_norm in (True, False):
        config = BASE.replace(sub_norm=sub_norm, rope_theta=12345.0, rms_norm_eps=3e-6)
        write(random_model(config), tmp_path / str(sub_norm), "master")
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / str(sub_norm))
        assert theirs.rope_parameters["rope_theta"] == 12345.0
        for name in ("vocab_size", "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
            assert getattr(theirs, name) == getattr(config, name), name


@pytest.mark.parametrize("form", ["packed", "packed-inverse"])
def test_an_int8_embedding_is_written_as_its_floats(tmp_path: Path, form: str) -> None:
    for tied in (True, False):
        model = random_model(BASE.replace(tie_word_embeddings=tied)).pack()
        write(model, tmp_path / str(tied), form)
        back = read(tmp_path / str(tied)).pack()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize(
    ("changes", "form", "message"),
    [
        ({}, "gguf", "form 'gguf' is unknown; choose one of packed"),
        ({"quantizer": "none"}, "packed", "quantizer is 'none'; write its floats with form master"),
        ({"quantizer": "int4"}, "packed-inverse", "quantizer is 'int4'; use GGUF"),
        ({"quantizer": "int8"}, "master", "quantizes online to ternary and the quantizer is 'int8'"),
        ({"quantizer": "binary"}, "master", "quantizer is 'binary'; write it as packed"),
        ({"head_dim": 16}, "packed", "4 heads of 16 are 64 wide and hidden_size is 32"),
        ({"intermediate_size": 46}, "packed", "has 46 rows, .* form master"),
        ({"sub_norm": False, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}, "master", "3 heads"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_express_is_refused(tmp_path: Path, changes: dict, form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(BitNetForCausalLM(BASE.replace(**changes)), tmp_path / "out", form)
    assert not list(tmp_path.iterdir())


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(BASE)
    with pytest.raises(ValueError, match=r"'\.\./x' is no tokenizer file"):
        write(model, tmp_path / "out", tokenizer_files={"../x": b""})
    with pytest.raises(ValueError, match="no latent floats"):
        write(random_model(BASE).pack(), tmp_path / "out", "master")

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("bitnet.storage.hf.write.write_atomic", full)
        with pytest.raises(OSError, match="no space left"):
            write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write(model, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(OSError, match="already exists"):
        write(model, tmp_path / "out")


# In


def save_theirs(transformers, folder: Path, config: ModelConfig, **options: Any) -> nn.Module:
    """A random model of transformers, saved by transformers."""
    theirs = oracle(transformers, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=0.15)
    theirs.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return theirs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shards", [False, True])
def test_models_saved_by_transformers(transformers, tmp_path: Path, shape: str, shards: bool) -> None:
    config = BASE.replace(quantizer="none", **SHAPES[shape])
    theirs = save_theirs(transformers, tmp_path, config, **({"max_shard_size": "20KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    ours = read(tmp_path)
    assert ours.config == config.replace(head_dim=config.head_width)
    assert_same_logits(ours, theirs, random_ids(config, 2, 9))
    if not shards:
        assert_same_text(ours, theirs, random_ids(config, 2, 5))


def test_half_precision_files(transformers, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        save_theirs(transformers, tmp_path / str(dtype), BASE, dtype=dtype)
        theirs = load(transformers, tmp_path / str(dtype))  # the same rounded weights, computed with in float32
        assert_same_logits(read(tmp_path / str(dtype)), theirs, random_ids(BASE, 2, 9))
        assert open_model(tmp_path / str(dtype), dtype=dtype).model.norm.weight.dtype == dtype


def save_packed_by_hand(transformers, folder: Path, config: ModelConfig, **options: Any) -> dict[str, Any]:
    """A packed folder as the published ones are, with codes packed by transformers; returns its tensors."""
    bitnet = oracles.require("transformers.integrations.bitnet")
    save_theirs(transformers, folder, config)
    inverse, dtype = options.get("inverse", False), options.get("dtype", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes = torch.randint(-1, 2, tensors[name].shape)
        tensors[name] = codes.to(dtype) if options.get("unpacked") else bitnet.pack_weights(codes)
        scale = torch.rand(1) * 0.2 + 0.05
        tensors[f"{name}_scale"] = ((1 / scale) if inverse else scale).to(dtype)
    for name, value in tensors.items():
        tensors[name] = value.to(dtype) if value.dtype == torch.float32 else value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=options["quantization"])
    return tensors


DIALECTS: dict[str, dict[str, Any]] = {
    "2B-4T": {
        "shape": {"hidden_act": "relu2", "rope_theta": 500000.0},
        "quantization": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    },
    "offline, codes as floats": {
        "shape": {}, "unpacked": True,
        "quantization": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    },
    "HF1BitLLM": {
        "shape": {"sub_norm": False, "tie_word_embeddings": False}, "inverse": True,
        "quantization": {"quant_method": "bitnet", "modules_to_not_convert": None},
    },
    "Falcon-E": {
        "shape": {"sub_norm": False, "num_key_value_heads": 1}, "inverse": True,
        "quantization": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"], "linear_class": "bitlinear"},
    },
    "bitlinear with sub-norms": {
        "shape": {"tie_word_embeddings": False}, "inverse": True, "dtype": torch.float32,
        "quantization": {"quant_method": "bitnet", "use_rms_norm": False, "quantization_mode": "offline"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_published_packed_layouts(transformers, tmp_path: Path, name: str) -> None:
    options = DIALECTS[name]
    config = BASE.replace(**options["shape"])
    tensors = save_packed_by_hand(transformers, tmp_path, config, **options)
    ours, theirs = read(tmp_path), load(transformers, tmp_path)
    assert ours.is_packed
    assert not ours.head_is_packed
    for module_name, module in ours.named_modules():
        if isinstance(module, PackedLinear):
            scale = tensors[f"{module_name}.weight_scale"].double()
            assert module.weight_scale.item() == (1 / scale if options.get("inverse") else scale).float().item()
    assert_same_logits(ours, theirs, random_ids(config, 16, 5))
    assert_same_text(ours, theirs, random_ids(config, 2, 5))


@pytest.mark.parametrize("shape", ["gqa", "relu2", "untied", "llama"])
def test_master_weights_of_transformers(transformers, tmp_path: Path, shape: str) -> None:
    config = BASE.replace(**SHAPES[shape])
    save_theirs(transformers, tmp_path, config)
    assert read(tmp_path).config.quantizer == "none"  # as transformers would compute it
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(tmp_path, quantization_config=online)
    ours, theirs = read(tmp_path), load(transformers, tmp_path)
    assert ours.config.quantizer == "ternary"
    assert_same_logits(ours, theirs, random_ids(config, 16, 5))
    assert_same_text(ours, theirs, random_ids(config, 2, 5))
    for quantizer in ("none", "int8"):
        assert read(tmp_path, quantizer=quantizer).config.quantizer == quantizer


def test_old_configurations(transformers, tmp_path: Path) -> None:
    """rope_theta at the top, classes' defaults, an inv_freq in every layer, a head stored beside its embedding."""
    config = TINY.replace(quantizer="none", sub_norm=False, num_key_value_heads=4, rope_theta=500.0, rms_norm_eps=1e-6)
    config = config.replace(max_position_embeddings=2048)
    theirs = save_theirs(transformers, tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "num_key_value_heads", "rms_norm_eps", "hidden_act", "max_position_embeddings"):
        del values[name]
    values |= {"rope_theta": 500.0, "rope_scaling": None, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, ids = read(tmp_path), random_ids(config, 2, 9)
    assert ours.config == config
    assert_same_logits(ours, theirs, ids)

    del tensors["model.embed_tokens.weight"]  # one of the two is enough
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(read(tmp_path)(ids), ours(ids))
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] * 2  # and two different ones are not tied
    save_file(tensors, tmp_path / "model.safetensors")
    assert not read(tmp_path).config.tie_word_embeddings


def test_2b_4t_configuration() -> None:
    values = {
        "architectures": ["BitNetForCausalLM"], "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"},
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "relu2", "hidden_size": 2560,
        "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 4096, "model_type": "bitnet",
        "rms_norm_eps": 1e-05, "num_attention_heads": 20, "num_hidden_layers": 30, "num_key_value_heads": 5,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 128256,
        "quantization_config": {
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
        },
    }  # fmt: skip
    from bitnet.model import PRESETS

    assert parse_config(values) == (PRESETS["2b-4t"].replace(head_dim=None), "packed")


# Round trips


def ternary_state(model: BitNetForCausalLM) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "_proj." in name}


@pytest.mark.parametrize("shape", ["gqa", "untied", "relu2", "llama", "llama, wide heads", "qwen2", "qwen3"])
def test_codes_and_scales_survive_every_way(tmp_path: Path, shape: str) -> None:
    model = random_model(BASE.replace(**SHAPES[shape]))
    write(model, tmp_path / "0", "packed-inverse")  # from latent floats
    write(model, tmp_path / "master", "master")
    expected = model.pack(embeddings=False).state_dict()
    assert sum(name.endswith("packed_weight") for name in expected) == 14
    for step, form in enumerate(["packed", "packed-inverse", "packed", "packed"]):
        back = read(tmp_path / str(step))
        assert back.config == model.config.replace(head_dim=model.config.head_width)
        assert back.state_dict().keys() == expected.keys()
        assert all(torch.equal(back.state_dict()[name], value) for name, value in expected.items())
        write(back, tmp_path / str(step + 1), form)
    master = read(tmp_path / "master").pack(embeddings=False).state_dict()
    assert all(torch.equal(master[name], value) for name, value in expected.items())


def test_reciprocal_scales_come_back_to_the_bit() -> None:
    scale = torch.cat([torch.rand(20000) * 10.0**e for e in range(-5, 4)]).clamp(min=1e-5)
    assert torch.equal((1 / (1 / scale.double())).float(), scale)
    assert not torch.equal(1 / (1 / scale), scale)  # which is why it is not kept in float32


@pytest.mark.parametrize("rows", [4, 8, 20])
def test_packed_rows_are_transformers_layout(transformers, rows: int) -> None:
    bitnet = oracles.require("transformers.integrations.bitnet")
    codes = torch.randint(-1, 2, (rows, 7), dtype=torch.int8)
    assert torch.equal(pack_rows(codes), bitnet.pack_weights(codes.clone()))
    assert torch.equal(unpack_rows(pack_rows(codes)), codes)
    byte = pack_rows(torch.tensor([[-1], [0], [1], [0]], dtype=torch.int8))
    assert byte.item() == 0b01_10_01_00
    assert unpack_rows(torch.tensor([[0b11_10_01_00]], dtype=torch.uint8)).flatten().tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("shape", ["gqa", "untied", "llama"])
def test_a_read_model_runs_natively_and_is_saved_packed(tmp_path: Path, shape: str) -> None:
    model = random_model(BASE.replace(**SHAPES[shape]))
    write(model, tmp_path / "hf")
    back, ids = read(tmp_path / "hf"), random_ids(BASE, 2, 9)
    save_packed(tmp_path / "float-head", back, b"tokenizer")
    with torch.no_grad():
        expected = back(ids)
        loaded = open_model(tmp_path / "float-head")
        assert isinstance(loaded, BitNetForCausalLM)
        assert not loaded.head_is_packed
        assert torch.equal(loaded(ids), expected)
        packed = back.pack()
        assert packed.head_is_packed
        assert (packed(ids) - expected).norm() < 0.03 * expected.norm()
    with kernels.use_backend("auto"):
        if not kernels.native_available():
            pytest.skip("the native kernels were not built")
        engine, direct = open_model(tmp_path / "float-head"), Engine.from_model(packed)
        assert isinstance(engine, Engine)
        assert torch.equal(engine(ids), direct(ids))
        assert (engine(ids) - packed(ids)).norm() < 0.02 * expected.norm()
