"""Speeds of generation on this machine.

python -m bitnet bench --threads 1 2 --json result.json
"""

import sys
from collections.abc import Sequence

import torch
import tyro

from bitnet.bench.cpu import run
from bitnet.bench.plan import Options


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m bitnet bench", args=argv)
    threads = torch.get_num_threads()
    try:
        if options.device != "cpu":
            from bitnet.bench import gpu as gpu_bench

            presets = {"presets": (options.preset,)} if options.preset else {}
            return gpu_bench.run(
                gpu_bench.Options(device=options.device, json=options.json, quick=options.quick, **presets)
            )
        return run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
