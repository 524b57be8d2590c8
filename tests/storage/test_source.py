"""open_source: every kind of model is told from its contents, its headers are read once, and its weights on request."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bitnet.inference.loading import open_model
from bitnet.model import BitLinear, BitNetForCausalLM, PackedLinear
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.folders import save_packed, save_quantized
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFFile, write_file
from bitnet.storage.hf import write as hf_write
from bitnet.storage.json_files import CheckpointError, load_json, load_record
from bitnet.storage.safetensors import save_tensors
from bitnet.storage.source import Source, find, open_source
from bitnet.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from bitnet.training.checkpoint import save_checkpoint
from tests.builders import save_run, tiny_model
from tests.vocabularies import byte_tokenizer, foreign_model, stdlib_tokenizer

pytestmark = pytest.mark.usefixtures("reference_backend")
TEXT = "def wrap(text):\n    return text"
IDS = torch.arange(24)[None]
LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4,
}  # fmt: skip


def write_run(path: Path, tokenizer: Tokenizer) -> BitNetForCausalLM:
    save_run(path, tiny_model(), tokenizer)
    return tiny_model()


def write_packed(path: Path, tokenizer: Tokenizer) -> BitNetForCausalLM:
    model = tiny_model().pack(embeddings=False)
    save_packed(path, model, tokenizer.model_proto)
    return model


def write_quantized(path: Path, tokenizer: Tokenizer) -> BitNetForCausalLM:
    model = quantize_model(tiny_model("none"), "rtn-int4", options=Options(group_size=32, progress=False))
    save_quantized(model, path, "rtn-int4", tokenizer.files())
    return model


def write_hugging_face(path: Path, tokenizer: Tokenizer) -> BitNetForCausalLM:
    hf_write.write(tiny_model(), path, "packed", tokenizer_files=sentencepiece_files(tokenizer.model_proto))
    return tiny_model().pack(embeddings=False)


def write_float_hugging_face(path: Path, tokenizer: Tokenizer) -> BitNetForCausalLM:
    model = tiny_model("none", sub_norm=False)
    hf_write.write(model, path, "master", tokenizer_files=sentencepiece_files(tokenizer.model_proto))
    return model


def write_gguf(path: Path, tokenizer: Tokenizer) -> BitNetForCausalLM:
    model = tiny_model("none")
    gguf_write.write(model, path, "F32", tokenizer=tokenizer)
    return model


KINDS = {
    "run": write_run, "packed": write_packed, "quantized": write_quantized, "hf": write_hugging_face,
    "hf, float": write_float_hugging_face, "gguf": write_gguf,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_and_read(tmp_path, tokenizer, kind):
    path = tmp_path / "model"
    expected = KINDS[kind](path, tokenizer)
    for given in (path, str(path)):
        source = open_source(given)
        assert source.kind == kind.partition(",")[0]
        assert source.path == (path / "checkpoints" / "step-00000001" if kind == "run" else path)
        assert source.config == expected.config.replace(
            head_dim=source.config.head_dim, initializer_range=source.config.initializer_range
        )
        assert source.config.head_width == expected.config.head_width
        assert source.chat_template is None
        assert source.tokenizer is source.tokenizer
        assert source.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
        model = source.model()
        assert not model.training
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in expected.named_modules()}
        with torch.inference_mode():
            assert torch.equal(model(IDS), expected(IDS))
            again = source.model()
            assert again is not model
            assert torch.equal(again(IDS), expected(IDS))
    for name, content in source.tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path, own=True).encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_the_stored_codes(tmp_path, tokenizer, kind):
    path = tmp_path / "model"
    expected = KINDS[kind](path, tokenizer)
    source = open_source(path)
    if kind == "quantized":
        with pytest.raises(ValueError, match="was quantized after training and cannot be trained"):
            source.latent()
        return
    latent = source.latent()
    assert not any(isinstance(module, PackedLinear) for module in latent.modules())
    assert sum(isinstance(module, BitLinear) for module in latent.modules()) == 14
    with torch.inference_mode():
        assert torch.allclose(latent(IDS), expected(IDS), atol=1e-4)
    assert torch.equal(latent.model.cos, expected.model.cos)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tensors_by_name(tmp_path, tokenizer, kind):
    path = tmp_path / "model"
    state = KINDS[kind](path, tokenizer).state_dict()
    source = open_source(path)
    if kind == "gguf":
        with pytest.raises(CheckpointError, match="is a GGUF file"), source.tensors():
            pass
        return
    with source.tensors() as tensors:
        if kind != "hf":
            assert tensors.names == set(state)
        for name in tensors.names & set(state):
            assert tensors.nbytes(name) == state[name].nbytes
            if name.endswith("weight_scale") or kind != "hf":  # its codes have another layout
                assert tensors.shape(name) == list(tensors.read(name).shape)
                assert torch.equal(tensors.read(name).view_as(state[name]), state[name])
        with pytest.raises(CheckpointError, match=r"has no tensor model\.other"):
            tensors.read("model.other")


class Parses:
    """Counts how often a JSON text with a mark in it is parsed, by whatever module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, original = 0, json.loads

        def loads(text, *arguments, **options):
            self.count += "counted" in (text if isinstance(text, str) else text.decode())
            return original(text, *arguments, **options)

        monkeypatch.setattr(json, "loads", loads)


