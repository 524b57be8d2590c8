"""Choices that depend on the machine: device, type of the matrix products, and torch.compile."""

import contextlib
import os
import shutil
import warnings

import torch

from bitnet.model import BitNetForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` takes a GPU if there is one. Raises ValueError for one that isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); choose auto, cpu, cuda or cuda:N") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; `auto` is bfloat16 where the device multiplies it faster than float32, else float32.

    On a CPU that takes AMX tiles: without them bfloat16 products measured half as fast as float32.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16", False) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def compile_model(model: BitNetForCausalLM, mode: str = "auto") -> bool:
    """torch.compile the layers and the loss of a model in place; returns whether it was done.

    Layer by layer, since the layers are alike and one compilation serves all of them. `auto` compiles where a
    C++ compiler is found (torch needs one on a CPU), `on` raises ValueError where there is none, `off` does nothing.
    """
    if mode == "off":
        return False
    found = [c for c in (os.environ.get("CXX"), "g++", "clang++", "cl") if c and shutil.which(c)]
    if not found:
        message = "torch.compile needs a C++ compiler and found none (g++ or clang++)"
        if mode == "on":
            raise ValueError(f"{message}; install one, or use --compile off")
        warnings.warn(f"{message}; training runs uncompiled, about 1.5x slower", stacklevel=2)
        return False
    for layer in model.model.layers:
        layer.compile()
    model.next_token_loss = torch.compile(model.next_token_loss)  # on a CPU 3x the speed of eager, in less memory
    return True


def eager() -> contextlib.AbstractContextManager[None]:
    """Run compiled modules uncompiled inside a `with` block: for code whose shapes change at every call."""
    return torch.compiler.set_stance("force_eager")
