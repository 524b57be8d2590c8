"""The BitNet weight quantizers: absmean ternary (b1.58), of a matrix or of groups, and sign binary (1-bit).

    b1.58  (arXiv 2402.17764, eq. 1-3)     gamma = max(mean(|W|), 1e-5)   q = clamp(round(W / gamma), -1, 1)
    1-bit  (arXiv 2310.11453, eq. 1-3, 12) beta  = mean(|W|)              q = +1 if W >= mean(W) else -1

Both take one scale for the whole matrix and W ~ q * scale. Everything is computed in float32 whatever W's dtype;
rounding is half to even, so W / gamma = 0.5 becomes 0 and 1.5 is clamped to 1.

In groups, each g weights of a row have a gamma of their own, which is a normal float16 number: rounded, half to even,
before anything is divided by it, so that the block formats of GGUF (Q2_0) and GPTQ's layout hold such a matrix exactly.
The last group of a row is shorter where g does not divide the row.

Absmean is not idempotent: the mean of |q * gamma| is gamma times the fraction of non-zeros, so quantizing ternary
values again shrinks them. Take codes and scale from one call and keep both.
"""

import torch
from torch import Tensor

from bitnet.quant.affine import SCALE_EPS

FLOAT16_TINY = 2.0**-14
"""The smallest normal number, below which fewer bits are left."""


def absmean_scale(weight: Tensor) -> Tensor:
    """Mean absolute value of the whole matrix, at least 1e-5: float32 scalar."""
    return _mean(weight.float().abs()).clamp(min=SCALE_EPS)


def quantize_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean ternary codes and scale of a weight of any shape and float dtype.

    Returns codes int8 in {-1, 0, 1} of the same shape and the float32 scalar `scale` (the papers' gamma), with
    `weight ~ codes * scale`. Source: arXiv 2402.17764, eq. 1-3.
    """
    codes, scale = _ternary(weight)
    return codes.to(torch.int8), scale


def quantize_binary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sign codes around the mean, and scale, of a weight of any shape and float dtype.

    Returns codes int8 in {-1, 1} (a weight equal to the mean gives +1) and the float32 scalar `scale` (the papers'
    beta). Source: arXiv 2310.11453, eq. 1-3 and 12.
    """
    codes, scale = _binary(weight)
    return codes.to(torch.int8), scale


def quantize_ternary_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Absmean ternary codes and scales of a weight `[N, K]` of any float dtype, in groups of `group_size` columns.

    Returns codes int8 `[N, K]` in {-1, 0, 1} and scale float32 `[N, ceil(K / group_size)]`, numbers that float16 holds.
    """
    codes, scale = _ternary_groups(weight, group_size)
    return codes.to(torch.int8), scale


def scale_of_columns(scale: Tensor, group_size: int, columns: int) -> Tensor:
    """The scales `[N, ceil(K / group_size)]` of groups as one for each of `columns` weights of a row, `[N, K]`."""
    return scale.repeat_interleave(group_size, dim=1)[:, :columns]


def group_means(values: Tensor, group_size: int) -> Tensor:
    """Means of `[N, K]` over each group of columns: `[N, ceil(K / group_size)]`."""
    rows, columns = values.shape
    last = columns % group_size
    whole = values[:, : columns - last].reshape(rows, columns // group_size, group_size).mean(2)
    return torch.cat([whole, values[:, columns - last :].mean(1, keepdim=True)], dim=1) if last else whole


def fake_quantize_ternary_groups(weight: Tensor, group_size: int) -> Tensor:
    """`codes * scale` of `quantize_ternary_groups` in the weight's dtype."""
    codes, scale = _ternary_groups(weight, group_size)
    return (codes * scale_of_columns(scale, group_size, weight.shape[1])).to(weight.dtype)


def fake_quantize_ternary(weight: Tensor) -> Tensor:
    """`codes * scale` of `quantize_ternary` in the weight's dtype."""
    codes, scale = _ternary(weight)
    return (codes * scale).to(weight.dtype)


def soft_ternary(weight: Tensor, temperature: Tensor, group_size: int = 0) -> Tensor:
    """What `codes * scale` is on average where each code k of -1, 0, 1 has the probability
    softmax(-(w / scale - k)^2 / T): W's shape and dtype, of matrices or, with a group_size, of groups of columns.

    temperature: T, a scalar tensor from 0, where this is `fake_quantize_ternary` but for weights on a border. Source:
    arXiv 2601.20745.
    """
    if group_size:
        scale = scale_of_columns(_group_scales(weight.float(), group_size), group_size, weight.shape[1])
    else:
        scale = absmean_scale(weight)
    u = weight.float() / scale
    # Of the three exponents that of 0 is taken from the others. e^80 is 1 in the end; below e^-30 both are alike, and
    # make 0: means of 1e-40 would make the products that they are operands of a hundred times as slow.
    T = temperature.clamp(min=1e-12)
    near, far = (((sign * 2 * u.abs() - 1) / T).clamp(-30, 80).exp() for sign in (1, -1))
    mean = (near - far) / (1 + near + far)
    return (scale * torch.where(u < 0, -mean, mean)).to(weight.dtype)  # which compiles to faster code than sign()


def fake_quantize_binary(weight: Tensor) -> Tensor:
    """`codes * scale` of `quantize_binary` in the weight's dtype."""
    codes, scale = _binary(weight)
    return (codes * scale).to(weight.dtype)


def _ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = absmean_scale(weight)
    return (weight.float() / scale).round().clamp(-1, 1), scale


def _ternary_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = _group_scales(weight, group_size)
    return (weight / scale_of_columns(scale, group_size, weight.shape[1])).round().clamp(-1, 1), scale


def _group_scales(weight: Tensor, group_size: int) -> Tensor:
    """Of float32 `[N, K]`."""
    return _round_to_float16(group_means(weight.abs(), group_size).clamp(min=FLOAT16_TINY))


def _round_to_float16(values: Tensor) -> Tensor:
    """Half to even, of normal float16 numbers. Written in integers, since compilers may leave out a cast there and
    back."""
    bits = values.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _binary(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    # No clamp to a smallest scale here: the 1-bit paper has none, and nothing divides by beta.
    return torch.where(weight >= _mean(weight), 1.0, -1.0), _mean(weight.abs())


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()  # 0 of no values, where torch's mean is NaN
