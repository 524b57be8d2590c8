"""Log-probabilities of tokens under a model, of those that were drawn and of a text that is already there; and a vector
for a whole text.

Log-probabilities are the model's own, natural logarithms of the softmax of its logits, before temperature, penalties
and bias.

Letters: N positions, V vocab_size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet.inference.engine import LanguageModel
from bitnet.model import BitNetForCausalLM


@dataclass(frozen=True)
class Score:
    """One token at its position."""

    logprob: float
    best: list[tuple[int, float]]
    """The most likely tokens there with their log-probabilities, in descending order; equal ones by their ids."""


def score(logits: Tensor, ids: list[int], alternatives: int = 0) -> list[Score]:
    """Scores of tokens `ids` (N of them) under logits float `[N, V]`, with so many of the most likely ones."""
    logprobs = logits.double().log_softmax(-1).float()  # as `draw_rows` computes those of drawn tokens
    chosen = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    if not alternatives:
        return [Score(value, []) for value in chosen]
    kth = logprobs.topk(min(alternatives, logprobs.shape[-1])).values[:, -1:]
    found = []
    for row, value, least in zip(logprobs, chosen, kth, strict=True):
        places = (row >= least).nonzero()[:, 0]  # in the order of their ids, which a stable sort keeps
        order = row[places].sort(descending=True, stable=True).indices[:alternatives]
        found.append(Score(value, list(zip(places[order].tolist(), row[places[order]].tolist(), strict=True))))
    return found


def hidden_states_of(model: LanguageModel) -> Callable[[Tensor], Tensor] | None:
    """What gives a model's last layer behind the final norm, `[B, T, C]` of ids `[B, T]`; None: its engine has none."""
    if isinstance(model, BitNetForCausalLM):
        return lambda ids: model.model(ids, None)
    return getattr(model, "hidden_states", None)


@torch.inference_mode()
def embedding(model: LanguageModel, ids: list[int]) -> Tensor:
    """The mean of the last layer's output over a text's tokens, behind the final norm, float32 `[C]` of length 1.

    Raises ValueError for an engine that gives logits alone.
    """
    hidden_states = hidden_states_of(model)
    if hidden_states is None:
        raise ValueError("this model's engine gives logits alone; embeddings need one that runs in torch or natively")
    hidden = hidden_states(torch.tensor([ids], device=model.device))[0]
    return F.normalize(hidden.float().mean(0), dim=0).cpu()
