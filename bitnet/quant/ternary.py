"""The two BitNet weight quantizers: absmean ternary (b1.58) and sign binary (1-bit).

    b1.58  (arXiv 2402.17764, eq. 1-3)     gamma = max(mean(|W|), 1e-5)   q = clamp(round(W / gamma), -1, 1)
    1-bit  (arXiv 2310.11453, eq. 1-3, 12) beta  = mean(|W|)              q = +1 if W >= mean(W) else -1

Both take one scale for the whole matrix and W ~ q * scale. Everything is computed in float32 whatever W's dtype;
rounding is half to even, so W / gamma = 0.5 becomes 0 and 1.5 is clamped to 1.

Absmean is not idempotent: the mean of |q * gamma| is gamma times the fraction of non-zeros, so quantizing ternary
values again shrinks them. Take codes and scale from one call and keep both.
"""

import torch
from torch import Tensor

from bitnet.quant.affine import SCALE_EPS


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


def fake_quantize_ternary(weight: Tensor) -> Tensor:
    """`codes * scale` of `quantize_ternary` in the weight's dtype."""
    codes, scale = _ternary(weight)
    return (codes * scale).to(weight.dtype)


def fake_quantize_binary(weight: Tensor) -> Tensor:
    """`codes * scale` of `quantize_binary` in the weight's dtype."""
    codes, scale = _binary(weight)
    return (codes * scale).to(weight.dtype)


def _ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = absmean_scale(weight)
    return (weight.float() / scale).round().clamp(-1, 1), scale


def _binary(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    # No clamp to a smallest scale here: the 1-bit paper has none, and nothing divides by beta.
    return torch.where(weight >= _mean(weight), 1.0, -1.0), _mean(weight.abs())


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()  # 0 of no values, where torch's mean is NaN
