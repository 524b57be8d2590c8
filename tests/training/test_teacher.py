"""--teacher: a run that learns from another model's distribution too, in every way that a run can be cut."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

import train as trainer
from bitnet.model.loss import cross_entropy
from bitnet.storage.hf import write as hf_write
from bitnet.storage.safetensors import CheckpointError
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.training import config as recipes
from tests.builders import FOXES, SMALL, configuration, fox_corpus, losses, save_run, tensors, tiny_model, torchrun
from tests.faults import stop_after
from tests.vocabularies import byte_pair_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([FOXES * 4], 300, threads=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return fox_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer) -> Path:
    """A wider float model with opinions of its own."""
    model = tiny_model("none", vocab_size=300, hidden_size=96)
    return save_run(tmp_path_factory.mktemp("teacher") / "run", model, tokenizer)


def student(tmp_path: Path, corpus: Path, teacher: Path, **changes) -> recipes.TrainConfig:
    return configuration(tmp_path, corpus, **{"teacher": str(teacher), **changes})


def test_a_step_mixes_the_labels_and_the_teacher(tmp_path, corpus, teacher):
    config = student(tmp_path, corpus, teacher, teacher_weight=0.3, teacher_temperature=2.0)
    run = trainer.prepare(config)
    assert run.feed.tokenizer.vocab_size == 300  # the teacher's, not one trained here
    input_ids, labels = run.feed.batch(0)
    with torch.no_grad():
        own, theirs = run.model(input_ids), run.teacher.model(input_ids)
        p, q = (logits.div(2).log_softmax(-1) for logits in (theirs, own))
        divergence = 4 * (p.exp() * (p - q)).sum(-1).mean()
        expected = 0.7 * cross_entropy(own, labels, "mean") + 0.3 * divergence
    before = {name: value.clone() for name, value in run.teacher.model.state_dict().items()}
    assert run.step().loss == pytest.approx(float(expected), rel=1e-5)
    assert run.validate(whole=True).loss > 2  # of the labels alone
    assert all(torch.equal(value, before[name]) for name, value in run.teacher.model.state_dict().items())
    run.batches.close()


def test_a_run_goes_on_to_the_bit_and_not_with_another_teacher(tmp_path, corpus, teacher, tokenizer, monkeypatch):
    config = student(tmp_path, corpus, teacher, ramp=0.3, data=recipes.DataConfig(
        corpus=str(corpus), cache=str(tmp_path / "data"), document_mask=True))  # fmt: skip
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "straight")))
    stop_after(monkeypatch, 3)
    stopped = trainer.train(config)
    monkeypatch.undo()
    trainer.train(stopped.config, resume=True)
    straight, broken = tensors(tmp_path / "straight"), tensors(tmp_path / "run")
    assert all(torch.equal(value, broken[name]) for name, value in straight.items())
    other = save_run(tmp_path / "other", tiny_model("none", seed=1, vocab_size=300), tokenizer)
    more = dataclasses.replace(config, steps=10, teacher=str(other))
    with pytest.raises(CheckpointError, match="other weights than those that the run has learned from"):
        trainer.train(more, resume=True)
    trainer.train(dataclasses.replace(more, teacher=None), resume=True)  # without one it may go on


@pytest.mark.parametrize(
    "changes",
    [{"micro_batches": 2}, {"loss_chunk": 20}, {"recompute": True}, {"micro_batches": 4, "loss_chunk": 7}],
    ids=str,
)
def test_however_a_step_is_cut_it_is_the_same(tmp_path, corpus, teacher, changes):
    steps = [
        trainer.train(student(tmp_path, corpus, teacher, out=str(tmp_path / name), steps=3, **each)).config
        for name, each in (("whole", {}), ("cut", changes))
    ]
    torch.testing.assert_close(losses(steps[1]), losses(steps[0]), rtol=2e-5, atol=0)


def test_several_processes_follow_the_curve_of_one(tmp_path, corpus, teacher):
    base = student(tmp_path, corpus, teacher, steps=6, ramp=0.5)
    runs = [dataclasses.replace(base, out=str(tmp_path / name), parallel=name) for name in ("ddp", "fsdp")]
    result = torchrun(2, tmp_path, [{"config": dataclasses.asdict(config)} for config in runs])
    assert result.returncode == 0, result.stderr
    one = losses(trainer.train(dataclasses.replace(base, out=str(tmp_path / "one"))).config)
    for config in runs:
        torch.testing.assert_close(losses(config), one, rtol=1e-4, atol=0)


@pytest.mark.skipif(not os.environ.get("BITNET_LONG"), reason="compiles two models; BITNET_LONG=1 runs it")
def test_a_compiled_step_is_the_eager_one(tmp_path, corpus, teacher):
    config = student(tmp_path, corpus, teacher, steps=3)
    eager = losses(trainer.train(dataclasses.replace(config, out=str(tmp_path / "eager"))).config)
    found = losses(trainer.train(dataclasses.replace(config, compile="on")).config)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=0)


def test_another_vocabulary_is_refused(tmp_path, corpus, teacher, tokenizer):
    theirs = byte_pair_tokenizer()
    hf_write.write(tiny_model("none", vocab_size=448), tmp_path / "hf", "master", tokenizer_files=theirs.files())
    config = student(tmp_path, corpus, teacher, init=str(tmp_path / "hf"))
    with pytest.raises(
        ValueError, match=f"another tokenizer than the run: 300 tokens, and {theirs.vocab_size} there; train"
    ):
        trainer.prepare(config)
    other = train_tokenizer(["completely different words here " * 50 + FOXES], 300, threads=1)
    other.save(tmp_path / "other.model")
    data = recipes.DataConfig(corpus=str(corpus), cache=str(tmp_path / "data"), tokenizer=str(tmp_path / "other.model"))
    with pytest.raises(ValueError, match=r"token \d+ is b'.*', and b'.*' there"):
        trainer.prepare(student(tmp_path, corpus, teacher, data=data))
    # The same tokens in a larger table, as padded models have them, are the same tokens.
    tokenizer.save(tmp_path / "own.model")
    padded = save_run(tmp_path / "padded", tiny_model("none", vocab_size=320), tokenizer)
    trainer.train(student(tmp_path, corpus, padded, steps=1))


def test_what_cannot_teach_is_named(tmp_path, corpus, tokenizer):
    short = save_run(tmp_path / "short", tiny_model("none", vocab_size=300, max_position_embeddings=16), tokenizer)
    with pytest.raises(ValueError, match="16 positions and the windows 32 tokens; use --context 16"):
        trainer.prepare(student(tmp_path, corpus, short))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        trainer.prepare(student(tmp_path, corpus, Path("nowhere")))
    for field, value in (("teacher_weight", 1.5), ("teacher_temperature", 0.0), ("teacher_temperature", 1e4)):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            dataclasses.replace(configuration(tmp_path, corpus), **{field: value})


def test_the_estimate_counts_the_teacher(teacher, capsys, monkeypatch):
    monkeypatch.setattr("bitnet.training.estimate.seconds", lambda *_, **__: 0.01)  # of the products that are timed
    command = [*SMALL, "--data.corpus", "nowhere.txt", "--estimate"]
    found = []
    for extra in ([], ["--teacher", str(teacher)]):
        assert trainer.main([*command, *extra]) == 0
        found.append(capsys.readouterr().out)
    assert "teacher" not in found[0]
    for line in ("  teacher ", "% teacher"):
        assert line in found[1]
