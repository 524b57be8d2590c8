"""Tensors that are spread over processes, on disk: a safetensors file of each process, and a JSON index of all.

    shards/index.json               {"tensors": {name: {"shape": [4, 3], "parts": [PART, ...]}}}
                                    PART is {"file": "part-00000.safetensors", "first": 0, "rows": 2}
    shards/part-00000.safetensors   rows 0 and 1 of that tensor, under its name, and so on

Any number of processes can read a folder, each its own rows. Names are those of the safetensors form, `model.` before
the model's and `optimizer.` before the optimizer's. Nothing is pickled; folders of earlier versions, which were, are
read by bitnet/training/old_shards.py, which runs nothing that they say.

    bitnet consolidate runs/big           model.safetensors and optimizer.safetensors beside the shards
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bitnet.files import write_atomic
from bitnet.storage.json_files import Bounds, Count, Form, load_record
from bitnet.storage.safetensors import Tensors, open_tensors, save_tensors
from bitnet.training.old_shards import METADATA, OldShards
from bitnet.training.sharding import local_part, without_wrapper

INDEX = "index.json"


@dataclass(frozen=True)
class Part:
    """Rows of a tensor; a scalar is one row."""

    file: Annotated[str, Form(r"part-\d{5}\.safetensors", "the name of a part, like part-00000.safetensors")]
    first: Count
    rows: Count


@dataclass(frozen=True)
class Stored:
    shape: Annotated[list[Count], Bounds(0, 8)]
    parts: list[Part]

    def __post_init__(self) -> None:
        """Refuse parts that are not one behind the other."""
        end = 0
        for part in self.parts:
            if part.first != end:
                raise ValueError(f"rows {end} to {part.first} are nowhere, or twice")
            end += part.rows
        if end != (self.shape[0] if self.shape else 1):
            raise ValueError(f"there are {end} rows of a tensor of {self.shape}")


@dataclass(frozen=True)
class ShardIndex:
    tensors: dict[str, Stored]


class Shards(Protocol):
    """A folder of shards, of either form."""

    shapes: dict[str, torch.Size]

    def read(self, name: str, first: int, rows: int) -> Tensor:
        """Rows of a tensor, `[rows, ...]`; a scalar as it is."""


class NewShards:
    """The form of this file. Raises ValueError for an index and files that do not fit."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        index = load_record(folder / INDEX, ShardIndex)
        self.shapes = {name: torch.Size(entry.shape) for name, entry in index.tensors.items()}
        self._entries, self._files = index.tensors, dict[str, Tensors]()
        for name, entry in self._entries.items():
            for part in entry.parts:
                if part.file not in self._files:
                    self._files[part.file] = stack.enter_context(open_tensors(folder / part.file))
                file = self._files[part.file]
                if name not in file.names or file.shape(name) != [*[part.rows][: len(entry.shape)], *entry.shape[1:]]:
                    raise ValueError(f"{part.file} does not hold the rows of {name} that {INDEX} says")

    def read(self, name: str, first: int, rows: int) -> Tensor:
        entry = self._entries[name]
        if not entry.shape:
            return self._files[entry.parts[0].file].read(name)
        found = []
        for part in entry.parts:
            begin, end = max(first, part.first), min(first + rows, part.first + part.rows)
            if begin < end:
                found.append(self._files[part.file].read_rows(name, begin - part.first, end - part.first))
        return found[0] if len(found) == 1 else torch.cat(found)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: "dist.ProcessGroup | None" = None) -> None:
    """Write this process's rows of every tensor; every process (of the group) must call it. Raises OSError in all of
    them where one cannot write."""
    together = dist.is_initialized()
    rank = dist.get_rank(group) if together else 0
    name = f"part-{rank:05d}.safetensors"
    mine: dict[str, tuple[list[int], Part]] = {}
    written: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        first, rows, local = _rows_of(tensor)
        # What every process has is the first one's to write.
        if rows and (rank == 0 or rows < (tensor.shape[0] if tensor.ndim else 1)):
            mine[key], written[key] = (list(tensor.shape), Part(name, first, rows)), local
    error: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / name, written)
    except OSError as problem:
        error = str(problem)
    everyone: list[Any] = [(mine, error)]
    if together:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (mine, error), group=group)
    if errors := [problem for _, problem in everyone if problem]:
        raise OSError(f"shards were not written to {folder}: {errors[0]}")
    if rank == 0:
        entries: dict[str, Stored] = {}
        for key in tensors:
            found = [parts[key] for parts, _ in everyone if key in parts]
            entries[key] = Stored(list(tensors[key].shape), sorted((part for _, part in found), key=lambda p: p.first))
        write_atomic(folder / INDEX, json.dumps(dataclasses.asdict(ShardIndex(entries))))


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or sharded over any number of processes, from a folder of shards, each process its own rows.

    Raises ValueError for shards that are damaged, or do not hold one of the tensors.
    """
    with _open(folder) as shards:
        for name, tensor in tensors.items():
            if name not in shards.shapes:
                raise ValueError(f"there is no {name}")
            if shards.shapes[name] != tensor.shape:
                raise ValueError(f"{name} is {list(shards.shapes[name])} and not {list(tensor.shape)}")
            first, rows, local = _rows_of(tensor)
            if rows and local.numel():
                local.copy_(shards.read(name, first, rows))


def names_and_shapes(folder: Path) -> dict[str, torch.Size]:
    """What a folder of shards holds. Raises ValueError where it cannot be read."""
    with _open(folder) as shards:
        return shards.shapes


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix ("model." or "optimizer."), whole, in one process, under their names without it."""
    with _open(folder) as shards:
        return {
            name.removeprefix(prefix): shards.read(name, 0, shape[0] if shape else 1)
            for name, shape in shards.shapes.items()
            if name.startswith(prefix)
        }


@contextmanager
def _open(folder: Path) -> Iterator[Shards]:
    """The shards of a folder. Raises ValueError naming it for whatever is wrong with it, in the block too."""
    try:
        with ExitStack() as stack:
            old = not (folder / INDEX).exists() and (folder / METADATA).exists()
            yield OldShards(folder) if old else NewShards(folder, stack)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"the shards in {folder} cannot be read: {error}; use another checkpoint") from error


def _rows_of(tensor: Tensor) -> tuple[int, int, Tensor]:
    """The first row that this process has of a tensor, the number of them, and these rows, sharing the memory."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.ndim else 1, tensor
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape[1:]) == tuple(tensor.shape[1:]), "shards are rows"
    return start[0], shape[0], local_part(tensor)


def plain_tensor(tensor: Tensor) -> Tensor:
    """The same storage without this package's subclass, which torch's staging does not know."""
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
