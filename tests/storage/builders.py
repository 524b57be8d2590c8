"""Models whose files are compared with those of other projects, and changes of such files."""

import json
from pathlib import Path
from typing import Any

import torch

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.storage.gguf.container import GGUFFile, TensorToWrite, write_file
from bitnet.storage.source import open_source

SHAPE = ModelConfig(
    vocab_size=400, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


def gguf_model(**changes: object) -> BitNetForCausalLM:
    """A model whose every tensor matters: norms are not 1, logits have a spread of about 1."""
    model = BitNetForCausalLM(SHAPE.replace(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim == 2 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def inference_form(model: BitNetForCausalLM, form: str) -> BitNetForCausalLM:
    return model if form == "master" else model.pack(embeddings=False)


def read(path: str | Path, **options: str) -> BitNetForCausalLM:
    return open_source(path).model(**options)


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def rewritten(path: Path, values: dict[str, object] | None = None, tensors=lambda list: list) -> Path:
    """A copy of a file with other metadata or tensors."""
    file = GGUFFile(path)
    metadata = {**file.metadata, **(values or {})}
    entries = [TensorToWrite(i.name, i.shape, i.type, lambda n=i.name: file.data(n)) for i in file.tensors.values()]
    write_file(path.with_suffix(".new"), {k: v for k, v in metadata.items() if v is not None}, tensors(entries))
    return path.with_suffix(".new")
