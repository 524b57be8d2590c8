"""The model that a run learns from beside the labels: knowledge distillation with a teacher that is run in every step.

    teacher = Teacher.open(config, feed, device, dtype)
    loss = model.loss(input_ids, labels, "mean", documents, teacher(input_ids, documents))

Any model that `open_source` knows and that gives the same token ids the same meaning. It sees the very tokens of the
student's batch, and attention of both keeps to the same documents. Of several processes each has all of it. The formula
of the loss is in `bitnet/model/loss.py`.
"""

import torch
from torch import Tensor

from bitnet.data.feed import Feed
from bitnet.model import BitNetForCausalLM, ModelConfig, bit_linears
from bitnet.model.loss import Taught
from bitnet.storage.checksums import sum_of_weights
from bitnet.storage.source import Source, open_source
from bitnet.training.config import TrainConfig


class Teacher:
    """A frozen model in evaluation mode, and how much it counts. Its float matrices are kept in the type of the
    products, `dtype`, which autocast would copy them to in every step; what it quantizes within its own products stays
    as it is, since rounded weights have other codes."""

    def __init__(self, model: BitNetForCausalLM, weight: float, temperature: float, dtype: torch.dtype) -> None:
        self.model, self.weight, self.temperature = model.eval().requires_grad_(False), weight, temperature
        self.fingerprint = sum_of_weights(model)
        """sha256 of the weights, hex."""
        self.head = model.head_weight.to(dtype)
        for _, layer in bit_linears(model):
            if layer.quantizer == "none":
                layer.weight.data = layer.weight.data.to(dtype)

    @classmethod
    def open(cls, config: TrainConfig, feed: Feed, device: torch.device, dtype: torch.dtype) -> "Teacher":
        """The teacher of a configuration, on the device. Raises ValueError for a model whose tokens are others, or that
        is too short for the windows, and as `open_source` does."""
        assert config.teacher is not None
        source = open_source(config.teacher)
        check_tokens(config.teacher, source, feed)
        check_window(config.teacher, source.config, config.window)
        return cls(source.latent().to(device), config.teacher_weight, config.teacher_temperature, dtype)

    def describe(self) -> str:
        """The teacher in a line."""
        return (
            f"teacher   {self.model.num_parameters():,} parameters, quantizer {self.model.config.quantizer}, "
            f"{self.weight:g} of the loss, temperature {self.temperature:g}"
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, documents: Tensor | None = None) -> Taught:
        """What it says of ids int64 `[B, T]`."""
        return Taught(self.model.states(input_ids, documents), self.head, self.weight, self.temperature)


def check_tokens(path: str, source: Source, feed: Feed) -> None:
    """Raise ValueError unless every id of the teacher stands for the same token in the run."""
    difference = source.tokenizer.difference(feed.tokenizer)
    if difference:
        raise ValueError(
            f"the teacher {path} has another tokenizer than the run: {difference}; train one of them with the "
            "tokenizer of the other (--data.tokenizer)"
        )


def check_window(path: str, teacher: ModelConfig, window: int) -> None:
    """Raise ValueError where the windows have more tokens than the teacher has positions."""
    if window > teacher.max_position_embeddings:
        raise ValueError(
            f"the teacher {path} has {teacher.max_position_embeddings} positions and the windows {window} tokens; "
            f"use --context {teacher.max_position_embeddings} or less"
        )
