"""--init: training goes on from a model of any kind, with its shape, weights, tokenizer and chat template."""

import dataclasses
import json

import pytest
import torch

import train as trainer
from bitnet.__main__ import main
from bitnet.model import PRESETS, BitLinear, PackedLinear
from bitnet.model.linear import codes_and_scale
from bitnet.quant import unpack_codes
from bitnet.storage.folders import save_packed
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.hf import write as hf_write
from bitnet.storage.safetensors import CheckpointError
from bitnet.storage.source import open_source
from bitnet.tokenizer import BaseTokenizer, Tokenizer, train_tokenizer
from bitnet.training import config as recipes
from tests.builders import FOXES, configuration, fox_corpus, save_run, tensors, tiny_model
from tests.conversations import CHATML, chat, write_chats
from tests.faults import stop_after
from tests.vocabularies import byte_pair_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([FOXES * 4], 300, threads=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return fox_corpus(tmp_path_factory.mktemp("corpus"))


def begin(tmp_path, corpus, source, **changes) -> recipes.TrainConfig:
    return configuration(tmp_path, corpus, init=str(source), context=32, **changes)


@pytest.mark.parametrize("quantizer", ["ternary", "ternary-g64", "binary", "int8", "int4"])
def test_packed_codes_become_latents_of_the_same_codes(tmp_path, tokenizer, quantizer):
    model = tiny_model(quantizer, vocab_size=300, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    packed = tiny_model(quantizer, vocab_size=300, tie_word_embeddings=False)
    packed.load_state_dict(model.state_dict())
    packed.pack()
    save_packed(tmp_path / "packed", packed, tokenizer.model_proto)
    source = open_source(tmp_path / "packed")
    assert source.kind == "packed"
    latent = source.latent()
    assert latent.config == model.config
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear) and name != "lm_head":
            ours = latent.get_submodule(name)
            assert isinstance(ours, BitLinear)
            codes, scale = codes_and_scale(ours)
            assert torch.equal(codes, layer.codes()), name
            if bool(codes.any()):
                torch.testing.assert_close(scale, codes_and_scale(layer)[1], rtol=1e-6, atol=0)
    table = packed.model.embed_tokens
    assert torch.equal(latent.model.embed_tokens.weight, unpack_codes(table.packed_weight, 8, 64) * table.weight_scale)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        error, expected = latent(ids) - model(ids), model(ids)
    assert float(error.norm() / expected.norm()) < 0.02  # INT8 embedding and head
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in latent.parameters())


def test_a_float_model_of_another_project_becomes_ternary(tmp_path, corpus, monkeypatch):
    """Rows of the embedding without a token, as such models have them, stay; so does the tokenizer.json."""
    theirs = byte_pair_tokenizer()
    model = tiny_model("none", vocab_size=448, sub_norm=False, max_position_embeddings=64)
    files = theirs.files() | {"chat_template.jinja": CHATML.encode()}
    hf_write.write(model, tmp_path / "hf", "master", tokenizer_files=files)
    config = begin(tmp_path, corpus, tmp_path / "hf", ramp=0.5)
    fresh = trainer.prepare(config)
    shape = fresh.config.model
    assert shape == model.config.replace(quantizer="ternary", head_dim=16, initializer_range=shape.initializer_range)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], value), name
    assert fresh.feed.tokenizer.fingerprint == theirs.fingerprint
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "straight"), sample_every=3))
    stop_after(monkeypatch, 3)
    stopped = trainer.train(config)
    assert stopped.progress.step == 3
    monkeypatch.undo()
    resumed = trainer.train(stopped.config, resume=True)
    assert resumed.progress.step == 8
    straight, broken = tensors(tmp_path / "straight"), tensors(tmp_path / "run")
    for name, value in straight.items():
        assert torch.equal(value, broken[name]), name
    opened = open_source(tmp_path / "run")
    assert opened.tokenizer.fingerprint == theirs.fingerprint
    assert opened.tokenizer.eos_ids == theirs.eos_ids
    assert opened.model().config.vocab_size == 448
    assert opened.chat_template.source == CHATML
    # And from there to a float twin, with the run's own config.json in the folder.
    twin = begin(
        tmp_path, corpus, tmp_path / "run", model=PRESETS["tiny"].replace(quantizer="none"), out=str(tmp_path / "twin")
    )
    assert trainer.prepare(twin).config.model == shape.replace(quantizer="none")


