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
then are the checkpoints removed that it no longer names, and nothing else is: what this run has written stands in the
index, under "removable", from before the rename until it is gone. At every moment `index.json` points at complete
checkpoints. Nothing is pickled, so loading a checkpoint runs no code. `newest_good` checks the sums before a run goes
on from one.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.console import note
from bitnet.files import JsonObject, fsync_folder, remove_remains, working_in, write_atomic
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.storage.checksums import CHECKSUMS, verify, write_sums
from bitnet.storage.folders import (
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
from bitnet.storage.json_files import CheckpointError, Index, State, load_record
from bitnet.storage.safetensors import load_tensors, open_tensors, save_tensors
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
    token = world.broadcast(secrets.token_hex(5)) if world else secrets.token_hex(5)
    temporary = folder.with_name(f".{folder.name}.tmp-{token}")
    index = read_index(run)
    weights = model if isinstance(model, Mapping) else model.state_dict()
    # This very step may be saved already, and only its rank changes; not if what was saved is damaged.
    known = folder.name in index.named()
    known = world.broadcast(known and _problem(folder) is None) if world else known and _problem(folder) is None

    def prepare() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean_up(run, index)
        if not known:
            if folder.exists() and folder.name not in index.named():
                raise OSError(f"{folder} is there already and this run has not written it; move it away")
            temporary.mkdir()

    def write_rest() -> None:
        write_atomic(temporary / STATE, json.dumps(state, indent=1))
        write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
        for name, content in named_files(tokenizer):
            write_atomic(temporary / name, content)
        write_sums(temporary)
        fsync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # what is damaged
        index.removable = [folder.name]  # should this process end between here and `publish`
        write_index(run, index)
        os.replace(temporary, folder)
        fsync_folder(folder.parent)

    def publish() -> None:
        kept = [folder.name, *(name for name in index.kept if name != folder.name)][:keep]
        after = Index(folder.name, folder.name if best or index.best is None else index.best, kept)
        after.removable = sorted(index.named() - after.named())
        write_index(run, after)
        clean_up(run, after)

    try:
        _on_first(world, prepare)
        if not known:
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
        if world is None or world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                clean_up(run, index)
        raise OSError(f"the checkpoint of step {state['step']} was not written to {folder.parent}: {error}") from error
    return folder


def write_index(run: Path, index: Index) -> None:
    """Replace a run's index in one step. Raises OSError."""
    write_atomic(run / "checkpoints" / INDEX, json.dumps(dataclasses.asdict(index)))
    fsync_folder(run / "checkpoints")


def clean_up(run: Path, index: Index | None = None) -> None:
    """Remove what this run has written and does not name any more, and what a save that was killed has left: it may be
    what fills the disk. The caller has the run's lock, or nobody else trains it."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return
    index = read_index(run) if index is None else index
    for remains in folder.iterdir():
        if re.fullmatch(r"\.step-\d+\.tmp-[0-9a-f]+", remains.name):
            shutil.rmtree(remains, ignore_errors=True)
    if index.removable:
        for name in set(index.removable) - index.named():
            shutil.rmtree(folder / name, ignore_errors=True)
        index.removable = []
        write_index(run, index)


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


def newest_good(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run whose files are whole, and for each newer one a line about what is lost with it.

    Raises CheckpointError where there is none.
    """
    names = read_index(run).named()
    if not names:
        resolve(run)  # says what is missing
    lost: list[str] = []
    for name in sorted(names, reverse=True):
        folder = run / "checkpoints" / name
        problem = _problem(folder)
        if problem is None:
            return folder, lost
        lost.append(f"checkpoint {name} is damaged ({problem}), and the steps since the one before it are lost")
    raise CheckpointError(f"{run} has no checkpoint that is whole: {'; '.join(lost)}; start the run anew")


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. One written without sums counts as good where its model can be opened,
    and its state read."""
    if (folder / CHECKSUMS).exists():
        return verify(folder)
    try:
        load_record(folder / STATE, State)
        with open_tensors(folder / MODEL):
            pass
    except CheckpointError as error:
        return str(error)
    note(f"{folder} has no {CHECKSUMS}: whether its files are what was written cannot be told")
    return None


def consolidate(folder: Path) -> Path:
    """Write the safetensors form of a sharded checkpoint beside its shards, in one process, and return the model's
    file. Raises CheckpointError for damaged shards and OSError for a disk that is full."""
    from bitnet.training.shards import read_whole

    if (folder / CHECKSUMS).exists() and (problem := verify(folder)):
        raise CheckpointError(f"{folder} is damaged: {problem}; use another checkpoint")
    try:
        for name, prefix in ((OPTIMIZER, "optimizer."), (MODEL, "model.")):  # with the model's file it is complete
            remove_remains(folder / name)
            temporary = folder / f".{name}.tmp-{secrets.token_hex(5)}"
            save_tensors(temporary, read_whole(folder / SHARDS, prefix))
            os.replace(temporary, folder / name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    write_sums(folder)
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
    best_tokens: int = 0
    """That were validated on then; losses on another number are of another part of the text. 0 where nobody knows."""
    data_shift: int = 0
    """Batches that rewinds have jumped over: step s computes batch s + data_shift."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of the last good steps."""
    faults: int = 0
    """Bad steps in a row up to now; a checkpoint is written behind a good one."""
    worst: int = -1
    """The furthest of the bad steps: a run that is rewound has got no further before it is past that one."""

    def state(self, fingerprint: object, teacher: str | None) -> JsonObject:
        """The contents of state.json; `fingerprint` is the feed's, `teacher` that of the model to learn from."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "best_tokens": self.best_tokens,
            "data": fingerprint,
            "teacher": teacher,
            "data_shift": self.data_shift,
            "history": self.history,
        }


def has_checkpoint(run: Path) -> bool:
    """Whether a run has begun: it has checkpoints, or an index that is damaged. Raises ValueError for a folder of
    checkpoints without an index, which another program or a person has filled."""
    folder = run / "checkpoints"
    if (folder / INDEX).exists():
        try:
            return bool(load_record(folder / INDEX, Index).named())
        except CheckpointError:
            return True
    remains = re.compile(r"\.(step-\d+|index\.json)\.tmp-[0-9a-f]+")
    if folder.is_dir() and (found := sorted(p.name for p in folder.iterdir() if not remains.fullmatch(p.name))):
        raise ValueError(
            f"{folder} holds {found[0]} and no {INDEX}, so it cannot be told whose that is. Go on from the checkpoints "
            f"that are whole with --resume {run}, move {folder} away, or choose another --out"
        )
    return False


@contextlib.contextmanager
def alone_in(run: Path, world: World) -> Iterator[None]:
    """Train in a run's folder, which is tidied first, and keep every other training out of it. Raises ValueError, in
    all processes, where there is one in it, and OSError for a folder that cannot be written to."""
    with contextlib.ExitStack() as stack:
        problem: Exception | None = None
        if world.is_first:
            try:
                stack.enter_context(working_in(run, "run"))
                clean_up(run)
            except (OSError, ValueError) as error:
                problem = error
        failure = world.broadcast(problem and str(problem))
        if failure:
            raise problem or ValueError(failure)
        yield


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
    teacher: str | None,
    model: BitNetForCausalLM,
    optimizer: Optimizer,
    device: torch.device,
) -> Progress:
    """Fill a model and its optimizer from a checkpoint, and return how far that is.

    Raises CheckpointError for damaged files, another model's, or other data or another teacher than the run had (the
    fingerprints of the feed and of the model that it learns from), and ValueError where the configuration ends before
    the checkpoint.
    """
    state = load_record(folder / STATE, State)
    if state.data != fingerprint:
        raise CheckpointError(
            f"the run was trained on data {state.data}, and {config.data.chat or config.data.corpus} gives "
            f"{fingerprint}: the corpus has changed, or what is read of it (--data.val-fraction, say). Restore it, or "
            "start a new run"
        )
    if teacher and state.teacher and state.teacher != teacher:
        raise CheckpointError(
            f"{config.teacher} holds other weights than those that the run has learned from up to now; restore "
            "them, or start a new run with --init"
        )
    load_training_tensors(folder, model, optimizer, device)
    if state.step > config.steps:
        raise ValueError(f"the run is at step {state.step} already; --steps {config.steps} is behind it")
    return Progress(
        step=state.step,
        seconds=state.seconds,
        best_loss=math.inf if state.best_loss is None else state.best_loss,
        best_tokens=state.best_tokens,
        data_shift=state.data_shift,
        history=state.history,
    )


def check_model(folder: Path, config: ModelConfig) -> None:
    """Raise CheckpointError where a checkpoint is of another shape, before a model of this one is made."""
    if not (folder / SHARDS).is_dir():
        with open_tensors(folder / MODEL) as tensors:
            check_fit(tensors, config)
        return
    from bitnet.training.shards import names_and_shapes

    try:
        found = {n.removeprefix("model."): s for n, s in names_and_shapes(folder / SHARDS).items() if n[:6] == "model."}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if config.num_hidden_layers > len(found) or found != config.tensor_shapes():
        raise CheckpointError(f"the shards in {folder} do not fit the model's configuration")


def load_weights(model: BitNetForCausalLM, path: Path, device: torch.device | str = "cpu") -> None:
    """Copy the tensors of a file into a model, every one of them and no other. Raises CheckpointError otherwise."""
    whole = model.state_dict()
    if not whole.keys() & model.config.tensor_shapes().keys():  # adapters alone
        try:
            model.load_state_dict(load_tensors(path, device))
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not hold the adapters of this run: {error}") from error
        return
    with open_tensors(path, device) as tensors:
        check_fit(tensors, model.config)
        model.load_state_dict({name: shard_like(whole[name], tensors.read(name)) for name in whole})
