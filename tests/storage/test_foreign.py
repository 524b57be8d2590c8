"""What is given in the place of a model: the hub's cache, adapters, pointers, other frameworks' files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.storage.json_files import CheckpointError
from bitnet.storage.source import open_source
from tests.builders import save_run, tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CONFIG = {"model_type": "llama", "hidden_size": 64}


def hub(folder: Path) -> Path:
    """huggingface_hub's cache of one model; returns its version."""
    root = folder / "models--org--name"
    version = root / "snapshots" / "abc123"
    for part in (version, root / "refs", root / "blobs"):
        part.mkdir(parents=True)
    (version / "config.json").write_text(json.dumps(CONFIG))
    (root / "refs" / "main").write_text("abc123")
    return version


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    version = hub(tmp_path)
    root = version.parent.parent
    for folder in (root, root / "snapshots", root / "blobs"):
        with pytest.raises(CheckpointError, match=f"hub's cache of a model, .*; give {version}"):
            open_source(folder)
    with pytest.raises(CheckpointError, match="hub's cache of 1 models; name one of them: org/name"):
        open_source(tmp_path)
    (version / "config.json").unlink()
    with pytest.raises(CheckpointError, match="none of them was downloaded whole"):
        open_source(root)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("about", ['{"base_model_name_or_path": "org/base"}', "{", "[]", "{}"])
@pytest.mark.parametrize("config", [False, True])
def test_an_adapter(tmp_path: Path, weights: str, about: str, config: bool) -> None:
    (tmp_path / "adapter_config.json").write_text(about)
    (tmp_path / weights).write_bytes(b"1234")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    base = " of org/base" if "org" in about else ""
    with pytest.raises(CheckpointError, match=f"is a LoRA adapter{base}, a difference and not a model; merge it first"):
        open_source(tmp_path)


def pointer_to(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / name).write_text(POINTER)
        return folder

    return make


def gguf_pointer(folder: Path) -> Path:
    (folder / "model.gguf").write_text(POINTER)
    return folder / "model.gguf"


@pytest.mark.parametrize(
    "make",
    [
        *map(pointer_to, ("model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "config.json")),
        pointer_to("tokenizer.model"),
        gguf_pointer,
        lambda folder: gguf_pointer(folder).parent,
    ],
)
def test_pointers_of_git_lfs(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(CheckpointError, match="is a git-lfs pointer, not the file itself; fetch it with: git lfs pull"):
        open_source(make(tmp_path))


def test_pointers_in_a_run(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", tiny_model())
    (weights,) = run.glob("checkpoints/*/model.safetensors")
    weights.write_text(POINTER)
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        open_source(run)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.onnx", "flax_model.msgpack"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=f"holds its weights in {name} .*give a folder with"):
        open_source(tmp_path)
