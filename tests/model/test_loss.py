"""The loss beside a teacher: against torch's own divergence, in chunks, with labels that do not count."""

import pytest
import torch
import torch.nn.functional as F

from bitnet.model import PRESETS
from bitnet.model.loss import Taught, chunked_loss, cross_entropy, next_token_loss
from tests.builders import packed_model, random_ids


def inputs(rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and labels of a student; hidden states and head of a teacher of another width."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 8), (11, 8), (2, 5, 6), (rows, 6)
    h, head, states, theirs = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    labels = torch.randint(9, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 4] = -100
    return h.float().requires_grad_(), head.float().requires_grad_(), labels, states.float(), theirs.float()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [11, 9, 14])
def test_it_is_the_mixture_of_cross_entropy_and_divergence(temperature, rows):
    h, head, labels, states, theirs = inputs(rows)
    both = min(rows, 11)
    counts = labels != -100
    q = (F.linear(h, head)[..., :both].double() / temperature).log_softmax(-1)
    p = (F.linear(states, theirs)[..., :both].double() / temperature).log_softmax(-1)
    each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2
    expected = 0.7 * cross_entropy(F.linear(h, head), labels, "mean") + 0.3 * each[counts].mean()
    taught = Taught(states, theirs, 0.3, temperature)
    found = next_token_loss(h, head, labels, "mean", taught)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    singles = next_token_loss(h, head, labels, "none", taught)
    assert (singles[~counts] == 0).all()
    torch.testing.assert_close(singles.sum() / counts.sum(), found)
    wanted, got = (torch.autograd.grad(loss, (h, head)) for loss in (expected, found))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert all(tensor.grad is None for tensor in (states, theirs))


def test_of_itself_there_is_nothing_to_learn():
    h, head, labels, _, _ = inputs()
    taught = Taught(h.detach(), head.detach(), 1.0, 3.0)
    loss = next_token_loss(h, head, labels, "mean", taught)
    assert abs(loss.item()) < 1e-6
    assert float(torch.autograd.grad(loss, h)[0].abs().max()) < 1e-6


def test_without_weight_it_is_the_cross_entropy():
    h, head, labels, states, theirs = inputs()
    for reduction in ("mean", "none"):
        found = next_token_loss(h, head, labels, reduction, Taught(states, theirs, 0.0, 2.0))
        torch.testing.assert_close(found, next_token_loss(h, head, labels, reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_give_the_same(reduction):
    h, head, labels, states, theirs = inputs()
    taught = Taught(states, theirs, 0.4, 2.0)
    whole = next_token_loss(h, head, labels, reduction, taught)
    parts = chunked_loss(next_token_loss, h, head, labels, reduction, 3, taught)
    torch.testing.assert_close(parts, whole)
    wanted, got = (torch.autograd.grad(loss.sum(), (h, head)) for loss in (whole, parts))
    torch.testing.assert_close(got, wanted)


def test_chunks_of_an_int8_head(monkeypatch):
    """Adapters train on such models, and --loss-chunk is to save memory there too."""
    model = packed_model(PRESETS["tiny"].replace(num_hidden_layers=1))
    ids, labels = random_ids(model.config, 2, 20), random_ids(model.config, 2, 20)
    with torch.no_grad():
        whole, singles = model.loss(ids, labels), model.loss(ids, labels, "none")
        model.loss_chunk, shapes, original = 16, [], model._logits
        monkeypatch.setattr(model, "_logits", lambda h: shapes.append(h.shape[:2]) or original(h))
        torch.testing.assert_close(model.loss(ids, labels), whole)
        torch.testing.assert_close(model.loss(ids, labels, "none"), singles)
    assert shapes == [(1, 16), (1, 16), (1, 8)] * 2
