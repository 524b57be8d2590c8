"""Hugging Face folders, both ways: transformers is the oracle for logits, text, packing and tokenization."""

import inspect
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitnet import kernels
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import load_for_inference
from bitnet.model import BitNetForCausalLM, ModelConfig, PackedLinear
from bitnet.storage.folders import save_packed
from bitnet.storage.hf.config import parse_config
from bitnet.storage.hf.read import SHARDS, locate, pack_rows, read, unpack_rows
from bitnet.storage.hf.write import files_of, write
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles
from tests.builders import random_ids, random_model
from tests.oracles.transformers import SHAPES, TINY, assert_same_logits, assert_same_text, greedy, load, oracle

pytestmark = pytest.mark.usefixtures("reference_backend")
BASE = TINY.replace(max_position_embeddings=80)
FORMS = ["packed", "packed-inverse", "master"]
TEXT = (
    "The state of the union, 1862: 007 agents said \u201cna\u00efve caf\u00e9\u201d.\n\n"
    "\tdef f(x):\n        return  x\r\n"
    "Fellow citizens of the Senate and the House   \U0001f600 \u65e5\u672c\u8a9e <s></s> <0x41>\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 30], 400)


def inference_form(model: BitNetForCausalLM, form: str) -> BitNetForCausalLM:
    return model if form == "master" else model.pack(embeddings=False)


# Out


OUT_SHAPES = ["gqa", "mha", "mqa", "relu2", "untied", "theta", "head_dim 2", "llama", "llama, wide heads"]


@pytest.mark.parametrize("shape", OUT_SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_what_is_written(transformers, tmp_path: Path, form: str, shape: str) -> None:
    config = BASE.replace(**SHAPES[shape])
    model = inference_form(random_model(config), form)
    write(model, tmp_path / "out", form)
    theirs = load(transformers, tmp_path / "out")
    assert type(theirs).__name__ == ("BitNetForCausalLM" if config.sub_norm else "LlamaForCausalLM")
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


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


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
        assert read(tmp_path / str(dtype), dtype=dtype).model.norm.weight.dtype == dtype


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


@pytest.mark.parametrize("shape", ["gqa", "untied", "relu2", "llama", "llama, wide heads"])
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
        loaded = load_for_inference(tmp_path / "float-head")
        assert isinstance(loaded, BitNetForCausalLM)
        assert not loaded.head_is_packed
        assert torch.equal(loaded(ids), expected)
        packed = back.pack()
        assert packed.head_is_packed
        assert (packed(ids) - expected).norm() < 0.03 * expected.norm()
    with kernels.use_backend("auto"):
        if not kernels.native_available():
            pytest.skip("the native kernels were not built")
        engine, direct = load_for_inference(tmp_path / "float-head"), Engine.from_model(packed)
        assert isinstance(engine, Engine)
        assert torch.equal(engine(ids), direct(ids))
        assert (engine(ids) - packed(ids)).norm() < 0.02 * expected.norm()


# Tokenizers and pipelines


def test_auto_tokenizer_gives_our_ids(transformers, tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = BASE.replace(vocab_size=tokenizer.vocab_size)
    files = sentencepiece_files(tokenizer.model_proto, max_length=80)
    for sub_norm in (True, False):
        folder = tmp_path / str(sub_norm)
        write(random_model(config.replace(sub_norm=sub_norm)), folder, "packed", tokenizer_files=files)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        rng = random.Random(0)
        texts = [TEXT, "", " ", "a", "  b", "<s>", "x" * 300, " " * 100, "\n" * 9, "e\u0301\ufb01\u3000\U0010ffff\x00"]
        for _ in range(500):
            start = rng.randrange(len(TEXT))
            texts.append(TEXT[start : start + rng.randrange(60)] + chr(rng.choice([32, 97, 233, 0x4E00, 0x1F600])))
        for text in texts:
            assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True), text
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (1, 2, 80)
        assert files_of(folder) == files
        assert Tokenizer.load(folder / "tokenizer.model").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_pipeline_writes_what_we_write(transformers, tmp_path: Path, tokenizer: Tokenizer, form: str) -> None:
    oracles.require("accelerate")
    model = inference_form(random_model(BASE.replace(vocab_size=tokenizer.vocab_size)), form)
    write(model, tmp_path / "out", form, tokenizer_files=sentencepiece_files(tokenizer.model_proto))
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    with torch.compiler.set_stance("force_eager"):
        text = pipeline("The state", max_new_tokens=24, do_sample=False)[0]["generated_text"]
    ids = greedy(model, torch.tensor([tokenizer.encode("The state", bos=True)]), 24)[0].tolist()
    ids = ids[: ids.index(2)] if 2 in ids else ids
    assert text == tokenizer.decode(ids)
    assert text.startswith("The state")
    assert pipeline.model.generation_config.eos_token_id == 2


def foreign_model(vocab_size: int = 380, **settings: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, *inspect.getsource(inspect).split("\n")]), model_writer=model, minloglevel=3,
        vocab_size=vocab_size, byte_fallback=True, remove_extra_whitespaces=False, **settings,
    )  # fmt: skip
    return model.getvalue()


