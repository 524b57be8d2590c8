"""Runs that differ in the weight quantizer alone: found beside a run, or trained."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet.console import say
from bitnet.model import ModelConfig
from bitnet.storage.folders import CONFIG, INDEX, STATE, read_index, resolve
from bitnet.storage.json_files import CheckpointError, Count, State, checked, load_json, load_record

TWIN_FIELDS = ("model", "data", "steps", "context", "batch_size", "seed")
"""Fields of two runs' configurations that must agree, apart from the weight quantizer, for them to be twins."""

TEACHER_FIELDS = ("teacher", "teacher_weight", "teacher_temperature")
"""The same of runs that learn from another model."""


def find_twins(run: Path) -> dict[str, Path]:
    """Runs beside this one, itself included, that differ from it in weight quantizer and learning rates only: the
    quantizer's name to the folder. Of several with one quantizer, the one given or the first by name."""

    def key(folder: Path) -> str | None:
        try:
            config = load_json(folder / CONFIG)
            parts = {name: config[name] for name in TWIN_FIELDS}
            if config.get("teacher"):
                parts |= {name: config.get(name) for name in TEACHER_FIELDS}
            trained_quantizer(folder)  # refuses what is no configuration of a run
        except (CheckpointError, KeyError):
            return None
        if config.get("init"):
            return None  # fine-tuned from another model: not trained the same way
        parts["model"] = {k: v for k, v in parts["model"].items() if k != "quantizer"}
        return json.dumps(parts, sort_keys=True)

    wanted = key(run)
    found: dict[str, Path] = {}
    for folder in [run, *sorted(run.resolve().parent.iterdir())]:
        if wanted is not None and folder.is_dir() and key(folder) == wanted and _finished(folder):
            found.setdefault(trained_quantizer(folder), folder)
    return found


def trained_quantizer(run: Path) -> str:
    """The weight quantizer of a run. Raises CheckpointError for a folder that is none."""
    try:
        return checked(ModelConfig, load_json(run / CONFIG).get("model"), f"{run / CONFIG}: model").quantizer
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _finished(run: Path) -> bool:
    """Whether a run was trained to its end; half a training says nothing about a method."""
    try:
        steps = checked(Count, load_json(run / CONFIG).get("steps"), f"{run / CONFIG}: steps")
        return read_index(run).last is not None and load_record(resolve(run) / STATE, State).step >= steps
    except ValueError:
        return False


def train_twin(run: Path, quantizer: str, train: Sequence[str]) -> None:
    """Train a twin beside the run, or go on with it; `train` is the command that trains, up to its arguments. A float
    twin gets half of a quantized run's learning rate, since quantized training wants the higher one. Raises ValueError
    where it fails, or where `train` is empty."""
    out = run.resolve().with_name(f"{run.resolve().name}-{'float' if quantizer == 'none' else quantizer}")
    if (out / "checkpoints" / INDEX).exists():
        arguments = ["--resume", str(out)]
    else:
        arguments = ["--like", str(run), "--model.quantizer", quantizer]
        if quantizer == "none":
            optim = checked(dict[str, Any], load_json(run / CONFIG).get("optim"), f"{run / CONFIG}: optim")
            lr: float = checked(float, optim.get("lr"), f"{run / CONFIG}: optim.lr")
            arguments += ["--optim.lr", f"{lr / 2:g}", "--product", "auto"]  # which may be one of codes
        arguments += ["--out", str(out)]
    say(f"training  the {quantizer} twin of {run} in {out}")
    if not train or subprocess.run([*train, *arguments]).returncode:
        raise ValueError(f"the twin was not trained; train it with: bitnet train {' '.join(arguments)}")
