"""Attention inside documents: a packed window is worth its documents one by one, in every way of training."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import train as trainer
from bitnet.data.mixture import document_borders, document_ids
from bitnet.evaluation.loss import evaluate_model
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.model.transformer import document_mask
from bitnet.training import config as recipes
from bitnet.training.compiling import compile_failure
from bitnet.training.reporter import read_metrics
from tests.builders import configuration, losses, torchrun

BOS, EOS = 1, 2
LENGTHS = (5, 2, 9, 3, 5)  # of the documents in a window; the first is the end of one that began before


def test_documents_are_numbered_from_either_border():
    ids = torch.tensor([[7, 2, 1, 5, 2, 1, 2, 1], [1, 5, 5, 5, 5, 5, 2, 1], [5, 5, 5, 5, 5, 5, 5, 5]])
    expected = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3], [0, 0, 0, 0, 0, 0, 0, 1], [0] * 8])
    for found in (document_ids(ids, BOS, EOS), document_ids(ids, None, EOS)):
        assert torch.equal(found - found[:, :1], expected)


def test_the_mask_is_the_own_document_and_the_past():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4]])
    mask = document_mask(documents)
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                assert bool(mask[b, 0, i, j]) == (j <= i and documents[b, i] == documents[b, j])


def packed_window(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two windows [2, 24] of documents of LENGTHS, in two orders, and labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for lengths in (LENGTHS, LENGTHS[::-1]):
        documents = [torch.randint(3, 300, (length,), generator=generator) for length in (*lengths, 1)]
        for number, document in enumerate(documents):
            document[-1] = EOS
            if number or lengths is not LENGTHS:  # the first window begins inside a document
                document[0] = BOS
        rows.append(torch.cat(documents))
    both = torch.stack(rows)
    return both[:, :-1], both[:, 1:]


def model_of(quantizer: str, **changes) -> BitNetForCausalLM:
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(
        vocab_size=300, max_position_embeddings=32, num_hidden_layers=2, quantizer=quantizer, **changes
    )
    return BitNetForCausalLM(config)


def one_by_one(model: BitNetForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [2, 24] with each document in a forward pass of its own, and the gradient of their sum."""
    model.zero_grad()
    assert model.document_ids is None
    rows = []
    for row, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
        parts = LENGTHS if row == 0 else LENGTHS[::-1]
        pieces = zip(row_ids.split(parts), row_labels.split(parts), strict=True)
        rows.append(torch.cat([model.loss(i[None], t[None], "none")[0] for i, t in pieces]))
    each = torch.stack(rows)
    each.sum().backward()
    return each.detach(), gradient_of(model)


def gradient_of(model: BitNetForCausalLM) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("quantizer", ["none", "ternary"])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_packed_window_is_its_documents_one_by_one(quantizer, heads):
    model = model_of(quantizer, num_attention_heads=4, num_key_value_heads=heads)
    ids, labels = packed_window()
    expected, gradient = one_by_one(model, ids, labels)
    # Rounding in the rotations may flip a code of an activation.
    tolerance = 1e-5 if quantizer == "none" else 5e-3

    def distance(mask: bool, recompute: bool = False, chunk: int = 0) -> tuple[float, float]:
        model.document_ids = partial(document_ids, start=BOS, end=EOS) if mask else None
        model.model.recompute, model.loss_chunk = recompute, chunk
        model.zero_grad()
        each = model.loss(ids, labels, "none")
        each.sum().backward()
        found = gradient_of(model)
        return float((each.detach() - expected).norm() / expected.norm()), float(
            (found - gradient).norm() / gradient.norm()
        )

    for options in ({}, {"recompute": True}, {"chunk": 7}):
        assert max(distance(mask=True, **options)) < tolerance, options
    assert min(distance(mask=False)) > 1e-2


