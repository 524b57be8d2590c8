"""The one place that chooses a backend for the products of BitLinear.

A backend is a module with the functions of `bitnet/kernels/reference.py`, under the same names and signatures, listed
in `BACKENDS`. The choice is made at every call, from the device of the tensors. `use_backend("name")` (or the
environment variable BITNET_BACKEND) asks for one of them explicitly, and a request that cannot be met raises, where
the automatic choice falls back.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from bitnet.kernels import reference
from bitnet.kernels.reference import PACKED_BITS, WEIGHT_QUANTIZERS, check_quantizer, quantize_weight

__all__ = [
    "BACKENDS",
    "PACKED_BITS",
    "WEIGHT_QUANTIZERS",
    "check_quantizer",
    "fake_quant_linear",
    "packed_linear",
    "quantize_weight",
    "select_backend",
    "use_backend",
]

BACKENDS: dict[str, ModuleType] = {"reference": reference}

_requested = os.environ.get("BITNET_BACKEND", "auto")


def select_backend(x: Tensor) -> ModuleType:
    """The backend for a product whose activations are x. Raises ValueError for a requested name that isn't there."""
    if _requested == "auto":
        return reference
    if _requested not in BACKENDS:
        raise ValueError(f"backend {_requested!r} is not available; choose auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[_requested]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use this backend ("auto" or a key of BACKENDS) inside the `with` block."""
    global _requested
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, bits: int, in_features: int
) -> Tensor:
    """Inference product on packed weights: see `reference.packed_linear`."""
    return select_backend(x).packed_linear(x, packed, scale, bias, bits=bits, in_features=in_features)


def fake_quant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
    """Training product with fake quantization: see `reference.fake_quant_linear`."""
    return select_backend(x).fake_quant_linear(x, weight, bias, quantizer)
