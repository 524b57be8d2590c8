"""Our own folders of models: a checkpoint of a run, a packed model, a quantized one.

    checkpoint   model.safetensors   latent floats, or shards/ of a sharded run (bitnet/training/shards.py)
                 config.json         {"model": shape, ...}: the whole training configuration
    packed       model.safetensors   of `BitNetForCausalLM.pack()`, with an INT8 or a float embedding
                 config.json         {"packed": true, "model": shape}
    quantized    model.safetensors   of any method of `bitnet/ptq`, quantized buffers as they are
                 config.json         {"model": shape, "quantization": {"method": name, "modules": {name: description}}}

Each has the files of its tokenizer and checksums.json (bitnet/storage/checksums.py) beside them. A run has several
checkpoints and an index of them (bitnet/training/checkpoint.py).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch

from bitnet.console import warn
from bitnet.files import JsonObject, new_folder, write_atomic
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.linear import PackedLinear
from bitnet.model.quantized import build_quantized, describe_quantized
from bitnet.storage.checksums import verify, write_sums
from bitnet.storage.json_files import CheckpointError, Index, State, load_record
from bitnet.storage.safetensors import (
    CONFIG,
    FLOATS,
    MODEL,
    Tensors,
    load_tensors,
    open_tensors,
    save_tensors,
)

INDEX, SHARDS, TOKENIZER = "index.json", "shards", "tokenizer.model"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def read_index(run: Path) -> Index:
    """The checkpoints that a run has; an empty index for a run without one. Where index.json is damaged or missing,
    those of its folders count whose files are whole, with a warning."""
    path = run / "checkpoints" / INDEX
    if path.exists():
        try:
            return load_record(path, Index)
        except CheckpointError as error:
            problem = str(error)
    else:
        problem = f"{path} is missing"
    whole = [folder for folder in sorted(path.parent.glob("step-*"), reverse=True) if verify(folder) is None]
    if not whole:
        if path.exists():
            raise CheckpointError(f"{problem}; no checkpoint beside it is whole, start the run anew")
        return Index()
    # The best loss of a run is in the state of every later checkpoint: the first with the last one's was the best.
    losses = [load_record(folder / STATE, State).best_loss for folder in whole]
    best = max(number for number, loss in enumerate(losses) if loss == losses[0])
    names = [folder.name for folder in whole]
    warn_once(f"{problem}; going by the folders beside it that are whole: {', '.join(names)}")
    return Index(last=names[0], best=names[best if losses[0] is not None else 0], kept=names)


@cache
def warn_once(message: str) -> None:
    warn(message)


def resolve(path: str | Path, which: str = "last") -> Path:
    """The checkpoint folder meant by a path: a checkpoint itself, or a run, of which `which` is last or best.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run folder made by train.py or one of its checkpoints")
    is_checkpoint = (path / MODEL).is_file() or (path / SHARDS).is_dir()
    folder = path if is_checkpoint else folder_of(path, which)
    if (folder / MODEL).is_file():
        return folder
    if (folder / SHARDS).is_dir():
        run = folder.parent.parent
        raise CheckpointError(f"{folder} is sharded; write its safetensors form with: bitnet consolidate {run}")
    raise CheckpointError(f"{path} names {folder.name} as its {which} checkpoint, but {MODEL} is missing there")


def folder_of(run: Path, which: str) -> Path:
    """The folder that a run's index names as last or best. Raises CheckpointError where it names none."""
    if which not in ("best", "last"):
        raise CheckpointError(f"a run has no checkpoint {which!r}; give best or last")
    index = read_index(run)
    name = index.best if which == "best" else index.last
    if name is None:
        raise CheckpointError(f"{run} holds no checkpoint; train one with: python train.py --out {run}")
    return run / "checkpoints" / name


