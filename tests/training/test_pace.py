"""Minutes that are kept: schedules that go on from where they are, and a machine that slows down or becomes faster."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import train as trainer
from bitnet.storage.json_files import load_record
from bitnet.training import config as recipes
from bitnet.training import pace, step
from bitnet.training.pace import Clock, place
from bitnet.training.reporter import read_metrics
from tests.builders import configuration, fox_corpus, tensors
from tests.faults import stop_after


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return fox_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_decision_leaves_what_was_and_goes_on_from_there():
    config = recipes.TrainConfig(steps=100, float_start=0.4, ramp=0.3)
    assert [config.place(t) for t in (0, 37, 99)] == [(0, 100), (37, 100), (99, 100)]
    for at, total in ((50, 70), (60, 200), (150, 151)):
        after = config.paced(at, total)
        assert [after.place(t) for t in range(at)] == [config.place(t) for t in range(at)]  # to the bit
        assert [after.quantizer_strength(t) for t in range(at)] == [config.quantizer_strength(t) for t in range(at)]
        shares = [where / of for where, of in map(after.place, range(total))]
        assert shares == sorted(shares)
        where, of = config.place(at)
        assert shares[at] == pytest.approx(where / of)
        assert 1 - shares[-1] == pytest.approx((1 - shares[at]) / (total - at))
        config = after
    assert config.pace == ((0, 100), (50, 70), (60, 200), (150, 151))
    begin, full = config.switch
    assert (begin, full) == (40, next(t for t in range(151) if config.quantizer_strength(t) == 1))
    # Behind a step that a run has gone back to, decisions are made anew.
    assert config.paced(55, 90).pace == ((0, 100), (50, 70), (55, 90))


@pytest.mark.parametrize("bad", [((5, 10),), ((0, 10), (4, 4)), ((0, 10), (6, 20), (3, 9))])
def test_what_no_clock_has_written_is_refused(bad):
    with pytest.raises(ValueError, match="it is written by --minutes"):
        recipes.TrainConfig(pace=bad)


def test_it_comes_back_from_json():
    config = recipes.TrainConfig(steps=100).paced(10, 50)
    assert recipes.TrainConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.02, 3.0, 20.0])
def test_a_machine_of_another_speed_ends_in_time(factor):
    """Validations too, which take as much longer."""
    clock, now, done, steps, decisions = Clock(1000.0, 1.0, 20.0, 40.0, 20.0), 0.0, 0, 760, 0
    known = pace.Pace()
    while done < steps:
        total = clock.decide(done, steps, 100, now)
        if total is not None:
            known, steps, decisions = pace.decided(known, steps, done, total), total, decisions + 1
        now, done = now + (factor if done > 200 else 1.0), done + 1
        if done % 100 == 0:
            seconds = 20.0 * (factor if done > 200 else 1.0)
            clock.pause(seconds)
            now += seconds
    now += 40 * factor
    assert now <= 1000 + 60 * factor  # a step and a validation that nobody saw coming
    assert now >= 0.9 * 1000
    assert decisions < 30
    where, of = place(steps - 1, steps, known)
    assert where / of > 0.95 or factor > 3


def test_a_run_ends_in_time_and_is_repeated_to_the_bit(tmp_path, corpus, monkeypatch):
    """Seconds are made up: a step takes one of them, from the 30th on three; 300 tokens of validation one."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    real_step, real_evaluations = step.Trainer.step, step.Trainer.evaluations

    def train_step(self):
        clock[0] += 3.0 if self.progress.step >= 30 else 1.0
        return real_step(self)

    def evaluations(self, *limits, **shown):
        read = 0
        for result in real_evaluations(self, *limits, **shown):
            clock[0] += (result.tokens - read) / 300
            read = result.tokens
            yield result

    monkeypatch.setattr(step.Trainer, "step", train_step)
    monkeypatch.setattr(step.Trainer, "evaluations", evaluations)
    config = configuration(tmp_path, corpus, minutes=2.0, eval_every=20, float_start=0.4, ramp=0.3, steps=100)
    run = trainer.train(config)
    monkeypatch.undo()
    assert 100 <= clock[0] <= 121
    found = load_record(run.folder / "config.json", recipes.TrainConfig)
    assert found == run.config
    assert found.pace[-1][1] == found.steps == run.progress.step
    assert found.steps < found.pace[0][1]
    rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if "lr" in row]
    assert rows[-1]["lr"] < 0.1 * max(row["lr"] for row in rows)
    assert found.quantizer_strength(found.steps - 1) == 1
    # With what the clock decided, and without the clock, also stopped on the way.
    again = dataclasses.replace(found, out=str(tmp_path / "again"), eval_every=10)
    stop_after(monkeypatch, 33)
    trainer.train(again)
    monkeypatch.undo()
    trainer.train(again, resume=True)
    expected = tensors(run.folder)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "again").items())
    # Other steps are another schedule, over all of them.
    assert trainer.prepare(dataclasses.replace(again, steps=90), resume=True).config.pace == ()


def test_a_ramp_to_the_end_is_whole_there():
    """Where a decision of the clock left the last step is rounded."""
    config = dataclasses.replace(recipes.PRESETS["tiny"], steps=5, pace=((0, 11), (2, 5)), float_start=0.2, ramp=0.8)
    where, of = config.place(5)
    assert 0 < of - where < 1e-9
    assert config.quantizer_strength(5) == 1
    assert config.quantizer_strength(4) < 1


def test_one_long_step_costs_its_own_time_alone():
    """A graph that is compiled in the middle of a run: 30 s in which the others take 1 s."""
    clock, now, steps = Clock(300.0, 1.0, 0.0, 0.0, 5.0), 0.0, 290
    seen, done = [], 0
    while done < steps:
        steps = clock.decide(done, steps, 100, now) or steps
        seen.append(steps)
        now, done = now + (30.0 if done == 60 else 1.0), done + 1
    assert min(seen) >= 265
    assert 280 <= now <= 301
