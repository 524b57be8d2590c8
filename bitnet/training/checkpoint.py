"""Run folders and checkpoints: safetensors files, written so that no crash can lose the previous one.

    runs/NAME/
      config.json              the whole training configuration
      metrics.jsonl  loss.png
      checkpoints/
        step-00000500/         model.safetensors, optimizer.safetensors, state.json, config.json, tokenizer.model (or
                               another tokenizer's files), chat_template.jinja where the model has one, checksums.json;
                               of a sharded run shards/ (bitnet/training/shards.py) for the safetensors
        index.json             {"last": "step-00000500", "best": "step-00000400", "kept": ["step-00000500", ...]}

A checkpoint is written into a folder of another name, flushed to disk and renamed; then `index.json` is replaced; only
then are the checkpoints removed that it no longer names. At every moment `index.json` points at complete checkpoints.
Nothing is pickled, so loading a checkpoint runs no code. `newest_good` checks the sums before a run goes on from one.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.files import JsonObject, fsync_folder, write_atomic
from bitnet.model import BitNetForCausalLM
from bitnet.storage.folders import (
    CHECKSUMS,
    CONFIG,
    INDEX,
    MODEL,
    OPTIMIZER,
    SHARDS,
    STATE,
    check_fit,
    folder_of,
    named_files,
    read_index,
    resolve,
)
from bitnet.storage.safetensors import CheckpointError, load_json, load_tensors, open_tensors, save_tensors
from bitnet.training.config import TrainConfig
from bitnet.training.optimizer import Optimizer
from bitnet.training.processes import World
from bitnet.training.sharding import shard_like


def save_checkpoint(
    run: Path,
    *,
    model: BitNetForCausalLM | Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    state: JsonObject,
    config: JsonObject,
    tokenizer: bytes | Mapping[str, bytes],
    best: bool,
    keep: int = 1,
    world: World | None = None,
) -> Path:
    """Write a checkpoint, make it the run's last one, and its best one if `best`; returns its folder.

    `model` may be its state_dict; `state` must hold the step under "step"; `tokenizer` is a sentencepiece .model, or
    files by name. The `keep` newest checkpoints stay, and the best one. `world` are the processes over which the model
    is sharded, each of which must call this; without one the model is whole. Raises OSError (disk full, no permission)
    with the earlier checkpoints untouched and nothing half-written left behind.
    """
    folder = run / "checkpoints" / f"step-{state['step']:08d}"
    pid = world.broadcast(os.getpid()) if world else os.getpid()
    temporary = folder.with_name(f".{folder.name}.tmp-{pid}")
    index = read_index(run)
    weights = model if isinstance(model, Mapping) else model.state_dict()

    def prepare() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for remains in folder.parent.glob(
            ".step-*.tmp-*"
        ):  # of a save that was killed; they may be what fills the disk
            shutil.rmtree(remains, ignore_errors=True)
        if folder.name not in _named(index):  # else this very step is already saved and only its rank may change
            temporary.mkdir()

    def write_rest() -> None:
        write_atomic(temporary / STATE, json.dumps(state, indent=1))
        write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
        for name, content in named_files(tokenizer):
            write_atomic(temporary / name, content)
        write_atomic(temporary / CHECKSUMS, json.dumps(_checksums(temporary), indent=1))
        fsync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # left by a crash between the next line and the index
        os.replace(temporary, folder)
        fsync_folder(folder.parent)

    def publish() -> None:
        index["last"] = folder.name
        index["kept"] = [folder.name, *(name for name in index.get("kept", []) if name != folder.name)][:keep]
        if best or "best" not in index:
            index["best"] = folder.name
        write_atomic(folder.parent / INDEX, json.dumps(index))
        fsync_folder(folder.parent)

    try:
        _on_first(world, prepare)
        if folder.name not in _named(index):
            if world:
                from bitnet.training.shards import write_shards

                tensors = {f"optimizer.{name}": value for name, value in optimizer_state.items()}
                tensors |= {f"model.{name}": value for name, value in weights.items()}
                write_shards(temporary / SHARDS, tensors, world.group)
            else:
                # Tied tensors appear once: the head of a tied model is no module of its own.
                save_tensors(temporary / MODEL, {k: v.detach() for k, v in weights.items()})
                save_tensors(temporary / OPTIMIZER, optimizer_state)
            _on_first(world, write_rest)
        _on_first(world, publish)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint of step {state['step']} was not written to {folder.parent}: {error}") from error
    if world is None or world.is_first:
        for other in folder.parent.iterdir():
            if other.is_dir() and other.name not in _named(index):
                shutil.rmtree(other, ignore_errors=True)
    return folder


def _on_first(world: World | None, action: Callable[[], None]) -> None:
    """Run on the first process only; what it raises, all raise."""
    error: Exception | None = None
    if world is None or world.is_first:
        try:
            action()
        except OSError as problem:
            error = problem
    failure = world.broadcast(error and str(error)) if world else None
    if error or failure:
        raise error or OSError(failure)


def _named(index: JsonObject) -> set[str]:
    return {name for name in (index.get("last"), index.get("best"), *index.get("kept", [])) if name}


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS):
        with open(path, "rb") as file:
            sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def verify(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None: a sum that differs, a file that is missing. One written
    without sums counts as good where its model can be opened."""
    try:
        if not (folder / CHECKSUMS).is_file():
            load_tensors(folder / MODEL)
            return None
        for name, expected in load_json(folder / CHECKSUMS).items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} is not what was written"
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