@pytest.mark.parametrize("which", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gguf"])
def test_a_config_is_parsed_once_per_opening(tmp_path, tokenizer, monkeypatch, kind, which):
    path = tmp_path / "model"
    KINDS[kind](path, tokenizer)
    folder = open_source(path).path
    if which == "tokenizer.json":
        for name, content in sentencepiece_files(tokenizer.model_proto).items():
            (folder / name).write_bytes(content)
        (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "counted", **load_json(folder / "config.json")}))
    parses = Parses(monkeypatch)
    source = open_source(path)
    assert source.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert source.chat_template is None
    assert open_model(source).config.vocab_size == 512
    source.model()
    assert parses.count == 1


def test_a_gguf_header_is_parsed_once_per_opening(tmp_path, tokenizer, monkeypatch):
    write_gguf(tmp_path / "x.gguf", tokenizer)
    opened, parse = [], GGUFFile._parse
    monkeypatch.setattr(GGUFFile, "_parse", lambda self: (opened.append(self.path), parse(self)))
    source = open_source(tmp_path / "x.gguf")
    assert source.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert source.chat_template is None
    assert open_model(source).config.vocab_size == 512
    assert source.latent().config == source.config
    assert opened == [tmp_path / "x.gguf"]


def test_headers_alone_are_read_when_a_source_is_opened(tmp_path, tokenizer):
    write_run(tmp_path / "run", tokenizer)
    folder = open_source(tmp_path / "run").path
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).write_bytes(b"damaged")
    source = open_source(tmp_path / "run")
    assert isinstance(source, Source)
    assert source.config == tiny_model().config
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        source.model()
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        _ = source.tokenizer


def test_the_checkpoint_of_a_run_is_chosen(tmp_path, tokenizer):
    models = [tiny_model(seed=seed) for seed in (0, 1)]
    for step, model in enumerate(models):
        save_checkpoint(
            tmp_path, model=model, optimizer_state={}, state={"step": step}, best=step == 0,
            config={"model": dataclasses.asdict(model.config)}, tokenizer=tokenizer.model_proto,
        )  # fmt: skip
    with torch.inference_mode():
        for which, model in zip(("best", "last"), models, strict=True):
            assert torch.equal(open_source(tmp_path, which=which).model()(IDS), model(IDS))
            assert open_source(tmp_path, which=which).path.name == f"step-{models.index(model):08d}"
        assert torch.equal(open_model(tmp_path, pack=False)(IDS), models[0](IDS))


