"""The real ggml through ctypes, as an oracle: the quantizers and dequantizers of its block types.

The library is that of the package libggml-python, and for the types that it is too old for llama.cpp's own, beside
`tests/oracles/llama.py`.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.quant.blocks import READ_ONLY, TYPES, row_bytes
from tests import oracles
from tests.oracles import llama


@functools.cache
def library(path: Path | None = None) -> Any:
    """The loaded library, of a file or of the package; skips or fails the test where that is not installed."""
    library = ctypes.CDLL(str(path or next(oracles.folder_of("libggml").glob("lib*/libggml-base.so"))))
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


KINDS = [kind for kind in TYPES if kind != "PQ2_0"]  # which PrismML's fork alone has
# ggml sorts the neighbours of these for seconds before it quantizes; their golden bytes are compared all the same.
SLOW_IN_GGML = () if os.environ.get("BITNET_LONG") == "1" else ("IQ2_S", "IQ1_M", "IQ1_S")
QUANTIZED_KINDS = [kind for kind in KINDS if kind not in SLOW_IN_GGML]
NEWER = ("Q1_0", "Q2_0", "IQ1_M", *READ_ONLY)  # of IQ1_M the sums of the older one are added in another order


def newer(kind: str) -> Path | None:
    """The library of a type that the package's does not have."""
    if kind not in NEWER:
        return None
    llama.library()  # skips or fails the test where it is not installed
    return llama.FOLDER / "libggml-base.so"


def quantize(x: Tensor, kind: str, importance: Tensor | None, path: Path | None = None) -> Tensor:
    """Rows float32 `[N, K]` to rows of bytes, on one thread, by the package's library or the one of a file."""
    path = path or newer(kind)
    x, out = x.contiguous(), torch.empty(len(x), row_bytes(x.shape[1], kind), dtype=torch.uint8)
    weight = None if importance is None else importance.data_ptr()
    size = library(path).ggml_quantize_chunk(
        TYPES[kind].number, x.data_ptr(), out.data_ptr(), 0, len(x), x.shape[1], weight
    )  # fmt: skip
    assert size == out.numel()
    return out


def dequantize(data: Tensor, kind: str) -> Tensor:
    """Rows of bytes to float32 `[N, K]`."""
    name = kind.lower() if kind[0] != "Q" or kind[-1] != "K" else kind.replace("Q", "q")
    function = getattr(library(newer(kind)), f"dequantize_row_{name}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    found = READ_ONLY.get(kind) or TYPES[kind]
    data, columns = data.contiguous(), data.shape[1] // found.bytes * found.block_size
    out = torch.zeros(len(data), columns)
    function(data.data_ptr(), out.data_ptr(), out.numel())
    return out
