"""Folders of shards as earlier versions wrote them (torch.distributed.checkpoint), read without running what they say.

    shards/.metadata        a pickle: which tensor has which rows at which place of which file
    shards/__0_0.distcp     tensors, one behind the other, each as `torch.save` writes it

A pickle is a program that may call anything by name. Here the names are looked up in a list of what such folders need,
and each is a record that only remembers what it was given: nothing of torch, and nothing else, is called. The tensors
are read by `torch.load(weights_only=True)`, which does the same.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.files import JSON_LIMIT, is_plain_file

METADATA = ".metadata"


class Record:
    """What a pickle says of an object: its state, by the names of its fields."""

    state: Mapping[str, Any] = {}

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


def _tuple(values: object = ()) -> tuple[object, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else ()


_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_RECORDS = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
    (_FILES, "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}
_VALUES = {name: name for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "strided")}


class _Unpickler(pickle._Unpickler):
    """The pure Python one: C's makes room for as many remembered values as a file says there are."""

    # Without what such folders do not have: arrays of a size that is only claimed, objects by number or by address.
    dispatch = {  # noqa: RUF012 - pickle's own way
        code: action
        for code, action in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (b"\x96", b"\x97", b"\x98", b"\x82", b"\x83", b"\x84", b"P", b"Q")
    }

    def find_class(self, module: str, name: str) -> Callable[..., object] | str:
        if (module, name) in _RECORDS:
            return Record
        if module == "torch" and name in _VALUES:
            return _VALUES[name]
        if (module, name) == ("torch", "Size"):
            return _tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(f"{METADATA} names {module}.{name}, which no checkpoint needs; it was made to run code")


def unpickle(path: Path) -> Any:
    """What a pickled index says, in records. Raises ValueError for anything else."""
    if not is_plain_file(path) or path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path} is no index of shards")
    try:
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except ValueError:
        raise
    except (Exception, RecursionError) as error:  # whatever a damaged pickle breaks
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error


class OldShards:
    """Rows of tensors in such a folder. Raises ValueError for one that is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._chunks: dict[str, dict[int, tuple[int, str, int, int]]] = {}
        try:
            self._read_index(unpickle(folder / METADATA))
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{METADATA} is no index of shards ({type(error).__name__}: {error})") from error

    def _read_index(self, metadata: Any) -> None:
        for name, entry in metadata.state["state_dict_metadata"].items():
            if "size" not in entry.state:
                raise ValueError(f"{name} is no tensor; it could be any object")
            self.shapes[name] = torch.Size(entry.state["size"])
            self._chunks[name] = {}
        for key, info in metadata.state["storage_data"].items():
            name, start = key.state["fqn"], key.state["offset"]
            path, offset, length = (info.state[field] for field in ("relative_path", "offset", "length"))
            if info.state.get("transform_descriptors") or not all(type(n) is int and n >= 0 for n in (offset, length)):
                raise ValueError(f"the place of {name} is of an unknown kind")
            if not isinstance(path, str) or path != Path(path).name or not is_plain_file(self.folder / path):
                raise ValueError(f"{METADATA} names the file {str(path)!r:.80}; it names files inside the folder")
            first = start[0] if start else 0
            if type(first) is not int or any(start[1:] if start else ()):
                raise ValueError(f"{name} is cut otherwise than into rows")
            self._chunks[name][first] = (first, path, offset, length)

    def read(self, name: str, first: int, rows: int) -> Tensor:
        """Rows of a tensor, `[rows, ...]`; a scalar as it is."""
        shape, found, end = self.shapes[name], [], 0
        for begin, path, offset, length in sorted(self._chunks[name].values()):
            if begin != end:
                raise ValueError(f"rows {end} to {begin} of {name} are nowhere, or twice")
            part = self._load(path, offset, length)
            if not isinstance(part, Tensor) or part.shape[1:] != shape[1:] or part.ndim != len(shape):
                raise ValueError(f"a part of {name} is no rows of a tensor of {list(shape)}")
            if not shape:
                return part
            end = begin + len(part)
            if begin < first + rows and first < end:
                found.append(part[max(0, first - begin) : first + rows - begin])
        if end < first + rows:
            raise ValueError(f"{name} ends at row {end}")
        return torch.cat(found)

    def _load(self, path: str, offset: int, length: int) -> object:
        with open(self.folder / path, "rb") as file:
            file.seek(offset)
            content = file.read(min(length, (self.folder / path).stat().st_size))
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip: whatever a damaged file breaks
            raise ValueError(f"{path} is damaged: {str(error).splitlines()[0] if str(error) else error}") from error
