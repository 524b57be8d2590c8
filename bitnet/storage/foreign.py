"""What is given in the place of a model, and looks like one: said by its name, with what to give instead.

a git-lfs pointer      the text that git leaves where the file itself was not fetched
the hub's cache        huggingface_hub's folder of all models, or of one with all of its versions
a LoRA adapter         the difference to a model, not the model
other frameworks       weights of other programs' formats, without a safetensors file
"""

from pathlib import Path

from bitnet.files import is_plain_file, parse_json
from bitnet.storage.json_files import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
ADAPTER_BASE = "adapter_base.json"
"""Stands beside adapters that were trained here, in their checkpoints too."""
# Names by which other formats are known; pickled ones could run code.
FORMATS = {
    "*.onnx": "ONNX", "*.h5": "Keras", "*.msgpack": "Flax", "*.ckpt*": "TensorFlow or Lightning", "*.npz": "NumPy",
    "*.pth": "pickled PyTorch", "*.pt": "pickled PyTorch", "*.bin": "pickled PyTorch", "*.ggml": "the old GGML",
}  # fmt: skip


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError for a file that git-lfs did not fetch."""
    if is_plain_file(path) and path.stat().st_size < 1024:
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise CheckpointError(
                    f"{path} is a git-lfs pointer, not the file itself; fetch it with: git lfs pull (in its repository)"
                )


def refuse_foreign(folder: Path) -> None:
    """Raise CheckpointError for a folder that is something else than a model, and known."""
    snapshots = _snapshots(folder)
    if snapshots is not None:
        latest = max(snapshots, key=lambda path: path.stat().st_mtime, default=None)
        raise CheckpointError(
            f"{folder} is the hub's cache of a model, with its versions in snapshots/; "
            + (f"give {latest}" if latest else "none of them was downloaded whole: download it again")
        )
    cached = sorted(path.name for path in folder.glob("models--*") if path.is_dir())
    if cached:
        names = ", ".join(name.removeprefix("models--").replace("--", "/") for name in cached[:3])
        raise CheckpointError(f"{folder} is the hub's cache of {len(cached)} models; name one of them: {names}")
    if (folder / ADAPTER_BASE).is_file():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter{_base(folder)}, a difference and not a model; open that model with --lora "
            f"{folder}"
        )
    weights = [path for path in folder.glob("*.safetensors") if path.name not in ADAPTER]
    if any((folder / name).is_file() for name in ADAPTER) and not weights:
        raise CheckpointError(
            f"{folder} is a LoRA adapter{_base(folder)}, a difference and not a model; merge it first (with peft: "
            "model.merge_and_unload().save_pretrained(...)) and give the merged folder, or open its base with --lora"
        )
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf"), *folder.glob("*.json"),
                        *folder.glob("*.model")]):  # fmt: skip
        refuse_pointer(path)
    if weights or (folder / "checkpoints").is_dir() or (folder / "shards").is_dir():
        return
    for pattern, name in FORMATS.items():
        found = next(folder.glob(pattern), None)
        if found is not None:
            raise CheckpointError(
                f"{folder} holds its weights in {found.name} ({name}), which is not read here; give a folder with "
                "*.safetensors (transformers: save_pretrained writes one) or a GGUF file"
            )


def _snapshots(folder: Path) -> list[Path] | None:
    """The versions in the hub's cache of a model, or None for another folder. Its parts count as well."""
    root = folder.parent if folder.name in ("snapshots", "blobs", "refs") else folder
    if root.name.startswith("models--") or all((root / name).is_dir() for name in ("snapshots", "refs")):
        versions = root / "snapshots"
        return [path for path in versions.iterdir() if (path / "config.json").is_file()] if versions.is_dir() else []
    return None


def _base(folder: Path) -> str:
    """Of which model, as the adapter says."""
    path = folder / ADAPTER[0]
    try:
        base = parse_json(path.read_bytes()[: 1 << 20]).get("base_model_name_or_path") if is_plain_file(path) else None
    except (ValueError, AttributeError):
        return ""
    return f" of {base}" if isinstance(base, str) and base else ""
