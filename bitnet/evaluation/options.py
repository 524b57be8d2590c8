"""The options of the comparison. Imports no torch, so that --help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Compare quantization methods on one model."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Runs of train.py, or one float model of any format."""
    methods: tuple[str, ...] = ("all",)
    """Post-training methods to run on the float model: names from `bitnet quantize --list`, kv-int8 and
    kv-int4 (keys and values in fewer bits), all, or none."""
    train: tuple[Literal["none", "ternary", "ternary-g64", "ternary-g128", "binary", "int4", "int8"], ...] = ()
    """Train these twins of the first run if they are not found beside it."""
    text: str | None = None
    """Corpus for calibration (its training part) and evaluation (its held-out part); a run's own by default."""
    tokens: int = 32768
    """Held-out tokens to evaluate on."""
    calibration_tokens: int = 16384
    group_size: int | None = None
    """Input channels that share a scale in the grouped methods; 128, or the largest power of 2 below that fits."""
    context: int | None = None
    """Tokens in a window; the training context of a run, at most 512 for other models."""
    out: Path = Path("comparison")
    """Folder of the table, the pictures and what is needed to go on after an interruption."""
    tasks: int = 200
    """Questions in each of our own tasks with choices (grammar, definitions); 0: none."""
    wordnet: Path | None = None
    """Folder of WordNet's data files, for the definitions; that of Debian's package wordnet-base by default."""
    keep_models: bool = False
    """Keep the quantized models in OUT/models."""
    speed: bool = True
    """Measure decode and prefill speed and memory, each in a process of its own. Called without it on a busy machine
    and with --keep-models, the same command measures the speeds of what it kept when it is called again."""
    threads: int | None = None