def test_what_has_one_checkpoint_has_no_last_one(tmp_path, tokenizer):
    run = tmp_path / "run"
    write_run(run, tokenizer)
    save_packed(tmp_path / "packed", tiny_model().pack(), {})
    float_model = tiny_model("none", sub_norm=False)
    gguf_write.write(float_model, tmp_path / "x.gguf", "F16", tokenizer=stdlib_tokenizer(float_model.config.vocab_size))
    assert open_source(run, which="last").path == open_source(run).path
    for path in (tmp_path / "packed", tmp_path / "x.gguf", open_source(run).path):
        assert open_source(path).path == path
        with pytest.raises(ValueError, match=r"checkpoint last is of a run folder, and .* is none; leave it out"):
            open_source(path, which="last")


def test_a_sharded_run_says_how_to_convert_it(tmp_path, tokenizer):
    run = tmp_path / "run"
    write_run(run, tokenizer)
    folder = open_source(run).path
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"as its best checkpoint, but model\.safetensors is missing"):
        open_source(run)
    (folder / "shards").mkdir()
    for path in (run, folder):
        with pytest.raises(CheckpointError, match=rf"is sharded; write its safetensors form with: .*consolidate {run}"):
            open_source(path)
    # What it holds when it was converted: both forms.
    save_tensors(folder / "model.safetensors", tiny_model().state_dict())
    with torch.inference_mode():
        assert torch.equal(open_source(run).model()(IDS), tiny_model()(IDS))


def test_another_quantizer_for_latent_floats_only(tmp_path, tokenizer):
    write_run(tmp_path / "run", tokenizer)
    model = open_source(tmp_path / "run").model(quantizer="none")
    assert model.config.quantizer == "none"
    assert all(layer.quantizer == "none" for layer in model.modules() if isinstance(layer, BitLinear))
    for kind in ("packed", "quantized", "hf", "gguf"):
        KINDS[kind](tmp_path / kind, tokenizer)
        with pytest.raises(ValueError, match="holds no latent floats, which alone can become 'ternary'"):
            open_source(tmp_path / kind).model(quantizer="ternary")


