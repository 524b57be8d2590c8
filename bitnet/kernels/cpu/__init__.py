"""The native CPU backend: the functions of `bitnet/kernels/reference.py` on compiled kernels.

Products of packed weights run in C++ (`matmul.h`), exact to the last integer; weights are brought into the run-time
layout (`layout.h`) the first time they are used and kept beside the packed tensor. Training stays with the reference,
which torch.compile fuses.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.kernels.cpu import matrices, native
from bitnet.kernels.reference import check_group_scale, fake_quant_linear, quantize_weight

__all__ = [
    "available",
    "fake_quant_linear",
    "packed_linear",
    "packed_matmul",
    "quantize_activations",
    "quantize_weight",
]

# What the kernels fill: never of somebody's default device or dtype.
_CPU = torch.device("cpu")
_PARALLEL_FROM = 2**19  # weights; a smaller product is done before a second thread wakes up


class _Layout(NamedTuple):
    """What was made of a packed tensor, and what must not have changed since."""

    version: int
    codec: str
    scale: Tensor
    scale_version: int
    scale_values: Tensor
    lines: native.Lines


_lines: dict[int, _Layout] = {}
"""By the identity of the packed tensor."""


class _Grouped(NamedTuple):
    """The same of weights with groups."""

    version: int
    columns: int
    scale_values: Tensor
    matrix: matrices.NativeMatrix


_grouped: dict[int, _Grouped] = {}


def available() -> bool:
    """Whether the library was built and loads."""
    return bool(native.instruction_sets())


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_activations`: int8 codes `[.., K]` and float32 scale `[.., 1]`."""
    codes, scale, _ = _quantize(x.reshape(-1, x.shape[-1]))
    return codes[:, : x.shape[-1]].reshape(x.shape), scale.view(*x.shape[:-1], 1)


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
    """As `reference.packed_linear`. Raises ValueError for tensors that do not fit together."""
    if x.shape[-1] != in_features or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; give floats with {in_features} as the last dimension")
    for name, tensor in (("packed", packed), ("scale", scale), ("x", x)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the native kernels run on the CPU")
    if packed.ndim != 2:
        raise ValueError(f"packed is {list(packed.shape)}; it must be [rows, bytes]")
    if bias is not None and bias.shape != packed.shape[:1]:
        raise ValueError(f"the bias is {list(bias.shape)} for {packed.shape[0]} rows")
    if group_size is not None:
        y = matrices.linear(_grouped_layout(packed, scale, in_features, group_size), x.detach())
        return (y if bias is None else y + bias.detach().float()).to(x.dtype)
    weights = _run_time_layout(packed, scale, bits, in_features)
    rows = x.numel() // in_features if in_features else 0
    y = torch.empty(rows, weights.rows, dtype=torch.float32, device=_CPU)
    if rows:
        codes, x_scale, total = _quantize(x.detach().reshape(rows, in_features))
        bias_f32 = None if bias is None else bias.detach().float().contiguous()
        _matmul(weights, codes, x_scale, total, rows, bias_f32, y, out=0)
    return y.view(*x.shape[:-1], weights.rows).to(x.dtype)


def integer_matmul(x: Tensor, weights: native.Lines) -> Tensor:
    """The int32 sums `[M, N]` behind `packed_linear`, of float x `[M, K]`: for tests and benchmarks."""
    codes, scale, total = _quantize(x)
    y = torch.empty(x.shape[0], weights.rows, dtype=torch.int32, device=_CPU)
    _matmul(weights, codes, scale, total, x.shape[0], None, y, out=4)
    return y


def packed_matmul(codes: Tensor, packed: Tensor, *, bits: int, in_features: int) -> Tensor:
    """As `reference.packed_matmul`. Raises ValueError for tensors that do not fit together."""
    if codes.dtype != torch.int8 or codes.shape[-1] != in_features:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; give int8 with {in_features} as last dimension")
    flat = codes.reshape(-1, in_features)
    rows = len(flat)
    weights = _run_time_layout(packed, _ones(1, 1), bits, in_features)
    y = torch.empty(rows, weights.rows, dtype=torch.int32, device=_CPU)
    if rows:
        padded = _codes_buffer(rows, in_features)
        padded[:rows, :in_features] = flat
        padded[:rows, in_features:] = 0
        _matmul(weights, padded, _ones(rows), flat.sum(1, dtype=torch.int32), rows, None, y, out=4)
    return y.view(*codes.shape[:-1], weights.rows)


def _matmul(
    weights: native.Lines,
    codes: Tensor,
    scale: Tensor,
    total: Tensor,
    rows: int,
    bias: Tensor | None,
    y: Tensor,
    out: int,
) -> None:
    threads = native.threads() if weights.rows * weights.columns * rows >= _PARALLEL_FROM else 1
    x = codes.data_ptr(), codes.stride(0), scale.data_ptr(), total.data_ptr(), rows
    into = None if bias is None else bias.data_ptr(), y.data_ptr(), y.stride(0), weights.rows, out
    failed = native.kernels().matmul(weights.struct, *x, *into, threads)
    if failed:
        raise MemoryError(f"no memory for the scratch of a product of {rows} tokens")


def _quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 `[M + 32, stride]` (padded with zeros, and with rows that AMX may read), scale, row sums."""
    rows, width = x.shape
    x = x.float().contiguous()
    codes = _codes_buffer(rows, width)
    scale = torch.empty(rows, dtype=torch.float32, device=_CPU)
    total = torch.empty(rows, dtype=torch.int32, device=_CPU)
    threads = native.threads() if x.numel() >= _PARALLEL_FROM else 1
    native.kernels().quantize(
        x.data_ptr(), rows, width, codes.data_ptr(), codes.stride(0), scale.data_ptr(), total.data_ptr(), threads
    )
    return codes[:rows], scale, total


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device=_CPU)


def _codes_buffer(rows: int, width: int) -> Tensor:
    # AMX reads whole tiles of 32 tokens, and a line of base 3 covers 20 columns: both may read beyond the end.
    return torch.empty(-(-rows // 32) * 32 + 32, -(-(width + 20) // 64) * 64, dtype=torch.int8, device=_CPU)


def _run_time_layout(packed: Tensor, scale: Tensor, bits: int, in_features: int) -> native.Lines:
    codec = native.codec_of(bits, in_features)
    # An id may be given again to another tensor, so the entry goes when its tensor does; until then the version tells
    # whether the bytes are still those that were repacked.
    key = id(packed)
    known = _lines.get(key)
    version, scale_version = _version(packed), _version(scale)
    if known is not None and known[:2] == (version, codec) and known.lines.columns == in_features:
        same = known.scale is scale and known.scale_version == scale_version and not scale.is_inference()
        if not same and not torch.equal(known.scale_values, scale):
            known.lines.fill_scale(scale, packed.shape[0])
        if not same:
            _lines[key] = _Layout(version, codec, scale, scale_version, scale.detach().clone(), known.lines)
        return known.lines
    weights = native.Lines(packed.shape[0], in_features, codec)
    weights.fill(packed, scale, bits)
    if known is None:
        weakref.finalize(packed, _lines.pop, key, None)
    _lines[key] = _Layout(version, codec, scale, scale_version, scale.detach().clone(), weights)
    return weights


def _grouped_layout(packed: Tensor, scale: Tensor, in_features: int, group_size: int) -> matrices.NativeMatrix:
    key, version = id(packed), _version(packed)
    known = _grouped.get(key)
    if known is not None and known[:2] == (version, in_features) and torch.equal(known.scale_values, scale):
        return known.matrix
    check_group_scale(scale, len(packed), in_features, group_size)
    matrix = matrices.NativeMatrix(matrices.ternary_groups(in_features, group_size), len(packed))
    matrix.write(matrices.ternary_piece(packed, scale, in_features))
    if known is None:
        weakref.finalize(packed, _grouped.pop, key, None)
    _grouped[key] = _Grouped(version, in_features, scale.detach().clone(), matrix)
    return matrix


def _version(tensor: Tensor) -> int:
    """Counts what is written in place, as load_state_dict does; inference tensors count nothing."""
    return 0 if tensor.is_inference() else tensor._version
