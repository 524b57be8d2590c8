"""What a run tells: wandb for those who want it, minutes that count validation, nothing computed twice."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train as trainer
from bitnet.evaluation.loss import Tally
from bitnet.training import config as recipes
from bitnet.training import reporter
from bitnet.training.processes import World
from bitnet.training.step import Trainer
from tests import ROOT
from tests.builders import configuration


class FakeWandb(SimpleNamespace):
    """wandb, logged in or not, with a network or without."""

    def __init__(self, *, logged_in: bool, network: bool) -> None:
        super().__init__(started=[], Settings=lambda **options: options)
        self.logged_in, self.network = logged_in, network

    def login(self, prompt: bool = True) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, mode: str, **options: Any) -> SimpleNamespace:
        if mode == "online" and not self.network:
            raise RuntimeError("no such host\nmore")
        self.started.append(mode)

        def log(values: object, step: int) -> None:
            raise RuntimeError("the tracker broke")

        return SimpleNamespace(log=log, finish=lambda: None)


@pytest.mark.parametrize(
    ("mode", "environment", "logged_in", "network", "started"),
    [
        ("auto", None, False, True, []),
        ("auto", None, True, True, ["online"]),
        ("auto", None, True, False, ["offline"]),
        ("auto", "offline", False, False, ["offline"]),
        ("auto", "disabled", True, True, []),
        ("online", None, True, False, ["offline"]),
        ("offline", None, False, False, ["offline"]),
        ("off", "online", True, True, []),
    ],
)
def test_wandb_is_for_who_asks_or_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str,
    environment: str | None, logged_in: bool, network: bool, started: list[str],
) -> None:  # fmt: skip
    wandb = FakeWandb(logged_in=logged_in, network=network)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    run = reporter._start_wandb(tmp_path, {}, mode)
    assert wandb.started == started
    assert (run is None) == (not started)
    told = "cannot be reached (no such host), so this run is recorded offline" in capsys.readouterr().err
    assert told == (logged_in and not network)


def test_without_wandb_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert reporter._start_wandb(tmp_path, {}, "auto") is None
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="pip install wandb"):
        reporter._start_wandb(tmp_path, {}, "online")


def test_what_is_only_for_looking_stops_no_training(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("for looking only")

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(logged_in=True, network=True))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("bitnet.training.reporter.draw_loss", fails)
    monkeypatch.setattr("bitnet.console._failed", set())  # each is told once in a process
    monkeypatch.setattr(Trainer, "sample", fails)
    run = trainer.train(configuration(tmp_path, corpus, wandb="auto", sample_every=2))
    assert run.progress.step == 8
    err = capsys.readouterr().err
    assert [err.count(f"warning: {what} failed") for what in ("wandb", "the picture of the loss", "the sample")] == [
        1
    ] * 3


def test_too_few_minutes_are_refused_before_anything_is_written(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"are time for \d steps of .* s here, .* 10 at least; give --minutes .* or more"
    ):
        trainer.train(configuration(tmp_path, corpus, minutes=1e-5))
    assert not (tmp_path / "run" / "config.json").exists()


def test_processes_time_as_many_steps_as_the_first(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stops timing a step earlier, by its own clock, would leave the others waiting in it."""

    class Second(World):
        def broadcast(self, value: object) -> object:
            return False if isinstance(value, bool) else value  # the first one is in no haste

    more, steps, original = trainer.prepare(configuration(tmp_path, corpus)), list[int](), Trainer.step
    more.world = Second()
    monkeypatch.setattr(Trainer, "step", lambda self: steps.append(1) or original(self))
    with pytest.raises(ValueError, match="are time for"):
        more.plan(1e-5)
    assert len(steps) == 7


def test_minutes_count_validation(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where validating is slow it gets its share of the time, and no more."""
    more = trainer.prepare(configuration(tmp_path, corpus, eval_every=5, eval_tokens=None))
    fast = more.plan(1.0)
    assert (fast.eval_tokens, more.validates_whole) == (None, True)
    assert (more.progress.step, more.progress.history) == (0, [])  # nothing of the timed steps stays
    held_out = more.feed.held_out_tokens
    monkeypatch.setattr(Trainer, "_validation_seconds", lambda self: 60.0 / held_out)  # a minute for all of it
    slow = more.plan(1.0)
    assert not more.validates_whole
    assert slow.eval_tokens is not None
    assert slow.eval_tokens <= 0.1 * held_out + more.config.window * more.config.batch_size
    assert slow.steps < fast.steps / 5


def test_the_last_validation_computes_nothing_twice(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    original = Tally.read

    def read(self: Tally, batches: Any, bar: Any = None) -> None:
        before = self.result().tokens if self.batches else 0
        original(self, batches, bar)
        counted.append(self.result().tokens - before)

    monkeypatch.setattr(Tally, "read", read)
    run = trainer.train(configuration(tmp_path, corpus))
    monkeypatch.undo()
    assert len(counted) == 3  # of step 4, and of step 8 the same part and the rest
    assert counted[0] == counted[1] < counted[1] + counted[2] == run.feed.held_out_tokens
    rows = reporter.read_metrics(run.folder / "metrics.jsonl")
    last = {key: value for row in rows if row["step"] == 8 for key, value in row.items()}
    part = run.validate(whole=False)
    assert (last["val_loss"], last["val_bits_per_byte"]) == (part.loss, part.bits_per_byte)
    assert last["whole_val_loss"] == run.validate(whole=True).loss
    everything = configuration(tmp_path, corpus, eval_tokens=None, out=str(tmp_path / "everything"))
    rows = reporter.read_metrics(trainer.train(everything).folder / "metrics.jsonl")
    assert "val_loss" in rows[-1]
    assert not any("whole_val_loss" in row for row in rows)


def test_going_on_says_where_the_switch_moves(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer.train(configuration(tmp_path, corpus, float_start=0.5))
    assert "quantized in full" not in capsys.readouterr().err
    trainer.train(dataclasses.replace(run.config, steps=24), resume=True)
    assert (
        "warning: weights are quantized in full from step 12 on, and were to be from step 4 on; the run is at step 8 "
        "and goes back to float ones until then"
    ) in capsys.readouterr().err
    base = recipes.TrainConfig(steps=100, float_start=0.2, ramp=0.1)
    assert (base.switch, recipes.TrainConfig().switch) == ((20, 30), None)
    assert base.moved_switch(base, 50) is None
    assert base.moved_switch(dataclasses.replace(base, ramp=0.0), 50) == (
        "weights are quantized in full from step 30 on, and were to be from step 20 on (a share of the steps: "
        "--float-start and --ramp)"
    )


def test_training_outlives_its_reader(tmp_path: Path, corpus: Path) -> None:
    """train.py | head -1"""
    config = configuration(tmp_path, corpus)
    options = ["--preset", "tiny", "--model.vocab-size", "300", "--model.max-position-embeddings", "32", "--steps", "6"]
    options += ["--data.corpus", str(corpus), "--data.cache", config.data.cache, "--compile", "off", "--device", "cpu"]
    options += ["--eval-every", "3", "--wandb", "off", "--out", config.out, "--optim.warmup-steps", "1"]
    child = subprocess.Popen(
        [sys.executable, "train.py", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    assert child.stdout.readline()
    child.stdout.close()
    assert child.wait(300) == 0
    index = json.loads((tmp_path / "run" / "checkpoints" / "index.json").read_text())
    assert index["last"] == "step-00000006"
