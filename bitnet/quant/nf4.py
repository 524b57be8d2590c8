"""NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, section 3).

    w ~ codebook[c] * scale        scale = absmax of each block of 64 weights along a row

The 16 codebook values are quantiles of the standard normal distribution, divided by the largest: 8 probabilities evenly
spaced from `p` to 1/2 (1/2 left out) on the positive side, 7 on the negative side, and an exact 0, with
`p = 1 - (1/30 + 1/32) / 2`, half-way between the outermost quantiles of 15 and of 16 levels. A Gaussian weight then
falls on each code with a probability of 1.7 % (the outermost) to 9.3 % (the one below 0).

Double quantization stores the scales in 8 bits: their mean is subtracted (scales are positive), the rest becomes int8
by absmax in blocks of 256. The paper has an 8-bit float there; for Gaussian weights integers of the same size keep the
scales to 0.15 % (rms), FP8 E4M3 to 0.43 %. Codes are chosen against the scale as it is stored. Bits per weight:
4 + 32/64 = 4.5, or 4 + 8/64 + 32/(64 * 256) = 4.127.
Packing is that of 4-bit codes in `packing.py`, with offset 8.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.quant.affine import PerGroup, dequantize, quantize_symmetric, scale_shape
from bitnet.quant.packing import pack_codes, unpack_codes

SCALES_PER_BLOCK = 256


@dataclass(frozen=True)
class DoubleQuantized:
    """Scales in 8 bits: `scale ~ codes * scale + offset`."""

    codes: Tensor
    """int8 `[N, K / block_size]`."""
    scale: Tensor
    """float32 `[ceil(codes.numel() / 256)]`, one for each 256 codes in row-major order."""
    offset: Tensor
    """float32 scalar, the mean of all scales."""

    def dequantize(self) -> Tensor:
        """float32 `[N, K / block_size]`, never negative."""
        values = dequantize(_scale_blocks(self.codes), self.scale[:, None]).flatten()[: self.codes.numel()]
        return (values + self.offset).clamp(min=0).reshape(self.codes.shape)


@dataclass(frozen=True)
class NF4Weight:
    """Result of `quantize_nf4`."""

    packed: Tensor
    """uint8 `[N, packed_width(K, 4)]`, codebook indices minus 8 as in `packing.py`."""
    scale: Tensor | DoubleQuantized
    """Absmax of each block: float32 `[N, K / block_size]`, or the same in 8 bits."""
    in_features: int
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        scale = self.scale
        tensors = [scale] if isinstance(scale, Tensor) else [scale.codes, scale.scale, scale.offset]
        return sum(tensor.nbytes for tensor in [self.packed, *tensors])


@functools.cache
def nf4_codebook() -> Tensor:
    """The 16 values, ascending from -1 to 1 with 0 at index 7: float32, on the CPU. Don't write to it."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    # Without the quantile of 1/2, which is 0 and would stand on both sides.
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (values / values.max()).float()


def quantize_nf4(weight: Tensor, *, block_size: int = 64, double_quant: bool = False) -> NF4Weight:
    """NF4 codes and scales of a float weight `[N, K]`, K a multiple of `block_size`.

    Every weight takes the nearest codebook value (the lower one of two equally near). All-zero blocks have scale 0.
    Raises ValueError for another rank or dtype, NaN or infinite weights, or a block size that doesn't divide K.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"NF4 takes a float weight [N, K], got {weight.dtype} {list(weight.shape)}")
    shape = scale_shape(weight.shape, PerGroup(block_size))
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError(
            f"the weight {list(weight.shape)} holds {int((~weight.isfinite()).sum())} NaN or infinite values"
        )
    blocks = weight.reshape(*shape, block_size)
    absmax = blocks.abs().amax(dim=-1)
    scale = _double_quantize(absmax) if double_quant else absmax
    stored = scale.dequantize() if isinstance(scale, DoubleQuantized) else scale
    codebook = nf4_codebook().to(weight.device)
    # By the scale as it is stored: a weight a little beyond it takes the outermost value.
    ratio = blocks / torch.where(stored > 0, stored, 1.0)[..., None]
    # The borders lie half-way between neighbours, so this finds the nearest value.
    codes = torch.bucketize(ratio, (codebook[1:] + codebook[:-1]) / 2, out_int32=True)
    packed = pack_codes((codes - 8).to(torch.int8).reshape(weight.shape), 4)
    return NF4Weight(packed, scale, weight.shape[1], block_size)


def dequantize_nf4(weight: NF4Weight) -> Tensor:
    """`codebook[codes] * scale`: float32 `[N, in_features]`."""
    codes = unpack_codes(weight.packed, 4, weight.in_features).int() + 8
    scale = weight.scale if isinstance(weight.scale, Tensor) else weight.scale.dequantize()
    return nf4_codebook().to(codes.device)[codes] * scale.repeat_interleave(weight.block_size, dim=1)


def _double_quantize(scale: Tensor) -> DoubleQuantized:
    offset = scale.mean() if scale.numel() else scale.new_zeros(())
    # The usual smallest absmax, 1e-5, would flatten scales that differ by less.
    codes, steps = quantize_symmetric(_scale_blocks(scale - offset), 8, PerGroup(SCALES_PER_BLOCK), eps=1e-30)
    return DoubleQuantized(codes.flatten()[: scale.numel()].reshape(scale.shape), steps.flatten(), offset)


def _scale_blocks(x: Tensor) -> Tensor:
    """Rows of 256 entries, the last one padded with 0."""
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % SCALES_PER_BLOCK)).view(-1, SCALES_PER_BLOCK)
