"""Training on several processes: replicas (DDP) or shards (FSDP2), on torch.distributed and started by torchrun.

ddp     every process has the whole model; gradients are averaged
fsdp    every process has 1 / W of each parameter, gradient and moment (`bitnet/training/sharding.py`)
"""

import atexit
import contextlib
import datetime
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from bitnet.model import BitNetForCausalLM

Strategy = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """The processes of a run. One that was not started by torchrun is a world of its own, in which nothing travels."""

    rank: int = 0
    size: int = 1
    strategy: str = "none"
    """none, ddp or fsdp."""
    group: "dist.ProcessGroup | None" = None
    """The processes as `broadcast` sees them, where it is called beside the training: a `host_group` of its own."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self, what: str) -> None:
        """Wait for every process. Raises RuntimeError that names the ones that did not come in time."""
        if self.size > 1:
            # On gloo, whatever the device: it says which rank is missing, where NCCL only hangs.
            try:
                dist.monitored_barrier(_host_group(), wait_all_ranks=True)
            except RuntimeError as error:
                raise RuntimeError(f"process {self.rank} waited in vain for others at {what}: {error}") from error

    @contextlib.contextmanager
    def first_alone(self, what: str) -> Iterator[None]:
        """Let the first process run the block before the others do, which then find done what it has left on disk."""
        if not self.is_first:
            self.barrier(what)
        yield
        if self.is_first:
            self.barrier(what)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group or _host_group())
        return box[0]


_host: "dist.ProcessGroup | None" = None


def _host_group() -> "dist.ProcessGroup | None":
    return _host or dist.group.WORLD


def host_group(timeout_minutes: float) -> "dist.ProcessGroup":
    """Another group of all processes, on gloo, for a thread that works beside the training; all must ask for it."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))


def start(strategy: Strategy, device: torch.device, timeout_minutes: float) -> World:
    """Join the processes that torchrun started; a world of one where it did not.

    `auto` is ddp. A collective that waits longer than the timeout for a process ends the program. Raises ValueError for
    fsdp without torchrun.
    """
    global _host
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if strategy == "fsdp":
            raise ValueError(
                "fsdp shards a model over processes; start them with: torchrun --nproc-per-node N train.py"
            )
        return World()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1 and strategy != "fsdp":
        return World()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = next(rendezvous("env://", timeout=timeout))[0]
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_own_part(store, rank, size, timeout.total_seconds()),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        _host = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None
    return World(rank, size, "ddp" if strategy == "auto" else strategy)


def _own_part(store: "dist.Store", rank: int, size: int, timeout: float) -> "dist.Store":
    """The part of torchrun's store that belongs to this start of the processes alone.

    The store outlives a restart, and what dead processes have left in it, their addresses, would be taken for the
    living ones' (pytorch issue 135712; nothing that torchrun gives a process numbers the restarts alike on all nodes).
    So each process says hello under a name made up now, the first one offers each name that it reads, which may be a
    dead one's, the name of a new part, and takes the answer that comes in that part for the living one's.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"hello/{rank}", me)
    missing = set() if rank else set(range(1, size))
    while (rank and not store.check([f"offer/{me}"])) or missing:
        for other in sorted(missing):
            if store.check([f"{me}/here/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"offer/{store.get(f'hello/{other}').decode()}", me)
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {rank} waited in vain for others at the start: {sorted(missing) or [0]}")
        time.sleep(0.01)
    part = store.get(f"offer/{me}").decode() if rank else me
    store.set(f"{part}/here/{rank}", "")
    return dist.PrefixStore(part, store)


def local_device(device: torch.device) -> torch.device:
    """The device of this process: with several GPUs in a machine, the one of its number there."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def stop() -> None:
    """Leave the process group, if there is one."""
    global _host
    if dist.is_initialized():
        dist.destroy_process_group()
    _host = None


def exit_process(status: int) -> NoReturn:
    """End the program; of several processes without the interpreter's last steps.

    A thread of gloo may still be letting go of the tensors of the last collective (torch 2.13), and where that waits
    for an interpreter that is ending, the process is aborted, which torchrun takes for a failure of the run.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise SystemExit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Replica(nn.Module):
    """The loss as a module's forward, which is what DDP wraps."""

    def __init__(self, model: BitNetForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return self.model.loss(*arguments, **options)


def replicate(model: BitNetForCausalLM, device: torch.device) -> nn.Module:
    """A module whose forward is `model.loss`, and whose backward averages the gradients over the processes."""
    from torch.nn.parallel import DistributedDataParallel

    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        Replica(model), device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
