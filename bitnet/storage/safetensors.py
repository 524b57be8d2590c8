"""Tensors on disk: one reader and one writer of safetensors files.

Nothing is pickled, so opening a file runs no code. Headers are read when a file is opened, and a tensor when it is
asked for; from then on the file is hashed in a thread, where there is a sum of it beside it
(bitnet/storage/checksums.py). What is wrong with a file is a CheckpointError that names it.
"""

import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitnet.files import is_plain_file
from bitnet.storage.checksums import verifying
from bitnet.storage.json_files import CheckpointError, load_json

CONFIG, MODEL, MODEL_PARTS = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Tensors:
    """The tensors of one safetensors file, or of the several files of a model, by name."""

    def __init__(self, files: Mapping[str, safe_open], path: Path, verify: Callable[[safe_open], None]) -> None:
        """verify: called with a file before a tensor of it is read."""
        self._files, self.path, self._verify = files, path, verify

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def kind(self, name: str) -> str:
        """The stored type, as safetensors calls it: F32, BF16, U8, ..."""
        return str(self._files[name].get_slice(name).get_dtype())

    def shape(self, name: str) -> list[int]:
        return list(self._files[name].get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * _BYTES.get(self.kind(name), 1)

    def metadata(self) -> dict[str, str]:
        """What the files say of themselves."""
        return {
            key: value for file in dict.fromkeys(self._files.values()) for key, value in (file.metadata() or {}).items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own or mapped from the file: copy what is to stay."""
        return self._read(name, None)

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows of a tensor, `[end - first, ...]`."""
        return self._read(name, slice(first, end))

    def _read(self, name: str, rows: slice | None) -> Tensor:
        if name not in self._files:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        file = self._files[name]
        self._verify(file)
        try:
            tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self._files}

    def check(self, name: str, shape: Iterable[int], kinds: Iterable[str]) -> None:
        """Raise CheckpointError unless the header says this shape and one of these types."""
        found, expected = self.shape(name), list(shape)
        if found != expected:
            raise CheckpointError(
                f"{self.path}: {name} is {found} and {CONFIG} says {expected}; they are of two models"
            )
        if self.kind(name) not in kinds:
            hint = ""
            if self.kind(name) == "U8":
                hint = f"; these look like packed codes, and {CONFIG} has no quantization_config for them"
            raise CheckpointError(f"{self.path}: {name} is {self.kind(name)}, not {' or '.join(sorted(kinds))}{hint}")


@contextmanager
def open_tensors(path: Path, device: torch.device | str = "cpu", *, verify: bool = True) -> Iterator[Tensors]:
    """The tensors of a safetensors file, or of a folder that has `MODEL` or its parts, to be read onto a device.

    verify: compare each file that a tensor is read of with its sum, if there is one, before the block ends. Raises
    CheckpointError for files that are missing, truncated or foreign, or not what was written.
    """
    wanted = None
    paths = [path]
    if path.is_dir():
        if not (path / MODEL).is_file():
            wanted = _weight_map(path)
        paths = [path / name for name in (sorted(set(wanted.values())) if wanted else [MODEL])]
    files: dict[str, safe_open] = {}
    with ExitStack() as stack:
        unverified: dict[safe_open, Path] = {}

        def begin(file: safe_open) -> None:
            if verify and file in unverified:
                stack.enter_context(verifying(unverified.pop(file)))

        for part in paths:
            file = stack.enter_context(_open(part, device))
            unverified[file] = part
            files.update({name: file for name in file.keys() if not wanted or wanted.get(name) == part.name})  # noqa: SIM118 - not a dict
        if wanted is not None and (absent := sorted(set(wanted) - set(files))):
            raise CheckpointError(
                f"{path / MODEL_PARTS} places {absent[0]} in {wanted[absent[0]]}, which does not hold it"
            )
        yield Tensors(files, path, begin)


def _open(path: Path, device: torch.device | str) -> safe_open:
    if path.exists() and not is_plain_file(path):  # a pipe would be waited for
        raise CheckpointError(f"{path} is not a file; give a whole model")
    try:
        return safe_open(path, framework="pt", device=str(device))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} the folder of a whole model?") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); it was truncated or is of another format. "
            "Use another checkpoint of the run, or download the model again"
        ) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file of a folder holds which tensor."""
    path = folder / MODEL_PARTS
    if not path.is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise CheckpointError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code when it is loaded; save "
                "the model again with transformers' save_pretrained (safetensors), or take a revision that has them"
            )
        raise CheckpointError(f"{folder} has no {MODEL} and no {MODEL_PARTS}; is it the folder of a model?")
    wanted = load_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not wanted:
        raise CheckpointError(f"{path} has no weight_map; it is not an index of shards")
    for name in set(map(str, wanted.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name, re.ASCII):
            raise CheckpointError(f"{path} names the shard {name!r}; a shard is a .safetensors file inside the folder")
        if not is_plain_file(folder / name):
            raise CheckpointError(f"{path} names {name}, which is not there; download the model again")
    return wanted


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError as `open_tensors` does."""
    with open_tensors(path, device) as tensors:
        return tensors.read_all()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, flushed to disk. Raises OSError."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # as this process makes files; safetensors' are private to the user
    try:
        save_file(contiguous, path, metadata={"format": "pt"})  # which transformers asks of a file before it reads it
    except SafetensorError as error:
        raise OSError(f"{path} was not written: {error}") from error
    os.chmod(path, stat.S_IMODE(mode))
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
