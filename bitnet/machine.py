"""The machine: device, type of the matrix products, processor, memory."""

import contextlib
import ctypes
import functools
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAPPED_BLOCK = 1 << 20
"""Bytes from which a block of memory comes from the system and goes back to it, where every step may ask for others."""
MAPPED_BLOCK_COMPILED = 4 << 20
"""The same where a small compiled model trains: its steps ask for the same blocks again, and the heap has them."""


MAX_THREADS = 1024
"""More than any machine of ours has processors, and far below where starting them ends the process."""


# Processors


def use_threads(count: int | None) -> None:
    """Take so many CPU threads for torch and the native kernels; None: torch's own number. Raises ValueError for a
    number that no machine has."""
    if count is None:
        return
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"--threads is {count}; give 1 to {MAX_THREADS}, as many as cores are idle")
    torch.set_num_threads(count)


@functools.cache
def cpu_quota(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Processors that the control groups of this process give it (cgroup v1 and v2), rounded, at least 1; None where
    they set no limit."""
    found = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:  # "0::/group" of v2, "4:cpu,cpuacct:/group" of v1
        number, names, group = line.split(":", 2)
        if number == "0" and not names:
            folders = [mount]
        elif "cpu" in names.split(","):
            folders = [mount / "cpu", mount / names]
        else:
            continue
        for folder in folders:
            inside = folder / group.strip("/")
            for path in (inside, *inside.parents):
                if path.is_relative_to(folder):
                    found.append(_quota(path))
    limits = [quota for quota in found if quota]
    return max(1, round(min(limits))) if limits else None


def _quota(group: Path) -> float | None:
    for read in (
        lambda: (group / "cpu.max").read_text().split(),
        lambda: [(group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")],
    ):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (float(part) for part in read())  # "max" and -1: none
            if quota > 0:
                return quota / period
    return None


# Device and types


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` takes a GPU if there is one. Raises ValueError for one that isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); choose auto, cpu, cuda or cuda:N") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; `auto` is bfloat16 where the device multiplies it faster than float32, else float32.

    On a CPU that takes AMX tiles: without them bfloat16 products measured half as fast as float32.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        return torch.bfloat16 if cpu_capabilities().get("amx_bf16") else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def int8_pays(product: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether training multiplies int8 codes (`bitnet/kernels/int8_training.py`): `auto` does in float32 on a CPU with
    instructions for it. Raises ValueError for an int8 that is asked for elsewhere."""
    possible, asked = device.type == "cpu" and dtype == torch.float32, product.startswith("int8")
    if asked and not possible:
        raise ValueError(f"product {product} runs in float32 on a CPU, and this is {dtype} on {device}; choose auto")
    found = cpu_capabilities()
    fast = any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "avx2_vnni", "amx_int8", "neon_i8mm", "i8mm"))
    return asked or (product == "auto" and possible and fast)


def cpu_capabilities() -> dict[str, object]:
    """What torch knows of the processor (name, instruction sets, caches); empty where this version can't tell."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


# Memory


def process_memory(field: str = "VmHWM") -> float | None:
    """MB (10^6 bytes) of this process: VmRSS is what it holds, VmHWM the most since `reset_peak_memory`.

    Without /proc both are the most it ever held (ru_maxrss), and None on Windows.
    """
    with contextlib.suppress(OSError):
        if found := re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def reset_peak_memory() -> None:
    """Let `process_memory` forget the peak so far, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> float:
    """Bytes that could be taken now; infinite where the system does not tell."""
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def return_freed_blocks(border: int = MAPPED_BLOCK) -> None:
    """Have glibc take blocks above `border` bytes from the system and give them back, for this process from now on, and
    torch ask for huge pages where a tensor has 2 MiB.

    Its heap cannot put an aligned block into a gap of its own size, so a step took 1.0 to 1.7 times the memory that
    it used. What comes from the system is cleared page by page as it is written, which was a fifth of a small model's
    step. Does nothing elsewhere, or where the environment has MALLOC_MMAP_THRESHOLD_.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # -3 is M_MMAP_THRESHOLD, -1 is M_TRIM_THRESHOLD
        mallopt(-3, border)
        mallopt(-1, border)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at the first large block


# torch.compile


def has_compiler(device: torch.device) -> bool:
    """Whether the compiler that torch.compile needs on this device is there; whether it works is another question."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return device.type != "cpu" or any(name and shutil.which(name) for name in names)


def eager() -> contextlib.AbstractContextManager[None]:
    """Run compiled modules uncompiled inside a `with` block: for code whose shapes change at every call."""
    return torch.compiler.set_stance("force_eager")


def compiled() -> contextlib.AbstractContextManager[None]:
    """Run them compiled again, inside a block that is `eager`."""
    return torch.compiler.set_stance("default")
