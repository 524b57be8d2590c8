"""Metrics of a run: a JSON-lines file and a loss-curve picture always, Weights & Biases beside them if wanted."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from bitnet.files import write_atomic
from bitnet.plots import draw_loss


class Tracker:
    """Writes `metrics.jsonl` (one object a line, each with "step") and `loss.png` into the run's folder.

    `wandb_mode`: auto (online if logged in, else offline), online, offline or off. A resumed run drops the lines after
    `resume_step`, so that the file reads like one run.
    """

    def __init__(self, folder: Path, config: dict[str, Any], wandb_mode: str, resume_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= resume_step] if resume_step else []
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.warned = False
        self.wandb = _start_wandb(folder, config, wandb_mode)

    def log(self, step: int, **values: float) -> None:
        """Append values for a step."""
        row = {"step": step, **values}
        self.rows.append(row)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self._warn(error)
        if self.wandb:
            self.wandb.log(values, step=step)

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, which a run goes back to."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        try:
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        except OSError as error:
            self._warn(error)

    def draw(self) -> None:
        """Write the loss curve so far."""
        try:
            draw_loss({self.path.parent.name: self.rows}, self.picture)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self.warned:  # once: a full disk would otherwise fill the terminal too
            print(f"warning: metrics are not being written: {error}", file=sys.stderr)
        self.warned = True

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


def _start_wandb(folder: Path, config: dict[str, Any], mode: str) -> Any:
    """A wandb run, or None. What was asked for by name raises ValueError where it fails; auto only warns."""
    if mode == "off":
        return None
    try:
        os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported
        import wandb

        chosen = mode
        if mode == "auto":
            chosen = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        run = wandb.init(project="bitnet", name=folder.name, dir=str(folder), config=config, mode=chosen)  # type: ignore[arg-type]
    except Exception as error:  # a tracker that does not start must not cost a training run
        if mode != "auto":
            raise ValueError(f"--wandb {mode} failed: {error}; pip install wandb, or use --wandb off") from error
        print(f"note: no wandb ({error}); the metrics are in {folder}", file=sys.stderr)
        return None
    print(f"wandb     {chosen}, in {folder / 'wandb'}")
    return run
