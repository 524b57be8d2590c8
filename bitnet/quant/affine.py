"""Linear quantization: symmetric absmax and asymmetric zero-point, at any granularity.

    x ~ (q - zero_point) * scale         q = clamp(round(x / scale) + zero_point, quant_min, quant_max)

    absmax      scale = absmax(x) / quant_max                    zero_point = 0
    zero-point  scale = (max(x) - min(x)) / (quant_max - quant_min),  zero_point = quant_min - round(min(x) / scale)
    clipping    the same with a narrower range than x has; what lies outside gets the first or the last code

`scale` always dequantizes. It has as many dimensions as x, and each of its entries covers a block of x: a dimension
of size s against one of size n stands for n / s neighbours each. So per tensor is `[1, .., 1]`, per channel of
`[N, K]` is `[N, 1]`, per token of `[.., T, K]` is `[.., T, 1]` and per group of 128 is `[N, K / 128]`; the functions
that use a scale need not be told which it was. All arithmetic is float32; rounding is half to even. The names are
torchao's (`quant_primitives.py`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.quant.straight_through import straight_through

SCALE_EPS = 1e-5


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of dimension `axis` (0: the output channels of a weight `[N, K]`)."""

    axis: int = 0


@dataclass(frozen=True)
class PerToken:
    """One scale for each vector along the last dimension (the rows of activations `[.., K]`)."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each `group_size` neighbours along the last dimension."""

    group_size: int = 128


Granularity = PerTensor | PerChannel | PerToken | PerGroup


