"""Held-out loss of one or several models; of a run of train.py, at its best checkpoint.

bitnet evaluate runs/demo runs/demo-float      one line a run, and the gap to the last one
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bitnet.console import only_for_looking, table


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs or models of any kind; the last one is the baseline of the gaps."""
    text: str | None = None
    """Corpus to evaluate on, its held-out part; a run's own unless given."""
    picture: Path | None = None
    """Draw the loss curves of all runs into this PNG."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products, as in train.py."""


def run(options: Options) -> None:
    """Print one line a run; the gap is the run's loss against the last run's."""
    from bitnet.evaluation.loss import Evaluation, evaluate_model
    from bitnet.machine import pick_device, pick_dtype
    from bitnet.plots import draw_loss
    from bitnet.training.reporter import read_metrics

    runs = options.runs
    if not runs:
        raise ValueError("no run was given; name a folder made by train.py, or a model of any kind")
    device = pick_device(options.device)
    results = [(run, *evaluate_model(run, device, pick_dtype(options.dtype, device), options.text)) for run in runs]

    def loss(part: Evaluation) -> str:
        return f"{part.loss:.4f} ± {part.standard_error:.4f}"

    rows = [["run", "quantizer", "held-out loss", "perplexity", "bits/byte", "gap"]]
    for name, quantizer, result in results:
        bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        gap = f"{result.loss / results[-1][2].loss - 1:+.2%}"
        rows.append([name, quantizer, loss(result), f"{result.perplexity:.2f}", bits, gap])
        rows += [[f"  {corpus}", "", loss(part), "", "", ""] for corpus, part in result.corpora.items()]
    shown = rows if len(results) > 1 else [row[:-1] for row in rows]  # a gap to itself says nothing
    print(table(shown, right=[3, 4, 5]))
    if options.picture:
        with only_for_looking(f"the picture {options.picture}"):
            draw_loss({run: read_metrics(Path(run) / "metrics.jsonl") for run in runs}, options.picture)
