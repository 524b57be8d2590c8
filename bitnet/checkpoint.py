"""Run folders and checkpoints: safetensors files, written so that no crash can lose the previous one.

    runs/NAME/
      config.json              the whole training configuration
      metrics.jsonl  loss.png
      checkpoints/
        step-00000500/         model.safetensors, optimizer.safetensors, state.json, config.json, tokenizer.model
        index.json             {"last": "step-00000500", "best": "step-00000400"}

A checkpoint is written into a folder of another name, flushed to disk and renamed; then `index.json` is replaced; only
then are the checkpoints removed that it no longer names. At every moment `index.json` points at complete checkpoints.
Nothing is pickled, so loading a checkpoint runs no code.

A packed model (`save_packed`) is a folder of its own with model.safetensors, config.json and tokenizer.model, where
config.json says `"packed": true` and the tensors are those of `BitNetForCausalLM.pack()`, with an INT8 or a float
embedding.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitnet.engine import Engine
from bitnet.files import fsync_folder, write_atomic
from bitnet.kernels import native_wanted, quantize_weight
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.quant import pack_codes

INDEX = "index.json"
MODEL, OPTIMIZER, STATE, CONFIG, TOKENIZER = (
    "model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.model",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or made for another model; the message says which and what to do."""


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a run or checkpoint of this project?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; it is not a file of this project")
    return value