def test_logits_of_a_document_do_not_see_the_one_before():
    model = model_of("none")
    ids, _ = packed_window()
    documents = document_ids(ids, BOS, EOS)
    h = model.model(ids, documents=documents)
    start = LENGTHS[0]
    torch.testing.assert_close(h[:1, start:], model.model(ids[:1, start:], documents=documents[:1, start:]))
    changed = ids.clone()
    changed[:, :4] = 99
    assert torch.equal(model.model(changed, documents=documents)[0, start:], h[0, start:])
    assert not torch.equal(model.model(changed)[0, start:], model.model(ids)[0, start:])


def test_a_tokenizer_without_borders_is_refused():
    class Bare:
        adds_bos, bos_id, eos_id = False, 1, None

    with pytest.raises(ValueError, match="neither a begin nor an end"):
        document_borders(Bare())  # type: ignore[arg-type]
    Bare.eos_id = EOS
    ids = torch.tensor([[5, 2, 1, 6]])
    assert document_borders(Bare())(ids).tolist() == [[0, 0, 1, 1]]  # type: ignore[arg-type]


def masked(tmp_path: Path, corpus: Path, **changes) -> recipes.TrainConfig:
    """A run on documents much shorter than its windows."""
    lines = [line for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()]
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = recipes.DataConfig(corpus=str(text), cache=str(tmp_path / "data"), document_mask=True)
    optim = recipes.OptimConfig(lr=5e-4, warmup_steps=2)
    return configuration(tmp_path, corpus, data=data, optim=optim, batch_size=8, steps=10, **changes)


def test_training_and_evaluation_are_masked(tmp_path, corpus):
    config = masked(tmp_path, corpus)
    run = trainer.train(config)
    ids, _ = run.feed.batch(0)
    assert int(document_ids(ids, BOS, EOS).max()) >= 2
    result = evaluate_model(config.out, torch.device("cpu"), torch.float32).evaluation
    row = [row for row in read_metrics(run.folder / "metrics.jsonl") if "whole_val_loss" in row][-1]
    assert result.loss == pytest.approx(row["whole_val_loss"], rel=1e-6)
    run.model.document_ids = None
    assert run.validate(whole=True).loss != pytest.approx(result.loss, rel=1e-4)
    plain = dataclasses.replace(
        config, data=dataclasses.replace(config.data, document_mask=False), out=str(tmp_path / "plain")
    )
    trainer.train(plain)
    assert float((losses(plain) / losses(config) - 1).abs().max()) > 1e-4


def test_a_compiled_step_is_masked_too(tmp_path, corpus):
    if reason := compile_failure(torch.device("cpu")):
        pytest.skip(reason)
    found, config = [], masked(tmp_path, corpus, micro_batches=2, recompute=True)
    config = dataclasses.replace(config, model=config.model.replace(num_hidden_layers=1))
    for compiled in ("off", "on"):
        run = trainer.prepare(dataclasses.replace(config, compile=compiled))
        run.set_products()
        loss = float(run.forward_backward(0))
        found.append((loss, gradient_of(run.model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert float((found[1][1] - found[0][1]).norm() / found[0][1].norm()) < 1e-2


def test_two_processes_are_masked_as_one(tmp_path, corpus):
    """A float model tells it exactly; in a ternary one another order of sums flips codes, from the first steps on."""
    bounds, jobs = {"none": 1e-5, "ternary": 5e-3}, []
    for quantizer in bounds:
        one = masked(tmp_path, corpus, out=str(tmp_path / f"{quantizer}-one"))
        one = dataclasses.replace(one, model=one.model.replace(quantizer=quantizer))
        two = [
            dataclasses.replace(one, out=str(tmp_path / f"{quantizer}-ddp"), parallel="ddp", micro_batches=2),
            dataclasses.replace(one, out=str(tmp_path / f"{quantizer}-fsdp"), parallel="fsdp", recompute=True),
        ]
        trainer.train(one)
        jobs += [(one, other, bounds[quantizer]) for other in two]
    result = torchrun(2, tmp_path, [{"config": dataclasses.asdict(other)} for _, other, _ in jobs])
    assert result.returncode == 0, result.stderr
    for one, other, bound in jobs:
        error = (losses(other) / losses(one) - 1).abs()
        assert float(error.max()) < bound, (other.out, error)