def integer_range(bits: int, *, signed: bool = True, restricted: bool = False) -> tuple[int, int]:
    """Smallest and largest code of an integer type: (-128, 127) for 8 bits signed, (-127, 127) restricted, (0, 255)
    unsigned. Raises ValueError for fewer than 2 or more than 16 bits, or a restricted unsigned range."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}; linear quantization takes 2 to 16")
    if not signed:
        if restricted:
            raise ValueError("restricted=True drops the most negative code; an unsigned range has none")
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + restricted, 2 ** (bits - 1) - 1


def scale_shape(shape: torch.Size, granularity: Granularity) -> list[int]:
    """Shape of the scale for a tensor of this shape. Raises ValueError where a group does not divide the last
    dimension or the axis does not exist."""
    ndim = len(shape)
    match granularity:
        case PerTensor():
            return [1] * ndim
        case PerChannel(axis):
            if not -ndim <= axis < ndim:
                raise ValueError(f"axis {axis} does not exist in a tensor of shape {list(shape)}")
            return [size if dim == axis % ndim else 1 for dim, size in enumerate(shape)]
        case PerToken():
            return [*shape[:-1], 1]
        case PerGroup(group_size):
            if group_size < 1 or shape[-1] % group_size:
                raise ValueError(
                    f"group_size {group_size} does not divide the last dimension of {list(shape)}; "
                    f"choose a divisor of {shape[-1]}"
                )
            return [*shape[:-1], shape[-1] // group_size]
    raise ValueError(f"granularity {granularity!r} is not one of PerTensor, PerChannel, PerToken, PerGroup")


def choose_qparams_symmetric(
    x: Tensor, bits: int, granularity: Granularity, *, restricted: bool = True, eps: float = SCALE_EPS
) -> Tensor:
    """Absmax scale, float32, of shape `scale_shape(x.shape, granularity)`.

    `restricted` maps absmax to `2^(bits-1) - 1`, so both signs reach it (BitNet's activations and the usual choice);
    otherwise absmax maps to `2^(bits-1)`, a finer step whose largest positive value is clipped by one code. An
    absmax below `eps` counts as `eps`, so an all-zero or empty block gets a scale and zero codes.
    """
    _check_float(x)
    _, quant_max = integer_range(bits)
    # One absmax for each block that a scale covers, whatever the granularity.
    absmax = _largest(_blocks(x.float(), scale_shape(x.shape, granularity)).abs(), _inner_dims(x))
    return absmax.clamp(min=eps) / (quant_max if restricted else quant_max + 1)


def choose_qparams_asymmetric(
    x: Tensor, bits: int, granularity: Granularity, *, signed: bool = False, eps: float = SCALE_EPS
) -> tuple[Tensor, Tensor]:
    """Zero-point scale (float32) and zero point (int32), both of shape `scale_shape(x.shape, granularity)`.

    The range is widened to contain 0, so that 0.0 has a code of its own (padding and ReLU outputs stay exact), which
    also keeps the zero point inside the integer range. `signed` picks [-2^(b-1), 2^(b-1)-1] instead of [0, 2^b - 1].
    """
    _check_float(x)
    quant_min, quant_max = integer_range(bits, signed=signed)
    blocks = _blocks(x.float(), scale_shape(x.shape, granularity))
    low, high = -_largest(-blocks, _inner_dims(x)), _largest(blocks, _inner_dims(x))
    return _zero_point_qparams(low, high, quant_min, quant_max, eps)


def choose_qparams_from_range(
    low: Tensor,
    high: Tensor,
    bits: int,
    *,
    symmetric: bool,
    signed: bool = True,
    restricted: bool = True,
    eps: float = SCALE_EPS,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for a given clip range, for instance of a calibration: values outside it will be clipped.

    low, high: float, of the scale's shape. Symmetric covers `max(-low, high)` on both sides and returns no zero point;
    with `signed=False` it spends the codes [0, 2^b - 1] on values that are never negative. Asymmetric widens the range
    to contain 0, as `choose_qparams_asymmetric` does. Raises ValueError where a bound isn't finite, low is above high,
    or low is negative in a symmetric unsigned range.
    """
    low, high = low.float(), high.float()
    if low.shape != high.shape:
        raise ValueError(f"low and high need one shape, got {list(low.shape)} and {list(high.shape)}")
    bad = ~(low.isfinite() & high.isfinite() & (low <= high))
    if bad.any():
        raise ValueError(f"a clip range needs finite low <= high, got low {low[bad][0]:g}, high {high[bad][0]:g}")
    quant_min, quant_max = integer_range(bits, signed=signed)
    if not symmetric:
        return _zero_point_qparams(low, high, quant_min, quant_max, eps)
    if not signed and (low < 0).any():
        raise ValueError(f"low is {low.min():g}, but symmetric unsigned codes have no negative values; use signed=True")
    # Symmetric around 0: the bound that lies further out decides.
    absmax = torch.maximum(-low, high).clamp(min=eps)
    return absmax / (quant_max if restricted or not signed else quant_max + 1), None


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Codes of x, of x's shape: int8 or uint8 where the range fits, else int32. The shapes of scale and zero_point
    are explained at the top of this file."""
    codes = _round_to_codes(x, scale, zero_point, quant_min, quant_max).reshape(x.shape)
    if quant_min >= -128 and quant_max <= 127:
        return codes.to(torch.int8)
    return codes.to(torch.uint8 if quant_min >= 0 and quant_max <= 255 else torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`(codes - zero_point) * scale` in float32, of the codes' shape."""
    values = _blocks(codes.float(), scale.shape)
    if zero_point is not None:
        values = values - _per_block(zero_point)
    return (values * _per_block(scale)).reshape(codes.shape)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """`dequantize(quantize(x))` without the detour through integer storage: same values, x's dtype and shape."""
    codes = _round_to_codes(x, scale, zero_point, quant_min, quant_max)
    if zero_point is not None:
        codes = codes - _per_block(zero_point)
    return (codes * _per_block(scale)).reshape(x.shape).to(x.dtype)


def fake_quantize_ste(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, *, clip_gradient: bool = True
) -> Tensor:
    """`fake_quantize` with a straight-through gradient for quantization-aware training: the identity for every x whose
    code lies in the range, and 0 outside it (1 there too with `clip_gradient=False`). The mask is the one of
    `torch.fake_quantize_per_tensor_affine`; no gradient goes to scale or zero_point."""
    inside = None
    if clip_gradient:
        # Where a code is clipped the output does not follow x, so no gradient goes there.
        codes = _unclipped_codes(x.detach(), scale, zero_point)
        inside = ((codes >= quant_min) & (codes <= quant_max)).reshape(x.shape)
    return straight_through(x, lambda value: fake_quantize(value, scale, zero_point, quant_min, quant_max), inside)


def quantize_symmetric(
    x: Tensor, bits: int, granularity: Granularity, *, restricted: bool = True, eps: float = SCALE_EPS
) -> tuple[Tensor, Tensor]:
    """Absmax codes and scale in one call: `choose_qparams_symmetric`, then `quantize` to the full signed range."""
    scale = choose_qparams_symmetric(x, bits, granularity, restricted=restricted, eps=eps)
    return quantize(x, scale, None, *integer_range(bits)), scale


@dataclass(frozen=True)
class QuantizationError:
    """Result of `quantization_error`."""

    mse: float
    """Mean of the squared differences."""
    sqnr_db: float
    """Signal-to-quantization-noise ratio, 10 log10(sum(x^2) / sum((x - y)^2)) dB; infinite where nothing differs."""
    max_abs: float
    """Largest absolute difference."""


def quantization_error(x: Tensor, quantized: Tensor) -> QuantizationError:
    """How far dequantized values (of x's shape) are from x, summed in float64. An all-zero x that did not stay zero
    has an SQNR of -inf. Raises ValueError where the shapes differ or x is empty."""
    if x.shape != quantized.shape or not x.numel():
        raise ValueError(f"the error needs two tensors of one shape, got {list(x.shape)} and {list(quantized.shape)}")
    difference = x.double() - quantized.double()
    signal, noise = float(x.double().square().sum()), float(difference.square().sum())
    ratio = math.inf if noise == 0 else signal / noise
    return QuantizationError(
        mse=noise / x.numel(),
        sqnr_db=10 * math.log10(ratio) if ratio > 0 else -math.inf,
        max_abs=float(difference.abs().max()),
    )


def _zero_point_qparams(low: Tensor, high: Tensor, quant_min: int, quant_max: int, eps: float) -> tuple[Tensor, Tensor]:
    # 0.0 must be one of the values, whose code then is the zero point.
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    scale = span.clamp(min=eps) / (quant_max - quant_min)
    # The span of finite bounds may be more than float32 holds.
    halves = high / (quant_max - quant_min) - low / (quant_max - quant_min)
    scale = torch.where(span.isinf() & low.isfinite() & high.isfinite(), halves, scale)
    zero_point = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def _round_to_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Codes as float32, in the blocked view of `_blocks`."""
    return _unclipped_codes(x, scale, zero_point).clamp(quant_min, quant_max)


def _unclipped_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    codes = (_blocks(x.float(), scale.shape) / _per_block(scale)).round()
    return codes if zero_point is None else codes + _per_block(zero_point)


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"quantization takes a float tensor, got {x.dtype}")


def _blocks(x: Tensor, scales: torch.Size | list[int]) -> Tensor:
    """View x `[n0, n1, ..]` as `[s0, n0/s0, s1, n1/s1, ..]`, so that scale i of a dimension covers its i-th block."""
    if len(scales) != x.ndim or any(n != s and (s < 1 or n % s) for n, s in zip(x.shape, scales, strict=True)):
        raise ValueError(f"a scale of shape {list(scales)} does not tile a tensor of shape {list(x.shape)}")
    return x.reshape([size for n, s in zip(x.shape, scales, strict=True) for size in (s, n // s if s else 1)])


def _inner_dims(x: Tensor) -> list[int]:
    """The dimensions inside a block, in the view of `_blocks`."""
    return list(range(1, 2 * x.ndim, 2))


def _largest(blocks: Tensor, inner: list[int]) -> Tensor:
    """Largest value over some dimensions; 0 where there are no values."""
    if any(blocks.shape[dim] == 0 for dim in inner):
        return blocks.new_zeros([size for dim, size in enumerate(blocks.shape) if dim not in inner])
    return blocks.amax(dim=inner)


def _per_block(scale: Tensor) -> Tensor:
    return scale.reshape([size for s in scale.shape for size in (s, 1)])
