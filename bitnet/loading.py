"""Any model that this project can run, from whatever holds it: `open_model(path)`.

    a run folder of train.py, or one of its checkpoints        a GGUF file, or a folder with one
    a folder of packed weights (python -m bitnet.export)       a Hugging Face folder, or the name of a model on the hub
    a folder of quantized weights (python -m bitnet.quantize)

What a path holds is found out from its contents: the magic bytes of a file, the keys of a config.json. Ternary weights
stay the codes that they are, and run on the native engine where it was built; floats run as floats in torch.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bitnet import checkpoint
from bitnet.generation import LanguageModel
from bitnet.model import BitNetForCausalLM, PackedEmbedding, PackedLinear
from bitnet.model.linear import codes_and_scale
from bitnet.tokenizer import (
    BaseTokenizer,
    ChatTemplate,
    chat_template_of_gguf,
    find_chat_template,
    from_gguf_metadata,
    load_tokenizer,
)

Kind = Literal["gguf", "hf", "run", "packed", "quantized"]


class OpenModel(NamedTuple):
    """What `open_model` found; `folder` is where its files are, `chat_template` None for a base model."""

    model: LanguageModel
    tokenizer: BaseTokenizer
    chat_template: ChatTemplate | None
    folder: Path
    kind: Kind


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
    device, (path, kind) = torch.device(device), _locate(path, which)
    tokenizer, template = open_tokenizer(path, kind)
    if kind == "run" or kind == "packed":
        model = _own(path, device, pack, cache_dtype, dtype)
    else:
        model = _ready(_read(path, kind), path, device, pack or kind == "quantized", cache_dtype, dtype)
    return _checked(OpenModel(model, tokenizer, template, path, kind))


def _checked(opened: OpenModel) -> OpenModel:
    tokens, rows = opened.tokenizer.vocab_size, opened.model.config.vocab_size
    if tokens > rows:
        raise checkpoint.CheckpointError(
            f"{opened.folder}: the tokenizer has {tokens} tokens and the model only {rows}; put the tokenizer there "
            "that the model was trained with"
        )
    return opened


def open_stored(path: str | Path, *, which: str = "best") -> tuple[BitNetForCausalLM, OpenModel]:
    """A model as it is stored, for writing it in another form: a run's latent floats, or the codes of a packed one,
    with float embeddings where they are float; and what `open_model` gives beside it. Raises as that does."""
    path, kind = _locate(path, which)
    tokenizer, template = open_tokenizer(path, kind)
    if kind == "run":
        model = checkpoint.load_model(path)
    elif kind == "packed":
        model = checkpoint.load_packed(path)
    else:
        model = _read(path, kind)
    return model, OpenModel(model, tokenizer, template, path, kind)


def open_latent(path: str | Path, *, which: str = "best") -> tuple[BitNetForCausalLM, OpenModel]:
    """A model to go on training with, its projections BitLinear layers of latent floats, and what `open_model` gives
    beside it.

    Packed codes become latents that are quantized to the same codes and scale. Raises as `open_model` does, and
    ValueError for weights that a method of `bitnet.quantize` has made.
    """
    model, opened = open_stored(path, which=which)
    if opened.kind == "quantized":
        raise ValueError(f"{path} was quantized after training and cannot be trained; give the model it was made from")
    _checked(opened)
    if not model.is_packed and not model.head_is_packed:
        return model, opened
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedEmbedding):
            tensors[f"{name}.weight"] = module(torch.arange(module.num_embeddings))
        elif isinstance(module, PackedLinear):
            codes, scale = codes_and_scale(module)
            if module.quantizer == "ternary":  # of which the mean of the absolute latents is the scale
                scale = scale / codes.abs().double().mean().clamp(min=1e-5).float()
            tensors[f"{name}.weight"] = codes * scale
    with torch.device("meta"):
        latent = BitNetForCausalLM(model.config)
    rest = {name: value for name, value in model.state_dict().items() if name in latent.state_dict()}
    latent.load_state_dict({**rest, **tensors}, assign=True)
    latent.model.cos, latent.model.sin = model.model.cos, model.model.sin
    return latent.eval(), opened


def _locate(path: str | Path, which: str) -> tuple[Path, Kind]:
    """The file or folder that holds the tensors, which of a run is a checkpoint, and its kind."""
    path = find(path)
    kind = kind_of(path)
    return path if kind in ("gguf", "hf") else checkpoint.resolve(path, which), kind


def tokenizer_files(opened: OpenModel) -> dict[str, bytes]:
    """The files, by name, that give a folder written from this model the same tokenizer and chat template."""
    from bitnet.interop.hf_write import TOKENIZER_FILES

    if opened.folder.is_dir():
        return {
            name: (opened.folder / name).read_bytes() for name in TOKENIZER_FILES if (opened.folder / name).is_file()
        }
    return opened.tokenizer.files() | (opened.chat_template.files() if opened.chat_template else {})


def find(path: str | Path) -> Path:
    """The local file or folder of a path; models named owner/name on the hub are downloaded.

    A name whose first half is a folder here is a path with a slip in it, not one on the hub.
    """
    local = Path(path)
    if not local.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not local.parent.exists():
        from bitnet.interop import hf

        return hf.locate(str(path))
    if local.is_dir() and not (local / checkpoint.CONFIG).is_file():
        files = sorted(local.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{local} holds several models ({names}); give one of these files")
        return files[0] if files else local
    return local


def kind_of(path: Path) -> Kind:
    """What a file or folder holds, by its contents. Raises ValueError where it is nothing that can be opened."""
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return "gguf"
        raise ValueError(
            f"{path} is a file and begins with {magic!r}, not with b'GGUF'; give a GGUF file, or the folder that holds "
            "a model's config.json and *.safetensors"
        )
    if not (path / checkpoint.CONFIG).is_file() or (path / "checkpoints").is_dir():
        return "run"
    config = checkpoint.load_json(path / checkpoint.CONFIG)
    if isinstance(config.get("model"), dict):
        return "quantized" if "quantization" in config else "packed" if config.get("packed") else "run"
    if "model_type" in config or "architectures" in config:
        return "hf"
    raise ValueError(
        f"{path / checkpoint.CONFIG} is neither of this project (no 'model') nor of a Hugging Face model (no "
        "'model_type'); give the folder of a whole model"
    )


def open_tokenizer(path: Path, kind: Kind) -> tuple[BaseTokenizer, ChatTemplate | None]:
    """The tokenizer and the chat template of a file or folder; of a run it is the checkpoint's folder."""
    if kind == "gguf":
        from bitnet.interop.gguf_file import GGUFFile

        metadata = GGUFFile(path).metadata
        tokenizer = from_gguf_metadata(metadata, str(path))
        return tokenizer, chat_template_of_gguf(metadata, tokenizer, str(path))
    tokenizer = load_tokenizer(path, own=kind != "hf")
    return tokenizer, find_chat_template(path, tokenizer)


