"""Faults provoked in a training run: a signal, a full disk, a gradient that is no number."""

import os
import signal

import pytest

from bitnet.evaluation.loss import Tally
from bitnet.storage import safetensors as safetensors_files
from bitnet.training.step import Trainer


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Deliver a SIGINT to this very process while the given step runs."""
    original = Trainer.step

    def train_step(self):
        if self.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "step", train_step)


def stop_in_last_validation(monkeypatch: pytest.MonkeyPatch, signum: int = signal.SIGINT) -> list[int]:
    """Deliver a signal to this very process in the second batch of the validation on everything. Returns a list of the
    tokens of the batches read from then on."""
    original, behind = Tally.read, list[int]()

    def read(self, batches, bar=None):
        def counted():
            for number, batch in enumerate(batches):
                if number == 1 and self.batches:
                    os.kill(os.getpid(), signum)
                elif number > 1 and self.batches:
                    behind.append(batch[0].numel())
                yield batch

        original(self, counted(), bar)

    monkeypatch.setattr(Tally, "read", read)
    return behind


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let every checkpoint of this step fail as on a full disk."""
    original = safetensors_files.save_file

    def save_file(tensors, path, **options):
        if f"step-{step:08d}" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(safetensors_files, "save_file", save_file)


def poison(monkeypatch: pytest.MonkeyPatch, at: int, factor: float, times: int = 1) -> None:
    """Multiply the gradient of a step's batch, the first `times` times that it comes up."""
    original, left = Trainer.forward_backward, [times]

    def poisoned(self, batch):
        loss = original(self, batch)
        if batch == at and left[0]:
            left[0] -= 1
            for parameter in self.model.parameters():
                parameter.grad *= factor
        return loss

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
