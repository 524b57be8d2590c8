"""The compiled library beside this file, by ctypes: which instruction sets there are, and the structs of `layout.h`.

Loaded on first use. `instruction_sets()` lists what this machine can run, best first, and is empty where the library
was not built; the environment variable BITNET_CPU_ISA or `use_instruction_set` picks one by name.
"""

import ctypes
import hashlib
import importlib.machinery
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitnet.kernels.reference import check_columns
from bitnet.machine import MAX_THREADS, cpu_quota
from bitnet.quant.packing import packed_width

CODECS = {"base3": 1, "two_bit": 2, "four_bit": 4, "eight_bit": 8}
_CODEC_BITS = {"base3": 2, "two_bit": 2, "four_bit": 4, "eight_bit": 8}
BASE3_MAX_K = 32767  # the wrapping sums of layout.h are exact below 2^15 columns


_LETTERS = {"p": c_void_p, "q": c_int64, "i": c_int}


def c_types(letters: str) -> list[type]:
    """Types of C arguments: p a pointer, q 64 bits, i an int, in the order of the letters."""
    return [_LETTERS[letter] for letter in letters]


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("lines", "scale", "bias", "groups", "supers", "levels", "values")),
        *((name, c_void_p) for name in ("order", "divisor", "down", "up")),
        *((name, c_int32) for name in ("N", "K", "inputs", "codec", "lines_per_block", "group", "kind", "center", "x")),
        ("x_scale", c_float),
        ("x_zero", c_int32),
        ("rank", c_int32),
    ]


MAX_PARTS = 3


class Projection(ctypes.Structure):
    _fields_ = [
        ("part", Matrix * MAX_PARTS),
        ("parts", c_int32),
        ("at", c_int32 * MAX_PARTS),
        ("rows", c_int32 * MAX_PARTS),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Projection) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "attn_sub_norm", "post_norm", "ffn_sub_norm")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")),
        *((name, c_int32) for name in ("layers", "relu2")),
        ("eps", c_float),
        ("layer", POINTER(Layer)),
        *((name, c_void_p) for name in ("norm", "cos", "sin")),
        ("head", Projection),
        ("embedding", Matrix),
    ]


class Cache(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "key_scale", "value_scale")),
        *((name, c_int32) for name in ("dtype", "block")),
        *((name, c_int64) for name in ("block_stride", "layer_stride", "head_stride")),
    ]


class Row(ctypes.Structure):
    _fields_ = [("cache", POINTER(Cache)), ("blocks", c_void_p), ("length", c_int64), ("tokens", c_int64)]


class Draw(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "change_ids", "changes", "allowed", "seen_ids")),
        *((name, c_void_p) for name in ("top_ids", "top_logprobs")),
        *((name, c_int64) for name in ("change_count", "seen_count", "top_count", "top_k")),
        *((name, c_double) for name in ("top_p", "uniform")),
        *((name, c_float) for name in ("min_p", "temperature", "repetition_penalty", "logprob")),
        *((name, c_int64) for name in ("token", "finite")),
    ]


class Kernels(ctypes.Structure):
    """The function table of one instruction set."""

    _fields_ = [
        ("name", c_char_p),
        ("codec", c_int32),
        ("quantize", ctypes.CFUNCTYPE(None, *c_types("pqqpqppi"))),
        ("matmul", ctypes.CFUNCTYPE(c_int, POINTER(Matrix), *c_types("pqppqppqqii"))),
        ("linear", ctypes.CFUNCTYPE(c_int, POINTER(Matrix), *c_types("pqpqqi"))),
        ("workspace", ctypes.CFUNCTYPE(c_int64, POINTER(Model), *c_types("qqqi"))),
        ("forward", ctypes.CFUNCTYPE(c_int, POINTER(Model), POINTER(Row), *c_types("qpppqpipi"))),
        ("peak", ctypes.CFUNCTYPE(c_int64, *c_types("qi"))),
        ("sample", ctypes.CFUNCTYPE(None, POINTER(Draw), *c_types("qqpi"))),
    ]


def threads() -> int:
    """Threads of a native call: torch's number, which `torch.set_num_threads` and OMP_NUM_THREADS choose, but no more
    than the quota of a container gives, since what is beyond it only waits, and at most MAX_THREADS."""
    return min(torch.get_num_threads(), cpu_quota() or MAX_THREADS, MAX_THREADS)


