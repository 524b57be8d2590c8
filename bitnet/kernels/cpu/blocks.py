"""The native quantizers and dequantizers of the GGUF block formats, by ctypes: the bytes of `bitnet/quant/blocks`.

`blocks.cpp` is in the library of `native.py`, compiled for fewer instruction sets, since it needs no integer products.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from bitnet.kernels.cpu import native
from bitnet.quant.blocks import block_type, row_bytes

Function = Callable[..., int]
_BUILDS = {"amx": "avx512", "avx512_vnni": "avx512", "avx_vnni": "avx2", "avx2": "avx2"}
_PARALLEL_FROM = 2**15  # weights; fewer are done before a second thread wakes up


def available() -> bool:
    """Whether the library has them."""
    return bool(native.instruction_sets()) and _functions("scalar") is not None


@cache
def _functions(build: str) -> tuple[Function, Function] | None:
    """The quantizer and the dequantizer of a build, or None where it isn't there."""
    lib = native.library()
    names = (f"bn_blocks_quantize_{build}", f"bn_blocks_dequantize_{build}")
    if lib is None or not all(hasattr(lib, name) for name in names):
        return None
    quantizer, dequantizer = (getattr(lib, name) for name in names)
    quantizer.argtypes = native.c_types("pqqippipi")
    dequantizer.argtypes = native.c_types("pqipi")
    return quantizer, dequantizer


def _in_force() -> tuple[Function, Function]:
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
    source = x.data_ptr(), len(x), x.shape[1], block_type(kind).number, None if weight is None else weight.data_ptr()
    failed = _in_force()[0](*source, sigma2.data_ptr(), int(compatible), out.data_ptr(), _threads(x.numel()))
    assert not failed, kind
    return out


def dequantize(data: Tensor, kind: str) -> Tensor:
    """As `bitnet.quant.blocks.dequantize_blocks`, of rows that `check_rows` found good."""
    found = block_type(kind)
    data = data.contiguous()
    columns = data.shape[1] // found.bytes * found.block_size
    out = torch.empty(len(data), columns, dtype=torch.float32, device="cpu")
    blocks = data.numel() // found.bytes
    failed = _in_force()[1](data.data_ptr(), blocks, found.number, out.data_ptr(), _threads(out.numel()))
    assert not failed, kind
    return out