def load_latent(folder: Path, config: ModelConfig, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """The model of a checkpoint, in float32 and evaluation mode.

    Raises CheckpointError for a damaged file or tensors that do not fit the configuration, before anything of the
    configuration's sizes is made.
    """
    with open_tensors(folder / MODEL, device) as tensors:
        check_fit(tensors, config)
        floats = {name: value.to(torch.float32, copy=True) for name, value in tensors.read_all().items()}
    return BitNetForCausalLM.from_tensors(config, floats)


def check_fit(tensors: Tensors, config: ModelConfig) -> None:
    """Raise CheckpointError unless a file has floats of the shapes of a model's tensors, every one of them and no
    other."""
    _check_layers(tensors, config)
    expected = {name: list(shape) for name, shape in config.tensor_shapes().items()}
    found = {name: tensors.shape(name) for name in tensors.names}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        detail = "; ".join(
            f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}" for name in wrong[:3]
        )
        raise CheckpointError(
            f"{tensors.path} does not fit the model's configuration at {len(wrong)} tensors ({detail})"
        )
    for name in expected:
        if tensors.kind(name) not in FLOATS:
            raise CheckpointError(f"{tensors.path}: {name} is {tensors.kind(name)}, not a float; it is damaged")


def _check_layers(tensors: Tensors, config: ModelConfig) -> None:
    """Raise CheckpointError where a file does not have tensors of every layer, before as many layers are made."""
    layers = {name.split(".")[2] for name in tensors.names if name.startswith("model.layers.")}
    if config.num_hidden_layers > len(layers):
        raise CheckpointError(
            f"{tensors.path} does not fit the model's configuration: that says {config.num_hidden_layers} layers, and "
            f"the file has tensors of {len(layers)}"
        )


def load_packed(folder: Path, config: ModelConfig, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """A packed model, its embedding and head as they are stored. Raises CheckpointError for a damaged file or tensors
    that do not fit the configuration."""
    try:
        model = BitNetForCausalLM.from_tensors(config, load_tensors(folder / MODEL, device))
        if not model.is_packed:
            raise ValueError("its tensors are floats")
    except ValueError as error:
        raise CheckpointError(f"{folder / MODEL} does not hold the packed model of its {CONFIG}: {error}") from error
    return model


def load_quantized(folder: Path, config: ModelConfig, quantization: object) -> BitNetForCausalLM:
    """A quantized model. Raises CheckpointError where the tensors are not those of the description."""
    try:
        if config.quantizer != "none":
            raise ValueError(
                f"its quantizer is {config.quantizer!r}, and only float models are quantized after training"
            )
        with open_tensors(folder / MODEL) as tensors:
            _check_layers(tensors, config)
            return build_quantized(config, quantization, tensors.read_all())  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not hold the quantized model of its {CONFIG}: {error}") from error


def save_packed(folder: Path, model: BitNetForCausalLM, tokenizer: bytes | Mapping[str, bytes]) -> None:
    """Write a packed model and its tokenizer (a sentencepiece .model, or files by name), whole or not at all.

    Raises OSError, also for a folder that exists.
    """
    if not model.is_packed:
        raise ValueError("the model is not packed; call model.pack() first")
    _save(folder, "packed model", model, {"packed": True, "model": dataclasses.asdict(model.config)}, tokenizer)


def save_quantized(model: BitNetForCausalLM, folder: Path, method: str, tokenizer: Mapping[str, bytes]) -> None:
    """Write a quantized model, whole or not at all. Raises OSError, also for a folder that exists."""
    quantizer = packed_quantizer(model)
    if quantizer:
        model.config = model.config.replace(quantizer=quantizer)
        return save_packed(folder, model, tokenizer)
    about = {"model": dataclasses.asdict(model.config), "quantization": describe_quantized(model, method)}
    _save(folder, "quantized model", model, about, tokenizer)


def _save(
    folder: Path, what: str, model: BitNetForCausalLM, about: JsonObject, tokenizer: bytes | Mapping[str, bytes]
) -> None:
    with new_folder(folder, what) as temporary:
        save_tensors(temporary / MODEL, dict(model.state_dict()))
        write_atomic(temporary / CONFIG, json.dumps(about, indent=1))
        for name, content in named_files(tokenizer):
            write_atomic(temporary / name, content)
        write_sums(temporary)


def named_files(tokenizer: bytes | Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """The files of a tokenizer, of which a sentencepiece .model is one without a name."""
    yield from ({TOKENIZER: tokenizer} if isinstance(tokenizer, bytes) else tokenizer).items()


def packed_quantizer(model: BitNetForCausalLM) -> str | None:
    """The quantizer of all projections, where they are packed layers of one kind; else None."""
    kinds = {
        module.quantizer if isinstance(module, PackedLinear) else None
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }
    return kinds.pop() if len(kinds) == 1 else None
