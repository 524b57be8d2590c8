"""Mutations of good files, from a fixed seed, and what may come of opening them."""

import contextlib
import json
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tests.timing import within

Result = TypeVar("Result")
SECONDS, MEMORY = 1.0, 300_000_000
"""What one attempt may take: of this process' own time, and of memory beyond the file and what was there before."""
ADDRESSES = 1 << 30
MANY = 10 if os.environ.get("BITNET_LONG") == "1" else 1  # ten times as many mutations
NUMBERS = [
    0,
    1,
    2,
    3,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "../x", "/etc/passwd", "\u0000", "U8", "F64", [], {}, [0, 1 << 62], [1, 2, 3, 4], {"a": 1}, [[]],
]  # fmt: skip


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """At most a gigabyte more of address space, where the system can say so."""
    try:
        import resource
    except ImportError:
        yield
        return
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    size = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmSize")) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _memory(name: str) -> int | None:
    """Bytes of this process by a name of /proc/self/status, where there is one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


def bounded(what: object, attempt: Callable[[], Result], size: int = 0) -> Result:
    """One attempt on a file of so many bytes: asserts that it takes little time and memory, whatever comes of it.

    What it imports or compiles late should be there: attempt the good file before.
    """
    before = _memory("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = within(SECONDS, attempt, what)
    peak = _memory("VmHWM")
    more = 0 if before is None or peak is None else peak - before
    assert more < size + MEMORY, f"{more:,} bytes: {what!r:.2000}"
    return result


def outcome(load: Callable[[], object]) -> str:
    """ "opened" or "refused": only ValueError may come out, and it must say something."""
    try:
        load()
    except ValueError as error:
        return "refused" if str(error) else "refused without a word"
    return "opened"


def mutate(content: bytes, rng: random.Random, header: int) -> bytes:
    """One of the usual accidents and attacks, within the first `header` bytes."""
    data = bytearray(content)
    place = rng.randrange(min(header, len(data)))
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(header, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.randrange(256)
    elif kind == 2:
        number = rng.choice(NUMBERS) + rng.randint(-1, 1)
        layout = rng.choice(["<I", "<Q", ">I", ">Q"])
        packed = struct.pack(layout, number % (1 << (32 if layout[1] == "I" else 64)))
        data[place : place + len(packed)] = packed
    elif kind == 3:
        del data[place:]
    elif kind == 4:
        del data[place : place + rng.randint(1, 9)]
    elif kind == 5:
        data[place:place] = rng.randbytes(rng.randint(1, 9))
    else:
        source = rng.randrange(len(data))
        data[place : place + 16] = data[source : source + rng.randint(1, 16)]
    return bytes(data)


def mutate_json(value: object, rng: random.Random) -> object:
    """A copy of a JSON value with something in it replaced, removed, renamed or nested."""
    value = json.loads(json.dumps(value))
    holder: object = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return rng.choice(VALUES)
        key = rng.choice(keys[:400])
        if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.15:
            break
        holder = holder[key]
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(key) + rng.choice(["x", "\u0000", " "])] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] * rng.choice([-1, 2, 1000, 10**9]) + rng.randint(-1, 1)
    else:
        holder[key] = rng.choice(VALUES)
    return value


def fuzz(
    attempts: int, seed: int, prepare: Callable[[random.Random], object], load: Callable[[], object]
) -> Counter[str]:
    """Try `load` after every `prepare`; only ValueError may come out. Returns how often it opened and failed."""
    rng, counts = random.Random(seed), Counter[str]()
    load()  # the file is good as it is, and what is imported late is now there
    with limited_memory():
        for attempt in range(attempts * MANY):
            what = prepare(rng)
            try:
                counts[bounded(what, lambda: outcome(load))] += 1
            except BaseException as error:
                raise AssertionError(
                    f"attempt {attempt} with {what!r:.2000}: {type(error).__name__}: {error}"
                ) from error
    assert not counts["refused without a word"], counts
    assert counts["refused"] > attempts * MANY // 20, counts
    return counts


def prepare_file(path: Path, header: int | None = None) -> Callable[[random.Random], bytes]:
    """Mutations of a file in its place."""
    good = path.read_bytes()

    def prepare(rng: random.Random) -> bytes:
        bad = mutate(good, rng, header or len(good))
        path.write_bytes(bad)
        return bad[: header or 300]

    return prepare


def prepare_json(path: Path) -> Callable[[random.Random], object]:
    good = json.loads(path.read_text())

    def prepare(rng: random.Random) -> object:
        if rng.random() < 0.2:
            bad = mutate(json.dumps(good).encode(), rng, 1 << 20)
        else:
            bad = json.dumps(mutate_json(good, rng)).encode()
        path.write_bytes(bad)
        return bad

    return prepare


def prepare_safetensors(path: Path) -> Callable[[random.Random], object]:
    """Mutations of the JSON header, its length and its first bytes."""
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])

    def prepare(rng: random.Random) -> object:
        if rng.random() < 0.4:
            bad = mutate(good, rng, size + 16)
        else:
            text = json.dumps(mutate_json(header, rng)).encode()
            bad = struct.pack("<Q", len(text)) + text + good[8 + size :]
        path.write_bytes(bad)
        return bad[: size + 16]

    return prepare
