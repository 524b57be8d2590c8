"""Quantizing to and from the block formats of GGUF files: native code where it was built, else torch.

`TYPES`, the rules and the errors are those of `bitnet/quant/blocks`, the specification, and so are the bytes.
"""

import torch
from torch import Tensor

from bitnet import kernels
from bitnet.kernels.cpu import blocks as native
from bitnet.kernels.ops import dequantize_blocks as dequantize_op
from bitnet.kernels.ops import is_eager
from bitnet.quant.blocks import (
    READ_ONLY,
    TYPES,
    BlockType,
    check_rows,
    check_weight,
    dequantize_blocks,
    quantize_blocks,
)

__all__ = ["READ_ONLY", "TYPES", "BlockType", "dequantize", "quantize"]


def quantize(x: Tensor, kind: str, importance: Tensor | None = None, *, compatible: bool = False) -> Tensor:
    """Rows of a weight to rows of blocks: see `bitnet.quant.blocks.quantize_blocks`."""
    if not _native_for(x) or not is_eager(x):
        return quantize_blocks(x, kind, importance, compatible=compatible)
    check_weight(x, kind, importance)
    return native.quantize(x, kind, importance, compatible=compatible)


def dequantize(data: Tensor, kind: str) -> Tensor:
    """Rows of blocks to float32: see `bitnet.quant.blocks.dequantize_blocks`."""
    if kind in READ_ONLY or not _native_for(data):
        return dequantize_blocks(data, kind)
    check_rows(data, kind)
    return native.dequantize(data, kind) if is_eager(data) else dequantize_op(data, kind)


def _native_for(x: Tensor) -> bool:
    """Whether native code does it: unless the reference was asked for, wherever it can."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if kernels.requested_backend() == "native":
        kernels.select_backend(x)  # raises where it was not built
    return kernels.requested_backend() != "reference" and native.available()
