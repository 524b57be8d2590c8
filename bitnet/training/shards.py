"""Tensors that are spread over processes, on disk: torch.distributed.checkpoint, and its conversion to safetensors.

A folder of shards holds one file a process and `.metadata`, which says where each part of each tensor is; any number of
processes can read it, each its own part. Names are those of the safetensors form, `model.` before the model's and
`optimizer.` before the optimizer's.

    bitnet consolidate runs/big           model.safetensors and optimizer.safetensors beside the shards
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from bitnet.training.sharding import without_wrapper


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: "dist.ProcessGroup | None" = None) -> None:
    """Write this process's part of every tensor; every process (of the group) must call it. Raises OSError."""
    try:
        dcp.save(
            {name: plain_tensor(value) for name, value in tensors.items()}, checkpoint_id=folder, process_group=group
        )
    except CheckpointException as error:
        raise OSError(f"shards were not written to {folder}: {_reason(error)}") from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors, whole or sharded over any number of processes, from a folder of shards; every process must call it,
    unless one reads whole tensors `alone`.

    Raises ValueError for shards that are damaged, or do not hold one of the tensors.
    """
    try:
        dcp.load(
            {name: plain_tensor(value) for name, value in tensors.items()},
            checkpoint_id=folder,
            no_dist=alone or not torch.distributed.is_initialized(),
        )
    except (Exception, CheckpointException) as error:  # pickle, zip, JSON: whatever a damaged file breaks
        raise ValueError(f"the shards in {folder} cannot be read: {_reason(error)}; use another checkpoint") from error


def names_and_shapes(folder: Path) -> dict[str, torch.Size]:
    """What a folder of shards holds. Raises ValueError where it cannot be read."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (Exception, CheckpointException) as error:
        raise ValueError(f"the shards in {folder} cannot be read: {_reason(error)}; use another checkpoint") from error
    return {name: getattr(entry, "size", torch.Size()) for name, entry in metadata.state_dict_metadata.items()}


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix ("model." or "optimizer."), whole, in one process, under their names without it."""
    shapes = {name: size for name, size in names_and_shapes(folder).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(size) for name, size in shapes.items()}
    if tensors:
        read_shards(folder, tensors, alone=True)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def plain_tensor(tensor: Tensor) -> Tensor:
    """The same storage without this package's subclass, so that reading needs no class of ours."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    wrapped = tensor.to_local()
    local = without_wrapper(wrapped)
    if local is wrapped:  # a copy in main memory, say, which from_local would move to the mesh's device
        return tensor
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", {})
    first = next(iter(failures.values()))[0] if failures else error
    return str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__