class Scratch:
    """Memory for native calls, of which each thread that is in one has a piece of its own."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    @contextmanager
    def piece(self, size: int) -> Iterator[int]:
        """The address of so many bytes or more, for the `with` block."""
        try:
            piece = self._free.pop()
        except IndexError:  # not looked at before: another thread could take the last one in between
            piece = torch.empty(0, dtype=torch.uint8)
        if len(piece) < size:
            piece = torch.empty(size, dtype=torch.uint8)
        yield piece.data_ptr()
        self._free.append(piece)


_requested = os.environ.get("BITNET_CPU_ISA", "auto")


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built or does not load."""
    folder = Path(os.environ.get("BITNET_NATIVE_FOLDER") or Path(__file__).parent)  # dev/ has others
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_native{suffix}"
        if path.exists():
            try:
                lib = ctypes.CDLL(str(path))
            except OSError:
                continue
            _check_sources(lib, path)
            lib.bn_available.argtypes = [POINTER(POINTER(Kernels))]
            lib.bn_struct_sizes.argtypes = [c_int]
            lib.bn_struct_sizes.restype = c_int64
            lib.bn_draw_bytes.argtypes, lib.bn_draw_bytes.restype = [c_int64], c_int64
            lib.bn_lines.argtypes = c_types("qi")
            lib.bn_pack.argtypes = c_types("pqqiqpiqqi")
            lib.bn_pack_codes.argtypes = c_types("pqqpiqqi")
            lib.bn_pack_codes.restype = None
            lib.bn_pack_blocks.argtypes = c_types("pqqipppqqi")
            lib.bn_advise_huge_pages.argtypes = c_types("pq")
            lib.bn_read.argtypes = c_types("pqi")
            lib.bn_read.restype = c_int64
            structs = (Matrix, Projection, Layer, Model, Cache, Row, Draw, Kernels)  # declared here and in layout.h
            for index, struct in enumerate(structs):
                if lib.bn_struct_sizes(index) != ctypes.sizeof(struct):
                    raise _stale(path, f" ({struct.__name__} differs)")
            return lib
    return None


def _check_sources(lib: ctypes.CDLL, path: Path) -> None:
    """Refuse a library that was built from other sources than those beside this file, where there are such: calling it
    could read past an end. A wheel has none."""
    sources = sorted((*Path(__file__).parent.glob("*.cpp"), *Path(__file__).parent.glob("*.h")))
    if sources:
        sums = hashlib.sha256()
        for source in sources:
            sums.update(source.read_bytes())
        built = getattr(lib, "bn_sources", None)  # the first libraries did not say
        if built is not None:
            built.restype = ctypes.c_char_p
        if built is None or built() != sums.hexdigest().encode():
            raise _stale(path)


def _stale(path: Path, why: str = "") -> RuntimeError:
    return RuntimeError(
        f"{path.name} was built from other sources than this Python{why}; rebuild it with: pip install -e ."
    )


@cache
def _tables() -> dict[str, Kernels]:
    lib = library()
    if lib is None:
        return {}
    found = (POINTER(Kernels) * 8)()
    count = lib.bn_available(found)
    return {found[i].contents.name.decode(): found[i].contents for i in range(count)}


def instruction_sets() -> list[str]:
    """Names of the instruction sets that this machine runs, best first: of amx, avx512_vnni, avx_vnni, avx2, neon and
    scalar. Empty without the library."""
    return list(_tables())


