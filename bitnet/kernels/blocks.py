"""Quantizing to and from the block formats of GGUF files: native code where it was built, else torch.

`TYPES`, the rules and the errors are those of `bitnet/quant/blocks`, the specification.
"""

from torch import Tensor

from bitnet.quant.blocks import TYPES, BlockType, dequantize_blocks, quantize_blocks

__all__ = ["TYPES", "BlockType", "dequantize", "quantize"]


def quantize(x: Tensor, kind: str, importance: Tensor | None = None, *, compatible: bool = False) -> Tensor:
    """Rows of a weight to rows of blocks: see `bitnet.quant.blocks.quantize_blocks`."""
    return quantize_blocks(x, kind, importance, compatible=compatible)


def dequantize(data: Tensor, kind: str) -> Tensor:
    """Rows of blocks to float32: see `bitnet.quant.blocks.dequantize_blocks`."""
    return dequantize_blocks(data, kind)
