"""Checkpoints that a thread writes beside the training: the same files, one after the other, and every error told."""

import dataclasses
import threading
import time

import pytest
import torch

import train as trainer
from bitnet.storage.folders import resolve
from bitnet.training import checkpoint
from bitnet.training import config as recipes
from bitnet.training.checkpoint import verify
from bitnet.training.faults import Diverged
from bitnet.training.step import Trainer
from tests.builders import configuration, tensors
from tests.faults import fill_disk_at, poison, stop_after
from tests.forked import Forked


@pytest.fixture
def slow_disk(monkeypatch) -> list[str]:
    """Let every file of tensors that a thread writes take a while, some steps; returns what was begun and ended."""
    original, events = checkpoint.save_tensors, []

    def save_tensors(path, tensors):
        events.append(f"begin {path.parent.name.split('.')[1]} {path.name}")
        time.sleep(0.1 * (threading.current_thread() is not threading.main_thread()))
        original(path, tensors)
        events.append(f"end {path.parent.name.split('.')[1]} {path.name}")

    monkeypatch.setattr(checkpoint, "save_tensors", save_tensors)
    return events


def test_it_writes_what_waiting_writes(tmp_path, corpus, slow_disk):
    optim = recipes.OptimConfig(optimizer="muon", lr=1e-2, warmup_steps=2)
    base = configuration(tmp_path, corpus, optim=optim, eval_every=2, keep_last=10)
    runs = [
        trainer.train(dataclasses.replace(base, out=str(tmp_path / mode), async_save=mode)) for mode in ("off", "on")
    ]
    for step in (2, 4, 6, 8):
        name = f"step-{step:08d}"
        waited, beside = (tensors(run.folder / "checkpoints" / name) for run in runs)
        assert waited.keys() == beside.keys()
        for key, value in waited.items():
            assert torch.equal(value, beside[key]), (step, key)
        assert verify(runs[1].folder / "checkpoints" / name) is None
    assert resolve(runs[1].folder).name == "step-00000008"
    begins, ends = slow_disk[16::2], slow_disk[17::2]
    assert [event.split()[1:] for event in begins] == [event.split()[1:] for event in ends]  # never two at a time
    assert trainer.prepare(runs[1].config, resume=True).progress.step == 8


def test_the_steps_go_on_meanwhile(tmp_path, corpus, monkeypatch):
    gone_on, train_step, save_tensors = threading.Event(), Trainer.step, checkpoint.save_tensors
    waited = []

    def step(self):
        if self.progress.step == 6:
            gone_on.set()
        return train_step(self)

    def save(path, tensors):
        waited.append(gone_on.wait(timeout=300))
        save_tensors(path, tensors)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    trainer.train(configuration(tmp_path, corpus, async_save="on"))
    assert waited == [True] * 4


def test_a_full_disk_warns_in_mid_run_and_is_an_error_at_the_end(tmp_path, corpus, monkeypatch, capsys):
    base = configuration(tmp_path, corpus, async_save="on")
    with monkeypatch.context() as patch:
        fill_disk_at(patch, 4)
        run = trainer.train(dataclasses.replace(base, out=str(tmp_path / "mid")))
        assert "warning: the checkpoint of step 4" in capsys.readouterr().err
        assert resolve(run.folder).name == "step-00000008"
    fill_disk_at(monkeypatch, 8)
    with pytest.raises(OSError, match="No space left"):
        trainer.train(base)
    assert resolve(tmp_path / "run").name == "step-00000004"


def test_a_rewind_waits_for_the_checkpoint_that_it_goes_back_to(
    tmp_path,
    corpus,
    slow_disk,
    monkeypatch,
):
    poison(monkeypatch, 4, float("nan"))
    run = trainer.train(configuration(tmp_path, corpus, async_save="on", on_nan="rewind"))
    assert (run.progress.step, run.progress.data_shift) == (8, 1)


def test_what_stops_a_run_waits_for_its_last_checkpoint(tmp_path, corpus, slow_disk, monkeypatch):
    stop_after(monkeypatch, 5)
    run = trainer.train(configuration(tmp_path, corpus, async_save="on"))
    assert run.progress.step == 5
    assert resolve(run.folder).name == "step-00000005"
    poison(monkeypatch, 4, float("nan"))  # right behind the save of step 4
    with pytest.raises(Diverged):
        trainer.train(configuration(tmp_path, corpus, async_save="on", out=str(tmp_path / "nan")))
    assert resolve(tmp_path / "nan").name == "step-00000004"


STAGED = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from bitnet.training.shards import plain_tensor

torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
staged = DTensor.from_local(torch.ones(3, 2), init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)

def moves(*arguments, **options):
    raise AssertionError("from_local moves a copy in main memory to the mesh's device")

DTensor.from_local = moves
assert plain_tensor(staged).to_local().data_ptr() == staged.to_local().data_ptr()
assert plain_tensor(staged.to_local().requires_grad_()).requires_grad is False
"""


def test_copies_in_main_memory_stay_there(tmp_path):
    done = Forked(tmp_path, code=STAGED).wait()
    assert done.returncode == 0, done.stderr
