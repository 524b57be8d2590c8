"""A model on the fastest engine that runs it here: `open_model(path)`.

Ternary weights stay the codes that they are, and run on the native engine where it was built; floats run as floats in
torch.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel, beyond_kernels
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.kernels import native_wanted, quantize_weight, triton_wanted
from bitnet.model import BitNetForCausalLM
from bitnet.quant import pack_codes
from bitnet.storage.safetensors import CONFIG, MODEL, CheckpointError
from bitnet.storage.source import Source, open_source


def open_model(
    source: Source | str | Path,
    *,
    device: torch.device | str = "cpu",
    pack: bool = True,
    cache_dtype: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A model ready to generate, of a source or what `open_source` takes.

    pack:         run quantized projections as packed codes, on the backend in force (`bitnet.kernels`): the native
                  engine on a CPU that has it, the Triton engine on a GPU that has it, else packed layers in torch.
                  False runs the float weights that training fake-quantizes, where there are such. Float models are
                  what they are.
    cache_dtype:  of keys and values in the native engine: float32 (None), float16 or int8. Nothing else takes it.
    dtype:        of weights and cache of a model that runs in floats.

    Raises as `open_source` and `Source.model` do, and ValueError for packed weights that are not to run packed and for
    a `cache_dtype` of a model that does not run on the native engine.
    """
    source, device = source if isinstance(source, Source) else open_source(source), torch.device(device)
    native = native_wanted(device) and not beyond_kernels(source.config)
    if pack and source.kind == "packed" and native:
        return _stream(source, cache_dtype)
    # Our own folders are read onto the device that runs them; other files, and for the native engine, into memory.
    own = source.kind in ("run", "packed") and not (pack and native)
    model = source.model(device=device if own else "cpu")
    if model.config.quantizer != "none" and pack:
        return _engine(model if source.kind == "packed" else model.pack(), device, cache_dtype)
    if model.is_packed and source.kind != "quantized":
        raise CheckpointError(
            f"{source.path} holds packed weights and no latent floats, so it cannot run without packing; give the run "
            "it was made from"
        )
    _refuse_cache(cache_dtype, "torch", str(dtype).removeprefix("torch."))
    return model.to(device=device, dtype=dtype)


def _refuse_cache(cache_dtype: str | None, runs_on: str, has: str) -> None:
    if cache_dtype is not None:
        raise ValueError(
            f"cache {cache_dtype} is of the native CPU engine and this model runs on {runs_on}, whose cache is {has}; "
            "leave it out"
        )


def _stream(source: Source, cache_dtype: str | None) -> Engine:
    """A packed folder on the native engine, one tensor in memory at a time."""

    def read(name: str) -> Tensor:  # a mapping of its own for each, so that no more of the file stays resident
        with source.tensors(verify=False) as tensors:
            return tensors.read(name)

    try:
        with source.tensors() as tensors:
            names = sorted(tensors.names)
        with source.verifying():
            return Engine(source.config, *_with_packed_embeddings(read, names), cache_dtype=cache_dtype)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source.path / MODEL} does not hold the packed model of its {CONFIG}: {error}"
        ) from error


def _engine(model: BitNetForCausalLM, device: torch.device, cache_dtype: str | None) -> LanguageModel:
    """A packed model as the backend in force runs it on a device: an engine where there is one, else torch."""
    runs = not beyond_kernels(model.config)
    if runs and native_wanted(device):
        return Engine.from_model(model.pack(), cache_dtype=cache_dtype)
    if runs and triton_wanted(device):
        _refuse_cache(cache_dtype, "the Triton engine", "bfloat16")
        return GpuEngine.from_model(model.to(device).pack(), device=device)
    _refuse_cache(cache_dtype, "torch", "float32")
    return model.to(device)


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
        # The engine asks for the packed tensors instead of the float one.
        names = [*(n for n in names if n != name), f"{module}.packed_weight", f"{module}.weight_scale"]
    return tensor, names