def _read(path: Path, kind: Kind) -> BitNetForCausalLM:
    """The model of a file or folder that is not of `bitnet/checkpoint.py`."""
    if kind == "gguf":
        from bitnet.interop import gguf_read

        return gguf_read.read(path)
    from bitnet.interop import hf, quantized

    return hf.read(path) if kind == "hf" else quantized.read(path)


def _own(folder: Path, device: torch.device, pack: bool, cache_dtype: str, dtype: torch.dtype) -> LanguageModel:
    """The model of one of our own folders."""
    config, _ = checkpoint.load_config(folder)
    if pack and config.quantizer != "none":
        return checkpoint.load_for_inference(folder, device, cache_dtype=cache_dtype)
    return checkpoint.load_model(folder, device).to(dtype)  # refuses packed weights


def _ready(
    model: BitNetForCausalLM, path: Path, device: torch.device, pack: bool, cache_dtype: str, dtype: torch.dtype
) -> LanguageModel:
    """A model as it was read from a foreign file, in the form in which it runs."""
    if model.is_packed and not pack:
        raise ValueError(f"{path} holds packed weights and no latent floats, so it cannot run without packing")
    if model.config.quantizer == "none" or not pack:
        return model.to(device=device, dtype=dtype)
    return checkpoint.engine_of(model.pack(), device, cache_dtype)
