"""Make the sharded checkpoints of a run (train.py --parallel fsdp) plain ones, which everything else reads.

bitnet consolidate runs/big           model.safetensors and optimizer.safetensors beside the shards
"""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of train.py."""


def run(options: Options) -> None:
    """Convert every sharded checkpoint of the runs named."""
    from bitnet.files import working_in
    from bitnet.storage.folders import SHARDS
    from bitnet.training.checkpoint import consolidate

    if not options.runs:
        raise ValueError("no run was given; name a folder made by train.py --parallel fsdp")
    for folder in options.runs:
        checkpoints = sorted((folder / "checkpoints").glob(f"step-*/{SHARDS}"))
        if not checkpoints:
            raise ValueError(f"{folder} has no sharded checkpoint; give a run of train.py --parallel fsdp")
        with working_in(folder, "run"):
            for shards in checkpoints:
                print(consolidate(shards.parent))
