"""A model on the fastest engine that runs it here: `open_model(path)`.

Weights of every format stay what they are, and run on the native engine where it was built.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bitnet.console import note
from bitnet.inference.adapters import put_on
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel, beyond_kernels, build_exactly
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.inference.split_engine import SplitEngine
from bitnet.inference.weights import ACTIVATIONS, EMBEDDINGS, PackedWeights, unknown_layers
from bitnet.kernels import native_wanted, requested_backend, triton_wanted
from bitnet.model import BitNetForCausalLM
from bitnet.storage.adapters import Adapter
from bitnet.storage.gguf.read import holds_ternary
from bitnet.storage.safetensors import CONFIG, MODEL, CheckpointError
from bitnet.storage.source import Source, open_source

DEFAULT_ACTIVATIONS = "auto"


def open_model(
    source: Source | str | Path,
    *,
    device: torch.device | str = "cpu",
    pack: bool = True,
    cache_dtype: str | None = None,
    dtype: torch.dtype = torch.float32,
    activations: str | None = None,
    embeddings: str | None = None,
    gpu_layers: int | None = None,
    lora: Adapter | None = None,
) -> LanguageModel:
    """A model ready to generate, of a source or what `open_source` takes.

    pack:         run quantized projections as packed codes, on the backend in force (`bitnet.kernels`): the native
                  engine on a CPU that has it, the Triton engine on a GPU that has it, else packed layers in torch.
                  False runs the float weights that training fake-quantizes, where there are such. Float models are
                  what they are.
    cache_dtype:  of keys and values in the engines: float32 (None on a CPU), float16 or int8, and on a GPU alone
                  bfloat16 (None there) or fp8. "int4" runs the model in torch, with
                  `bitnet/model/quantized_cache.py`, and torch takes no other.
    dtype:        of weights and cache of a model that runs in floats; another than float32 runs in torch.
    activations:  in the native engine, of weights with a scale a group: "int8" or "int16" with a scale a group, or
                  "float", exact to the format's definition; None is int16 for integer codes of at most 6 bits, else
                  float. What BitNet and W8A8 were made for stays.
    embeddings:   in the native engine, of a float embedding and head: "int8" (None, for models that are quantized in
                  training) or "float16", exact to a source of 16 bits.
    gpu_layers:   of a packed model, so many of its first layers on the GPU `device` and the others and the head on the
                  native engine, for a model larger than the GPU's memory; 0: none, all or more: all.
    lora:         an adapter of this model's weights (`bitnet/storage/adapters.py`); on a GPU it runs in torch.

    Raises as `open_source` and `Source.model` do, and ValueError for packed weights that are not to run packed and for
    options of the native engine where the model does not run on it.
    """
    source, device = source if isinstance(source, Source) else open_source(source), torch.device(device)
    for name, value, known in (("activations", activations, ACTIVATIONS), ("embeddings", embeddings, EMBEDDINGS)):
        if value not in (None, *known):
            raise ValueError(f"{name} {value!r} are unknown; choose one of {', '.join(known)}")
    if lora is not None and (gpu_layers is not None or not pack):
        raise ValueError("an adapter stands on the packed model as a whole; leave gpu_layers and no-pack out")
    options = EngineOptions(cache_dtype, activations, embeddings)
    if gpu_layers is not None:
        if gpu_layers < 0:
            raise ValueError(f"gpu_layers is {gpu_layers}; give 0 or more")
        if gpu_layers and device.type == "cpu" and not triton_wanted(device):
            raise ValueError(
                f"{gpu_layers} layers are to run on a GPU and the device is {device}; name a GPU, or give 0"
            )
        if 0 < gpu_layers < source.config.num_hidden_layers:
            _refuse(replace(options, cache_dtype=None), "two engines")
            _say_unused(source, dtype)
            return _split(source, gpu_layers, device, cache_dtype, pack)
        device = device if gpu_layers else torch.device("cpu")
    if cache_dtype == "int4":
        if lora is not None or activations is not None or embeddings is not None:
            raise ValueError("an int4 cache runs the model in torch; leave adapters, activations and embeddings out")
        return _with_int4_cache(source, device, pack, dtype)
    native = native_wanted(device)
    if lora is not None:
        return _with_adapter(source, lora, device, dtype, options)
    if pack and source.kind == "packed" and native:
        _say_unused(source, dtype)
        return _stream(source, options)
    if native and dtype == torch.float32 and not (source.file is not None and holds_ternary(source.file)):
        model = source.stored()
        if model is not None:
            return options.engine(model)
    # Our own folders are read onto the device that runs them; other files, and for the native engine, into memory.
    own = source.kind in ("run", "packed") and not (pack and native)
    model = source.model(device=device if own else "cpu")
    if model.config.quantizer != "none" and pack:
        _say_unused(source, dtype)
        return _engine(model, device, options, packed=source.kind == "packed")
    if model.is_packed and source.kind != "quantized":
        raise CheckpointError(
            f"{source.path} holds packed weights and no latent floats, so it cannot run without packing; give the run "
            "it was made from"
        )
    if native and model.config.quantizer == "none" and dtype == torch.float32:
        unknown = [] if requested_backend() == "native" else unknown_layers(model)
        if not unknown:
            return options.engine(model)
        note(f"{source.path} has layers {', '.join(unknown)}, which the native kernels do not know; it runs in torch")
    _refuse(options, "torch", str(dtype).removeprefix("torch."))
    return model.to(device=device, dtype=dtype)


def _with_int4_cache(source: Source, device: torch.device, pack: bool, dtype: torch.dtype) -> BitNetForCausalLM:
    """In torch, which alone has such a cache."""
    if requested_backend() == "native":
        raise ValueError("the native kernels have no int4 cache; choose int8, or another backend")
    model = source.model()
    if pack and model.config.quantizer != "none" and source.kind not in ("packed", "quantized"):
        model.pack()
    model.cache_bits = 4
    return model.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class EngineOptions:
    """What only the native engine takes."""

    cache_dtype: str | None
    activations: str | None
    embeddings: str | None

    def engine(self, model: BitNetForCausalLM) -> Engine:
        engine = Engine.from_model(
            model, cache_dtype=self.cache_dtype, activations=self.activations or DEFAULT_ACTIVATIONS,
            embeddings=self.embeddings,
        )  # fmt: skip
        return self.told(engine)

    def told(self, engine: Engine) -> Engine:
        """The engine, and a note where its activations are not what was asked for."""
        if self.activations is not None and self.activations not in engine.activations:
            note(
                f"activations {self.activations} are of weights that were quantized in groups afterwards; those of "
                f"this model stay {' and '.join(engine.activations)}"
            )
        return engine


def _with_adapter(
    source: Source, adapter: Adapter, device: torch.device, dtype: torch.dtype, options: EngineOptions
) -> LanguageModel:
    """A model with an adapter: on the native engine, and otherwise in torch. Raises ValueError for one of other
    weights."""
    base = source.frozen()
    adapter.check(base, source.path)
    if native_wanted(device) and dtype == torch.float32 and not unknown_layers(base):
        if base.is_packed and source.kind != "quantized":
            base.pack(embeddings=(options.embeddings or "int8") == "int8")
        model: LanguageModel = options.engine(base)
    else:
        _refuse(options, "torch", str(dtype).removeprefix("torch."))
        model = base.to(device=device, dtype=dtype)
    put_on(model, adapter)
    return model


def _split(source: Source, gpu_layers: int, device: torch.device, cache: str | None, pack: bool) -> SplitEngine:
    for there, what in (
        (triton_wanted(device), "Triton kernels"),
        (native_wanted(torch.device("cpu")), "native kernels"),
    ):
        if not there:
            raise ValueError(
                f"layers are divided between engines and the {what} are not in force; leave gpu_layers out"
            )
    if source.config.quantizer == "none" or not pack:
        raise ValueError("layers of packed models alone are divided; leave gpu_layers out")
    model = source.model()
    return SplitEngine.from_model(model.pack(), gpu_layers, device=device, cache_dtype=cache)


def _refuse(options: EngineOptions, runs_on: str, cache: str = "") -> None:
    if options.cache_dtype is not None:
        raise ValueError(
            f"cache {options.cache_dtype} is of the engines and this model runs on {runs_on}, whose cache is {cache}; "
            "leave it out"
        )
    for name, value in (("activations", options.activations), ("embeddings", options.embeddings)):
        if value is not None:
            raise ValueError(
                f"{name} {value} are of the native CPU engine and this model runs on {runs_on}; leave them out"
            )


def _say_unused(source: Source, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        note(f"{source.path} runs packed, in types of its own: dtype {name} changes nothing")


def _stream(source: Source, options: EngineOptions) -> Engine:
    """A packed folder on the native engine, one tensor in memory at a time."""

    def read(name: str) -> Tensor:  # a mapping of its own for each, so that no more of the file stays resident
        with source.tensors(verify=False) as tensors:
            return tensors.read(name)

    try:
        with source.tensors() as tensors:
            names = set(tensors.names)
        if source.config.num_hidden_layers > len(names):
            raise ValueError(f"it says {source.config.num_hidden_layers} layers and there are {len(names)} tensors")
        engines: list[Engine] = []

        def build(tensor: Callable[..., Tensor]) -> None:
            weights = PackedWeights(tensor, names, source.config.quantizer, options.embeddings or "int8")
            engines.append(Engine(source.config, weights, cache_dtype=options.cache_dtype))

        with source.verifying():
            build_exactly(build, read, names)
        return options.told(engines[0])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source.path / MODEL} does not hold the packed model of its {CONFIG}: {error}"
        ) from error


def _engine(model: BitNetForCausalLM, device: torch.device, options: EngineOptions, *, packed: bool) -> LanguageModel:
    """A ternary model as the backend in force runs it on a device: an engine where there is one, else torch."""
    if native_wanted(device):
        table = options.embeddings or "int8"
        return options.engine(model.pack(embeddings=table == "int8"))
    if not packed:
        model.pack()
    if triton_wanted(device) and not beyond_kernels(model.config):
        _refuse(replace(options, cache_dtype=None), "the Triton engine")
        return GpuEngine.from_model(model.to(device).pack(), device=device, cache_dtype=options.cache_dtype)
    _refuse(options, "torch", "float32")
    return model.to(device)
