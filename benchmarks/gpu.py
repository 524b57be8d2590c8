"""Everything that this project measures on a GPU, in one command: see `bitnet/bench/gpu.py`.

    python benchmarks/gpu.py [--sections gate kernels models training curve] [--presets 700m 2b-4t]

The correctness gate comes first and stops the script where a number is wrong. Results go to
benchmarks/results/gpu_<device>.json.
"""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from bitnet.bench.gpu import Options, run

if __name__ == "__main__":
    try:
        sys.exit(run(tyro.cli(Options, description=__doc__)))
    except ValueError as error:
        sys.exit(f"error: {error}")
