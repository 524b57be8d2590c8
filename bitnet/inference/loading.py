"""Any model that this project can run, on the fastest engine that is there: `open_model(path)`."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitnet.inference import loading
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.kernels import native_wanted, quantize_weight, triton_wanted
from bitnet.model import BitNetForCausalLM
from bitnet.quant import pack_codes
from bitnet.storage.folders import CONFIG, MODEL, load_config, load_model, load_packed
from bitnet.storage.safetensors import CheckpointError
from bitnet.storage.source import OpenModel, check_tokenizer, locate, open_tokenizer, read_foreign


def open_model(
    path: str | Path,
    *,
    which: str = "best",
    device: torch.device | str = "cpu",
    pack: bool = True,
    cache_dtype: str = "float32",
    dtype: torch.dtype = torch.float32,
) -> OpenModel:
    """A model ready to generate, its tokenizer and its chat template.

    which:        the checkpoint of a run folder, "best" or "last".
    pack:         run quantized projections as packed codes, on the backend in force (`bitnet.kernels`); False runs the
                  float weights that training fake-quantizes, where there are such. Float models are what they are.
    cache_dtype:  of the native engine: float32, float16 or int8.
    dtype:        of weights and cache of a model that runs in floats.

    Raises ValueError (CheckpointError is one) or OSError naming what is wrong with the path.
    """
    device, (path, kind) = torch.device(device), locate(path, which)
    tokenizer, template = open_tokenizer(path, kind)
    if kind == "run" or kind == "packed":
        model = _own(path, device, pack, cache_dtype, dtype)
    else:
        model = _ready(read_foreign(path, kind), path, device, pack or kind == "quantized", cache_dtype, dtype)
    return check_tokenizer(OpenModel(model, tokenizer, template, path, kind))


def _own(folder: Path, device: torch.device, pack: bool, cache_dtype: str, dtype: torch.dtype) -> LanguageModel:
    """The model of one of our own folders."""
    config, _ = load_config(folder)
    if pack and config.quantizer != "none":
        return loading.load_for_inference(folder, device, cache_dtype=cache_dtype)
    return load_model(folder, device).to(dtype)  # refuses packed weights


def _ready(
    model: BitNetForCausalLM, path: Path, device: torch.device, pack: bool, cache_dtype: str, dtype: torch.dtype
) -> LanguageModel:
    """A model as it was read from a foreign file, in the form in which it runs."""
    if model.is_packed and not pack:
        raise ValueError(f"{path} holds packed weights and no latent floats, so it cannot run without packing")
    if model.config.quantizer == "none" or not pack:
        return model.to(device=device, dtype=dtype)
    return loading.engine_of(model.pack(), device, cache_dtype)


def load_for_inference(
    checkpoint: Path, device: torch.device | str = "cpu", *, cache_dtype: str = "float32"
) -> BitNetForCausalLM | Engine | GpuEngine:
    """The packed model of a checkpoint or packed folder, on the backend in force (`bitnet.kernels`): the native engine
    on a CPU that has it, the Triton engine on a GPU that has it, else packed layers in torch.

    `cache_dtype` (float32, float16, int8) is the native engine's; the torch model keeps float32. Raises
    CheckpointError for a damaged file and ValueError for a float twin, which has no packed form.
    """
    device = torch.device(device)
    config, packed = load_config(checkpoint)
    if config.quantizer == "none":
        raise ValueError(f"{checkpoint} is a float model, which has no packed form; generate with --no-pack")
    native = native_wanted(device)
    if not packed:
        return engine_of(load_model(checkpoint, "cpu" if native else device).pack(), device, cache_dtype)
    if not native:
        return engine_of(load_packed(checkpoint, device), device, cache_dtype)
    path = checkpoint / MODEL

    def read(name: str) -> Tensor:  # a mapping of its own for each, so that no more of the file stays resident
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        return Engine(config, *_with_packed_embeddings(read, names), cache_dtype=cache_dtype)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the packed model of its {CONFIG}: {error}") from error


def engine_of(
    model: BitNetForCausalLM, device: torch.device, cache_dtype: str = "float32"
) -> BitNetForCausalLM | Engine | GpuEngine:
    """A packed model as the backend in force runs it on a device: an engine where there is one, else torch."""
    if native_wanted(device):
        return Engine.from_model(model.pack(), cache_dtype=cache_dtype)
    if triton_wanted(device):
        return GpuEngine.from_model(model.to(device).pack(), device=device)
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
        names = [*(n for n in names if n != name), f"{module}.packed_weight", f"{module}.weight_scale"]
    return tensor, names
