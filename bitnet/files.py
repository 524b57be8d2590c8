"""Files that are written whole or not at all, and JSON objects, read with the reason where one cannot be."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

JsonObject = dict[str, Any]
"""Of a JSON file or a file's metadata: whoever reads a value checks it."""
JSON_LIMIT = 64 * 2**20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` in one step when the block ends, flushed to disk.

    Readers see the old or the new content, never a part. After an error, OSError or any other, the old file is
    untouched and nothing is left beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace a file in one step, as `replacing` does. Text is written as UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def fsync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    if os.name == "posix":  # elsewhere a folder can't be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder to fill, which then appears under its name whole, or not at all. Raises OSError, naming `what` was to
    be written, also for a folder that exists."""
    if folder.exists():
        raise OSError(f"{folder} already exists; choose another name or delete it")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise OSError(f"the {what} was not written to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file. Raises FileNotFoundError, and ValueError, naming the file, for one that is damaged,
    larger than `JSON_LIMIT` bytes, or holds something else."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise ValueError(f"{path} has {size:,} bytes; a file of this name has a few thousand")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value
