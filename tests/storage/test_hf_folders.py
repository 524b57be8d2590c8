"""Hugging Face folders as a whole: tokenizers, pipelines, folders that nobody should trust, the hub."""

import inspect
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet.storage.hf.read import download
from bitnet.storage.hf.write import write
from bitnet.storage.safetensors import MODEL_PARTS
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles
from tests.builders import random_model
from tests.fuzzing import MANY, bounded
from tests.oracles.transformers import TINY, greedy
from tests.storage.builders import edit_config, inference_form, read
from tests.timing import within

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


# Tokenizers and pipelines


def test_auto_tokenizer_gives_our_ids(transformers, tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = BASE.replace(vocab_size=tokenizer.vocab_size)
    files = sentencepiece_files(tokenizer.model_proto, max_length=80)
    for sub_norm in (True, False):
        folder = tmp_path / str(sub_norm)
        write(random_model(config.replace(sub_norm=sub_norm)), folder, "packed", tokenizer_files=files)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        rng = random.Random(0)
        texts = [
            TEXT,
            "",
            " ",
            "a",
            "  b",
            "<s>",
            "x" * 300,
            " " * 100,
            "\n" * 9,
            "a\u2581b",
            "e\u0301\ufb01\u3000\U0010ffff\x00",
        ]
        for _ in range(500):
            start = rng.randrange(len(TEXT))
            texts.append(TEXT[start : start + rng.randrange(60)] + chr(rng.choice([32, 97, 233, 0x4E00, 0x1F600])))
        for text in texts:
            assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True), text
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (1, 2, 80)
        assert open_source(folder).tokenizer_files() == files
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
    def call() -> None:
        with pytest.raises(ValueError, match=message):
            read(folder)

    within(1, call)


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
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
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
        ({QUANTIZATION: "bitnet"}, "quant_method 'bitnet', and 'bitnet', 'gptq' and 'awq'"),
        ({QUANTIZATION: {"quant_method": "hqq"}}, "quant_method 'hqq', and 'bitnet', 'gptq' and 'awq' are understood"),
        ({QUANTIZATION: {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm"),
        ({QUANTIZATION: {"quant_method": "bitnet", "linear_class": "x"}}, "linear_class 'x'"),
        ({QUANTIZATION: {"quant_method": "bitnet", "group_size": 64}}, "has group_size 64, which is not understood"),
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
    refused(tmp_path / "nowhere", "nowhere does not exist; give .* owner/name of the hub")


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
    refused(folder, rf"{name} \(pickled PyTorch\).* save_pretrained")
    (folder / name).unlink()
    refused(folder, "has no model.safetensors")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "..", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors", "x.bin",
     "model.safetensors\x00", "x\n.safetensors", ".x.safetensors", "", 5, None, ["x.safetensors"]],
)  # fmt: skip
def test_shards_stay_inside_the_folder(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    (folder / MODEL_PARTS).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(folder, r"names the shard .*; a shard is a \.safetensors file inside the folder")


def test_indexes_that_lie(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = list(load_file(folder / "a.safetensors"))
    index = folder / MODEL_PARTS
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
        (folder / MODEL_PARTS).write_bytes(index)

    def state_or_nothing() -> dict[str, Tensor]:
        try:
            return read(folder).state_dict()
        except ValueError:
            return {}

    read(folder)  # what is imported late is now there
    loaded = 0
    for _ in range((500 if target == "header" else 150) * MANY):  # few edits of a header are harmless
        if target == "config.json":
            (folder / target).write_bytes(mutate(rng, config))
        elif target == "index":
            (folder / MODEL_PARTS).write_bytes(mutate(rng, index))
        else:
            header = mutate(rng, whole[:length])
            if rng.random() < 0.8 and len(header) > 8:  # a length that fits, so that the rest is looked at
                header = (len(header) - 8).to_bytes(8, "little") + header[8:]
            tensors.write_bytes(header + whole[length:])
        state = bounded(target, state_or_nothing, len(whole))
        loaded += bool(state)
        assert sum(value.nbytes for value in state.values()) <= 4 * len(whole)
    assert 0 < loaded < 75 * MANY  # some edits are harmless, and most are not


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
    for name in ("model", "a/b/c", "../x", "a/..", "/x", "a/b?c"):
        with pytest.raises(ValueError, match=r"is not a folder, nor a hub name like owner/model"):
            download(name)
    with pytest.raises(ValueError, match=r"config\.json is a file and begins with"):
        read(folder / "config.json")


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = oracles.require("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"somebody/model is not a folder and could not be downloaded .* local folder"):
        read("somebody/model")
