"""The Triton backend: the functions of `bitnet/kernels/reference.py` on a GPU.

    activations.py    norm, gate and INT8 quantization in one pass
    weights.py        ternary quantization and packing without host synchronisation, unpacking
    add_subtract.py   the product by additions and subtractions, readable and fast
    dot4.py           the product on integer dot instructions, 1 to 4 tokens
    tensor_core.py    the product on matrix instructions
    product.py        which of them runs, and the launch
    groups.py         the product with scales of groups of columns
    project.py        one token through norm, quantization and product in one launch
    attention.py      rotary positions, cache and attention of one new token
    float8.py         FP8 of a cache, to numbers and back
    sampling.py       the next token of every row: temperature, top-p, min-p and the draw
    limits.py         how large a model they hold
    warm.py           all of them compiled beforehand, in several processes
    ops.py            torch operators of the packed product
    training.py       the int8 forward and its backward

Triton is imported when a function here is first called. Without a GPU the kernels run in Triton's interpreter, on CPU
tensors, if TRITON_INTERPRET=1 is set before Triton is imported: slow, and what the tests do.
"""

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from bitnet.kernels import reference
from bitnet.kernels.reference import check_quantizer, quantize_weight

__all__ = [
    "available",
    "fake_quant_linear",
    "packed_linear",
    "packed_matmul",
    "quantize_activations",
    "quantize_weight",
]

_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether the interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> bool:
    """Whether Triton is installed. Says nothing about a GPU."""
    return _INSTALLED


def require(device: torch.device) -> None:
    """Raise ValueError where the kernels cannot run on this device."""
    if not available():
        raise ValueError("Triton is not installed; install it (pip install triton) or choose another backend")
    wanted = "cpu" if interpreted() else "cuda"
    if device.type != wanted:
        raise ValueError(
            f"the Triton kernels run on {wanted} tensors here and the activations are on {device}; choose auto"
        )


def _inference() -> ModuleType:
    from bitnet.kernels.triton import ops as inference

    return inference


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_activations`: int8 codes `[.., K]` and float32 scale `[.., 1]`."""
    K = x.shape[-1]
    codes, scale, _ = _inference().quantize_op(x.reshape(-1, K).contiguous(), None, 0.0, "none")
    return codes[:, :K].reshape(x.shape), scale.view(*x.shape[:-1], 1)


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
    """As `reference.packed_linear`. Raises ValueError for tensors that do not fit together, before any launch."""
    if x.shape[-1] != in_features or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; give floats with {in_features} as the last dimension")
    if packed.device != x.device:
        raise ValueError(f"x is on {x.device} and the packed weight on {packed.device}; move them to one device")
    ops = _inference()
    codes, x_scale, total = ops.quantize_op(x.detach().reshape(-1, in_features).contiguous(), None, 0.0, "none")
    bias, scale = None if bias is None else bias.detach(), scale.detach()
    if group_size is None:
        y = ops.product_op(codes, x_scale, total, packed, scale, bias, None, bits, in_features, x.dtype)
    else:
        y = ops.group_op(codes, x_scale, packed, scale, bias, in_features, group_size, x.dtype)
    return y.view(*x.shape[:-1], packed.shape[0])


def packed_matmul(codes: Tensor, packed: Tensor, *, bits: int, in_features: int) -> Tensor:
    """As `reference.packed_matmul`. Raises ValueError for tensors that do not fit together, before any launch."""
    if codes.dtype != torch.int8 or codes.shape[-1] != in_features:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; give int8 with {in_features} as last dimension")
    from bitnet.kernels.triton.activations import padded

    flat = codes.reshape(-1, in_features)
    ones, total = torch.ones(len(flat), device=codes.device), flat.sum(1, dtype=torch.int32)
    flat = torch.nn.functional.pad(flat, (0, padded(in_features) - in_features))
    product = _inference().product_op
    y = product(flat, ones, total, packed, ones.new_ones(1), None, None, bits, in_features, torch.int32)
    return y.view(*codes.shape[:-1], packed.shape[0])


def fake_quant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
    """As `reference.fake_quant_linear`: ternary weights by an int8 product, the other quantizers on the reference.

    The sums are exact where the reference rounds its operands to x's type. Inside autocast the result has its type.
    """
    if check_quantizer(quantizer) != "ternary" or x.dtype == torch.float64 or weight.dtype == torch.float64:
        return reference.fake_quant_linear(x, weight, bias, quantizer)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x is {list(x.shape)} and the weight {list(weight.shape)}; their last dimensions must agree")
    from bitnet.kernels.triton.training import ternary_linear

    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.autocast(kind, enabled=False):
        y = ternary_linear(rows, weight.contiguous(), bias, dtype)[0]
    return y.view(*x.shape[:-1], weight.shape[0])
