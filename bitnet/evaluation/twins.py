"""Runs that differ in the weight quantizer alone: found beside a run, or trained."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bitnet.console import say
from bitnet.storage.folders import CONFIG, INDEX, STATE, resolve
from bitnet.storage.safetensors import CheckpointError, load_json

TWIN_FIELDS = ("model", "data", "steps", "context", "batch_size", "seed")
"""Fields of two runs' configurations that must agree, apart from the weight quantizer, for them to be twins."""


def find_twins(run: Path) -> dict[str, Path]:
    """Runs beside this one, itself included, that differ from it in weight quantizer and learning rates only: the
    quantizer's name to the folder. Of several with one quantizer, the one given or the first by name."""

    def key(folder: Path) -> str | None:
        try:
            config = load_json(folder / CONFIG)
            parts = {name: config[name] for name in TWIN_FIELDS}
        except (CheckpointError, KeyError):
            return None
        if config.get("init"):
            return None  # fine-tuned from another model: not trained the same way
        parts["model"] = {k: v for k, v in parts["model"].items() if k != "quantizer"}
        return json.dumps(parts, sort_keys=True)

    wanted = key(run)
    found: dict[str, Path] = {}
    for folder in [run, *sorted(run.resolve().parent.iterdir())]:
        if wanted is not None and folder.is_dir() and key(folder) == wanted:
            quantizer = load_json(folder / CONFIG)["model"]["quantizer"]
            if _finished(folder):
                found.setdefault(quantizer, folder)
    return found


def _finished(run: Path) -> bool:
    """Whether a run was trained to its end; half a training says nothing about a method."""
    if not (run / "checkpoints" / INDEX).exists():
        return False
    state = load_json(resolve(run) / STATE)
    return state["step"] >= load_json(run / CONFIG)["steps"]


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
            arguments += ["--optim.lr", f"{load_json(run / CONFIG)['optim']['lr'] / 2:g}"]
        arguments += ["--out", str(out)]
    say(f"training  the {quantizer} twin of {run} in {out}")
    if not train or subprocess.run([*train, *arguments]).returncode:
        raise ValueError(f"the twin was not trained; train it with: bitnet train {' '.join(arguments)}")
