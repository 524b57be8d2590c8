"""open_model: every kind of model is recognized by its contents and gives the numbers that it held."""

import json
import re

import pytest
import torch

import generate as cli
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import open_model
from bitnet.kernels import use_backend
from bitnet.storage.folders import load_model, save_packed
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import write_file
from bitnet.storage.hf import write as hf_write
from bitnet.storage.source import find, kind_of, tokenizer_files
from bitnet.tokenizer import HuggingFaceTokenizer, Tokenizer, find_chat_template, load_tokenizer, train_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles
from tests.builders import save_run, tiny_model
from tests.vocabularies import byte_tokenizer, stdlib_text

TEXT = "def wrap(text):\n    return text"


@torch.inference_mode()
def logits(model, tokenizer) -> torch.Tensor:
    return model(torch.tensor([tokenizer.encode(TEXT, bos=True)])).float()


@pytest.mark.parametrize("quantizer", ["ternary", "none"])
@pytest.mark.parametrize("pack", [True, False])
def test_runs_checkpoints_and_packed_folders(tmp_path, tokenizer, quantizer, pack):
    model = tiny_model(quantizer)
    run = save_run(tmp_path / "run", model, tokenizer)
    (run / "config.json").write_text("{}")  # train.py's own, which is no model's
    checkpoint = next((run / "checkpoints").glob("step-*"))
    expected = logits(model, tokenizer) if not pack or quantizer == "none" else None
    with use_backend("reference"):
        for path in (run, checkpoint, str(run)):
            opened = open_model(path, pack=pack)
            assert (opened.kind, opened.folder, opened.chat_template) == ("run", checkpoint, None)
            assert opened.tokenizer.fingerprint == tokenizer.fingerprint
            expected = logits(load_model(checkpoint).pack(), tokenizer) if expected is None else expected
            assert torch.equal(logits(opened.model, tokenizer), expected)
    if quantizer != "none":
        save_packed(tmp_path / "packed", model.pack(), tokenizer.model_proto)
        with use_backend("reference"):
            opened = open_model(tmp_path / "packed")
            assert opened.kind == "packed"
            assert torch.equal(logits(opened.model, tokenizer), logits(model, tokenizer))
            with pytest.raises(ValueError, match="holds packed weights and no latent floats"):
                open_model(tmp_path / "packed", pack=False)


@pytest.mark.parametrize("form", ["packed", "packed-inverse", "master"])
def test_hugging_face_folders(tmp_path, tokenizer, form):
    model = tiny_model()
    hf_write.write(model, tmp_path / "hf", form, tokenizer_files=sentencepiece_files(tokenizer.model_proto))
    with use_backend("reference"):
        opened = open_model(tmp_path / "hf")
        assert (opened.kind, opened.model.config.quantizer) == ("hf", "ternary")
        for text in (TEXT, " a  b\n", "\u00e9 \U0001f600"):
            assert opened.tokenizer.encode(text) == tokenizer.encode(text)
            assert opened.tokenizer.decode(opened.tokenizer.encode(text)) == text
        assert opened.tokenizer.eos_ids == tokenizer.eos_ids
        assert opened.tokenizer.bos_id == tokenizer.bos_id
        assert torch.equal(logits(opened.model, tokenizer), logits(tiny_model().pack(), tokenizer))
        if form == "master":
            assert torch.equal(
                logits(open_model(tmp_path / "hf", pack=False).model, tokenizer), logits(model, tokenizer)
            )
        else:
            with pytest.raises(ValueError, match="no latent floats"):
                open_model(tmp_path / "hf", pack=False)


def test_float_models_of_hugging_face_run_in_their_dtype(tmp_path, tokenizer):
    model = tiny_model("none", sub_norm=False)
    files = sentencepiece_files(tokenizer.model_proto)
    hf_write.write(model, tmp_path / "hf", "master", tokenizer_files=files)
    opened = open_model(tmp_path / "hf")
    assert torch.equal(logits(opened.model, tokenizer), logits(model, tokenizer))
    half = open_model(tmp_path / "hf", dtype=torch.bfloat16).model
    assert next(iter(half.parameters())).dtype == torch.bfloat16
    assert float((logits(half, tokenizer) - logits(model, tokenizer)).abs().max()) < 0.3


def test_the_native_engine_runs_what_is_ternary(tmp_path, tokenizer):
    from bitnet.kernels import native_available

    if not native_available():
        pytest.skip("the native kernels were not built")
    files = sentencepiece_files(tokenizer.model_proto)
    hf_write.write(tiny_model(), tmp_path / "hf", "packed", tokenizer_files=files)
    run = save_run(tmp_path / "run", tiny_model(), tokenizer)
    with use_backend("native"):
        ours, theirs = (open_model(path, cache_dtype="int8").model for path in (run, tmp_path / "hf"))
    assert isinstance(theirs, Engine)
    assert theirs.cache_dtype == "int8"
    assert torch.equal(logits(ours, tokenizer), logits(theirs, tokenizer))


