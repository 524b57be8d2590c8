"""Write the safetensors form of sharded checkpoints beside their shards.

python -m bitnet consolidate runs/big           model.safetensors and optimizer.safetensors beside the shards
"""

import sys
from pathlib import Path

from bitnet.training.shards import SHARDS


def main(argv: list[str] | None = None) -> int:
    """Command line: convert every sharded checkpoint of the runs named."""
    from bitnet.storage.safetensors import CheckpointError
    from bitnet.training.checkpoint import consolidate

    runs = sys.argv[1:] if argv is None else argv
    if not runs:
        print("usage: python -m bitnet consolidate RUN ...", file=sys.stderr)
        return 2
    for run in runs:
        folders = sorted((Path(run) / "checkpoints").glob("step-*/" + SHARDS))
        if not folders:
            print(f"error: {run} has no sharded checkpoint", file=sys.stderr)
            return 1
        for shards in folders:
            try:
                print(consolidate(shards.parent))
            except (CheckpointError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    return 0
