"""The native quantizers and dequantizers of the GGUF block formats, by ctypes: the bytes of `bitnet/quant/blocks`.

`blocks.cpp` and `blocks_iq.cpp` are in the library of `native.py`, compiled for fewer instruction sets, since they need
no integer products. For the IQ types of codebooks the searches are native and the bytes are made of their vectors in
torch, as they are read.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitnet.kernels.cpu import native
from bitnet.quant.blocks import block_type, dequantize_blocks, iquants, row_bytes
from bitnet.quant.blocks.codebooks import CODEBOOKS
from bitnet.quant.blocks.layout import Vectors

Function = Callable[..., int]
_BUILDS = {"amx": "avx512", "avx512_vnni": "avx512", "avx_vnni": "avx2", "avx2": "avx2"}
_PARALLEL_FROM = 2**15  # weights; fewer are done before a second thread wakes up


def available() -> bool:
    """Whether the library has them."""
    return bool(native.instruction_sets()) and _functions("scalar") is not None


@dataclass(frozen=True)
class Functions:
    quantize: Function
    dequantize: Function
    search: Function
    """For the IQ types of codebooks."""


class _Codebook(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("search", "values", "place", "neighbours")),
        *((name, ctypes.c_int32) for name in ("entries", "size", "base", "width")),
    ]  # fmt: skip


class _Job(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p), ("importance", ctypes.c_void_p),
        ("blocks", ctypes.c_int64), ("per_row", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("kind", "compatible", "threads")),
        *((name, ctypes.c_void_p) for name in ("index", "signs", "scale", "scales")),
    ]  # fmt: skip


@cache
def _codebook(kind: str) -> tuple[_Codebook, list[Tensor]]:
    """A codebook as C++ sees it, and the tensors that it points to."""
    book = CODEBOOKS[kind]
    search = book.values if book.is_ternary else 2 * book.digits.float() + 1
    tables = [search, book.values.t().contiguous(), book.place.to(torch.int32), book.neighbours]
    sizes = len(book.values), book.size, book.base, book.neighbours.shape[1]
    return _Codebook(*(table.data_ptr() for table in tables), *sizes), tables


@cache
def _functions(build: str) -> Functions | None:
    """The functions of a build, or None where it isn't there."""
    lib = native.library()
    names = (f"bn_blocks_quantize_{build}", f"bn_blocks_dequantize_{build}", f"bn_blocks_iq_{build}")
    if lib is None or not all(hasattr(lib, name) for name in names):
        return None
    quantizer, dequantizer, searcher = (getattr(lib, name) for name in names)
    quantizer.argtypes = native.c_types("pqqippipi")
    dequantizer.argtypes = native.c_types("pqipi")
    searcher.argtypes = [ctypes.POINTER(_Job), ctypes.POINTER(_Codebook)]
    return Functions(quantizer, dequantizer, searcher)


def _in_force() -> Functions:
    name = native.kernels().name.decode()
    found = _functions(_BUILDS.get(name, "scalar")) or _functions("scalar")
    assert found is not None
    return found


def _threads(weights: int) -> int:
    return native.threads() if weights >= _PARALLEL_FROM else 1


def quantize(x: Tensor, kind: str, importance: Tensor | None = None, *, compatible: bool = False) -> Tensor:
    """As `bitnet.quant.blocks.quantize_blocks`, of arguments that `check_weight` found good."""
    x = x.detach().to(torch.float32).contiguous()
    out = torch.empty(len(x), row_bytes(x.shape[1], kind), dtype=torch.uint8, device="cpu")
    sigma2 = torch.empty(len(x), dtype=torch.float32, device="cpu")
    weight = None if importance is None else importance.detach().to(torch.float32).contiguous()
    if kind in iquants.BITS:
        return _search(x, kind, weight, compatible=compatible) if x.numel() else out
    source = x.data_ptr(), len(x), x.shape[1], block_type(kind).number, None if weight is None else weight.data_ptr()
    failed = _in_force().quantize(*source, sigma2.data_ptr(), int(compatible), out.data_ptr(), _threads(x.numel()))
    assert not failed, kind
    return out


def _search(x: Tensor, kind: str, weight: Tensor | None, *, compatible: bool) -> Tensor:
    """`quantize` for the IQ types of codebooks."""
    blocks, width = x.numel() // 256, x.shape[1] // 256

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(blocks, columns, dtype=dtype, device="cpu")

    index, signs = empty(256 // CODEBOOKS[kind].size, torch.int16), empty(32, torch.uint8)
    scale, scales = empty(1, torch.float16), empty(256 // iquants.GROUP[kind], torch.int16)
    out = [part.data_ptr() for part in (index, signs, scale, scales)]
    given: Any = None if weight is None else weight.data_ptr()
    sizes = blocks, width, block_type(kind).number, int(compatible), _threads(x.numel())
    failed = _in_force().search(_Job(x.data_ptr(), given, *sizes, *out), _codebook(kind)[0])
    assert not failed, kind
    return iquants.pack(Vectors(index, signs, scale.view(-1), scales), kind).view(len(x), -1)


def dequantize(data: Tensor, kind: str) -> Tensor:
    """As `bitnet.quant.blocks.dequantize_blocks`, of rows that `check_rows` found good."""
    if kind in iquants.BITS:
        return dequantize_blocks(data, kind)
    found = block_type(kind)
    data = data.contiguous()
    columns = data.shape[1] // found.bytes * found.block_size
    out = torch.empty(len(data), columns, dtype=torch.float32, device="cpu")
    blocks = data.numel() // found.bytes
    failed = _in_force().dequantize(data.data_ptr(), blocks, found.number, out.data_ptr(), _threads(out.numel()))
    assert not failed, kind
    return out
