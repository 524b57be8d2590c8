"""The one place that chooses what multiplies in BitLinear: the backend of a product, the product of a training step.

A backend is a module with the functions of `bitnet/kernels/reference.py`, under the same names and signatures, listed
in `BACKENDS`: `reference` (plain torch, every device), `native` (`bitnet/kernels/cpu`, compiled when the package was
installed) and `triton` (`bitnet/kernels/triton`, for GPUs). The choice is made at every call, from the device of the
tensors. `use_backend("name")` (or the environment variable BITNET_BACKEND) asks for one of them explicitly, and a
request that cannot be met raises, where the automatic choice falls back to the reference and says so once.

What a layer computes in training changes during a run (`training_product`), the layer itself does not:

    float_linear        no quantization: the 16-bit warm start of a ternary run
    FadingProduct       a part of it, while the quantizers fade in
    fake_quant_linear   all of it, on dequantized operands: the default of every layer
    Int8Product         all of it, multiplied as int8 on codes that are made once a step

Sharded layers have two more, which say how their weights travel (`bitnet/training/sharding.py`).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bitnet.console import note
from bitnet.kernels import cpu, ops, reference, triton
from bitnet.kernels.int8_training import Int8Product, cuts_off, sums_exactly
from bitnet.kernels.ops import constant
from bitnet.kernels.reference import (
    GROUP_SIZES,
    INT32_COLUMNS,
    PACKED_BITS,
    TERNARY_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    check_columns,
    check_quantizer,
    dequantize_weight,
    quantize_weight,
)

__all__ = [
    "BACKENDS",
    "GROUP_SIZES",
    "INT32_COLUMNS",
    "PACKED_BITS",
    "TERNARY_QUANTIZERS",
    "WEIGHT_QUANTIZERS",
    "FadingProduct",
    "Int8Product",
    "Product",
    "check_columns",
    "check_quantizer",
    "constant",
    "cuts_off",
    "dequantize_weight",
    "fake_quant_linear",
    "float_linear",
    "native_available",
    "native_wanted",
    "packed_linear",
    "packed_matmul",
    "quantize_weight",
    "requested_backend",
    "select_backend",
    "sums_exactly",
    "training_product",
    "triton_wanted",
    "use_backend",
]

BACKENDS: dict[str, ModuleType] = {"reference": reference, "native": cpu, "triton": triton}

Product = Callable[[Tensor, Tensor, Tensor | None, str], Tensor]
"""What a BitLinear computes: `y = product(x, weight, bias, quantizer)`, of x `[.., K]`, weight `[N, K]`, bias `[N]`."""

_requested = os.environ.get("BITNET_BACKEND", "auto")


def select_backend(x: Tensor) -> ModuleType:
    """The backend for a product whose activations are x. Raises ValueError for a requested one that isn't there."""
    if _requested == "auto":
        if x.device.type == "cuda":
            if triton.available():
                return triton
            _warn_without_triton()
        # Dynamo traces tensors without memory, and fuses the reference.
        plain = x.device.type == "cpu" and not torch.compiler.is_compiling()
        return cpu if plain and native_available() else reference
    if _requested not in BACKENDS:
        raise ValueError(f"backend {_requested!r} is not available; choose auto or one of {', '.join(BACKENDS)}")
    if _requested == "native":
        cpu.native.kernels()  # raises, with what to do, where it was not built
        if x.device.type != "cpu":
            raise ValueError(f"the native backend runs on the CPU and the activations are on {x.device}; choose auto")
    if _requested == "triton":
        triton.require(x.device)
    return BACKENDS[_requested]


def requested_backend() -> str:
    """What was asked for: "auto" or a key of BACKENDS."""
    return _requested


def native_wanted(device: torch.device) -> bool:
    """Whether a model on this device should run natively as a whole: asked for, or automatic and possible. Raises
    ValueError where it was asked for and cannot be."""
    return select_backend(torch.empty(0, device=device)) is cpu


def triton_wanted(device: torch.device) -> bool:
    """The same for the Triton kernels."""
    return select_backend(torch.empty(0, device=device)) is triton