def newest_good(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run whose files are whole, and for each newer one a line about what is lost with it.

    Raises CheckpointError where there is none.
    """
    index = read_index(run)
    if not _named(index):
        resolve(run)  # says what is missing
    lost: list[str] = []
    for name in sorted(_named(index), reverse=True):
        problem = verify(run / "checkpoints" / name)
        if problem is None:
            return run / "checkpoints" / name, lost
        lost.append(f"checkpoint {name} is damaged ({problem}), and the steps since the one before it are lost")
    raise CheckpointError(f"{run} has no checkpoint that is whole: {'; '.join(lost)}; start the run anew")


def consolidate(folder: Path) -> Path:
    """Write the safetensors form of a sharded checkpoint beside its shards, in one process, and return the model's
    file. Raises CheckpointError for damaged shards and OSError for a disk that is full."""
    from bitnet.training.shards import read_whole

    try:
        for name, prefix in ((OPTIMIZER, "optimizer."), (MODEL, "model.")):  # with the model's file it is complete
            temporary = folder / f".{name}.tmp-{os.getpid()}"
            save_tensors(temporary, read_whole(folder / SHARDS, prefix))
            os.replace(temporary, folder / name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    fsync_folder(folder)
    return folder / MODEL


def consolidate_run(run: Path, world: World) -> None:
    """Consolidate the last and the best checkpoint of a sharded run; nothing to do for a run of another kind."""
    if world.strategy != "fsdp":
        return
    if world.is_first:
        for which in ("last", "best"):
            consolidate(folder_of(run, which))
    world.barrier("the conversion of the last checkpoint")


def load_training_tensors(
    folder: Path, model: BitNetForCausalLM, optimizer: Optimizer, device: torch.device | str = "cpu"
) -> None:
    """Fill a model and its optimizer, whole or sharded, from a checkpoint of either form. Raises CheckpointError for
    damaged files or another model's."""
    if not (folder / SHARDS).is_dir():
        load_weights(model, folder / MODEL, device)
        optimizer.load_state(load_tensors(folder / OPTIMIZER))
        return
    from bitnet.training.shards import names_and_shapes, read_shards

    parameters = dict(model.named_parameters())
    wanted = {f"model.{name}": value for name, value in model.state_dict().items()}
    try:
        shapes = names_and_shapes(folder / SHARDS)
        moments: dict[str, Tensor] = {}
        for key, size in shapes.items():
            if not key.startswith("optimizer."):
                continue
            name = key.removeprefix("optimizer.").rpartition(".")[0]
            if name not in parameters:
                raise ValueError(f"optimizer state {key!r} belongs to no parameter of this model")
            moments[key] = torch.zeros_like(parameters[name].detach()) if len(size) else torch.zeros(())
        found = {name: size for name, size in shapes.items() if name.startswith("model.")}
        if found != {name: value.shape for name, value in wanted.items()}:
            raise ValueError(f"the shards in {folder} do not fit the model's configuration")
        read_shards(folder / SHARDS, wanted | moments)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    optimizer.load_state({key.removeprefix("optimizer."): value for key, value in moments.items()})


@dataclass
class Progress:
    """How far a run is: what a checkpoint's state.json holds, and what a resumed run goes on with."""

    step: int = 0
    """Steps done, which is the number of the next one."""
    seconds: float = 0.0
    """Spent in steps, by all processes of this run that were started one behind the other."""
    best_loss: float = math.inf
    """Of the validations, warm start and ramp left out."""
    data_shift: int = 0
    """Batches that rewinds have jumped over: step s computes batch s + data_shift."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of the last good steps."""
    faults: int = 0
    """Bad steps in a row up to now; a checkpoint is written behind a good one."""

    def state(self, fingerprint: object) -> JsonObject:
        """The contents of state.json; `fingerprint` is the feed's."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "data": fingerprint,
            "data_shift": self.data_shift,
            "history": self.history,
        }


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a checkpoint to continue from."""
    return (run / "checkpoints" / INDEX).exists()


def newest_checkpoint(run: Path, world: World) -> Path:
    """`newest_good`, found by the first process for all, which warns of what is lost. Raises as that does."""
    found: Any = None
    if world.is_first:
        try:
            found = newest_good(run)
        except CheckpointError as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, CheckpointError):
        raise found
    folder, lost = found
    for line in lost if world.is_first else ():
        print(f"warning: {line}", file=sys.stderr)
    return folder


def restore(
    folder: Path,
    config: TrainConfig,
    fingerprint: object,
    model: BitNetForCausalLM,
    optimizer: Optimizer,
    device: torch.device,
) -> Progress:
    """Fill a model and its optimizer from a checkpoint, and return how far that is.

    Raises CheckpointError for damaged files, another model's, or other data than the run began with (`fingerprint` is
    the feed's), and ValueError where the configuration ends before the checkpoint.
    """
    state = load_json(folder / STATE)
    if state.get("data") != fingerprint:
        raise CheckpointError(
            f"the run was trained on data {state.get('data')}, and {config.data.chat or config.data.corpus} gives "
            f"{fingerprint}: the corpus has changed. Restore it, or start a new run"
        )
    load_training_tensors(folder, model, optimizer, device)
    if state["step"] > config.steps:
        raise ValueError(f"the run is at step {state['step']} already; --steps {config.steps} is behind it")
    return Progress(
        step=state["step"],
        seconds=state["seconds"],
        best_loss=math.inf if state["best_loss"] is None else state["best_loss"],
        data_shift=state.get("data_shift", 0),
        history=[(loss, norm) for loss, norm in state.get("history", [])],
    )


def load_weights(model: BitNetForCausalLM, path: Path, device: torch.device | str = "cpu") -> None:
    """Copy the tensors of a file into a model, every one of them and no other. Raises CheckpointError otherwise."""
    whole = model.state_dict()
    with open_tensors(path, device) as tensors:
        check_fit(tensors, model.config)
        model.load_state_dict({name: shard_like(whole[name], tensors.read(name)) for name in whole})
