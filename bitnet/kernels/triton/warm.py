"""Compile kernels in several processes at once, before they are needed.

What some calls would launch is recorded, each variant is compiled once in a pool of processes, and the machine code
stays in Triton's cache folder, where the first real launch finds it. A model has 40 to 60 variants and a variant takes
0.5 to 1.5 s of one core, which otherwise passes in silence, a little at every prompt of a new length.
"""

import hashlib
import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bitnet.files import write_atomic
from bitnet.kernels.triton.language import cache_folder, device_name, record, triton

# Module and name of a kernel, its arguments' types (17 or 1.5 for a number), constants and options: all of it pickles.
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
            kinds = tuple(
                v.dtype if isinstance(v, torch.Tensor) else 1.5 if isinstance(v, float) else 17
                for v in each.arguments.values()
            )
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
    """A row of results for each variant as it is ready, with `error` where it or its process failed."""
    processes = processes or max(1, min(16, len(variants) // 2, (os.cpu_count() or 2) - 2))
    todo: queue.SimpleQueue[Variant] = queue.SimpleQueue()
    done: queue.SimpleQueue[Row] = queue.SimpleQueue()
    for variant in variants:
        todo.put(variant)
    for _ in range(min(processes, len(variants))):
        threading.Thread(target=_feed, args=(todo, done), daemon=True).start()
    for _ in variants:
        yield done.get()


def _feed(todo: "queue.SimpleQueue[Variant]", done: "queue.SimpleQueue[Row]") -> None:
    # A process of our own, since multiprocessing's would run the caller's script again, unless it guards against that.
    command = [sys.executable, "-c", f"from {__name__} import work; work()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    worker: subprocess.Popen[bytes] | None = None
    while True:
        try:
            variant = todo.get_nowait()
        except queue.Empty:
            break
        try:
            if worker is None:
                worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            assert worker.stdin is not None
            assert worker.stdout is not None
            pickle.dump(variant, worker.stdin)
            worker.stdin.flush()
            done.put(pickle.load(worker.stdout))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code, worker = worker.wait() if worker else None, None
            done.put({"kernel": variant[1], "error": f"its process ended with code {code}: {error}"})
    if worker is not None:
        worker.communicate()


def work() -> None:
    """Compile variants that come pickled on standard input and answer with rows, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    while True:
        try:
            variant = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(compile_variant(variant), answers)
        answers.flush()


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
