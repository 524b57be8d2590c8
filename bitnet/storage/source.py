"""Any model on disk: `open_source(path)` finds out what a path holds, and reads its headers once.

    a run folder of train.py, or one of its checkpoints        a GGUF file, or a folder with one
    a folder of packed weights (bitnet export)                 a Hugging Face folder, or the name of a model on the hub
    a folder of quantized weights (bitnet quantize)

The kind is told from the contents: the magic bytes of a file, the keys of a config.json. Weights are read when
`Source.model()`, `.latent()` or `.tensors()` asks for them. What runs a model is not known here: `bitnet/inference`
puts a source on the fastest engine.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bitnet.files import JsonObject
from bitnet.kernels import TERNARY_QUANTIZERS
from bitnet.model import BitNetForCausalLM, ModelConfig, PackedEmbedding, PackedLinear, bit_linears
from bitnet.model.linear import codes_and_scale, latent_weight, ternary_latent
from bitnet.storage import folders
from bitnet.storage.checksums import CHECKSUMS, verifying
from bitnet.storage.folders import TOKENIZER, warn_once
from bitnet.storage.foreign import refuse_foreign, refuse_pointer
from bitnet.storage.gguf import read as gguf_read
from bitnet.storage.gguf import stored as gguf_stored
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.gguf.stored import read_stored
from bitnet.storage.hf import read as hf_read
from bitnet.storage.hf import stored as hf_stored
from bitnet.storage.hf.config import Form, group_scheme, parse_config
from bitnet.storage.hf.write import TOKENIZER_FILES
from bitnet.storage.json_files import CheckpointError, load_json
from bitnet.storage.safetensors import CONFIG, MODEL, Tensors, open_tensors
from bitnet.storage.sampling import Sampling, sampling_of_folder, sampling_of_gguf
from bitnet.tokenizer import (
    BaseTokenizer,
    ChatTemplate,
    chat_template_of_gguf,
    end_ids,
    find_chat_template,
    from_gguf_metadata,
    load_tokenizer,
    read_settings,
)
from bitnet.tokenizer.added import GENERATION

Kind = Literal["run", "packed", "quantized", "hf", "gguf"]


@dataclass(frozen=True, eq=False)
class Source:
    """A model on disk, of which nothing but the headers was read."""

    path: Path
    """The GGUF file, or the folder of the tensors; of a run it is a checkpoint."""
    kind: Kind
    config: ModelConfig
    """As the headers say. Two things only the weights tell, and `model().config` knows: whether a GGUF file is ternary,
    and whether embedding and head of a Hugging Face folder differ after all."""
    settings: JsonObject
    """All of config.json, or of a GGUF file's metadata."""
    form: Form | None = None
    """Of the weights of a Hugging Face folder."""
    file: GGUFFile | None = None

    @cached_property
    def tokenizer(self) -> BaseTokenizer:
        """Raises ValueError for one that is missing or damaged, or has more tokens than the model."""
        if self.file is not None:
            tokenizer = from_gguf_metadata(self.settings, str(self.path))
        else:
            # Our own folders have the shape in a field of its own.
            settings = {"vocab_size": self.config.vocab_size, **self.settings}
            tokenizer = load_tokenizer(self.path, own=self.kind != "hf", config=settings)
        tokens, rows = tokenizer.vocab_size, self.config.vocab_size
        if tokens > rows:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {tokens} tokens and the model only {rows}; put the tokenizer there "
                "that the model was trained with"
            )
        return tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """None for a base model. Raises ValueError for a damaged one."""
        if self.file is not None:
            return chat_template_of_gguf(self.settings, self.tokenizer, str(self.path))
        return find_chat_template(self.path, self.tokenizer)

    @cached_property
    def sampling(self) -> Sampling:
        """How the model's makers want tokens drawn, by the names of `SamplingConfig`; {} where they do not say. Raises
        CheckpointError for what cannot be read."""
        if self.file is not None:
            return sampling_of_gguf(self.settings, self.path)
        return sampling_of_folder(self.path)

    def model(self, *, device: torch.device | str = "cpu", quantizer: str | None = None) -> BitNetForCausalLM:
        """The model as it is stored, in evaluation mode: latent floats in float32, or codes as they are, with float
        embeddings where they are float.

        `quantizer` gives latent floats another weight quantizer than the headers say: "ternary" for a ternary Hugging
        Face folder whose config.json does not say so. Raises CheckpointError (a ValueError) for what is damaged or does
        not fit the headers.
        """
        config = self.config
        if quantizer is not None:
            if self.kind != "run" and self.form not in ("dense", "master"):
                raise ValueError(
                    f"{self.path} holds no latent floats, which alone can become {quantizer!r}; leave it out"
                )
            config = config.replace(quantizer=quantizer)
        self._say_where_sums_are_missing()
        if self.kind == "run":
            return folders.load_latent(self.path, config, device)
        if self.kind == "packed":
            return folders.load_packed(self.path, config, device)
        if self.kind == "quantized":
            return folders.load_quantized(self.path, config, self.settings["quantization"]).to(device)
        if self.file is not None:
            return gguf_read.read_model(self.file, config).to(device)
        if self.form in ("gptq", "awq"):
            model = self.stored()
            assert model is not None
            return model.to(device)
        assert self.form is not None
        return hf_read.read_model(self.path, config, self.form).to(device)

    def stored(self) -> BitNetForCausalLM | None:
        """The model of a GGUF file or Hugging Face folder with its weights as they are stored, most of them views of
        the mapped file; None where there is no such form. Raises as `model` does."""
        if self.file is not None:
            return gguf_stored.read_stored(self.file, self.config)
        if self.form not in ("dense", "gptq", "awq"):
            return None
        return hf_stored.read_stored(self.path, self.config, group_scheme(self.settings.get("quantization_config")))

    def _say_where_sums_are_missing(self) -> None:
        """Our own folders are written with the sums of their files; other formats know none."""
        if self.kind in ("run", "packed", "quantized") and not (self.path / CHECKSUMS).exists():
            warn_once(f"{self.path} has no {CHECKSUMS}: whether its weights are what was written cannot be told")

    def latent(self, quantizer: str | None = None) -> BitNetForCausalLM:
        """The model to go on training with, its projections BitLinear layers of latent floats.

        Packed codes become latents that are quantized to the same codes and scale, and so do floats that are ternary
        already, with the scales of the `quantizer` that the training has: other projects' files of groups. Raises as
        `model` does, and ValueError for weights that were quantized after training.
        """
        if self.kind == "quantized" or self.form in ("gptq", "awq"):
            raise ValueError(
                f"{self.path} was quantized after training and cannot be trained; give the model it was made from"
            )
        model = self.model()
        if quantizer in TERNARY_QUANTIZERS and model.config.quantizer == "none":
            with torch.no_grad():
                for _, layer in bit_linears(model):
                    found = ternary_latent(layer.weight, quantizer)
                    if found is not None:
                        layer.weight.copy_(found)
        if not model.is_packed and not model.head_is_packed:
            return model
        tensors: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, PackedEmbedding):
                tensors[f"{name}.weight"] = module(torch.arange(module.num_embeddings))
            elif isinstance(module, PackedLinear):
                tensors[f"{name}.weight"] = latent_weight(*codes_and_scale(module), module.quantizer)
        floats = {name: value for name, value in model.state_dict().items() if name in model.config.tensor_shapes()}
        return BitNetForCausalLM.from_tensors(model.config, floats | tensors)

    def frozen(self) -> BitNetForCausalLM:
        """The model as adapters stand on it (`bitnet/model/lora.py`): projections as they are stored, codes where they
        are trained for few bits, blocks of a GGUF file as they are. Raises as `model` does."""
        if self.file is not None and not gguf_read.holds_ternary(self.file):
            stored = read_stored(self.file, self.config)
            if stored is not None:
                return stored
        model = self.model()
        return model.pack(embeddings=False) if model.config.quantizer != "none" else model

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Hash the weights beside the block, which opens them more than once, with `tensors(verify=False)`. Raises
        CheckpointError at its end where they are not what was written."""
        self._say_where_sums_are_missing()
        with verifying(self.path / MODEL):
            yield

    @contextmanager
    def tensors(self, *, verify: bool = True) -> Iterator[Tensors]:
        """The stored tensors under their stored names, verified as `open_tensors` says. Raises CheckpointError where
        there are no safetensors files."""
        if self.file is not None:
            raise CheckpointError(f"{self.path} is a GGUF file, which holds no safetensors; see its GGUFFile")
        with open_tensors(self.path if self.kind == "hf" else self.path / MODEL, verify=verify) as tensors:
            yield tensors

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files, by name, that give a folder written from this model the same tokenizer and chat template."""
        stored = [name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        # Around a tokenizer.model transformers' files mean something else than ours.
        anew = self.file is not None or (self.kind == "hf" and TOKENIZER in stored and "tokenizer.json" not in stored)
        files = self.tokenizer.files() if anew else {name: (self.path / name).read_bytes() for name in stored}
        if (anew or (self.path / "chat_template.json").is_file()) and self.chat_template:
            files = self.chat_template.files() | files
        if self.file is not None and self.sampling:
            settings = json.loads(files.get(GENERATION, b"{}"))
            files[GENERATION] = json.dumps(settings | {"do_sample": True} | self.sampling, indent=1).encode()
        return files | self._generation_file() if self.kind == "hf" else files

    def _generation_file(self) -> dict[str, bytes]:
        """generation_config.json of a Hugging Face folder with the token ids that its config.json adds, if any."""
        stored = read_settings(self.path / GENERATION)
        said = {name: self.settings.get(name) for name in ("bos_token_id", "pad_token_id")}
        said = {name: value for name, value in said.items() if type(value) is int and value >= 0}  # -1 stands for none
        ends = list(dict.fromkeys(end_ids(self.path, self.settings)))
        merged = said | stored | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})
        if merged != stored:
            return {GENERATION: json.dumps(merged, indent=1).encode()}
        return {GENERATION: (self.path / GENERATION).read_bytes()} if stored else {}


