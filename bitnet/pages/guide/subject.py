"""What the guide is drawn from: its own vectors, and one layer of a model with what comes into it."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM
from bitnet.storage.source import open_source

VECTOR = (5.47, 3.08, -7.59, 0.0, -1.95, -4.57, 10.8)
"""The guide's vector of absmax and zero-point quantization."""
NEIGHBOUR = 3.02
"""What the guide shows to become the same integer as 3.08."""
OUTLIER_VECTOR = (-0.59, -0.21, -0.07, 0.13, 0.28, 0.57, 256.0)
"""The guide's vector with an outlier."""
CLIP = 5.0
"""The guide clips that vector at [-5, 5]."""
BATCHES = 8


@dataclass(frozen=True)
class Subject:
    """One layer of a model."""

    model: str
    layer: str
    weight: Tensor
    """float32 `[N, K]`"""
    inputs: Tensor
    """What comes into the layer, float32 `[B, T, K]`: windows of text."""
    parameters: int
    """Of the whole model."""

    def row(self, count: int) -> Tensor:
        """The first weights of the first row, float32 `[count]` or fewer."""
        return self.weight[0, :count]


def open_subject(path: str | Path, tokens: int = 256) -> Subject:
    """The middle layer's last projection of a model of any kind with its float weights, and what comes into it while
    the model reads `tokens` tokens of each of some English texts.

    Raises ValueError where there is no such model, or it has no such projection.
    """
    source = open_source(path)
    model = source.latent()
    window = min(tokens, model.config.max_position_embeddings)
    ids = source.tokenizer.encode(own_text(8 * BATCHES * window))[: BATCHES * window]
    rows = len(ids) // window
    return subject_of(model, torch.tensor(ids[: rows * window]).view(rows, window), str(path))


def subject_of(model: BitNetForCausalLM, ids: Tensor, name: str) -> Subject:
    """The subject of a model that reads ids int64 `[B, T]`."""
    found = [(key, part) for key, part in model.named_modules() if key.endswith("down_proj")]
    if not found:
        raise ValueError(f"{name} has no feed-forward layer with a down_proj, which the guide is drawn from")
    layer, module = found[len(found) // 2]
    assert isinstance(module, nn.Linear)
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach().float()))
    with torch.inference_mode():
        for row in ids:
            model(row[None])
    hook.remove()
    seen = torch.cat(inputs).clone()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Subject(name, layer, module.weight.detach().float().clone(), seen, parameters)


def own_text(characters: int) -> str:
    """English that every installation has: the docstrings and code of this package, from its shortest module on."""
    text = ""
    for part in _sources():
        text += part
        if len(text) >= characters:
            break
    return text[:characters]


def _sources() -> Iterator[str]:
    root = resources.files("bitnet")
    for room in ("quant", "ptq", "evaluation", "inference", "model", "kernels", "storage", "training"):
        for file in sorted((root / room).iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                yield file.read_text(encoding="utf-8")