def save_checkpoint(
    run: Path,
    *,
    model: BitNetForCausalLM,
    optimizer_state: dict[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    tokenizer: bytes,
    best: bool,
) -> Path:
    """Write a checkpoint, make it the run's last one, and its best one if `best`; returns its folder.

    `state` must hold the step under "step". Raises OSError (disk full, no permission) with the earlier checkpoints
    untouched and nothing half-written left behind.
    """
    folder = run / "checkpoints" / f"step-{state['step']:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    index = _read_index(run)
    for remains in folder.parent.glob(".step-*.tmp-*"):  # of a save that was killed; they may be what fills the disk
        shutil.rmtree(remains, ignore_errors=True)
    try:
        if folder.name not in index.values():  # else this very step is already saved and only its rank may change
            temporary.mkdir()
            # Tied tensors appear once: the head of a tied model is no module of its own.
            save_tensors(temporary / MODEL, {k: v.detach() for k, v in model.state_dict().items()})
            save_tensors(temporary / OPTIMIZER, optimizer_state)
            write_atomic(temporary / STATE, json.dumps(state, indent=1))
            write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
            write_atomic(temporary / TOKENIZER, tokenizer)
            fsync_folder(temporary)
            shutil.rmtree(folder, ignore_errors=True)  # left by a crash between the next line and the index
            os.replace(temporary, folder)
            fsync_folder(folder.parent)
        index["last"] = folder.name
        if best or "best" not in index:
            index["best"] = folder.name
        write_atomic(folder.parent / INDEX, json.dumps(index))
        fsync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint of step {state['step']} was not written to {folder.parent}: {error}") from error
    for other in folder.parent.iterdir():
        if other.is_dir() and other.name not in index.values():
            shutil.rmtree(other, ignore_errors=True)
    return folder


def resolve(path: str | Path, which: str = "last") -> Path:
    """The checkpoint folder meant by a path: a checkpoint itself, or a run, of which `which` is last or best.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if (path / MODEL).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run folder made by train.py or one of its checkpoints")
    name = _read_index(path).get(which)
    if name is None:
        raise CheckpointError(f"{path} holds no checkpoint; train one with: python train.py --out {path}")
    if not (path / "checkpoints" / name / MODEL).is_file():
        raise CheckpointError(f"{path} names {name} as its {which} checkpoint, but {MODEL} is missing there")
    return path / "checkpoints" / name


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError for a truncated or foreign file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a checkpoint of this project?") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); it was truncated or is of another format. "
            "Use another checkpoint of the run"
        ) from error


def load_model(checkpoint: Path, device: torch.device | str = "cpu", quantizer: str | None = None) -> BitNetForCausalLM:
    """The model of a checkpoint folder, in float32 and evaluation mode.

    `quantizer` loads the same latent weights under another weight quantizer. Raises CheckpointError for a damaged file
    or tensors that do not fit the configuration.
    """
    model_config, packed = load_config(checkpoint)
    if packed:
        raise CheckpointError(f"{checkpoint} holds packed weights and no latent floats; give the run it was made from")
    if quantizer is not None:
        model_config = model_config.replace(quantizer=quantizer)
    with torch.device(device):
        model = BitNetForCausalLM(model_config)
    load_weights(model, checkpoint / MODEL, device)
    return model.eval()


def load_config(checkpoint: Path) -> tuple[ModelConfig, bool]:
    """The model's shape, and whether the folder holds packed weights. Raises CheckpointError for a damaged file."""
    config = load_json(checkpoint / CONFIG)
    if not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{checkpoint / CONFIG} has no 'model' section; it is not a checkpoint of this project")
    try:
        return ModelConfig.from_dict(config["model"]), bool(config.get("packed"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / CONFIG}: {error}") from error


def save_packed(folder: Path, model: BitNetForCausalLM, tokenizer: bytes | Mapping[str, bytes]) -> None:
    """Write a packed model and its tokenizer (a sentencepiece .model, or files by name), whole or not at all.

    Raises OSError, also for a folder that exists.
    """
    if not model.is_packed:
        raise ValueError("the model is not packed; call model.pack() first")
    with new_folder(folder, "packed model") as temporary:
        save_tensors(temporary / MODEL, dict(model.state_dict()))
        config = {"packed": True, "model": dataclasses.asdict(model.config)}
        write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
        for name, content in ({TOKENIZER: tokenizer} if isinstance(tokenizer, bytes) else tokenizer).items():
            write_atomic(temporary / name, content)


@contextmanager
def new_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder to fill, which then appears under its name whole, or not at all. Raises OSError, naming `what` was to
    be written, also for a folder that exists."""
    if folder.exists():
        raise OSError(f"{folder} already exists; choose another name or delete it")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the {what} was not written to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_for_inference(
    checkpoint: Path, device: torch.device | str = "cpu", *, cache_dtype: str = "float32"
) -> BitNetForCausalLM | Engine:
    """The packed model of a checkpoint or packed folder, on the backend in force (`bitnet.kernels`): the native engine
    on a CPU that has it, else packed layers in torch.

    `cache_dtype` (float32, float16, int8) is the engine's; the torch model keeps float32. Raises CheckpointError for a
    damaged file and ValueError for a float twin, which has no packed form.
    """
    device = torch.device(device)
    config, packed = load_config(checkpoint)
    if config.quantizer == "none":
        raise ValueError(f"{checkpoint} is a float model, which has no packed form; generate with --no-pack")
    native = native_wanted(device)
    if not packed:
        model = load_model(checkpoint, "cpu" if native else device).pack()
        return Engine.from_model(model, cache_dtype=cache_dtype) if native else model
    path = checkpoint / MODEL
    try:
        if native:

            def read(name: str) -> Tensor:  # a mapping of its own for each, so that no more of the file stays resident
                with safe_open(path, framework="pt") as file:
                    return file.get_tensor(name)

            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            return Engine(config, *_with_packed_embeddings(read, names), cache_dtype=cache_dtype)
        return BitNetForCausalLM.packed_from(config, load_tensors(path, device)).to(device)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the packed model of its {CONFIG}: {error}") from error


def _with_packed_embeddings(
    read: Callable[[str], Tensor], names: list[str]
) -> tuple[Callable[[str], Tensor], list[str]]:
    """A packed model's tensors with the matrices that are float, embedding and head, quantized to INT8 as they are
    read; in a file that holds them in INT8 nothing changes."""
    floats = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in names]
    made: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        module = name.rpartition(".")[0]
        if f"{module}.weight" not in floats:
            return read(name)
        if name not in made:
            codes, scale = quantize_weight(read(f"{module}.weight"), "int8")
            made.update({f"{module}.packed_weight": pack_codes(codes, 8), f"{module}.weight_scale": scale})
        return made.pop(name)

    for name in floats:
        module = name.rpartition(".")[0]
        names = [*(n for n in names if n != name), f"{module}.packed_weight", f"{module}.weight_scale"]
    return tensor, names


def load_weights(model: BitNetForCausalLM, path: Path, device: torch.device | str = "cpu") -> None:
    """Copy the tensors of a file into a model, every one of them and no other. Raises CheckpointError otherwise."""
    tensors = load_tensors(path, device)
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        detail = "; ".join(
            f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}" for name in wrong[:3]
        )
        raise CheckpointError(f"{path} does not fit the model's configuration at {len(wrong)} tensors ({detail})")
    model.load_state_dict(tensors)


def _read_index(run: Path) -> dict[str, str]:
    path = run / "checkpoints" / INDEX
    return load_json(path) if path.exists() else {}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, flushed to disk."""
    # The metadata is what transformers asks of a file before it reads it.
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
