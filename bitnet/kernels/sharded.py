"""A row of activations that is spread over processes: its norm and its product, to the bit those of one process.

Each of the processes of a group holds the same part of the columns of x and of a weight [N, K] (tensor parallelism; a
layer whose rows are spread needs nothing of this: every process has all of x). What is summed over all columns is
summed in integers, which come out the same in whatever parts and order; largest values are compared as integers too,
in which form a NaN is above every number.

    norm     e: |x| < 2^e for the whole row      sum = sum(round(x^2 * 2^(F - 2e)))  in int64, F so that it holds K
    product  absmax of the whole row -> codes as of one process -> int32 sums -> scales

A norm takes two small reductions, a product a small one and that of its sums `[M, N]`, in int32. Without a group both
run in one process; the product is then `packed_linear`.

Letters: M tokens, N out_features, K in_features of this process.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from bitnet.kernels import ops
from bitnet.kernels.reference import ACTIVATION_BITS
from bitnet.quant.affine import SCALE_EPS, integer_range


@torch.library.custom_op("bitnet::row_parallel_linear", mutates_args=())
def row_parallel_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, in_features: int, group: str
) -> Tensor:
    """`reference.packed_linear` of rows and weights that are spread over a group's processes.

    x: float `[.., K]`; packed: uint8 `[N, packed_width(K, bits)]`, this process's columns; scale, bias: of the whole
    weight. group: name of a process group, or "" for none. Returns `[.., N]` in x's dtype, the same everywhere.
    """
    if not group:
        return ops.packed_linear(x, packed, scale, bias, bits, in_features)
    quant_min, quant_max = integer_range(ACTIVATION_BITS)
    v = x.float()
    x_scale = _largest(v, group).clamp(min=SCALE_EPS) / quant_max
    codes = (v / x_scale).round().nan_to_num(0.0).clamp(quant_min, quant_max).to(torch.int8)
    sums = ops.packed_matmul(codes, packed, bits, in_features)
    dist.all_reduce(sums, group=_process_group(group))
    y = sums.float() * x_scale * scale.view(-1)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


@torch.library.custom_op("bitnet::row_parallel_norm", mutates_args=())
def row_parallel_norm(x: Tensor, weight: Tensor, eps: float, width: int, group: str) -> Tensor:
    """RMSNorm of rows of `width` values that are spread over a group's processes.

    x: float `[.., K]`; weight: float `[K]`, of this process's columns; group: name of a process group, or "" for none.
    Returns `[.., K]` in x's dtype.
    """
    v = x.float()
    largest = _largest(v, group)
    exponent = torch.frexp(largest).exponent
    fraction = 62 - width.bit_length()
    squares = (v.double() * _power_of_2(-exponent)).square() * 2.0**fraction  # 48 bits and a power of 2: exact
    total = squares.round().to(torch.int64).sum(-1, keepdim=True)
    if group:
        dist.all_reduce(total, group=_process_group(group))
    mean = total.double() * (2.0**-fraction / width) * _power_of_2(2 * exponent)
    mean = torch.where(largest.isfinite(), mean, torch.nan)
    normed = v * (mean + eps).rsqrt().float()
    return weight * normed.to(x.dtype)


def _largest(v: Tensor, group: str) -> Tensor:
    """Largest absolute value of every row, float32 `[.., 1]`, over all processes; NaN where one is."""
    bits = v.abs().view(torch.int32).amax(-1, keepdim=True)
    if group:
        dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=_process_group(group))
    return bits.view(torch.float32)


def _power_of_2(exponent: Tensor) -> Tensor:
    """Float64, of an int32 exponent above -1023 and below 1024."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _process_group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


@row_parallel_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, in_features: int, group: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@row_parallel_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, width: int, group: str) -> Tensor:
    return torch.empty_like(x)
