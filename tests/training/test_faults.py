"""What can go wrong in a run, provoked: NaN, spikes, damaged checkpoints, no time left, a step that hangs, kill -9."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import time

import pytest
import torch

import train as trainer
from bitnet.kernels import sums_exactly
from bitnet.model import bit_linears
from bitnet.storage.folders import MODEL, OPTIMIZER, STATE, resolve
from bitnet.storage.safetensors import CheckpointError, load_json
from bitnet.training import saver
from bitnet.training.faults import Diverged, Fault
from bitnet.training.reporter import read_metrics
from bitnet.training.step import Trainer
from tests.builders import SMALL, configuration, tensors
from tests.faults import poison
from tests.forked import Forked


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_nan_is_skipped_where_that_is_wanted(tmp_path, corpus, monkeypatch, capsys, factor):
    poison(monkeypatch, 5, factor)
    run = trainer.train(configuration(tmp_path, corpus, on_nan="skip"))
    assert run.progress.step == 8
    assert "step 5: the loss is" in capsys.readouterr().err
    assert all(bool(v.isfinite().all()) for v in tensors(run.folder).values())
    assert [row["step"] for row in read_metrics(run.folder / "metrics.jsonl") if "loss" in row] == [*range(1, 9)]


def test_a_spike_rewinds_and_takes_other_batches(tmp_path, corpus, monkeypatch, capsys):
    poison(monkeypatch, 18, 1e4, times=100)
    batches = []
    original = Trainer.forward_backward

    def seen(self, batch):
        batches.append(batch)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "forward_backward", seen)
    run = trainer.train(configuration(tmp_path, corpus, steps=24, eval_every=16, on_spike="rewind"))
    assert "rewinding" in capsys.readouterr().err
    assert batches == [*range(19), *range(19, 27)]  # from step 16 again, on the batches behind the bad one
    assert run.progress.step == 24
    assert run.progress.data_shift == 3
    rows = [row["step"] for row in read_metrics(run.folder / "metrics.jsonl") if "loss" in row]
    assert rows == [*range(1, 25)]
    # The jump is in the checkpoint: a resumed run reads the same batches.
    again = trainer.prepare(run.config, resume=True)
    assert again.progress.data_shift == 3


def test_faults_without_end_stop_the_run(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(Trainer, "forward_backward", lambda self, batch: torch.tensor(math.nan).double())
    with pytest.raises(Diverged, match="after 10 remedies in a row"):
        trainer.train(configuration(tmp_path, corpus, steps=50, eval_every=50, on_nan="skip"))


def test_rewinding_to_one_checkpoint_without_end_stops_the_run(tmp_path, corpus, monkeypatch):
    """The good steps between that checkpoint and the bad step are no progress."""
    steps = []

    def find_fault(loss, norm, history, config):
        steps.append(len(history))
        assert len(steps) < 100
        return Fault("it is bad", "rewind") if len(history) == 6 else None

    monkeypatch.setattr("bitnet.training.step.find_fault", find_fault)
    with pytest.raises(Diverged, match="step 6: it is bad, after 10 remedies in a row"):
        trainer.train(configuration(tmp_path, corpus))
    assert steps == [*range(4), *[4, 5, 6] * 11]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_that_no_gradient_reaches_stops_the_run(tmp_path, corpus, monkeypatch, compiled):
    run, original = trainer.prepare(configuration(tmp_path, corpus)), Trainer.forward_backward
    name, lost = next((name, layer.weight) for name, layer in bit_linears(run.model))
    before, run.compiled = lost.clone(), compiled

    def losing(self, batch):
        loss = original(self, batch)
        lost.grad = None
        return loss

    monkeypatch.setattr(Trainer, "forward_backward", losing)
    advice = "compiles this model wrongly: train with --compile off" if compiled else ""
    with pytest.raises(
        Diverged, match=rf"step 0: no gradient reached 1 of \d+ parameters, {name}.weight first.*{advice}$"
    ):
        run.step()
    assert run.progress.step == 0
    assert torch.equal(lost, before)
    run.batches.close()


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, STATE])
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, corpus, capsys, file):
    run = trainer.train(configuration(tmp_path, corpus, steps=8))
    end = {name: value.clone() for name, value in tensors(run.folder).items()}  # they were mapped from the file
    path = run.folder / "checkpoints" / "step-00000008" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = trainer.prepare(run.config, resume=True)
    assert again.progress.step == 4
    assert "step-00000008 is damaged" in capsys.readouterr().err
    again = trainer.train(run.config, resume=True)
    assert again.progress.step == 8
    for name, value in tensors(run.folder).items():
        assert torch.equal(value, end[name]), name
    (run.folder / "checkpoints" / "step-00000004" / file).unlink()
    path = run.folder / "checkpoints" / "step-00000008" / file
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint that is whole"):
        trainer.prepare(run.config, resume=True)


def test_it_saves_before_the_time_runs_out(tmp_path, corpus, monkeypatch, capsys):
    clock = [0.0]  # a step takes a tenth of a second, and a validation with a checkpoint a quarter
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    train_step, save_checkpoint = Trainer.step, saver.save_checkpoint

    def step(self):
        clock[0] += 0.1
        return train_step(self)

    def save(*arguments, **options):
        clock[0] += 0.25
        return save_checkpoint(*arguments, **options)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(saver, "save_checkpoint", save)
    run = trainer.train(configuration(tmp_path, corpus, steps=10**6, eval_every=6, max_minutes=2 / 60))
    assert run.progress.step == 11  # the next step and checkpoint may take twice as long
    assert load_json(resolve(run.folder) / STATE)["step"] == run.progress.step
    assert f"stopped at step {run.progress.step}" in capsys.readouterr().out
    assert 1.4 < clock[0] < 2


def test_a_step_that_hangs_ends_the_program_with_its_stack(tmp_path):
    code = "import train, time\nwith train.watchdog(0.3 / 60):\n    time.sleep(600)"
    result = Forked(tmp_path, code=code).wait()
    assert result.returncode == 1
    assert "Timeout" in result.stderr
    assert 'File "<string>", line 3' in result.stderr


def test_weight_statistics_are_logged(tmp_path, corpus):
    run = trainer.train(configuration(tmp_path, corpus))
    rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if "zero_fraction" in row]
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        assert 0.2 < row["zero_fraction"] < 0.5  # 0.31 for Gaussian weights
        assert 0 < row["flip_fraction"] < 0.5
        assert 0 < row["latent_magnitude"] < 0.1


def test_resume_auto_needs_a_folder_and_begins_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="give --out"):
        trainer.parse(["--resume", "auto"])
    config, resume, *_ = trainer.parse(["--resume", "auto", "--preset", "tiny", "--out", str(tmp_path / "new")])
    assert (config.out, resume) == (str(tmp_path / "new"), False)


KILLS = int(os.environ.get("BITNET_KILLS", "1"))  # of one run; 20 take minutes


def test_kills_at_random_moments_change_nothing(tmp_path, corpus):
    arguments = [
        *SMALL, "--data.corpus", str(corpus), "--steps", str(20 * KILLS), "--eval-every", "3", "--eval-tokens", "64",
        "--batch-size", "2", "--log-every", "1", "--dtype", "float32",
    ]  # fmt: skip
    command = ["train", *arguments, "--resume", "auto", "--out"]
    straight = Forked(tmp_path, command=[*command, "straight"])
    assert straight.wait().returncode == 0, straight.wait().stderr
    rng, kills, attempts = random.Random(0), 0, 0
    metrics = tmp_path / "broken" / "metrics.jsonl"
    while True:
        process = Forked(tmp_path, command=[*command, "broken"])
        before = metrics.read_bytes() if metrics.exists() else b""
        while not process.ended() and (metrics.read_bytes() if metrics.exists() else b"") == before:
            time.sleep(0.002)
        time.sleep(rng.random() * straight.seconds / 2)  # while it trains, on a machine of any speed
        if kills < KILLS and not process.ended():
            os.kill(process.children[0], signal.SIGKILL)
        attempts += 1
        if code := process.wait().returncode:
            assert code == -signal.SIGKILL
            kills += 1
        elif kills or attempts > 20:
            break
        else:  # it was faster than the signal
            shutil.rmtree(tmp_path / "broken")
    assert kills >= 1
    end, expected = tensors(tmp_path / "broken"), tensors(tmp_path / "straight")
    assert end.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, end[name]), name
    rows = [
        [row["loss"] for row in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in row]
        for name in ("straight", "broken")
    ]
    assert rows[0] == rows[1]


def test_recomputation_chunks_and_int8_products_give_the_same_gradients(tmp_path, corpus):
    base = configuration(tmp_path, corpus, product="float")
    found = []
    for number, changes in enumerate([{}, {"recompute": True}, {"loss_chunk": 24}, {"product": "int8"}]):
        run = trainer.prepare(dataclasses.replace(base, out=str(tmp_path / str(number)), **changes))
        run.set_products()
        loss = float(run.forward_backward(0))
        found.append((loss, torch.cat([p.grad.flatten() for p in run.model.parameters()])))
    assert torch.equal(found[0][1], found[1][1])
    for loss, gradient in found[2:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        # Rounding may flip a code of an activation.
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) < 5e-3


@pytest.mark.skipif(not sums_exactly(), reason="int8 products of 8-bit codes are not exact here")
def test_int8_gradients_are_asked_for_by_name(tmp_path, corpus):
    base, found = configuration(tmp_path, corpus), []
    for product in ("int8", "int8-all"):
        run = trainer.prepare(dataclasses.replace(base, out=str(tmp_path / product), product=product))
        run.set_products()
        loss = float(run.forward_backward(0))
        found.append((loss, torch.cat([p.grad.flatten() for p in run.model.parameters()])))
    (loss, exact), (same, rounded) = found
    assert loss == same
    assert 1e-3 < float((rounded - exact).norm() / exact.norm()) < 5e-2