@dataclasses.dataclass
class Example:
    a: int
    b: float | None = None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": null}', None),
        ('{"a": 1}', None),
        ('{"b": 2}', r"there is no 'a'; it must be a whole number"),
        ('{"a": true}', r"'a' is True; it must be a whole number"),
        ('{"a": 1.5}', r"'a' is 1\.5; it must be a whole number"),
        ('{"a": "1"}', r"'a' is '1'; it must be a whole number"),
        ('{"a": 1, "b": 2}', None),
        ('{"a": 1, "b": [2]}', r"'b' is \[2\]; it must be a finite number or null"),
        ('{"a": 1, "b": NaN}', r"'b' is nan; it must be a finite number or null"),
        ("[1]", "holds a list, not an object"),
        ('{"a": ', "cannot be read"),
        ("\udc80", "cannot be read"),
    ],
    ids=str,
)
def test_kinds_of_json_fields(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    if message is None:
        assert load_record(path, Example) == Example(**json.loads(content))
        return
    with pytest.raises(CheckpointError, match=rf"x\.json.* {message}"):
        load_record(path, Example)


def test_json_that_is_no_file_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.json does not exist"):
        load_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_json(tmp_path)
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(CheckpointError, match="67,108,865 bytes"):
        load_json(tmp_path / "x.json")


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
    source = open_source(run)
    assert source.tokenizer_files() == {"tokenizer.model": tokenizer.model_proto}
    (source.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    source = open_source(run)
    assert source.chat_template is not None
    assert source.tokenizer_files()["chat_template.jinja"] == b"{{ messages[0].content }}"


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("with_json", [False, True])
def test_a_tokenizer_means_the_same_in_a_folder_made_from_another_s(tmp_path, legacy, with_json):
    """Of both files tokenizer.json counts, and a tokenizer.model is not legacy unless its folder says so."""
    proto = foreign_model(vocab_size=400).model_proto
    settings = {} if legacy is None else {"legacy": legacy}
    files = {"tokenizer.model": proto, "tokenizer_config.json": json.dumps(settings | {"bos_token": "<s>"}).encode()}
    if with_json:
        byte_tokenizer().save(tmp_path / "tokenizer.json")  # which puts no <s> in front
        files["tokenizer.json"] = (tmp_path / "tokenizer.json").read_bytes()
    hf_write.write(tiny_model("none", vocab_size=400), tmp_path / "hf", "master", tokenizer_files=files)
    source = open_source(tmp_path / "hf")
    save_packed(tmp_path / "packed", tiny_model(vocab_size=400).pack(), source.tokenizer_files())
    theirs, ours = source.tokenizer, open_source(tmp_path / "packed").tokenizer
    assert type(theirs) is type(ours) is (HuggingFaceTokenizer if with_json else Tokenizer)
    assert theirs.adds_bos == ours.adds_bos == (not with_json)
    text = "a</s>b </s> c"
    assert theirs.encode(text, special=True) == ours.encode(text, special=True)
    if not with_json:
        legacy_one = Tokenizer(proto).encode(text, special=True)
        assert (ours.encode(text, special=True) == legacy_one) is (legacy is True)


def test_a_foreign_tokenizer_beside_our_weights(tmp_path, tokenizer):
    run = save_run(tmp_path / "run", tiny_model(), tokenizer)
    checkpoint = next((run / "checkpoints").glob("step-*"))
    (checkpoint / "tokenizer.model").unlink()
    for name, content in sentencepiece_files(tokenizer.model_proto).items():
        if name != "tokenizer.model" and not name.startswith("config"):
            (checkpoint / name).write_bytes(content)
    opened = open_source(run)
    assert isinstance(opened.tokenizer, HuggingFaceTokenizer)
    assert opened.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)


def test_what_cannot_be_opened_is_named(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02pickle")
    with pytest.raises(ValueError, match=r"weights\.bin is a file and begins with .*not with b'GGUF'"):
        open_source(tmp_path / "weights.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint"):
        open_source(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    for content, message in ((b"{}", "neither of this project"), (b"[]", "holds a list"), (b"{", "cannot be read")):
        (other / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_source(other)
    (other / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'mamba'; the architectures that are understood"):
        open_source(other)
    (other / "config.json").write_text(json.dumps(LLAMA))
    source = open_source(other)
    with pytest.raises(ValueError, match=r"no tokenizer\.json and no tokenizer\.model"):
        _ = source.tokenizer
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        source.model()
    small = stdlib_tokenizer(600)
    run = save_run(tmp_path / "run", tiny_model(), small)
    with pytest.raises(ValueError, match="the tokenizer has 600 tokens and the model only 512"):
        _ = open_source(run).tokenizer


def test_folders_with_gguf_files(tmp_path):
    first = tmp_path / "one.gguf"
    write_file(first, {"general.architecture": "llama"}, [])
    assert find(tmp_path) == first
    with pytest.raises(ValueError, match=r"one\.gguf: it has no matrix token_embd\.weight"):
        open_source(tmp_path)
    write_file(tmp_path / "two.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(ValueError, match=r"several models \(one\.gguf, two\.gguf\)"):
        open_source(tmp_path)


def test_only_names_of_no_local_folder_go_to_the_hub(tmp_path, monkeypatch):
    from bitnet.storage.hf import read as hf_read

    asked = []

    def download(name):
        asked.append(name)
        raise ValueError("offline")

    monkeypatch.setattr(hf_read, "download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/typo", "just-a-name", "a/b/c", str(tmp_path / "x")):
        with pytest.raises(ValueError, match="does not exist"):
            open_source(path)
    assert asked == []
    with pytest.raises(ValueError, match="offline"):
        open_source("owner/model")
    assert asked == ["owner/model"]
