"""Runs several training runs, one behind the other, in the processes that torchrun started: for test_distributed.py.

    torchrun --standalone --nproc-per-node 2 tests/distributed_worker.py runs.json

runs.json is a list of {"config": a TrainConfig as a dict, "resume": bool, "hang": rank that stops answering, or null}.
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train as trainer
from bitnet import distributed, recipes


def main() -> None:
    torch.set_num_threads(1)
    trainer.stop = lambda: None  # one process group for all runs
    for job in json.loads(Path(sys.argv[1]).read_text()):
        original = trainer.Run.train_step

        def train_step(self, job=job, original=original):
            if self.step == 2 and job["hang"] == self.world.rank:
                time.sleep(600)
            return original(self)

        trainer.Run.train_step = train_step
        trainer.train(recipes.TrainConfig.from_dict(job["config"]), job["resume"])
        trainer.Run.train_step = original
    distributed.stop()


if __name__ == "__main__":
    main()
