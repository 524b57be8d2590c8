"""The block formats of GGUF files: rows of weights to bytes and back, in plain torch.

A row of K weights becomes K / block_size blocks, each with its own scales. `quantize_blocks` and `dequantize_blocks`
take any type of `TYPES`; the files behind them draw the bits: `simple.py` (32 weights, one level), `kquants.py` (256
weights, two levels), `levels.py` (uneven levels), `iquants.py` (vectors of a codebook), `ternary.py` (ternary and
binary) and `fp4.py`, whose types are only read. This is the specification; `bitnet/kernels/blocks.py` chooses between
it and native code with the same bytes.

Two quantizers: the default minimizes the squared error of what is stored, weighted with the importance if there is one
(`search.py`), and `compatible=True` gives the bytes of ggml's `ggml_quantize_chunk` (`ggml_search.py`). The importance
is a weight for each column `[K]`: the mean squared activation that llama.cpp calls an importance matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.quant.blocks import fp4, iquants, kquants, levels, simple, ternary


@dataclass(frozen=True)
class BlockType:
    """A type: its number in ggml, weights in a block, bytes of a block."""

    number: int
    block_size: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.block_size


TYPES = {
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
    "IQ4_NL": BlockType(20, 32, 18),
    "IQ4_XS": BlockType(23, 256, 136),
    "IQ3_S": BlockType(21, 256, 110),
    "IQ3_XXS": BlockType(18, 256, 98),
    "IQ2_S": BlockType(22, 256, 82),
    "IQ2_XS": BlockType(17, 256, 74),
    "IQ2_XXS": BlockType(16, 256, 66),
    "IQ1_M": BlockType(29, 256, 56),
    "IQ1_S": BlockType(19, 256, 50),
    "TQ1_0": BlockType(34, 256, 54),
    "TQ2_0": BlockType(35, 256, 66),
    "Q1_0": BlockType(41, 128, 18),
    "Q2_0": BlockType(42, 64, 18),
    "PQ2_0": BlockType(142, 128, 34),
}
READ_ONLY = {"MXFP4": BlockType(39, 32, 17), "NVFP4": BlockType(40, 64, 36)}
"""Types that are dequantized and not quantized."""
# What llama.cpp takes for a row whose length is no multiple of 256.
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ4_XS", *iquants.BITS), "IQ4_NL"),
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}
NEEDS_IMPORTANCE = iquants.NEEDS_IMPORTANCE
LARGEST = 65504  # of float16
_FAMILIES = (simple, kquants, levels, iquants, ternary)
_FAMILY = {name: family for family in _FAMILIES for name in TYPES if name in family.BITS}
_DEQUANTIZE = {name: family.dequantize for name, family in _FAMILY.items()} | dict.fromkeys(READ_ONLY, fp4.dequantize)


def block_type(kind: str) -> BlockType:
    """Entry of `TYPES`. Raises ValueError for a type that isn't there."""
    if kind not in TYPES:
        raise ValueError(f"block type {kind!r} is unknown; choose one of {', '.join(TYPES)}")
    return TYPES[kind]


def row_bytes(columns: int, kind: str) -> int:
    """Bytes of a row of `columns` weights. Raises ValueError where blocks don't fill it, with the type to take."""
    found = READ_ONLY.get(kind) or block_type(kind)
    if columns % found.block_size:
        fallback = FALLBACK.get(kind)
        remedy = f"use {fallback}" if fallback and columns % 32 == 0 else "keep it in F16"
        raise ValueError(
            f"rows of {columns} weights are no multiple of {found.block_size}, the block of {kind}; {remedy}"
        )
    return columns // found.block_size * found.bytes


def check_weight(x: Tensor, kind: str, importance: Tensor | None) -> None:
    """Raises ValueError for what `quantize_blocks` does not take."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"a weight must be a float matrix [N, K], got {x.dtype} {list(x.shape)}")
    row_bytes(x.shape[1], kind)
    # One pass for both: NaN is the smallest and the largest where there is one.
    largest = max(abs(float(end)) for end in x.detach().aminmax()) if x.numel() else 0.0
    if not math.isfinite(largest):
        bad = int((~x.isfinite()).sum())
        raise ValueError(
            f"{bad} of {x.numel()} weights are NaN or infinite; blocks cannot hold them, repair the weight"
        )
    if largest > LARGEST:
        raise ValueError(f"a weight of {largest:g} is beyond float16, which the scales are; rescale the layer")
    if importance is None:
        if kind in NEEDS_IMPORTANCE:
            raise ValueError(
                f"{kind} needs the importance of the columns: calibrate on text (bitnet quantize --method "
                f"gguf-{kind.lower()}), or use IQ2_S, IQ3_XXS or IQ1_M"
            )
        return
    if importance.shape != (x.shape[1],):
        raise ValueError(
            f"importance has shape {list(importance.shape)}; it must be [{x.shape[1]}], one for each column"
        )
    if not (importance.isfinite().all() and (importance >= 0).all()):
        raise ValueError("importance must be finite and at least 0; give mean squared activations")


def quantize_blocks(x: Tensor, kind: str, importance: Tensor | None = None, *, compatible: bool = False) -> Tensor:
    """Quantize the rows of a weight.

    x: float `[N, K]`, K a multiple of the type's block size; importance: float `[K]`, at least 0, or None. Returns
    uint8 `[N, K / block_size * bytes]`. `compatible` gives ggml's bytes instead of the smallest error. Raises
    ValueError for an unknown type, other shapes, NaN and infinity, and a missing importance for NEEDS_IMPORTANCE.
    """
    check_weight(x, kind, importance)
    size = block_type(kind).block_size
    blocks = x.detach().float().reshape(-1, size)
    weight = None
    if importance is not None:
        # The importance belongs to columns, so every row has the same.
        weight = importance.to(blocks).expand(x.shape).reshape(-1, size)
    sigma2 = None
    if weight is not None and kind in simple.ROW_SIGMA:
        sigma2 = simple.row_sigma2(x.detach().float()).repeat_interleave(x.shape[1] // size)
    family = _FAMILY[kind]
    if not len(blocks):
        return torch.empty(len(x), row_bytes(x.shape[1], kind), dtype=torch.uint8, device=x.device)
    return family.pack(family.quantize(blocks, kind, weight, sigma2, compatible=compatible), kind).view(len(x), -1)


def check_rows(data: Tensor, kind: str) -> None:
    """Raises ValueError for what `dequantize_blocks` does not take."""
    found = READ_ONLY.get(kind) or block_type(kind)
    if data.ndim != 2 or data.dtype != torch.uint8 or data.shape[1] % found.bytes:
        raise ValueError(f"{kind} rows must be uint8 [N, blocks * {found.bytes}], got {data.dtype} {list(data.shape)}")


def dequantize_blocks(data: Tensor, kind: str) -> Tensor:
    """Rows of bytes uint8 `[N, row bytes]` to float32 `[N, K]`, to the last bit as ggml does. Raises ValueError for an
    unknown type and for rows that no number of blocks fills."""
    check_rows(data, kind)
    found = READ_ONLY.get(kind) or block_type(kind)
    columns = data.shape[1] // found.bytes * found.block_size
    if not data.numel():
        return torch.empty(len(data), columns, device=data.device)
    return _DEQUANTIZE[kind](data.reshape(-1, found.bytes), kind).view(len(data), columns)
