"""This project's own folders: a run's checkpoints, packed models, models quantized after training.

A packed model (`save_packed`) is a folder of its own with model.safetensors, config.json and tokenizer.model, where
config.json says `"packed": true` and the tensors are those of `BitNetForCausalLM.pack()`, with an INT8 or a float
embedding. A quantized one (`save_quantized`), of any method of `bitnet/ptq`, has the state_dict, quantized buffers as
they are, the tokenizer files as they were beside the float model, and as config.json

    {"model": shape, "quantization": {"method": name, "modules": {name: description}}}
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bitnet.files import new_folder, write_atomic
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.linear import PackedLinear
from bitnet.model.quantized import build_quantized, describe_quantized
from bitnet.storage.safetensors import CheckpointError, load_json, load_tensors, open_tensors, save_tensors

INDEX, CHECKSUMS, SHARDS = "index.json", "checksums.json", "shards"
MODEL, OPTIMIZER, STATE, CONFIG, TOKENIZER = (
    "model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.model",
)  # fmt: skip


def resolve(path: str | Path, which: str = "last") -> Path:
    """The checkpoint folder meant by a path: a checkpoint itself, or a run, of which `which` is last or best.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if (path / MODEL).is_file():
        return path
    if (path / SHARDS).is_dir():
        raise _not_converted(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run folder made by train.py or one of its checkpoints")
    folder = folder_of(path, which)
    if (folder / SHARDS).is_dir() and not (folder / MODEL).is_file():
        raise _not_converted(folder)
    if not (folder / MODEL).is_file():
        raise CheckpointError(f"{path} names {folder.name} as its {which} checkpoint, but {MODEL} is missing there")
    return folder


def folder_of(run: Path, which: str) -> Path:
    """The folder that a run's index names as last or best. Raises CheckpointError where it names none."""
    name = read_index(run).get(which)
    if name is None:
        raise CheckpointError(f"{run} holds no checkpoint; train one with: python train.py --out {run}")
    return run / "checkpoints" / name


def _not_converted(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is sharded; write its safetensors form with: bitnet consolidate {folder.parent.parent}"
    )


def load_model(checkpoint: Path, device: torch.device | str = "cpu", quantizer: str | None = None) -> BitNetForCausalLM:
    """The model of a checkpoint folder, in float32 and evaluation mode.

    `quantizer` loads the same latent weights under another weight quantizer. Raises CheckpointError for a damaged file
    or tensors that do not fit the configuration, before anything of the configuration's sizes is made.
    """
    config, packed = load_config(checkpoint)
    if packed:
        raise CheckpointError(f"{checkpoint} holds packed weights and no latent floats; give the run it was made from")
    if quantizer is not None:
        config = config.replace(quantizer=quantizer)
    path = checkpoint / MODEL
    with open_tensors(path, device) as file:
        names = list(file.keys())
        check_layers(path, config, names)
        check_fit(path, config, file)
        tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
    return BitNetForCausalLM.from_tensors(config, tensors)


def check_layers(path: Path, config: ModelConfig, names: Iterable[str]) -> None:
    """Raise CheckpointError where a file does not have tensors of every layer, before as many layers are made."""
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    if config.num_hidden_layers > len(layers):
        raise CheckpointError(
            f"{path} does not fit the model's configuration: that says {config.num_hidden_layers} layers, and the file "
            f"has tensors of {len(layers)}"
        )


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
        for name, content in named_files(tokenizer):
            write_atomic(temporary / name, content)


def named_files(tokenizer: bytes | Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    yield from ({TOKENIZER: tokenizer} if isinstance(tokenizer, bytes) else tokenizer).items()


def load_packed(folder: Path, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """The packed model of a folder, its embedding and head as they are stored. Raises CheckpointError for a damaged
    file or tensors that do not fit the configuration."""
    config, _ = load_config(folder)
    try:
        model = BitNetForCausalLM.from_tensors(config, load_tensors(folder / MODEL, device))
    except ValueError as error:
        raise CheckpointError(f"{folder / MODEL} does not hold the packed model of its {CONFIG}: {error}") from error
    if not model.is_packed:
        raise CheckpointError(f"{folder / MODEL} holds floats, and its {CONFIG} says that they are packed")
    return model


def check_fit(path: Path, config: ModelConfig, file: Any) -> None:
    """Raise CheckpointError unless a safetensors file has floats of the shapes of the model's tensors, every one of
    them and no other."""
    expected = {name: list(shape) for name, shape in config.tensor_shapes().items()}
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    found = {name: list(value.get_shape()) for name, value in slices.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        detail = "; ".join(
            f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}" for name in wrong[:3]
        )
        raise CheckpointError(f"{path} does not fit the model's configuration at {len(wrong)} tensors ({detail})")
    for name, value in slices.items():
        if value.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"{path}: {name} is {value.get_dtype()}, not a float; it is damaged")


def read_index(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / INDEX
    return load_json(path) if path.exists() else {}


def save_quantized(model: BitNetForCausalLM, folder: Path, method: str, tokenizer_files: Mapping[str, bytes]) -> None:
    """Write a quantized model, whole or not at all. Raises OSError, also for a folder that exists."""
    quantizer = packed_quantizer(model)
    if quantizer:
        model.config = model.config.replace(quantizer=quantizer)
        return save_packed(folder, model, tokenizer_files)
    with new_folder(folder, "quantized model") as temporary:
        save_tensors(temporary / MODEL, dict(model.state_dict()))
        about = {"model": dataclasses.asdict(model.config), "quantization": describe_quantized(model, method)}
        write_atomic(temporary / CONFIG, json.dumps(about, indent=1))
        for name, content in tokenizer_files.items():
            write_atomic(temporary / name, content)


def packed_quantizer(model: BitNetForCausalLM) -> str | None:
    """The quantizer of all projections, where they are packed layers of one kind; else None."""
    kinds = {
        module.quantizer if isinstance(module, PackedLinear) else None
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }
    return kinds.pop() if len(kinds) == 1 else None


def load_quantized(folder: Path, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """The model of such a folder. Raises CheckpointError where the tensors are not those of the description."""
    config, _ = load_config(folder)
    description = load_json(folder / CONFIG).get("quantization")
    try:
        tensors = load_tensors(folder / MODEL)  # mapped, not read
        check_layers(folder / MODEL, config, tensors)
        model = build_quantized(config, description, tensors)  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold the quantized model of its {CONFIG}: {error}") from error
    return model.to(device).eval()