def open_source(path: str | Path, *, which: str = "best") -> Source:
    """What a path holds, headers read.

    which: the checkpoint of a run folder, "best" or "last". Raises ValueError (CheckpointError is one) or OSError
    naming what is wrong with the path, and for a "last" one of what has no several.
    """
    path = find(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a run of train.py, a model's folder, a GGUF file, or owner/name of the hub"
        )
    if which != "best" and path.exists() and not (path / "checkpoints").is_dir():
        raise ValueError(f"checkpoint {which} is of a run folder, and {path} is none; leave it out")
    if path.is_file():
        file = _gguf_file(path)
        return Source(path, "gguf", gguf_read.read_config(file), file.metadata, file=file)
    refuse_foreign(path)
    if not (path / CONFIG).is_file() or (path / "checkpoints").is_dir():
        path = folders.resolve(path, which)
        refuse_foreign(path)
    settings = load_json(path / CONFIG)
    if isinstance(settings.get("model"), dict):
        kind: Kind = "quantized" if "quantization" in settings else "packed" if settings.get("packed") else "run"
        if kind == "run":
            path = folders.resolve(path)  # which refuses a sharded checkpoint
        return Source(path, kind, _config(path, settings["model"]), settings)
    if "model_type" in settings or "architectures" in settings:
        try:
            config, form = parse_config(settings)
        except ValueError as error:
            raise CheckpointError(f"{path / CONFIG}: {error}") from error
        return Source(path, "hf", config, settings, form)
    raise CheckpointError(
        f"{path / CONFIG} is neither of this project (no 'model') nor of a Hugging Face model (no 'model_type'); give "
        "the folder of a whole model"
    )


def _config(folder: Path, values: JsonObject) -> ModelConfig:
    try:
        return ModelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def _gguf_file(path: Path) -> GGUFFile:
    refuse_pointer(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(
            f"{path} is a file and begins with {magic!r}, not with b'GGUF'; give a GGUF file, or the folder that holds "
            "a model's config.json and *.safetensors"
        )
    return GGUFFile(path)


def find(path: str | Path) -> Path:
    """The local file or folder of a path; models named owner/name on the hub are downloaded.

    A name whose first half is a folder here is a path with a slip in it, not one on the hub.
    """
    local = Path(path)
    if not local.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not local.parent.exists():
        return hf_read.download(str(path))
    if local.is_dir() and not (local / CONFIG).is_file():
        files = sorted(local.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{local} holds several models ({names}); give one of these files")
        return files[0] if files else local
    return local
