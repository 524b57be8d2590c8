"""open_model: every kind of model gives the numbers that it held, on every engine."""

import re

import pytest
import torch

import generate as cli
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import open_model
from bitnet.kernels import native_wanted, use_backend
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.folders import save_packed, save_quantized
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.hf import write as hf_write
from bitnet.storage.source import open_source
from bitnet.tokenizer import find_chat_template, load_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles
from tests.builders import save_run, tiny_model
from tests.forked import Forked

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
            source = open_source(path)
            assert (source.kind, source.path, source.chat_template) == ("run", checkpoint, None)
            assert source.tokenizer.fingerprint == tokenizer.fingerprint
            expected = logits(source.model().pack(), tokenizer) if expected is None else expected
            for given in (source, path):
                assert torch.equal(logits(open_model(given, pack=pack), tokenizer), expected)
    if quantizer != "none":
        save_packed(tmp_path / "packed", model.pack(), tokenizer.model_proto)
        with use_backend("reference"):
            source = open_source(tmp_path / "packed")
            assert source.kind == "packed"
            assert torch.equal(logits(open_model(source), tokenizer), logits(model, tokenizer))
            with pytest.raises(ValueError, match="holds packed weights and no latent floats"):
                open_model(tmp_path / "packed", pack=False)


@pytest.mark.parametrize("form", ["packed", "packed-inverse", "master"])
def test_hugging_face_folders(tmp_path, tokenizer, form):
    model = tiny_model()
    hf_write.write(model, tmp_path / "hf", form, tokenizer_files=sentencepiece_files(tokenizer.model_proto))
    with use_backend("reference"):
        opened = open_source(tmp_path / "hf")
        assert (opened.kind, opened.form, opened.config.quantizer) == ("hf", form, "ternary")
        for text in (TEXT, " a  b\n", "\u00e9 \U0001f600"):
            assert opened.tokenizer.encode(text) == tokenizer.encode(text)
            assert opened.tokenizer.decode(opened.tokenizer.encode(text)) == text
        assert opened.tokenizer.eos_ids == tokenizer.eos_ids
        assert opened.tokenizer.bos_id == tokenizer.bos_id
        assert torch.equal(logits(open_model(opened), tokenizer), logits(tiny_model().pack(), tokenizer))
        if form == "master":
            assert torch.equal(logits(open_model(opened, pack=False), tokenizer), logits(model, tokenizer))
        else:
            with pytest.raises(ValueError, match="no latent floats"):
                open_model(opened, pack=False)


def test_float_models_of_hugging_face_run_in_their_dtype(tmp_path, tokenizer):
    model = tiny_model("none", sub_norm=False)
    files = sentencepiece_files(tokenizer.model_proto)
    hf_write.write(model, tmp_path / "hf", "master", tokenizer_files=files)
    with use_backend("reference"):
        assert torch.equal(logits(open_model(tmp_path / "hf"), tokenizer), logits(model, tokenizer))
    torch.testing.assert_close(logits(open_model(tmp_path / "hf"), tokenizer), logits(model, tokenizer))
    half = open_model(tmp_path / "hf", dtype=torch.bfloat16)
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
        ours, theirs = (open_model(path, cache_dtype="int8") for path in (run, tmp_path / "hf"))
    assert isinstance(theirs, Engine)
    assert theirs.cache_dtype == "int8"
    assert torch.equal(logits(ours, tokenizer), logits(theirs, tokenizer))


@pytest.mark.parametrize(("quantizer", "kind"), [("ternary", "TQ2_0"), ("none", "F32")])
def test_gguf_files(tmp_path, tokenizer, quantizer, kind):
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tiny_model(quantizer, **shape)
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    path = tmp_path / "a file without an ending"
    gguf_write.write(model, path, kind, tokenizer=tokenizer, chat_template=template, embedding_type="F32")
    with use_backend("reference"):
        opened = open_source(path)
        model_of_file = open_model(opened)
        assert (opened.kind, opened.path, model_of_file.config.quantizer) == ("gguf", path, quantizer)
        assert opened.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
        ids = opened.chat_template.encode([{"role": "user", "content": "hi"}])
        assert ids == [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]
        expected = logits(tiny_model(quantizer, **shape).pack() if quantizer == "ternary" else model, tokenizer)
        assert torch.allclose(logits(model_of_file, tokenizer), expected, atol=1e-5)
        for name, content in opened.tokenizer_files().items():
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


