"""Any model that this project can run, from whatever holds it: `open_model(path)`.

    a run folder of train.py, or one of its checkpoints        a GGUF file, or a folder with one
    a folder of packed weights (bitnet export)       a Hugging Face folder, or the name of a model on the hub
    a folder of quantized weights (bitnet quantize)

What a path holds is found out from its contents: the magic bytes of a file, the keys of a config.json. Ternary weights
stay the codes that they are, and run on the native engine where it was built; floats run as floats in torch.
"""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitnet.model import BitNetForCausalLM, PackedEmbedding, PackedLinear
from bitnet.model.linear import codes_and_scale
from bitnet.storage.folders import CONFIG, load_model, load_packed, resolve
from bitnet.storage.safetensors import CheckpointError, load_json
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

    model: Any
    tokenizer: BaseTokenizer
    chat_template: ChatTemplate | None
    folder: Path
    kind: Kind


def check_tokenizer(opened: OpenModel) -> OpenModel:
    tokens, rows = opened.tokenizer.vocab_size, opened.model.config.vocab_size
    if tokens > rows:
        raise CheckpointError(
            f"{opened.folder}: the tokenizer has {tokens} tokens and the model only {rows}; put the tokenizer there "
            "that the model was trained with"
        )
    return opened


def open_stored(path: str | Path, *, which: str = "best") -> tuple[BitNetForCausalLM, OpenModel]:
    """A model as it is stored, for writing it in another form: a run's latent floats, or the codes of a packed one,
    with float embeddings where they are float; and what `open_model` gives beside it. Raises as that does."""
    path, kind = locate(path, which)
    tokenizer, template = open_tokenizer(path, kind)
    if kind == "run":
        model = load_model(path)
    elif kind == "packed":
        model = load_packed(path)
    else:
        model = read_foreign(path, kind)
    return model, OpenModel(model, tokenizer, template, path, kind)


def open_latent(path: str | Path, *, which: str = "best") -> tuple[BitNetForCausalLM, OpenModel]:
    """A model to go on training with, its projections BitLinear layers of latent floats, and what `open_model` gives
    beside it.

    Packed codes become latents that are quantized to the same codes and scale. Raises as `open_model` does, and
    ValueError for weights that a method of `bitnet.commands.quantize` has made.
    """
    model, opened = open_stored(path, which=which)
    if opened.kind == "quantized":
        raise ValueError(f"{path} was quantized after training and cannot be trained; give the model it was made from")
    check_tokenizer(opened)
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


def locate(path: str | Path, which: str) -> tuple[Path, Kind]:
    """The file or folder that holds the tensors, which of a run is a checkpoint, and its kind."""
    path = find(path)
    kind = kind_of(path)
    return path if kind in ("gguf", "hf") else resolve(path, which), kind


def tokenizer_files(opened: OpenModel) -> dict[str, bytes]:
    """The files, by name, that give a folder written from this model the same tokenizer and chat template."""
    from bitnet.storage.hf.write import TOKENIZER_FILES

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
        from bitnet.storage.hf import read as hf_read

        return hf_read.locate(str(path))
    if local.is_dir() and not (local / CONFIG).is_file():
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
    if not (path / CONFIG).is_file() or (path / "checkpoints").is_dir():
        return "run"
    config = load_json(path / CONFIG)
    if isinstance(config.get("model"), dict):
        return "quantized" if "quantization" in config else "packed" if config.get("packed") else "run"
    if "model_type" in config or "architectures" in config:
        return "hf"
    raise ValueError(
        f"{path / CONFIG} is neither of this project (no 'model') nor of a Hugging Face model (no "
        "'model_type'); give the folder of a whole model"
    )


def open_tokenizer(path: Path, kind: Kind) -> tuple[BaseTokenizer, ChatTemplate | None]:
    """The tokenizer and the chat template of a file or folder; of a run it is the checkpoint's folder."""
    if kind == "gguf":
        from bitnet.storage.gguf.container import GGUFFile

        metadata = GGUFFile(path).metadata
        tokenizer = from_gguf_metadata(metadata, str(path))
        return tokenizer, chat_template_of_gguf(metadata, tokenizer, str(path))
    tokenizer = load_tokenizer(path, own=kind != "hf")
    return tokenizer, find_chat_template(path, tokenizer)


def read_foreign(path: Path, kind: Kind) -> BitNetForCausalLM:
    """The model of a file or folder that is not of `bitnet/training/checkpoint.py`."""
    if kind == "gguf":
        from bitnet.storage.gguf import read as gguf_read

        return gguf_read.read(path)
    from bitnet.storage.folders import load_quantized
    from bitnet.storage.hf import read as hf_read

    return hf_read.read(path) if kind == "hf" else load_quantized(path)
