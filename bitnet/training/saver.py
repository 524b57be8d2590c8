"""The checkpoints of a run, written at once or in a thread while the steps go on."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from bitnet.console import say
from bitnet.training.checkpoint import save_checkpoint
from bitnet.training.processes import World, host_group
from bitnet.training.shards import plain_tensor
from bitnet.training.step import Trainer


class Saver:
    """Writes what a trainer has. A disk that is full in mid-run is a warning, since the next save may succeed; at the
    end of a run it is an error. Every process must make one and call the same methods."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, world = trainer, trainer.world
        self._background: BackgroundSaver | None = None
        if trainer.config.saves_in_background(world.strategy):
            self._background = BackgroundSaver(world, trainer.config.timeout_minutes)

    def save(self, *, best: bool, must: bool) -> None:
        """Write a checkpoint, or begin to; with `must` it is on disk when this returns, or OSError is raised. Earlier
        checkpoints stay untouched."""
        self.wait()  # for the one before
        self._write(functools.partial(self._start, best), must)
        if must:
            self.wait(must=True)

    def wait(self, *, must: bool = False) -> None:
        """Until the checkpoint that is being written is on disk."""
        if self._background:
            self._write(self._background.wait, must)

    def _write(self, action: Callable[[], None], must: bool) -> None:
        try:
            action()
        except OSError as error:
            if must:
                raise
            if self.trainer.world.is_first:
                say(f"warning: {error}; earlier checkpoints are intact and training goes on", sys.stderr)

    def _start(self, best: bool) -> None:
        trainer, config, feed = self.trainer, self.trainer.config, self.trainer.feed
        sharded = trainer.world.strategy == "fsdp"
        if not (sharded or trainer.world.is_first):
            return
        save = functools.partial(
            save_checkpoint,
            trainer.folder,
            state=trainer.progress.state(feed.fingerprint, trainer.teacher.fingerprint if trainer.teacher else None),
            config=dataclasses.asdict(config),
            tokenizer=feed.tokenizer.files() | (feed.template.files() if feed.template else {}) | dict(trainer.files),
            best=best or math.isinf(trainer.progress.best_loss),  # until one is ranked, the newest is what there is
            keep=config.keep_last,
        )
        weights, moments = trainer.model.state_dict(), trainer.optimizer.state()
        if self._background:
            self._background.start(save, weights, moments)
        else:
            save(model=weights, optimizer_state=moments, world=trainer.world if sharded else None)

    def close(self) -> None:
        """Let the save that runs come to its end, and end the thread."""
        if self._background:
            self._background.close()


class BackgroundSaver:
    """Saves in a thread, one checkpoint at a time, from copies in main memory; the processes of a sharded run talk
    about it in a group of their own. Every process must make one."""

    def __init__(self, world: World, timeout_minutes: float) -> None:
        sharded = world.strategy == "fsdp"
        self.world = dataclasses.replace(world, group=host_group(timeout_minutes)) if sharded else None
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[object] | None = None

    def start(self, save: Callable[..., object], weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Copy the tensors, then call `save(model=, optimizer_state=, world=)` with the copies, in the thread. Waits
        for the save before, and raises what that one raised."""
        self.wait()
        stager = DefaultStager(StagingOptions(False, False, False, False))
        plain = [{name: plain_tensor(value) for name, value in tensors.items()} for tensors in (weights, moments)]
        copies: Any = stager.stage({"model": plain[0], "optimizer_state": plain[1]})
        stager.close()
        self._running = self._thread.submit(save, **copies, world=self.world)

    def wait(self) -> None:
        """Until the save that runs is done. Raises what it raised: OSError for a full disk."""
        running, self._running = self._running, None
        if running:
            running.result()

    def close(self) -> None:
        """Let the save that runs come to its end."""
        self._thread.shutdown()
