"""Compile kernels in several processes at once, before they are needed.

What some calls would launch is recorded, each variant is compiled once in a pool of processes, and the machine code
stays in Triton's cache folder, where the first real launch finds it. A model has 40 to 60 variants and a variant takes
0.5 to 1.5 s of one core, which otherwise passes in silence, a little at every prompt of a new length.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bitnet.files import write_atomic
from bitnet.kernels.triton.language import cache_folder, device_name, record, triton

# Module and name of a kernel, its arguments' types (17 for a number), constants and options: all of it pickles.
Variant = tuple[str, str, tuple[Any, ...], dict[str, Any], dict[str, Any]]
Row = dict[str, Any]


def variants_of(calls: Iterable[Callable[[], object]], assembly: str = "ptx") -> list[Variant]:
    """The kernel variants that the calls would launch on the GPU whose tensors they use. Nothing is launched, so what
    the calls return is garbage; one that stumbles over it ends there, with the launches until then."""
    found: dict[str, Variant] = {}
    for call in calls:
        with record(assembly) as launches:
            try:
                call()
            except (ValueError, RuntimeError, IndexError):
                if not launches:
                    raise
        for each in launches:
            # Numbers that are no constants (M, T) are not specialized, so any one stands for all.
            kinds = tuple(v.dtype if isinstance(v, torch.Tensor) else 17 for v in each.arguments.values())
            variant = (each.kernel.fn.__module__, each.kernel.fn.__name__, kinds, each.constants, each.options)
            found.setdefault(repr(variant), variant)
    return list(found.values())


def compile_variant(variant: Variant) -> Row:
    """Compile one variant and load it onto the current device, which tells what a launch would find out: too much
    shared memory, too many threads. A row of results; `error` holds what went wrong."""
    module, name, kinds, constants, options = variant
    row: Row = {"kernel": name, "constants": {key: str(value) for key, value in constants.items()}}
    try:
        kernel = getattr(importlib.import_module(module), name).warmup(*kinds, grid=(1,), **constants, **options)
        kernel._init_handles()
        return row | {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared}
    except Exception as error:  # whatever a compiler or a driver says; the others go on
        return row | {"error": f"{type(error).__name__}: {error}"[:600]}


def compile_all(variants: list[Variant], processes: int | None = None) -> Iterator[Row]:
    """A row of results for each variant as it is ready. Those of a process that crashed are missing."""
    processes = processes or max(1, min(16, len(variants) // 2, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(compile_variant, variant) for variant in variants]):
            try:
                yield future.result()
            except BrokenProcessPool:
                return


def mark_of(variants: list[Variant], device: torch.device) -> Path:
    """The file that says that these variants lie in Triton's cache: asking Triton for each would take processes of its
    own. Its name depends on the kernels' source, Triton's version and the GPU."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    key = repr((triton.__version__, device_name(device), sorted(map(repr, variants)), sources))
    return cache_folder() / "compiled" / hashlib.sha256(key.encode()).hexdigest()


def compile_missing(variants: list[Variant], device: torch.device) -> Iterator[Row]:
    """`compile_all`, unless these variants were compiled before with the same cache."""
    mark = mark_of(variants, device)
    if mark.exists():
        return
    failed = 0
    for row in compile_all(variants):
        failed += "error" in row
        yield row
    if not failed:
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(mark, "")
