"""Held-out loss of one or several models; of a run of train.py, at its best checkpoint.

bitnet evaluate runs/demo runs/demo-float      one line a run, and the gap to the last one
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


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
    from bitnet.evaluation.loss import evaluate_model
    from bitnet.machine import pick_device, pick_dtype
    from bitnet.plots import draw_loss
    from bitnet.training.reporter import read_metrics

    runs = options.runs
    if not runs:
        raise ValueError("no run was given; name a folder made by train.py, or a model of any kind")
    device = pick_device(options.device)
    results = [(run, *evaluate_model(run, device, pick_dtype(options.dtype, device), options.text)) for run in runs]
    if options.picture:
        draw_loss({run: read_metrics(Path(run) / "metrics.jsonl") for run in runs}, options.picture)
    width = max(3, *(len(run) for run in runs), *(2 + len(name) for *_, result in results for name in result.corpora))
    gap_column = "  gap" if len(runs) > 1 else ""
    print(f"{'run':{width}}  quantizer  held-out loss    perplexity  bits/byte{gap_column}")
    for name, quantizer, result in results:
        gap = result.loss / results[-1][2].loss - 1
        bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        print(
            f"{name:{width}}  {quantizer:9}  {result.loss:.4f} ± {result.standard_error:.4f}  "
            f"{result.perplexity:10.2f}  {bits:>9}" + (f"  {gap:+.2%}" if len(runs) > 1 else "")
        )
        for corpus, part in result.corpora.items():
            print(f"  {corpus:{width - 2}}  {'':9}  {part.loss:.4f} ± {part.standard_error:.4f}")