@cache
def _warn_without_triton() -> None:
    note(
        "Triton is not installed, so packed products on the GPU run on the slow torch reference; run: "
        "pip install triton"
    )


@cache
def native_available() -> bool:
    """Whether the native CPU kernels are there; a note says, once, where they are not."""
    if not cpu.available():
        note(
            "the native CPU kernels were not built, so packed products run on the slow torch reference; install a "
            "C++ compiler and run: pip install -e ."
        )
        return False
    return True


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
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    in_features: int,
    group_size: int | None = None,
) -> Tensor:
    """Inference product on packed weights: see `reference.packed_linear`."""
    backend = select_backend(x)
    if not ops.is_eager(x):
        x = ops.constant(x)
        if backend is cpu:
            _check_device(x, packed)
            return ops.packed_linear(x, packed, scale, bias, bits, in_features, group_size)
    if _requested == "auto" and not 0 < in_features <= INT32_COLUMNS[bits]:
        backend = reference  # which knows no int32 sums, and can multiply nothing by nothing
    return backend.packed_linear(x, packed, scale, bias, bits=bits, in_features=in_features, group_size=group_size)


def packed_matmul(codes: Tensor, packed: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Integer product on packed weights: see `reference.packed_matmul`."""
    backend = select_backend(codes) if in_features else reference
    if backend is cpu and not ops.is_eager(codes):
        _check_device(codes, packed)
        return ops.packed_matmul(codes, packed, bits, in_features)
    return backend.packed_matmul(codes, packed, bits=bits, in_features=in_features)


def _check_device(x: Tensor, packed: Tensor) -> None:
    # An operator would take this for a call on fake tensors.
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device} and the packed weight on {packed.device}; move them to one device")


def fake_quant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
    """Training product with fake quantization: see `reference.fake_quant_linear`.

    The automatic choice is the reference, which torch.compile fuses: an eager step of 125M on an H200 took 107 ms with
    it and 150 with the Triton kernels (67 compiled). Those train by name.
    """
    backend = reference if _requested == "auto" else select_backend(x)
    return backend.fake_quant_linear(x, weight, bias, quantizer)


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
    """`F.linear`, whatever the layer's quantizer."""
    return fake_quant_linear(x, weight, bias, "none")


class FadingProduct:
    """Fake quantization of a strength between 0 and 1, a scalar tensor, `soft` or not: see
    `reference.fake_quant_linear`."""

    def __init__(self, strength: Tensor, *, soft: bool = False) -> None:
        self.strength, self.soft = strength, soft

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
        return reference.fake_quant_linear(x, weight, bias, quantizer, self.strength, soft=self.soft)


def training_product(
    before: Product, weight: Tensor, quantizer: str, strength: float | Tensor, *, int8: bool, gradients: bool = False,
    soft: bool = False,
) -> Product:  # fmt: skip
    """What a layer of this weight `[N, K]` computes in the next step, behind a step with the product `before`.

    strength: 0 for no quantization, 1 for all of it, or a scalar tensor between them, which all layers share.
    int8: multiply codes, made here and valid until the weight changes, where the strength is 1; not of groups, whose
    sums have as many scales, nor where they are cut off (`cuts_off`). gradients: multiply int8 in the backward too.
    soft: of `FadingProduct`, where weights are ternary.
    """
    if quantizer == "none":
        return fake_quant_linear
    if isinstance(strength, Tensor):
        same = isinstance(before, FadingProduct) and before.strength is strength
        return before if same else FadingProduct(strength, soft=soft and quantizer in TERNARY_QUANTIZERS)
    if strength == 0:
        return float_linear
    columns = weight.shape[1]
    if not int8 or quantizer in GROUP_SIZES or not 0 < columns <= INT32_COLUMNS[PACKED_BITS[quantizer]]:
        return fake_quant_linear
    if cuts_off(quantizer, gradients=gradients):
        return fake_quant_linear
    if not isinstance(before, Int8Product):
        return Int8Product(weight, quantizer, gradients=gradients)
    before.refresh(weight, quantizer)
    return before
