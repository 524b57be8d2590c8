"""Triton itself, which only this file imports, the one way to launch a kernel, and what several kernels share.

`bitnet/kernels/triton/__init__.py` imports this file and the operations beside it when one of them is first used, so
a machine without Triton can import the package. `record()` collects launches instead of running them: the tests
compile, for a GPU that is not there, exactly what a call would have launched.
"""

# mypy: disable-error-code="no-untyped-def, valid-type, name-defined"

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _load() -> tuple[Any, Any]:
    import triton
    import triton.language

    return triton, triton.language


triton, tl = _load()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The kernels run in Triton's interpreter, on CPU tensors; the variable counts when Triton is imported."""


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: tensors and numbers by parameter name, constants apart."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]


_recorded: list[Launch] | None = None
_assembly: str | None = None
_dependent: bool | None = None
_shared: int | None = None


@contextmanager
def record(assembly: str, *, dependent: bool | None = None, shared: int | None = None) -> Iterator[list[Launch]]:
    """Collect the launches inside the `with` block, which then do nothing; `assembly` as `assembly()` returns it,
    `dependent` and `shared` as `dependent_launch()` and `shared_memory()` do, by default what the device has."""
    global _recorded, _assembly, _dependent, _shared
    previous = _recorded, _assembly, _dependent, _shared
    _recorded, _assembly, _dependent, _shared = [], assembly, dependent, shared
    try:
        yield _recorded
    finally:
        _recorded, _assembly, _dependent, _shared = previous


def recording() -> bool:
    return _recorded is not None


def assembly() -> str:
    """Which inline assembly a kernel may hold: "ptx", "gcn" (AMD CDNA3) or "none", for the interpreter."""
    if _assembly is not None:
        return _assembly
    if INTERPRETED:
        return "none"
    return "ptx" if torch.version.hip is None else "gcn"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; without a GPU those of an A100, or of an MI300."""
    if _shared is not None:
        return _shared
    if device.type == "cuda":
        found = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
        if found is not None:
            return int(found)
    return 65_536 if assembly() == "gcn" else 166_912


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels start while the one before still runs, and wait for it themselves ("programmatic dependent
    launch"): NVIDIA GPUs of compute capability 9.0 and later."""
    if _dependent is not None:
        return _dependent
    return device.type == "cuda" and assembly() == "ptx" and _capability(device) >= (9, 0)


def device_name(device: torch.device) -> str:
    """As a part of a file's name."""
    if device.type != "cuda" or recording():
        return "none"
    return torch.cuda.get_device_name(device).replace("/", " ")


def cache_folder() -> Path:
    """Where what was found out about this machine's kernels is kept, in Triton's own cache."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "bitnet"


@contextmanager
def dependent_launches(wanted: bool | None) -> Iterator[None]:
    """Inside the `with` block `dependent_launch` answers this, with None what the device can do."""
    global _dependent
    previous, _dependent = _dependent, wanted
    try:
        yield
    finally:
        _dependent = previous


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def launch(
    kernel: Any, grid: tuple[int, ...], *tensors: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` on the device of its first tensor. `constants` are its constexpr parameters.

    Multiplications and additions are not fused: the epilogues round as torch does. A kernel with a parameter PDL is
    told there whether it was launched ahead of the end of the kernel before, so that it must wait.
    """
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if "PDL" in kernel.arg_names:
        constants["PDL"] = dependent_launch(tensors[0].device)
        if constants["PDL"]:
            options["launch_pdl"] = True
    if _recorded is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        arguments = dict(zip(names, tensors, strict=True))
        _recorded.append(Launch(kernel, grid, arguments, constants, options))
        return
    device = tensors[0].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*tensors, **constants, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*tensors, **constants, **options)


def check(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device, *shape: int | None) -> None:
    """Raise ValueError unless the tensor is contiguous, on this device, and of this dtype (None: any float) and shape
    (None: any size)."""
    if not recording() and tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise ValueError(f"{name} is on {tensor.device}; the Triton kernels run on a GPU, move it there")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and the rest on {device}; move them to one device")
    if tensor.dtype != dtype and not (dtype is None and tensor.is_floating_point()):
        raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype or 'a float type'}")
    fits = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {list(tensor.shape)}; it must be [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; call .contiguous() on it")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel start, and wait until the one before has written everything. Each kernel with a parameter
    PDL calls it once, before it reads what another kernel wrote and before its first store; only constants of the
    model may be read ahead of it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def round_half_even(x):
    # Adding 1.5 * 2^23 leaves no bits behind the point, and the hardware rounds the sum half to even. For |x| < 2^22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def store_product(
    acc, y, m, n, inside, x_scale, w_scale, bias, residual, N: tl.constexpr, PER_ROW: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Write int32 sums to y `[M, N]`: as they are to an int32 y, else scaled, biased and added to the residual.

    m and n are the indices of tokens and rows, of shapes that broadcast to acc's; `inside` masks what exists.
    """
    at = m.to(tl.int64) * N + n
    if y.dtype.element_ty == tl.int32:
        tl.store(y + at, acc, mask=inside)
    else:
        value = acc.to(tl.float32) * tl.load(x_scale + m, mask=inside, other=0.0)
        value = value * (tl.load(w_scale + n, mask=n < N, other=0.0) if PER_ROW else tl.load(w_scale))
        if BIAS:
            value = value + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if RESIDUAL:
            # Rounded to y's type first, as a product that is stored and then added would be.
            value = value.to(y.dtype.element_ty).to(tl.float32)
            value = value + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
