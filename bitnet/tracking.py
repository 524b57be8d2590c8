"""Metrics of a run: a JSON-lines file and a loss-curve picture always, Weights & Biases beside them if wanted."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bitnet.checkpoint import write_text_atomic


class Tracker:
    """Writes `metrics.jsonl` (one object a line, each with "step") and `loss.png` into the run's folder.

    `wandb_mode`: auto (online if logged in, else offline), online, offline or off. A resumed run drops the lines after
    `resume_step`, so that the file reads like one run.
    """

    def __init__(self, folder: Path, config: dict[str, Any], wandb_mode: str, resume_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= resume_step] if resume_step else []
        write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.wandb = _start_wandb(folder, config, wandb_mode)

    def log(self, step: int, **values: float) -> None:
        """Append values for a step."""
        row = {"step": step, **values}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    def draw(self) -> None:
        """Write the loss curve so far."""
        draw_loss({self.path.parent.name: self.rows}, self.picture)

    def close(self) -> None:
        """Finish the wandb run, if there is one."""
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a half-written last line (a crash) is left out, a missing file has none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_loss(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training and validation loss over steps for one or several runs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, rows) in enumerate(runs.items()):
        color = f"C{index}"
        training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
        axes.plot(*zip(*training, strict=True), color=color, alpha=0.35, lw=1) if training else None
        if validation:
            axes.plot(*zip(*validation, strict=True), "o-", color=color, ms=4, label=f"{name}, validation")
            axes.annotate(f"{validation[-1][1]:.3f}", validation[-1], (4, 6), textcoords="offset points", color=color)
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Loss (thin: training)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _start_wandb(folder: Path, config: dict[str, Any], mode: str) -> Any:
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError:
        if mode != "auto":
            raise ValueError(f"--wandb {mode} needs the wandb package; pip install wandb, or use --wandb off") from None
        return None
    if mode == "auto":
        mode = "online" if wandb.api.api_key else "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DIR", str(folder))
    start = time.perf_counter()
    try:
        run = wandb.init(project="bitnet", name=folder.name, dir=str(folder), config=config, mode=mode)  # type: ignore[arg-type]
    except Exception as error:  # a tracker that fails to start must not cost a training run
        print(f"warning: wandb did not start ({error}); metrics go to {folder} only", file=sys.stderr)
        return None
    print(f"wandb     {mode} ({time.perf_counter() - start:.1f} s to start), in {folder / 'wandb'}")
    return run
