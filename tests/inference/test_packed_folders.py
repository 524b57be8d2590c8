"""Packed models on disk, and the engine that reads them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bitnet import kernels
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import open_model
from bitnet.model import BitLinear, BitNetForCausalLM
from bitnet.model.linear import PackedEmbedding, PackedLinear
from bitnet.model.transformer import rope_tables
from bitnet.storage.checksums import CHECKSUMS
from bitnet.storage.folders import CONFIG, MODEL, TOKENIZER, save_packed
from bitnet.storage.safetensors import CheckpointError, load_tensors
from bitnet.training.checkpoint import save_checkpoint
from tests.builders import packed_model, random_ids, torch_logits
from tests.inference.builders import BASE, CONFIGS, ON_NATIVE_KERNELS

pytestmark = ON_NATIVE_KERNELS


@pytest.mark.parametrize("name", ["base", "untied", "odd sizes", "binary", "int4", "int8, untied"])
def test_a_packed_model_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model, ids = packed_model(config), random_ids(config, 2, 11)
    folder = tmp_path / "deep" / "packed"
    save_packed(folder, model, b"tokenizer")
    assert sorted(path.name for path in folder.iterdir()) == sorted([CHECKSUMS, CONFIG, MODEL, TOKENIZER])
    assert [path.name for path in folder.parent.iterdir()] == ["packed"]
    assert (folder / TOKENIZER).read_bytes() == b"tokenizer"
    stored, state = load_tensors(folder / MODEL), model.state_dict()
    assert stored.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(stored[key], value), key
        assert stored[key].dtype == value.dtype, key

    with kernels.use_backend("reference"):
        loaded = open_model(folder)
    assert isinstance(loaded, BitNetForCausalLM)
    assert not loaded.training
    assert loaded.config == config
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(torch_logits(loaded, ids), torch_logits(model, ids))
    for table, expected in zip((loaded.model.cos, loaded.model.sin), rope_tables(config), strict=True):
        assert table.device.type == "cpu"
        assert torch.equal(table, expected)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])

    for backend in ("native", "auto"):
        with kernels.use_backend(backend):
            engine = open_model(folder, cache_dtype="float16")
        assert isinstance(engine, Engine)
        assert engine.new_cache(1, 1).keys.dtype == torch.float16
        assert torch.equal(engine(ids), Engine.from_model(model, cache_dtype="float16")(ids))


def test_what_save_packed_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"call model.pack\(\) first"):
        save_packed(tmp_path / "a", BitNetForCausalLM(BASE), b"")
    assert not list(tmp_path.iterdir())
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="already exists"):
        save_packed(tmp_path / "b", packed_model(BASE), b"")
    assert not list((tmp_path / "b").iterdir())

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("bitnet.storage.folders.write_atomic", full)
    with pytest.raises(OSError, match=r"was not written to .*c: no space left"):
        save_packed(tmp_path / "c", packed_model(BASE), b"")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    save_packed(tmp_path / "packed", packed_model(BASE.replace(tie_word_embeddings=False)), b"")
    return tmp_path / "packed"


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("size", [0, 5, 500, -1])
def test_truncated_files_are_named(packed_folder: Path, backend: str, size: int) -> None:
    whole = (packed_folder / MODEL).read_bytes()
    (packed_folder / MODEL).write_bytes(whole[:size])
    with kernels.use_backend(backend), pytest.raises(CheckpointError, match=MODEL):
        open_model(packed_folder)
    (packed_folder / MODEL).unlink()
    with kernels.use_backend(backend), pytest.raises(CheckpointError, match=MODEL):
        open_model(packed_folder)


MISFITS: list[tuple[str, object]] = [
    ("num_hidden_layers", 3), ("num_hidden_layers", 1), ("quantizer", "int4"), ("tie_word_embeddings", True),
    ("sub_norm", False), ("intermediate_size", 73), ("intermediate_size", 71), ("vocab_size", 10), ("vocab_size", 51),
    ("hidden_size", 48), ("num_key_value_heads", 1),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("field", "value"), MISFITS)
def test_files_that_are_not_of_their_configuration(
    packed_folder: Path, backend: str, field: str, value: object
) -> None:
    config = json.loads((packed_folder / CONFIG).read_text())
    config["model"][field] = value
    (packed_folder / CONFIG).write_text(json.dumps(config))
    with kernels.use_backend(backend), pytest.raises(CheckpointError, match=MODEL):
        open_model(packed_folder)


def test_packed_folders_hold_no_latent_weights(packed_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds packed weights and no latent floats"):
        open_model(packed_folder, pack=False)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_float_twins_run_as_floats(tmp_path: Path, backend: str) -> None:
    model = BitNetForCausalLM(BASE.replace(quantizer="none"))
    folder = save_checkpoint(
        tmp_path, model=model, optimizer_state={}, state={"step": 1},
        config={"model": dataclasses.asdict(model.config)}, tokenizer=b"", best=True,
    )  # fmt: skip
    with kernels.use_backend(backend):
        opened = open_model(folder)
    ids = random_ids(BASE, 2, 9)
    if backend == "native":
        assert isinstance(opened, Engine)
        torch.testing.assert_close(opened(ids), model(ids))
        return
    assert isinstance(opened, BitNetForCausalLM)
    assert not opened.is_packed
    assert not opened.head_is_packed
    assert torch.equal(opened(ids), model(ids))


def test_packing_a_float_twin_packs_its_head_only() -> None:
    for tied in (True, False):
        torch.manual_seed(0)
        model = BitNetForCausalLM(BASE.replace(quantizer="none", tie_word_embeddings=tied)).eval()
        ids = random_ids(BASE, 2, 9)
        with torch.no_grad():
            hidden = model.model(ids)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert model.pack() is model
        assert isinstance(model.model.embed_tokens, PackedEmbedding)
        assert isinstance(model.lm_head, PackedLinear) == (not tied)
        assert sum(isinstance(module, BitLinear) for module in model.modules()) == 2 * 7
        for name, value in model.state_dict().items():
            if "embed_tokens" not in name and "lm_head" not in name:
                assert torch.equal(value, before[name]), name
        assert model.head_is_packed
        again = model.pack().state_dict()  # a second time changes nothing
        assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            packed = model.model(ids)
        assert float((packed - hidden).norm() / hidden.norm()) < 0.02  # the embedding's INT8
