"""The loss of a language model: cross-entropy with the labels, and beside it how far a teacher's distribution is.

    loss = (1 - w) CE + w tau^2 KL(p || q)      p = softmax(teacher's logits / tau)     q = softmax(own logits / tau)

the mean over the labels that count; softmax and sums in float32. tau^2 keeps the gradient of the second term as large
as that of the first, whatever the temperature. Source: Hinton et al., "Distilling the Knowledge in a Neural Network"
(arXiv 1503.02531). Without a teacher the loss is CE.

Letters: B batch, T tokens, C hidden_size, V vocab_size; w weight and tau temperature of the teacher.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


class Taught(NamedTuple):
    """What a teacher says about the tokens of a batch, and how much that counts. Its logits are made within the loss,
    so that those of a chunk alone are in memory."""

    states: Tensor
    """Its last hidden states, `[B, T, C']`, without a gradient."""
    head: Tensor
    """Its output matrix, `[V', C']`."""
    weight: float
    """w, from 0 to 1."""
    temperature: float
    """tau, above 0."""


def next_token_loss(
    h: Tensor,
    head: Tensor,
    labels: Tensor,
    reduction: str = "mean",
    taught: Taught | None = None,
    unused: Tensor | None = None,
) -> Tensor:
    """Loss of hidden states `[B, T, C]` under an output matrix `[V, C]`, with labels and unused rows as `cross_entropy`
    takes them: the mean, or `[B, T]` with reduction "none"."""
    logits = F.linear(h, head)
    if taught is None:
        return cross_entropy(logits, labels, reduction, unused)
    with torch.no_grad():
        theirs = F.linear(taught.states, taught.head)
    return distillation_loss(logits, theirs, labels, reduction, weight=taught.weight, temperature=taught.temperature)


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str, unused: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits `[B, T, V]`, in float32: the mean over labels that count, or `[B, T]` with "none".
    `unused`: as `drawable_logits` takes them."""
    logits = drawable_logits(logits, labels, unused)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)
    return losses if reduction == "mean" else losses.view(labels.shape)


def drawable_logits(logits: Tensor, labels: Tensor, unused: Tensor | None) -> Tensor:
    """Logits float32 `[.., V]` of tokens int64 `[..]` in which rows that are never drawn, int64 `[U]`, have no share of
    the softmax; those of a text's own tokens stay, which may have one that its model must not write. None: all do."""
    logits = logits.float()
    if unused is None:
        return logits
    tokens = labels.clamp(min=0)[..., None]  # a label that does not count is no token
    masked = logits.index_fill(-1, unused, torch.finfo(torch.float32).min)
    return masked.scatter(-1, tokens, logits.gather(-1, tokens))


def distillation_loss(
    logits: Tensor, theirs: Tensor, labels: Tensor, reduction: str, *, weight: float, temperature: float
) -> Tensor:
    """The loss of logits `[B, T, V]` beside a teacher's `[B, T, V']`, reduced as `cross_entropy`.

    Rows that only one of both has stand for no token and are left out of the divergence.
    """
    rows = min(logits.shape[-1], theirs.shape[-1])
    own, told = logits.float(), theirs.float()[..., :rows]
    log_q = own.log_softmax(-1)  # of the labels' term, and where they are the same also of the teacher's
    losses = F.nll_loss(log_q.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)
    if temperature != 1 or rows < own.shape[-1]:
        log_q = (own[..., :rows] / temperature).log_softmax(-1)
    log_p = (told / temperature).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    counts = labels != IGNORE_INDEX
    divergence = torch.where(counts, divergence, 0.0)
    if reduction == "mean":
        return (1 - weight) * losses + weight * (divergence.sum() / counts.sum())
    return (1 - weight) * losses.view(labels.shape) + weight * divergence


def chunked_loss(
    loss: Callable[..., Tensor],
    h: Tensor,
    head: Tensor | None,
    labels: Tensor,
    reduction: str,
    chunk: int,
    taught: Taught | None = None,
    unused: Tensor | None = None,
) -> Tensor:
    """`loss` (a `next_token_loss`) over pieces of `chunk` tokens, whose logits are made again in the backward: never
    more than `chunk` x V of them, and as many of a teacher, are in memory."""
    told: list[Taught | None] = [None] * -(-labels.numel() // chunk)
    if taught is not None:
        told = [taught._replace(states=part[None]) for part in taught.states.flatten(0, 1).split(chunk)]
    pieces = zip(h.flatten(0, 1).split(chunk), labels.flatten().split(chunk), told, strict=True)
    losses = [
        checkpoint(loss, part[None], head, wanted[None], "none", theirs, unused, use_reentrant=False)
        for part, wanted, theirs in pieces
    ]
    each = torch.cat([part.flatten() for part in losses])
    return each.sum() / (labels != IGNORE_INDEX).sum() if reduction == "mean" else each.view(labels.shape)