@pytest.mark.parametrize(
    "parts",
    [
        {"rope_factors": (1.0,) * 4 + (8.0,) * 4, "rope_theta": 50.0},
        {"qkv_bias": True},
        {"qk_norm": True, "head_dim": 8},
    ],
    ids=["llama3", "qwen2", "qwen3"],
)
def test_models_of_other_architectures_become_ternary(tmp_path, corpus, parts):
    model = tiny_model("none", vocab_size=448, sub_norm=False, **parts)
    hf_write.write(model, tmp_path / "hf", "master", tokenizer_files=byte_pair_tokenizer().files())
    shape = trainer.train(begin(tmp_path, corpus, tmp_path / "hf", steps=2)).config.model
    width = model.config.head_width
    assert shape == model.config.replace(
        quantizer="ternary", head_dim=width, initializer_range=shape.initializer_range, rope_factors=shape.rope_factors
    )
    assert shape.rope_factors == pytest.approx(model.config.rope_factors)
    run = open_source(tmp_path / "run")
    assert run.config == shape
    before, after = model.state_dict(), run.model().state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], value) for name, value in after.items())  # biases and norms learn as well
    hf_write.write(run.model(), tmp_path / "again", "packed-inverse")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(open_source(tmp_path / "again").model()(ids), run.model()(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "TQ2_0"])
def test_a_gguf_file_goes_on_with_its_template(tmp_path, tokenizer, kind):
    model = tiny_model("none" if kind == "F16" else "ternary", vocab_size=300, hidden_size=256, intermediate_size=256)
    write_chats(tmp_path / "chats.jsonl", [chat("one", "two"), chat("two", "three"), chat("three", "one")])
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    gguf_write.write(model, tmp_path / "m.gguf", kind, tokenizer=tokenizer, chat_template=template)
    data = recipes.DataConfig(chat=str(tmp_path / "chats.jsonl"), cache=str(tmp_path / "data"))
    quantizer = model.config.quantizer
    config = begin(
        tmp_path, tmp_path, tmp_path / "m.gguf", data=data, steps=2, model=PRESETS["tiny"].replace(quantizer=quantizer)
    )
    run = trainer.prepare(config)
    stored = open_source(tmp_path / "m.gguf").latent()
    assert run.config.model == stored.config
    assert run.feed.template.source == template
    assert "[assistant]" in run.feed.tokenizer.decode(run.feed.prompt(run.config.sample_prompt))
    trainer.train(config)
    opened = open_source(tmp_path / "run")
    assert opened.chat_template.source == template
    assert isinstance(opened.tokenizer, BaseTokenizer)
    assert opened.tokenizer.adds_bos == tokenizer.adds_bos


def test_settings_of_a_sentencepiece_tokenizer_survive(tmp_path, tokenizer, corpus):
    """The .model does not say whether <s> goes in front; what says it is stored with the run."""
    quiet = Tokenizer(tokenizer.model_proto, adds_bos=False, ends=(5,))
    hf_write.write(tiny_model("none", vocab_size=300), tmp_path / "hf", "master", tokenizer_files=quiet.files())
    trainer.train(begin(tmp_path, corpus, tmp_path / "hf", steps=1))
    opened = open_source(tmp_path / "run")
    assert (opened.tokenizer.adds_bos, opened.tokenizer.eos_ids) == (False, (2, 5))


def test_what_cannot_be_trained_is_named(tmp_path, tokenizer, corpus):
    save_run(tmp_path / "small", tiny_model("none", vocab_size=290), tokenizer)
    with pytest.raises(CheckpointError, match="300 tokens and the model only 290"):
        trainer.prepare(begin(tmp_path, corpus, tmp_path / "small"))
    folder = save_run(tmp_path / "quantized", tiny_model("none", vocab_size=300), tokenizer) / "checkpoints"
    source = next(folder.glob("step-*"))
    assert main(["quantize", str(source), str(tmp_path / "q"), "--method", "rtn-int4", "--group-size", "-1"]) == 0
    with pytest.raises(ValueError, match="quantized after training"):
        trainer.prepare(begin(tmp_path, corpus, tmp_path / "q"))
    with pytest.raises(ValueError, match="nowhere"):
        trainer.prepare(begin(tmp_path, corpus, "nowhere"))


def test_the_tokenizer_of_a_run_may_be_a_tokenizer_json(tmp_path, corpus):
    theirs = byte_pair_tokenizer()
    theirs.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    data = recipes.DataConfig(
        corpus=str(corpus), cache=str(tmp_path / "data"), tokenizer=str(tmp_path / "tokenizer.json")
    )
    run = trainer.train(configuration(tmp_path, corpus, data=data, steps=1))
    assert run.config.model.vocab_size == theirs.vocab_size
    assert open_source(run.folder).tokenizer.fingerprint == run.feed.tokenizer.fingerprint
