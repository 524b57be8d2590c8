"""Damaged and hostile files of every format give an error of ours, at once, in bounded memory, or they open.

Thousands of small mutations of a good file, from a fixed seed: bits, numbers, lengths, truncations, JSON values. A
mutation that leaves a good file must open.
"""

import dataclasses
import json

import pytest

from bitnet.inference.loading import open_model
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.folders import save_packed, save_quantized
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.hf import write as hf_write
from bitnet.storage.safetensors import save_tensors
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer, from_gguf_metadata, load_tokenizer, train_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles
from tests.fuzzing import fuzz, prepare_file, prepare_json, prepare_safetensors

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = " ".join(chr(97 + i * 7 % 26) + chr(97 + i * 11 % 26) + chr(97 + i % 26) for i in range(3000))
    return train_tokenizer([words], CONFIG.vocab_size, threads=1)


@pytest.fixture
def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(CONFIG).eval()


# GGUF


@pytest.mark.parametrize(("kind", "quantizer"), [("F16", "ternary"), ("Q8_0", "none"), ("I2_S", "ternary")])
def test_gguf(tmp_path, tokenizer, kind, quantizer):
    sizes = {"hidden_size": 128, "intermediate_size": 128} if kind == "I2_S" else {}
    model = BitNetForCausalLM(CONFIG.replace(quantizer=quantizer, **sizes))
    path = tmp_path / "x.gguf"
    gguf_write.write(model, path, kind)
    header = min(info.start for info in GGUFFile(path).tensors.values())
    prepare = prepare_file(path, header)
    assert fuzz(200, 1, prepare, lambda: open_source(path).model())["opened"]


def test_gguf_with_a_vocabulary(tmp_path, tokenizer, model):
    path = tmp_path / "x.gguf"
    gguf_write.write(model, path, "F16", tokenizer=tokenizer, chat_template="{{ messages }}")
    header = min(info.start for info in GGUFFile(path).tensors.values())
    prepare = prepare_file(path, header)

    def load() -> None:
        from_gguf_metadata(GGUFFile(path).metadata).encode("hello world 123")

    assert fuzz(40, 2, prepare, load)["opened"]


# safetensors and config.json


@pytest.mark.parametrize("form", ["packed", "packed-inverse", "master"])
def test_hugging_face_folders(tmp_path, model, form):
    folder = tmp_path / "x"
    hf_write.write(model, folder, form)
    good = (folder / "model.safetensors").read_bytes()
    prepare = prepare_safetensors(folder / "model.safetensors")
    assert fuzz(90, 3, prepare, lambda: open_source(folder).model())["opened"]
    (folder / "model.safetensors").write_bytes(good)
    assert fuzz(90, 4, prepare_json(folder / "config.json"), lambda: open_source(folder).model())["opened"]


def test_indexes_of_shards(tmp_path, model):
    folder = tmp_path / "x"
    hf_write.write(model, folder, "master")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = list(model.state_dict())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    open_source(folder).model()
    prepare = prepare_json(folder / "model.safetensors.index.json")
    assert fuzz(60, 5, prepare, lambda: open_source(folder).model())["refused"]


def test_our_own_folders(tmp_path, tokenizer, model):
    folder = tmp_path / "packed"
    save_packed(folder, model.pack(), tokenizer.model_proto)
    (folder / "checksums.json").unlink()  # by which every mutation of the weights would be found
    good = (folder / "model.safetensors").read_bytes()
    prepare = prepare_safetensors(folder / "model.safetensors")
    assert fuzz(90, 6, prepare, lambda: open_model(folder))["opened"]
    (folder / "model.safetensors").write_bytes(good)
    assert fuzz(90, 7, prepare_json(folder / "config.json"), lambda: open_model(folder))["opened"]


def test_checkpoints(tmp_path, model):
    save_tensors(tmp_path / "model.safetensors", model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(CONFIG)}))
    good = (tmp_path / "model.safetensors").read_bytes()
    prepare = prepare_safetensors(tmp_path / "model.safetensors")
    assert fuzz(60, 10, prepare, lambda: open_source(tmp_path).model())["opened"]
    (tmp_path / "model.safetensors").write_bytes(good)
    assert fuzz(60, 11, prepare_json(tmp_path / "config.json"), lambda: open_source(tmp_path).model())["opened"]


@pytest.mark.parametrize("method", ["nf4", "rtn-int4", "w8a8-dynamic", "gguf-q4_0"])
def test_quantized_folders(tmp_path, method):
    model = quantize_model(
        BitNetForCausalLM(CONFIG.replace(quantizer="none")), method, options=Options(group_size=32, progress=False)
    )
    folder = tmp_path / "x"
    save_quantized(model, folder, method, {})
    (folder / "checksums.json").unlink()
    assert fuzz(40, 12, prepare_json(folder / "config.json"), lambda: open_model(folder))["opened"]


# Tokenizers


def test_sentencepiece_models(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model_proto)
    assert fuzz(225, 8, prepare_file(path), lambda: Tokenizer.load(path).encode("hello world 123"))["opened"]


def test_tokenizer_json(tmp_path, tokenizer):
    oracles.require("tokenizers")
    for name, content in sentencepiece_files(tokenizer.model_proto).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        good = (tmp_path / name).read_bytes()
        attempts = 100 if name == "tokenizer.json" else 50
        fuzz(attempts, 9, prepare_json(tmp_path / name), lambda: load_tokenizer(tmp_path).encode("hello world 123"))
        (tmp_path / name).write_bytes(good)