def test_the_files_of_a_tokenizer_make_it_again(tmp_path, tokenizer):
    for number, original in enumerate((
        tokenizer, Tokenizer(tokenizer.model_proto, adds_bos=False, ends=(7, 9)), byte_tokenizer(),
        byte_tokenizer(adds_bos=True, pad_id=3), byte_tokenizer(bos_id=None, eos_id=None, unk_id=None, ends=(4, 5)),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in original.files().items():
            (folder / name).write_bytes(content)
        again = load_tokenizer(folder)
        assert type(again) is type(original)
        assert set(again.eos_ids) == set(original.eos_ids)
        if original.eos_id is not None:
            assert (again.eos_id, again.pad_id) == (original.eos_id, original.pad_id)
        assert (again.bos_id, again.unk_id, again.adds_bos) == (original.bos_id, original.unk_id, original.adds_bos)
        assert again.encode(TEXT + "</s>", special=True) == original.encode(TEXT + "</s>", special=True)


def test_tokenizer_files_of_a_folder(tmp_path, tokenizer):
    run = save_run(tmp_path / "run", tiny_model(), tokenizer)
    opened = open_model(run)
    assert tokenizer_files(opened) == {"tokenizer.model": tokenizer.model_proto}
    (opened.folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    opened = open_model(run)
    assert opened.chat_template is not None
    assert tokenizer_files(opened)["chat_template.jinja"] == b"{{ messages[0].content }}"


def test_a_foreign_tokenizer_beside_our_weights(tmp_path, tokenizer):
    run = save_run(tmp_path / "run", tiny_model(), tokenizer)
    checkpoint = next((run / "checkpoints").glob("step-*"))
    (checkpoint / "tokenizer.model").unlink()
    for name, content in sentencepiece_files(tokenizer.model_proto).items():
        if name != "tokenizer.model" and not name.startswith("config"):
            (checkpoint / name).write_bytes(content)
    opened = open_model(run)
    assert isinstance(opened.tokenizer, HuggingFaceTokenizer)
    assert opened.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)


def test_what_cannot_be_opened_is_named(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02pickle")
    with pytest.raises(ValueError, match=r"weights\.bin is a file and begins with .*not with b'GGUF'"):
        open_model(tmp_path / "weights.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint"):
        open_model(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_model(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    for content, message in ((b"{}", "neither of this project"), (b"[]", "holds a list"), (b"{", "cannot be read")):
        (other / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_model(other)
    (other / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"no tokenizer\.json and no tokenizer\.model"):
        open_model(other)
    small = train_tokenizer([stdlib_text()[:60_000]], 600, threads=1)
    run = save_run(tmp_path / "run", tiny_model(), small)
    with pytest.raises(ValueError, match="the tokenizer has 600 tokens and the model only 512"):
        open_model(run)


@pytest.mark.parametrize(("quantizer", "kind"), [("ternary", "TQ2_0"), ("none", "F32")])
def test_gguf_files(tmp_path, tokenizer, quantizer, kind):
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tiny_model(quantizer, **shape)
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    path = tmp_path / "a file without an ending"
    gguf_write.write(model, path, kind, tokenizer=tokenizer, chat_template=template, embedding_type="F32")
    with use_backend("reference"):
        opened = open_model(path)
        assert (opened.kind, opened.folder, opened.model.config.quantizer) == ("gguf", path, quantizer)
        assert opened.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
        ids = opened.chat_template.encode([{"role": "user", "content": "hi"}])
        assert ids == [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]
        expected = logits(tiny_model(quantizer, **shape).pack() if quantizer == "ternary" else model, tokenizer)
        assert torch.allclose(logits(opened.model, tokenizer), expected, atol=1e-5)
        for name, content in tokenizer_files(opened).items():
            (tmp_path / name).write_bytes(content)
        assert load_tokenizer(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
        assert find_chat_template(tmp_path, tokenizer).source == template


def test_smollm2_answers(capsys):
    """The whole way of an instruct model: GGUF blocks, byte-level tokenizer, chat template, end of turn."""
    path = oracles.smollm2()
    question = ("--prompt", "What is the capital of France?", "--temperature", "0", "--max-new-tokens", "24")
    assert cli.main([str(path), "--chat", "--device", "cpu", *question]) == 0
    captured = capsys.readouterr()
    assert "Paris" in captured.out
    assert "<|im_end|>" not in captured.out
    assert int(re.search(r"decode (\d+) tokens", captured.err)[1]) < 24  # ended by itself


def test_folders_with_gguf_files(tmp_path):
    first = tmp_path / "one.gguf"
    write_file(first, {"general.architecture": "llama"}, [])
    assert find(tmp_path) == first
    assert kind_of(first) == "gguf"
    with pytest.raises(ValueError, match=r"one\.gguf holds no tokenizer"):
        open_model(tmp_path)
    write_file(tmp_path / "two.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(ValueError, match=r"several models \(one\.gguf, two\.gguf\)"):
        open_model(tmp_path)


def test_only_names_of_no_local_folder_go_to_the_hub(tmp_path, monkeypatch):
    from bitnet.storage.hf import read as hf_read

    asked = []

    def locate(name):
        asked.append(name)
        raise ValueError("offline")

    monkeypatch.setattr(hf_read, "locate", locate)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/typo", "just-a-name", "a/b/c", str(tmp_path / "x")):
        with pytest.raises(ValueError, match="does not exist"):
            open_model(path)
    assert asked == []
    with pytest.raises(ValueError, match="offline"):
        open_model("owner/model")
    assert asked == ["owner/model"]