def kernels() -> Kernels:
    """The table in force. Raises ValueError for a requested instruction set that isn't there."""
    tables = _tables()
    if not tables:
        raise ValueError("the native CPU kernels were not built; install with a C++ compiler, or use the reference")
    if _requested == "auto":
        return next(iter(tables.values()))
    if _requested not in tables:
        raise ValueError(f"instruction set {_requested!r} is not here; choose auto or one of {', '.join(tables)}")
    return tables[_requested]


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run on this instruction set ("auto" or one of `instruction_sets()`) inside the `with` block."""
    global _requested
    previous, _requested = _requested, name
    try:
        kernels()
        yield
    finally:
        _requested = previous


class Lines:
    """A weight matrix in the run-time layout of `layout.h`, filled from packed rows.

    `codec` is a key of CODECS. Memory for the lines may be given (uint8, a slice of a larger arena); otherwise it is
    allocated. `struct` is what the kernels read.
    """

    def __init__(self, rows: int, columns: int, codec: str, memory: Tensor | None = None) -> None:
        lib = library()
        assert lib is not None
        check_columns(columns, _CODEC_BITS[codec])
        if codec == "base3" and columns > BASE3_MAX_K:
            raise ValueError(f"{columns} columns are too many for base3, which holds {BASE3_MAX_K}; use two_bit")
        self.rows, self.columns = rows, columns
        self.codec = codec
        # The kernels work on panels of 32 rows.
        padded = -(-rows // 32) * 32
        per_block = lib.bn_lines(columns, CODECS[codec])
        size = self.size(rows, columns, codec)
        self.memory = huge_pages(size) if memory is None else memory
        if self.memory.numel() != size or self.memory.dtype != torch.uint8 or not self.memory.is_contiguous():
            raise ValueError(f"memory must be {size} contiguous bytes, got {list(self.memory.shape)}")
        # A row that does not exist multiplies by 0, like its scale: what its codes are does not matter.
        if rows % 32:
            self.memory[(rows // 16) * per_block * 64 :].zero_()
        self.scale = torch.zeros(padded, dtype=torch.float32, device="cpu")
        self.struct = Matrix(self.memory.data_ptr(), self.scale.data_ptr(), N=padded, K=columns, inputs=columns)
        self.struct.codec, self.struct.lines_per_block = CODECS[codec], per_block

    @staticmethod
    def size(rows: int, columns: int, codec: str) -> int:
        """Bytes of the lines."""
        lib = library()
        assert lib is not None
        return -(-rows // 32) * 2 * lib.bn_lines(columns, CODECS[codec]) * 64

    def fill(self, packed: Tensor, scale: Tensor, bits: int, *, at: int = 0, step: int = 1) -> None:
        """Write packed rows (`bitnet/quant/packing.py`) and their scale `[1, 1]` or `[N, 1]` from row `at` on, taking
        every `step`-th block of 16 rows."""
        lib = library()
        assert lib is not None
        last = at + (len(packed) - 1) // 16 * 16 * step + 16
        if (
            packed.dtype != torch.uint8
            or packed.shape[1:] != (packed_width(self.columns, bits),)
            or last > len(self.scale)
        ):
            raise ValueError(
                f"packed is {packed.dtype} {list(packed.shape)} for row {at} on; it must be uint8 "
                f"[rows, {packed_width(self.columns, bits)}] and end before row {len(self.scale)}"
            )
        if scale.numel() not in (1, len(packed)):
            raise ValueError(f"the scale has {scale.numel()} values for {len(packed)} rows; give 1 or one for each")
        if bits != _CODEC_BITS[self.codec]:
            raise ValueError(
                f"the codec {self.codec} holds codes of {_CODEC_BITS[self.codec]} bits, and these have {bits}"
            )
        packed = packed.contiguous()
        rows, width = packed.shape
        source = packed.data_ptr(), rows, width, bits, self.columns
        target = self.memory.data_ptr(), CODECS[self.codec], at, step
        failed = lib.bn_pack(*source, *target, threads())
        if failed == 2:
            raise ValueError("the packed weight holds the pattern 3, which is no ternary code; the file is damaged")
        if failed:
            raise MemoryError(f"no memory to repack rows of {self.columns} codes")
        self.fill_scale(scale, len(packed), at=at, step=step)

    def fill_scale(self, scale: Tensor, rows: int, *, at: int = 0, step: int = 1) -> None:
        """Write the scale `[1, 1]` or `[rows, 1]` alone, to the rows that `fill` would write."""
        scales = scale.detach().float().reshape(-1).expand(rows)
        for first in range(0, rows, 16):
            row = at + first * step
            part = scales[first : first + 16]
            self.scale[row : row + len(part)] = part


def huge_pages(size: int) -> Tensor:
    """Uninitialized bytes, on huge pages where the system gives them: 4 KiB pages cost a fifth of the bandwidth."""
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    lib = library()
    if lib is not None and size >= 2**21:
        lib.bn_advise_huge_pages(memory.data_ptr(), size)
    return memory


def codec_of(bits: int, columns: int) -> str:
    """The layout of packed codes of 2, 4 or 8 bits; of 2 bits, the one the instruction set in force is fastest with."""
    if bits != 2:
        return {4: "four_bit", 8: "eight_bit"}[bits]
    names = {number: name for name, number in CODECS.items()}
    return "two_bit" if columns > BASE3_MAX_K else names[kernels().codec]
