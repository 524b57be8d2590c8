"""What a run tells: lines and a bar on the terminal, metrics.jsonl, loss.png, and Weights & Biases where it is wanted.

Of several processes the first one reports; a Reporter of the others is silent and writes nothing.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from bitnet.console import EveryFewSeconds, clock, note, only_for_looking, progress_bar, say
from bitnet.evaluation.loss import Evaluation
from bitnet.files import JsonObject, write_atomic
from bitnet.plots import draw_loss
from bitnet.storage.json_files import read_metrics
from bitnet.training.config import TrainConfig
from bitnet.training.step import StepResult


def draw_runs(runs: Sequence[str], picture: Path) -> None:
    """The loss curves of runs of train.py, in one PNG."""
    draw_loss({run: read_metrics(Path(run) / "metrics.jsonl") for run in runs}, picture)


class Reporter:
    """Writes `metrics.jsonl` (one object a line, each with "step") and `loss.png` into the run's folder, and prints.

    A run that goes on at `step` drops the lines after it, so that the file reads like one run.
    """

    def __init__(self, config: TrainConfig, *, step: int = 0, silent: bool = False) -> None:
        folder = Path(config.out)
        self.config, self.silent = config, silent
        self.path, self.picture = folder / "metrics.jsonl", folder / "loss.png"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= step] if step and not silent else []
        self._warned = self._torn = False
        self._wandb: Any = None
        if not silent:
            self._write()
            self._wandb = _start_wandb(folder, dataclasses.asdict(config), config.wandb)
        self._bar = progress_bar(total=config.steps, done=step, unit="step", enabled=not silent, lines=False)
        self._lines = EveryFewSeconds()
        self._since, self._logged = time.perf_counter(), step  # of the last logged step, without what `paused` holds

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print a line, above the bar."""
        if not self.silent:
            say(text, file)

    def log(self, step: int, **values: float) -> None:
        """Append a row of values to the metrics."""
        if self.silent:
            return
        # JSON has no other numbers than finite ones.
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self.rows.append(row)
        with self._warning():
            if self._torn:  # by a full disk, within a line
                self._write()
            else:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        if self._wandb:
            with only_for_looking("wandb"):
                self._wandb.log(values, step=step)

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """A step was done, `seconds` into the run; every `log_every`-th is logged, unless its loss is no number."""
        config = self.config
        self._bar.update(step - self._bar.n)
        done = step == config.steps
        if not ((step % config.log_every == 0 or done) and math.isfinite(result.loss)):
            return
        now = time.perf_counter()
        rate = (step - self._logged) * config.tokens_per_step / (now - self._since)
        self._since, self._logged = now, step
        self.log(
            step, loss=result.loss, grad_norm=result.norm, lr=result.lr, tokens_per_second=round(rate), seconds=seconds
        )
        speed = f"{rate:,.0f} tok/s"
        self._bar.set_postfix_str(f"loss {result.loss:.3f}, {speed}")
        if self._bar.disable and (self._lines.due() or done):  # no terminal that would show the bar
            left = clock((config.steps - step) * config.tokens_per_step / rate)
            self.say(f"step {step:>6}/{config.steps}  loss {result.loss:.3f}  {speed}  ETA {left}")

    def follow(self, config: TrainConfig) -> None:
        """The run has another number of steps now."""
        self.config = config
        self._bar.total = config.steps
        self._bar.refresh()

    def rewind(self, step: int) -> None:
        """The run has gone back to this step: what is logged again replaces what was."""
        self._bar.update(step - self._bar.n)
        self._since, self._logged = time.perf_counter(), step
        self.rows = [row for row in self.rows if row["step"] <= step]
        if not self.silent:
            with self._warning():
                self._write()

    def _write(self) -> None:
        """All rows anew."""
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._torn = False

    def validation(self, step: int, result: Evaluation, *, whole: bool = False) -> None:
        """Log and print the result on the held-out part, or with `whole` on all of it."""
        prefix, bits = "whole_val" if whole else "val", result.bits_per_byte
        self.log(
            step,
            **{f"{prefix}_loss": result.loss, f"{prefix}_perplexity": result.perplexity},
            **({} if bits is None else {f"{prefix}_bits_per_byte": bits}),
            **{f"{prefix}_loss/{name}": each.loss for name, each in result.corpora.items()},
        )
        self.say(
            f"step {step:>6}/{self.config.steps}  {'whole ' if whole else ''}validation loss "
            f"{result.loss:.4f}  perplexity {result.perplexity:.2f}"
            + ("" if bits is None else f"  bits/byte {bits:.4f}")
            + "".join(f"  {name} {each.loss:.4f}" for name, each in result.corpora.items())
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside the block out of the tokens a second."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def draw(self) -> None:
        """Write the loss curve so far."""
        if not self.silent:
            with only_for_looking("the picture of the loss"), self._warning():
                draw_loss({self.path.parent.name: self.rows}, self.picture, switch=self.config.switch)

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Warn of a full disk, once: it would otherwise fill the terminal too."""
        try:
            yield
        except OSError as error:
            self._torn = True
            if not self._warned:
                print(f"warning: metrics are not being written: {error}", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        """Finish the bar, and the wandb run, if there is one."""
        self._bar.close()
        if self._wandb:
            with only_for_looking("wandb"):
                self._wandb.finish()


def _start_wandb(folder: Path, config: JsonObject, mode: str) -> Any:
    """A wandb run, or None. auto is online for who is logged in, what WANDB_MODE says, else off. Online without a
    network is offline. What was asked for by name raises ValueError where it fails; auto only says so."""
    chosen = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    if chosen in ("off", "disabled"):
        return None
    try:
        os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported
        import wandb

        if chosen == "auto":
            if not wandb.login(prompt=False):
                return None
            chosen = "online"
        about: JsonObject = {"project": "bitnet", "name": folder.name, "dir": str(folder), "config": config}
        try:
            run = wandb.init(**about, mode=chosen, settings=wandb.Settings(init_timeout=20))  # type: ignore[arg-type]
        except Exception as error:
            if chosen != "online":
                raise
            note(
                f"wandb cannot be reached ({str(error).splitlines()[0]}), so this run is recorded offline; send it "
                f"with: wandb sync {folder / 'wandb'}/offline-run-*"
            )
            chosen = "offline"
            run = wandb.init(**about, mode=chosen)  # type: ignore[arg-type]
    except Exception as error:  # a tracker that does not start must not cost a training run
        if mode != "auto":
            raise ValueError(f"--wandb {mode} failed: {error}; pip install wandb, or use --wandb off") from error
        if not isinstance(error, ImportError):
            note(f"no wandb ({error}); the metrics are in {folder}")
        return None
    print(f"wandb     {chosen}, in {folder / 'wandb'}")
    return run
