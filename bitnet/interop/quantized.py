"""Folders of models that were quantized after training: our own form, for every method of `bitnet/ptq.py`.

model.safetensors      the state_dict, quantized buffers as they are
config.json            {"model": shape, "quantization": {"method": name, "modules": {name: description}}}
tokenizer files        as they were beside the float model
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from bitnet import ptq
from bitnet.checkpoint import (
    CONFIG,
    MODEL,
    CheckpointError,
    check_layers,
    load_config,
    load_json,
    load_tensors,
    new_folder,
    save_packed,
    save_tensors,
)
from bitnet.files import write_atomic
from bitnet.model import BitNetForCausalLM
from bitnet.model.linear import PackedLinear


def write(model: BitNetForCausalLM, folder: Path, method: str, tokenizer_files: Mapping[str, bytes]) -> None:
    """Write a quantized model, whole or not at all. Raises OSError, also for a folder that exists."""
    quantizer = packed_quantizer(model)
    if quantizer:
        model.config = model.config.replace(quantizer=quantizer)
        return save_packed(folder, model, tokenizer_files)
    with new_folder(folder, "quantized model") as temporary:
        save_tensors(temporary / MODEL, dict(model.state_dict()))
        about = {"model": dataclasses.asdict(model.config), "quantization": ptq.describe_quantized(model, method)}
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


def read(folder: Path, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """The model of such a folder. Raises CheckpointError where the tensors are not those of the description."""
    config, _ = load_config(folder)
    description = load_json(folder / CONFIG).get("quantization")
    try:
        tensors = load_tensors(folder / MODEL)  # mapped, not read
        check_layers(folder / MODEL, config, tensors)
        model = ptq.build_quantized(config, description, tensors)  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold the quantized model of its {CONFIG}: {error}") from error
    return model.to(device).eval()
