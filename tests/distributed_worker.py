"""Runs several training runs, one behind the other, in the processes that torchrun started: for test_distributed.py.

    torchrun --standalone --nproc-per-node 2 tests/distributed_worker.py runs.json

runs.json is a list of {"config": a TrainConfig as a dict, "resume": bool, "hang": rank that stops answering, or null},
with "muon" a file for the weights and moments after some steps of Muon alone.
"""

import json
import sys
import time
from pathlib import Path

import torch

import train as trainer
from bitnet import distributed, recipes
from bitnet.model import BitNetForCausalLM
from bitnet.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parent.parent))


def muon_steps(config: recipes.TrainConfig, world: distributed.World) -> dict[str, torch.Tensor]:
    """Weights and moments of a model, sharded or whole, after three steps on gradients from a seed."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(config.model)
    if world.strategy == "fsdp":
        distributed.shard(model, torch.device("cpu"), torch.float32)
    optimizer, generator = Optimizer(model, config.optim), torch.Generator().manual_seed(1)
    for step in range(3):
        optimizer.set_schedule(step, 10)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = distributed.placed_like(parameter, gradient)
        optimizer.step()
    found = dict(model.state_dict()) | optimizer.state()
    return {name: distributed.gathered(value.detach()).clone() for name, value in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    trainer.stop = lambda: None  # one process group for all runs
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = recipes.TrainConfig.from_dict(job["config"])
        if job.get("muon"):
            world = distributed.start("fsdp", torch.device("cpu"), 1)
            found = muon_steps(config, world)
            if world.is_first:
                torch.save(found, job["muon"])
            continue
        original = trainer.Run.train_step

        def train_step(self, job=job, original=original):
            if self.step == 2 and job["hang"] == self.world.rank:
                time.sleep(600)
            return original(self)

        trainer.Run.train_step = train_step
        trainer.train(config, job["resume"])
        trainer.Run.train_step = original
    distributed.stop()
    distributed.leave(0)


if __name__ == "__main__":
    main()