def test_layers_on_a_gpu(tmp_path, tokenizer):
    ternary, floats = (save_run(tmp_path / name, tiny_model(name), tokenizer) for name in ("ternary", "none"))
    assert type(open_model(ternary, gpu_layers=0)) is type(open_model(ternary))
    cpu = "the device is cpu; name a GPU, or give 0"
    for layers, message in ((1, cpu), (99, f"99 layers are to run on a GPU and {cpu}"), (-1, "gpu_layers is -1")):
        with pytest.raises(ValueError, match=message):
            open_model(ternary, gpu_layers=layers)
    with pytest.raises(ValueError, match="the device is cpu"):
        open_model(floats, gpu_layers=1)


def test_options_of_the_engine_are_refused_elsewhere(tmp_path, tokenizer):
    folder = save_run(tmp_path / "run", tiny_model("ternary"), tokenizer)
    for name, value in (
        ("activations", "int8"),
        ("activations", "int16"),
        ("activations", "float"),
        ("embeddings", "float16"),
    ):
        message = f"{name} {value} are of the native CPU engine and this model runs on torch; leave them out"
        with use_backend("reference"), pytest.raises(ValueError, match=message):
            open_model(folder, **{name: value})
        with pytest.raises(ValueError, match=message):
            open_model(folder, pack=False, **{name: value})


@pytest.mark.skipif(not native_wanted(torch.device("cpu")), reason="the native kernels were not built")
def test_activations_that_no_weight_takes_are_told(tmp_path, tokenizer, capsys):
    save_run(tmp_path / "ternary", tiny_model(), tokenizer)
    save_packed(tmp_path / "packed", tiny_model().pack(), tokenizer.model_proto)
    save_run(tmp_path / "float", tiny_model("none"), tokenizer)
    groups = quantize_model(tiny_model("none"), "rtn-int4", options=Options(group_size=32, progress=False))
    save_quantized(groups, tmp_path / "groups", "rtn-int4", tokenizer.files())
    for name, stays in (("ternary", "int8"), ("packed", "int8"), ("float", "float"), ("groups", None)):
        for asked in ("int8", "int16", "float"):
            open_model(tmp_path / name, activations=asked)
            said = f"note: activations {asked} are of weights that were quantized in groups afterwards; those of this"
            assert (said in capsys.readouterr().err) is (stays not in (asked, None)), (name, asked)


def test_a_cache_type_that_nothing_takes_is_refused(tmp_path, tokenizer):
    folder = save_run(tmp_path / "run", tiny_model("none"), tokenizer)
    with pytest.raises(ValueError, match=r"cache int8 .* runs on torch, whose cache is bfloat16; leave it out"):
        open_model(folder, cache_dtype="int8", dtype=torch.bfloat16)
    folder = save_run(tmp_path / "ternary", tiny_model("ternary"), tokenizer)
    for name in ("float16", "fp8"):
        with use_backend("reference"), pytest.raises(ValueError, match=rf"cache {name} .* leave it out"):
            open_model(folder, cache_dtype=name)


@pytest.mark.parametrize("method", ["nf4", "gguf-q4_0", "float32"])
def test_a_folder_is_opened_without_torchs_compiler(tmp_path, method):
    model = tiny_model("none").eval()
    if method != "float32":
        model = quantize_model(model, method, torch.arange(128)[None])
    save_quantized(model, tmp_path / "model", method, {})
    code = "import sys; from bitnet.inference.loading import open_model; open_model('model')"
    code += "; print('torch._dynamo' in sys.modules)"
    done = Forked(tmp_path, bare=True, code=code).wait()
    assert done.stdout.strip() == "False", done.stderr
