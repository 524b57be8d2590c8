"""Sums of what was written: `checksums.json` in our own folders, {"model.safetensors": its SHA-256, ...}.

Whoever opens weights compares them while reading: `verifying(path)` hashes in a thread beside what the block does with
the same file, which the disk is asked for once.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from bitnet.files import is_plain_file, write_atomic
from bitnet.records import Form, checked
from bitnet.storage.json_files import CheckpointError, load_json

CHECKSUMS = "checksums.json"
CHUNK = 4 << 20

Sum = Annotated[str, Form("[0-9a-f]{64}", "a SHA-256, 64 hexadecimal digits")]


def write_sums(folder: Path) -> None:
    """Write the sums of all files of a folder into it. Raises OSError."""
    files = sorted(p for p in folder.rglob("*") if is_plain_file(p) and p.name != CHECKSUMS and ".tmp-" not in p.name)
    sums = {path.relative_to(folder).as_posix(): file_sum(path) for path in files}
    write_atomic(folder / CHECKSUMS, json.dumps(sums, indent=1))


def read_sums(folder: Path) -> dict[str, str] | None:
    """The sums by the names of files, None for a folder without. Raises CheckpointError for a damaged file and for
    names that lead out of the folder."""
    if not (folder / CHECKSUMS).exists():
        return None
    value = load_json(folder / CHECKSUMS)
    for name in value:
        parts = name.split("/")
        if len(parts) > 2 or not all(re.fullmatch(r"\.?\w[\w.@+-]*", part, re.ASCII) for part in parts):
            raise CheckpointError(f"{folder / CHECKSUMS} names {name!r:.80}; it names files inside the folder")
    try:
        return checked(dict[str, Sum], value, str(folder / CHECKSUMS))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def file_sum(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file; of its beginning, once `stop` is set. Raises OSError."""
    sha, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while (size := file.readinto(buffer)) and not (stop and stop.is_set()):
            sha.update(memoryview(buffer)[:size])
    return sha.hexdigest()


def verify(folder: Path) -> str | None:
    """What is wrong with the files of a folder, or None: a sum that differs, a file that is missing, or no sums."""
    try:
        sums = read_sums(folder)
        if sums is None:
            return f"there is no {CHECKSUMS}"
        for name, expected in sums.items():
            if not is_plain_file(folder / name):
                return f"{name} is missing or not a file"
            if file_sum(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


@contextmanager
def verifying(path: Path) -> Iterator[None]:
    """Hash a file beside the block, where there is a sum of it. Raises CheckpointError at the end, also in place of a
    ValueError of the block, if it is not what was written."""
    sums = read_sums(path.parent)
    expected = (sums or {}).get(path.name)
    if expected is None or not is_plain_file(path):
        yield
        return
    found: list[str] = []
    stop = threading.Event()
    thread = threading.Thread(target=lambda: found.append(file_sum(path, stop)), daemon=True)
    thread.start()
    failure: ValueError | None = None
    try:
        yield
    except ValueError as error:
        failure = error
    except BaseException:
        stop.set()
        raise
    finally:
        thread.join()
    if found != [expected]:
        raise CheckpointError(
            f"{path} is not what was written: its SHA-256 is another one than {CHECKSUMS} says. The file was damaged "
            f"or changed; use another checkpoint or copy, or delete {CHECKSUMS} if you changed it yourself"
        ) from failure
    if failure:
        raise failure


def sum_of_weights(model: nn.Module) -> str:
    """SHA-256 of a model's tensors and their names, hex, whatever file they are from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
