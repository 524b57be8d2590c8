"""Runs several training runs, one behind the other, in each process of a group: for `torchrun` of tests/builders.py.

A job is {"config": a TrainConfig as a dict, "resume": bool, "hang": rank that stops answering, or null}, with "signal"
a step behind which the second process alone gets a SIGTERM, with "muon" a file for the weights and moments after some
steps of Muon alone, with "gradients" one for those of the first batch.

torch._dynamo and matplotlib, for which a run waits some seconds when it makes its optimizer and its picture, are
imported here, once for all processes that are forked.
"""

import multiprocessing
import os
import signal
import time
from typing import Any, NoReturn

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train as trainer
from bitnet.model import BitNetForCausalLM
from bitnet.training import config as recipes
from bitnet.training import processes, reporter, sharding
from bitnet.training.optimizer import Optimizer
from bitnet.training.processes import World
from bitnet.training.sharding import full_tensor, shard_like
from bitnet.training.step import Trainer


def muon_steps(config: recipes.TrainConfig, world: World) -> dict[str, torch.Tensor]:
    """Weights and moments of a model, sharded or whole, after three steps on gradients from a seed."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(config.model)
    if world.strategy == "fsdp":
        sharding.shard(model, torch.device("cpu"))
    optimizer, generator = Optimizer(model, config.optim), torch.Generator().manual_seed(1)
    for step in range(3):
        optimizer.set_schedule(step, 10)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = shard_like(parameter, gradient)
        optimizer.step()
    found = dict(model.state_dict()) | optimizer.state()
    return {name: full_tensor(value.detach()).clone() for name, value in found.items()}


def gradients(run: Trainer) -> dict[str, torch.Tensor]:
    """Of the first batch, whole."""
    run.set_products()
    run.forward_backward(0)
    return {name: full_tensor(parameter.grad).clone() for name, parameter in run.model.named_parameters()}


def train_and_die(arguments: list[str]) -> None:
    """A command of train.py, in which the second process of the first start dies behind a checkpoint, at step 14."""
    step = Trainer.step

    def train_step(self: Trainer) -> Any:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.world.rank == 1 and self.progress.step == 14:
            while not (self.folder / "checkpoints" / "index.json").exists():  # which a thread writes
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer.step = train_step
    if code := trainer.main(arguments):
        raise SystemExit(code)


def launch(command: list[str], restarts: int) -> None:
    """Two processes under torchrun's agent, which starts them again; they are forked from one that has imported all."""
    multiprocessing.set_forkserver_preload([__name__])
    config = LaunchConfig(
        1, 1, 2, run_id="restarts", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
        start_method="forkserver",
    )  # fmt: skip
    elastic_launch(config, train_and_die)(command[1:])


def work(jobs: list[dict[str, Any]]) -> NoReturn:
    trainer.stop = lambda: None  # one process group for all runs
    reporter.draw_loss = lambda *arguments, **options: None  # at every validation
    for job in jobs:
        config = recipes.TrainConfig.from_dict(job["config"])
        if job.get("muon"):
            world = processes.start("fsdp", torch.device("cpu"), 1)
            found = muon_steps(config, world)
            if world.is_first:
                torch.save(found, job["muon"])
            continue
        if job.get("gradients"):
            run = trainer.prepare(config, world=processes.start("fsdp", torch.device("cpu"), 1))
            found = gradients(run)
            run.batches.close()
            if run.world.is_first:
                torch.save(found, job["gradients"])
            continue
        original = Trainer.step

        def train_step(self, job=job, original=original):
            if self.progress.step == 2 and job["hang"] == self.world.rank:
                time.sleep(600)
            result = original(self)
            if self.progress.step == job.get("signal") and self.world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        Trainer.step = train_step
        trainer.train(config, job["resume"])
        Trainer.step = original
    processes.stop()
    processes.exit_process(0)
