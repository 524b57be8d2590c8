"""Files that are written whole or not at all, folders that one program at a time works in, and JSON objects, read with
the reason where one cannot be.

What is being written has a name of its own, `.NAME.tmp-<hex>`, and is locked by its writer. One without a lock was left
by a writer that was killed: the next one of the same NAME removes it. Without POSIX locks (Windows) that can't be told,
and such remains stay.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

JsonObject = dict[str, Any]
"""Of a JSON file or a file's metadata: whoever reads a value checks it (bitnet/records.py)."""
JSON_LIMIT = 64 * 2**20
LOCK = ".lock"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` in one step when the block ends, flushed to disk.

    Readers see the old or the new content, never a part. After an error, OSError or any other, the old file is
    untouched and nothing is left beside it.
    """
    path = Path(path)
    remove_remains(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            _try_lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "posix":  # before the lock goes, lest another writer takes the file for remains
                os.replace(temporary, path)
        if os.name != "posix":  # where an open file cannot be renamed
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
    remove_remains(folder)
    temporary = _temporary(folder)
    try:
        temporary.mkdir(parents=True)
        with _held(temporary):
            yield temporary
            os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise OSError(f"the {what} was not written to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise OSError, before the work, where nothing can be written under this name behind it."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: nothing may be written into {folder}")


def remove_remains(path: Path) -> None:
    """Remove what killed writers of this file or folder have left beside it."""
    name = re.compile(re.escape(f".{path.name}.tmp-") + "[0-9a-f]+")
    try:
        found = [each.name for each in os.scandir(path.parent) if name.fullmatch(each.name)]
    except OSError:  # no such folder yet, or none that can be read
        return
    for each in found:
        _remove_if_abandoned(path.parent / each)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(5)}")


def _remove_if_abandoned(path: Path) -> None:
    """Remove a file or folder that a writer has left, unless its lock is held or cannot be asked for."""
    if path.is_symlink():  # no writer of ours makes one
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # gone, or on Windows a folder
        return
    try:
        if _try_lock(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed; False where another process has, None where nobody can."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The lock of a folder of our own, where folders have locks."""
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def working_in(folder: Path, what: str) -> Iterator[None]:
    """Keep other programs that ask for it out of a folder, which is made where there is none, and goes again if nothing
    was put into it. Raises ValueError, naming `what` is done there and by which process, where another one is in it.

    The lock is of the file `.lock`, which a program that is killed leaves behind without the lock.
    """
    made, path = [place for place in (folder, *folder.parents) if not place.exists()], folder / LOCK
    file = _locked_file(path)
    if file is None:
        raise ValueError(
            f"another program is at work in {folder} ({_owner(path)}), and two would mix up its files; wait until it "
            f"has ended, or give the {what} another folder"
        )
    try:
        with file:
            file.truncate(0)
            file.write(f"process {os.getpid()}: {what}\n".encode())
            file.flush()
            try:
                yield
            finally:
                if os.name == "posix":
                    path.unlink(missing_ok=True)
    finally:
        if os.name != "posix":  # where an open file cannot be removed
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty
            for place in made:
                place.rmdir()


def _locked_file(path: Path) -> BinaryIO | None:
    """The lock file, open and locked, or None where another process has it. A file system without locks has none that
    could be held."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+b")  # noqa: SIM115 - open as long as it is locked
        except FileNotFoundError:  # the folder went with its last holder
            if path.is_symlink():
                raise
            continue
        held = _lock_byte(file) if os.name == "nt" else _try_lock(file.fileno())
        if held is False:
            file.close()
            return None
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its last holder has removed it meanwhile


def _lock_byte(file: BinaryIO) -> bool:
    """Windows: lock a byte far behind the end of a file, until it is closed."""
    import msvcrt

    file.seek(1 << 30)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


def _owner(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(200).decode(errors="replace").strip() or "it says no more"
    except OSError:
        return "it says no more"


def is_plain_file(path: Path) -> bool:
    """Whether a path is a regular file, or a link to one: reading it ends."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return False


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file. Raises FileNotFoundError, and ValueError, naming the file, for one that is damaged,
    larger than `JSON_LIMIT` bytes, or holds something else."""
    if path.exists() and not is_plain_file(path):  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise ValueError(f"{path} has {size:,} bytes; a file of this name has a few thousand")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for one that cannot be read, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