def test_sentencepiece_models_with_a_space_prefix() -> None:
    tokenizers = oracles.require("tokenizers")
    proto = foreign_model(900, model_type="bpe", normalization_rule_name="identity", pad_id=3)  # as LLaMA's
    files, ours = sentencepiece_files(proto), Tokenizer.from_bytes(proto)
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs.encode_special_tokens = True  # what split_special_tokens in tokenizer_config.json sets
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    for text in (TEXT, " The", "The  state", "", inspect.getsource(random)):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram", "normalization_rule_name": "identity", "vocab_size": 900},
        {"model_type": "bpe"},  # with nmt_nfkc
        {"model_type": "bpe", "normalization_rule_name": "identity", "user_defined_symbols": ["zqx"]},
    ],
)
def test_sentencepiece_models_that_no_tokenizer_json_expresses(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"cannot be written as a tokenizer\.json: .* GGUF"):
        sentencepiece_files(foreign_model(**settings))


# Folders that nobody should trust


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed folder of ours, in one file."""
    write(random_model(BASE.replace(num_hidden_layers=1)), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        read(folder)
    assert time.monotonic() - start < 1


QUANTIZATION = "quantization_config"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; the architectures that are understood are bitnet and llama"),
        ({"model_type": None}, "model_type is None"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is unknown; there are silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters is .*llama3.* without scaling"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads 5 does not divide"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"head_dim": 16}, "head_dim 16 times 4 heads"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        ({"vocab_size": 2**30}, r"embed_tokens.weight is \[67, 32\] and config.json says \[1073741824, 32\]"),
        ({"num_hidden_layers": 900}, "says 900 layers and there are only"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers is 1073741824|says 1073741824 layers"),
        ({"num_hidden_layers": 2}, "lacks .* tensors of its config.json"),
        ({"max_position_embeddings": 2**30}, "max_position_embeddings 1073741824 would take .* lower it"),
        ({"intermediate_size": 2**30}, "they are of two models"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors of its config.json, lm_head.weight"),
        ({"model_type": "llama"}, "no place for, such as .*sub_norm"),
        ({QUANTIZATION: None}, "holds packed weights, and its config.json has no quantization_config"),
        ({QUANTIZATION: "bitnet"}, "quant_method 'bitnet', and only"),
        ({QUANTIZATION: {"quant_method": "gptq"}}, "quant_method 'gptq', and only 'bitnet' is understood"),
        ({QUANTIZATION: {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm"),
        ({QUANTIZATION: {"quant_method": "bitnet", "linear_class": "x"}}, "linear_class 'x'"),
        ({QUANTIZATION: {"quant_method": "bitnet", "modules_to_not_convert": []}}, "lm_head is quantized too"),
        ({QUANTIZATION: {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head", "(a+)+$"]}}, "in float"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(folder: Path, changes: dict, message: str) -> None:
    edit_config(folder, **changes)
    refused(folder, message)


def test_what_is_missing_or_no_json(folder: Path, tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000):
        (folder / "config.json").write_bytes(content)
        refused(folder, "config.json")
    with open(folder / "config.json", "wb") as file:
        file.truncate(2**30)  # a hole; nothing of it may be read
    refused(folder, r"config.json has 1,073,741,824 bytes")
    (folder / "config.json").unlink()
    refused(folder, "config.json does not exist")
    refused(tmp_path / "nowhere", "is not a folder, nor a hub name")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{DOWN}.weight", torch.full((8, 48), 0b11_00_00_00, dtype=torch.uint8), "other codes than -1, 0 and 1"),
        (f"{DOWN}.weight", torch.full((32, 48), 0.5), "other codes than -1, 0 and 1"),
        (f"{DOWN}.weight", torch.full((32, 48), 2.0), "other codes than -1, 0 and 1"),
        (f"{DOWN}.weight", torch.full((32, 48), torch.nan), "other codes than -1, 0 and 1"),
        (f"{DOWN}.weight", torch.zeros(32, 48, dtype=torch.int8), "is I8"),
        (f"{DOWN}.weight", torch.zeros(12, 48, dtype=torch.uint8), r"is \[12, 48\] and config.json says \[8, 48\]"),
        (f"{DOWN}.weight_scale", torch.zeros(1), "scale 0.0; it must be above 0"),
        (f"{DOWN}.weight_scale", torch.tensor([-1.0]), "scale -1.0"),
        (f"{DOWN}.weight_scale", torch.tensor([torch.nan]), "scale nan"),
        (f"{DOWN}.weight_scale", torch.tensor([torch.inf]), "scale inf"),
        (f"{DOWN}.weight_scale", torch.ones(2), r"weight_scale is F32 \[2\], not one float"),
        (f"{DOWN}.weight_scale", torch.ones(1, dtype=torch.int32), "weight_scale is I32"),
        (f"{DOWN}.weight_scale", None, "lacks 1 tensors"),
        (f"{DOWN}.bias", torch.zeros(32), "no place for, such as .*bias"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int64), "is I64, not"),
        ("lm_head.weight", torch.ones(66, 32), r"\[66, 32\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(folder: Path, name: str, value: Tensor | None, message: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value}))
    refused(folder, message)


def test_rows_that_share_no_byte(folder: Path) -> None:
    edit_config(folder, intermediate_size=46)
    refused(folder, "has 46 rows, and four of them share a byte")


@pytest.mark.parametrize("size", [0, 7, 8, 100, 3000, -1])
def test_truncated_files(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "model.safetensors is not a complete safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_not_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, rf"{name}, a pickle, which can run any code .* save_pretrained")
    (folder / name).unlink()
    refused(folder, "has no model.safetensors")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "..", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors", "x.bin",
     "model.safetensors\x00", "x\n.safetensors", ".x.safetensors", "", 5, None, ["x.safetensors"]],
)  # fmt: skip
def test_shards_stay_inside_the_folder(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    (folder / SHARDS).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(folder, r"names the shard .*; a shard is a \.safetensors file inside the folder")


def test_indexes_that_lie(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = list(load_file(folder / "a.safetensors"))
    index = folder / SHARDS
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    expected = read(folder).state_dict()
    for weight_map in (None, [], {}, "a.safetensors"):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, "has no weight_map")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "b.safetensors")}))
    refused(folder, "names b.safetensors, which is not there")
    (folder / "b.safetensors").mkdir()
    refused(folder, "names b.safetensors, which is not there")
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "lm_head.weight"], "a.safetensors")}))
    refused(folder, "places lm_head.weight in a.safetensors, which does not hold it")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], "a.safetensors")}))
    refused(folder, "lacks 1 tensors")
    # What the index doesn't name is not read, whatever the shard holds.
    save_file({**load_file(folder / "a.safetensors"), "extra": torch.ones(1)}, folder / "c.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "c.safetensors")}))
    assert all(torch.equal(value, expected[name]) for name, value in read(folder).state_dict().items())


def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder: Path) -> None:
    import os

    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "has no model.safetensors")


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One or a few edits: bits, bytes, numbers made huge, pieces cut out, doubled or moved."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2 and (digits := [i for i, byte in enumerate(data) if 48 <= byte < 58]):
            where = rng.choice(digits)
            data[where : where + 1] = rng.choice((b"0", b"9", b"-1", b"1e99", b"99999999999999999999", b"null", b"0.5"))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        else:
            data[at:at] = rng.choice((b'"', b"{", b"[", b"}", b"]", b",", b"true", b'"model_type":', b"\x00", b"\xff"))
        data = data or bytearray(b"0")
    return bytes(data)


@pytest.mark.parametrize("target", ["config.json", "index", "header"])
def test_mutated_files_give_our_error_or_a_sound_model(folder: Path, target: str) -> None:
    rng = random.Random(target)
    tensors = folder / "model.safetensors"
    whole, config = tensors.read_bytes(), (folder / "config.json").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    index = json.dumps({"weight_map": dict.fromkeys(load_file(tensors), "a.safetensors")}).encode()
    if target == "index":
        tensors.rename(folder / "a.safetensors")
    loaded = slowest = 0.0
    for _ in range(1000):
        if target == "config.json":
            (folder / target).write_bytes(mutate(rng, config))
        elif target == "index":
            (folder / SHARDS).write_bytes(mutate(rng, index))
        else:
            header = mutate(rng, whole[:length])
            if rng.random() < 0.8 and len(header) > 8:  # a length that fits, so that the rest is looked at
                header = (len(header) - 8).to_bytes(8, "little") + header[8:]
            tensors.write_bytes(header + whole[length:])
        start = time.monotonic()
        try:
            state = read(folder).state_dict()
        except ValueError:
            state = {}
        slowest = max(slowest, time.monotonic() - start)
        loaded += bool(state)
        assert sum(value.nbytes for value in state.values()) <= 4 * len(whole)
    assert slowest < 1
    assert 0 < loaded < 500  # some edits are harmless, and most are not


# The hub


def test_hub_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = oracles.require("huggingface_hub")
    seen = {}

    def snapshot_download(name: str, **options: Any) -> str:
        seen.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert read("somebody/some-model_1.5").config.hidden_size == 32
    assert seen["name"] == "somebody/some-model_1.5"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in seen["allow_patterns"])
    assert locate(folder) == folder
    for name in ("model", "a/b/c", "../x", "a/..", "/x", "a/b?c"):
        with pytest.raises(ValueError, match=r"is not a folder, nor a hub name like owner/model"):
            locate(name)
    with pytest.raises(ValueError, match=r"is not a folder, nor a hub name"):
        locate(folder / "config.json")


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = oracles.require("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"somebody/model is not a folder and could not be downloaded .* local folder"):
        read("somebody/model")
