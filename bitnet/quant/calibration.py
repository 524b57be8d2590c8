"""Calibration: from the values that a tensor takes over many batches to one scale and zero point.

An `Observer` counts magnitudes in a histogram with bins of width `2^e / bins`, one row for values >= 0 and one for
values < 0; e is the smallest exponent, from -100 on, with `absmax < 2^e`. A larger value doubles the range, which
merges neighbouring bins in pairs, and since every edge is a multiple of a power of two no value changes sides: the
counts, int64, are those of the union of all batches, to the last bit, in whatever order and pieces they came. Memory
doesn't grow with the data. More than half of the bins lie below absmax.

`calibrate` then picks the clip range:

    minmax      smallest and largest value
    percentile  symmetric: p % of the magnitudes; asymmetric: all but (100 - p) % at either end. The edge of its bin.
    mse         argmin over scale (and zero point) of  sum (x - quantized(x))^2,  x spread evenly in each bin
    entropy     argmin over i of KL(P_i || Q_i): P_i is the histogram cut after i bins with the outliers added to its
                last one, Q_i the histogram cut after i bins and averaged over the non-empty bins of each level. The
                algorithm of TensorRT (S. Migacz, "8-bit Inference with TensorRT", GTC 2017) in the form that
                pytorch-quantization publishes it (`calib/histogram.py`): i from 128 on, the first bin replaced by the
                second, the last of equal minima. It knows symmetric ranges; for an asymmetric one each side of zero is
                searched on its own, with half of the levels if both sides have values.

Both searches are exhaustive over their candidates: sums over the bins of a level are differences of cumulative sums.
"""

import math

import torch
from torch import Tensor

from bitnet.quant.affine import (
    SCALE_EPS,
    Granularity,
    PerChannel,
    PerTensor,
    _blocks,
    _inner_dims,
    _largest,
    choose_qparams_from_range,
    fake_quantize,
    integer_range,
    scale_shape,
)

METHODS = ("minmax", "percentile", "mse", "entropy")
VALUES_PER_LEVEL = 8
"""Entropy needs at least this many observed values, and entropy and mse this many bins, for each code of a side."""
_SMALLEST_EXPONENT = -100  # of the range: far below SCALE_EPS, and 2^-e stays a normal float32
_CHUNK = 1 << 19  # values binned at a time, so that the bin numbers of a large batch stay small
_ASYMMETRIC_SCALES = 1024


class Observer:
    """Statistics of a tensor over many batches, for `calibrate`; order and pieces of the batches don't matter.

    granularity: `PerTensor()`, or `PerChannel(axis)` for separate statistics of each index of a dimension. bins: a
    power of two up to 65536 for each sign, 16 bytes each a channel; 0 keeps minimum and maximum only.
    """

    def __init__(self, granularity: PerTensor | PerChannel, *, bins: int = 4096) -> None:
        if not isinstance(granularity, PerTensor | PerChannel):
            raise ValueError(f"an observer is PerTensor() or PerChannel(axis), got {granularity!r}; others are dynamic")
        if bins and (bins < 16 or bins > 1 << 16 or bins & (bins - 1)):
            raise ValueError(f"bins is {bins}; choose 0 or a power of two from 16 to 65536")
        self.granularity = granularity
        self.bins = bins
        self.count = 0
        """Values seen, for each channel."""
        self.scale_shape: list[int] = []
        self.minimum = self.maximum = torch.empty(0)  # float32 [C]
        self.exponent = torch.empty(0, dtype=torch.int64)  # [C]
        self.counts = torch.empty(0, dtype=torch.int64)  # [C, 2, bins]: values >= 0, magnitudes of values < 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a batch: float, of any shape whose number of dimensions (and of channels) stays the same. Raises
        ValueError for NaN or infinite values, and then keeps what it had."""
        if not x.is_floating_point():
            raise ValueError(f"an observer takes a float tensor, got {x.dtype}")
        shape = scale_shape(x.shape, self.granularity)
        if not x.numel():
            return
        channels_first = x.movedim(self.granularity.axis, 0) if isinstance(self.granularity, PerChannel) else x[None]
        rows = channels_first.reshape(len(channels_first), -1).float()
        batch = Observer(self.granularity, bins=self.bins)
        batch.count, batch.scale_shape = rows.shape[1], shape
        batch.minimum, batch.maximum = rows.amin(1).cpu(), rows.amax(1).cpu()
        if not (batch.minimum.isfinite() & batch.maximum.isfinite()).all():
            nan, infinite = int(x.isnan().sum()), int((~x.float().isfinite()).sum())
            raise ValueError(
                f"calibration data of shape {list(x.shape)} holds {nan} NaN and {infinite - nan} infinite values "
                f"(in float32); the first stands at {(~x.float().isfinite()).nonzero()[0].tolist()}"
            )
        absmax = torch.maximum(-batch.minimum, batch.maximum)
        exponent = torch.where(absmax > 0, torch.frexp(absmax).exponent, _SMALLEST_EXPONENT)
        batch.exponent = exponent.long().clamp(min=_SMALLEST_EXPONENT)
        batch.counts = _histogram(rows, batch.exponent, self.bins) if self.bins else batch.counts
        self.merge(batch)

    def merge(self, other: "Observer") -> None:
        """Add everything that another observer of the same kind has seen."""
        if other.granularity != self.granularity or other.bins != self.bins:
            raise ValueError(
                f"an observer with {self.granularity}, {self.bins} bins can't take in {other.granularity}, {other.bins}"
            )
        if not other.count:
            return
        if not self.count:
            self.count, self.scale_shape, self.exponent = other.count, other.scale_shape, other.exponent
            self.minimum, self.maximum, self.counts = other.minimum, other.maximum, other.counts
            return
        if self.scale_shape != other.scale_shape:
            raise ValueError(
                f"batches with scales of shape {self.scale_shape} and {other.scale_shape} can't share an observer; "
                "keep the number of dimensions and of channels"
            )
        exponent = torch.maximum(self.exponent, other.exponent)
        if self.bins:
            self.counts = _coarsen(self.counts, exponent - self.exponent)
            self.counts += _coarsen(other.counts, exponent - other.exponent)
        self.exponent = exponent
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.count += other.count

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude, float32 `[C]` (C = 1 per tensor)."""
        return torch.maximum(-self.minimum, self.maximum)


def calibrate(
    observer: Observer,
    method: str = "minmax",
    bits: int = 8,
    *,
    symmetric: bool = True,
    signed: bool = True,
    restricted: bool = True,
    percentile: float = 99.99,
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point (int32, None if symmetric) for what the observer has seen, ready for `quantize` to
    `integer_range(bits, signed=signed)`; of shape `[1, .., 1]`, or one entry along the observer's axis; on the CPU.

    Symmetric with `signed=False` is for one-sided values (after a ReLU). `restricted` as in `choose_qparams_symmetric`;
    mse finds the scale without it. Constant values take their exact range whatever the method, and all zeros the
    smallest scale, as there. Raises ValueError for too few values, too few bins, negative values in an unsigned
    symmetric range, an unknown method.
    """
    _check_enough(observer, method, bits, symmetric and signed, percentile)
    low, high = observer.minimum.clone(), observer.maximum.clone()
    # The range of minmax also decides for constants, and refuses negative values where codes are not.
    options = {"symmetric": symmetric, "signed": signed, "restricted": restricted or method == "mse"}
    scale, zero_point = choose_qparams_from_range(low, high, bits, **options)
    varying = (low < high).nonzero().flatten().tolist() if method != "minmax" else []
    for channel in varying:
        counts, width = observer.counts[channel], math.ldexp(1.0, int(observer.exponent[channel])) / observer.bins
        extremes = float(low[channel]), float(high[channel])
        if method == "mse":
            found = _mse_qparams(counts, width, extremes, bits, symmetric, signed)
            scale[channel] = max(found[0], SCALE_EPS / 2**bits)
            if zero_point is not None:
                zero_point[channel] = found[1]
        elif method == "percentile":
            low[channel], high[channel] = _percentile_range(counts, width, extremes, percentile, symmetric)
        else:
            low[channel], high[channel] = _entropy_range(counts, width, extremes, bits, symmetric, signed)
    if method in ("percentile", "entropy"):
        scale, zero_point = choose_qparams_from_range(low, high, bits, **options)
    shape = observer.scale_shape
    return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


def choose_qparams_mse(
    x: Tensor,
    bits: int,
    granularity: Granularity,
    *,
    symmetric: bool = True,
    signed: bool = True,
    smallest_ratio: float = 0.2,
    steps: int = 80,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every block of a tensor at hand (a weight) with the smallest squared error, measured on
    the values themselves, among `steps` clip ranges from the whole range down to `smallest_ratio` of it. So it is
    never worse than min-max with the restricted range. Shapes and options as in `choose_qparams_from_range`."""
    x = x.float()
    shape = scale_shape(x.shape, granularity)
    blocks, inner = _blocks(x, shape), _inner_dims(x)
    low, high = -_largest(-blocks, inner), _largest(blocks, inner)
    limits = integer_range(bits, signed=signed)
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    for ratio in torch.linspace(1, smallest_ratio, steps).tolist():
        scale, zero_point = choose_qparams_from_range(
            low * ratio, high * ratio, bits, symmetric=symmetric, signed=signed
        )
        error = (fake_quantize(x, scale, zero_point, *limits) - x).square().reshape(blocks.shape).sum(inner)
        if best is None:
            best = error, scale, zero_point
            continue
        better = error < best[0]
        zero = None if zero_point is None or best[2] is None else torch.where(better, zero_point, best[2])
        best = torch.where(better, error, best[0]), torch.where(better, scale, best[1]), zero
    assert best is not None
    return best[1], best[2]


def entropy_threshold(counts: Tensor, levels: int, *, start: int = 128) -> int:
    """Number of leading bins to keep of a histogram of magnitudes, int64 `[n]`, for `levels` quantized magnitudes: the
    search of the published algorithm (top of this file) over every i from `start` to n. All n where n <= start."""
    n = len(counts)
    if n <= start:
        return n
    counts = counts.double()
    counts = torch.cat([counts[1:2], counts[1:]])
    kept = torch.arange(start, n + 1)
    # Level j of a candidate i covers the bins k with j i / levels <= k < (j + 1) i / levels.
    edges = (torch.arange(levels + 1) * kept[:, None] + levels - 1) // levels  # [candidates, levels + 1]
    sums, used = _cumulative(counts), _cumulative((counts > 0).double())
    level_sum = sums[edges].diff(dim=1)
    log_mean = (level_sum / used[edges].diff(dim=1).clamp(min=1)).clamp(min=1e-300).log()
    total, last = sums[-1], counts[kept - 1]
    outliers = total - sums[kept]
    # sum_k p_k ln(p_k / q_k) with p = r / total, q = mean / sums[i]; r = counts, but for the last bin with the outliers
    r_log_r = _cumulative(torch.xlogy(counts, counts))[kept] - torch.xlogy(last, last)
    r_log_r += torch.xlogy(last + outliers, last + outliers)
    last_level = (kept - 1) * levels // kept  # levels - 1, but where there are fewer bins than levels
    r_log_q = (level_sum * log_mean).sum(dim=1) + outliers * log_mean.gather(1, last_level[:, None])[:, 0]
    divergence = (r_log_r - r_log_q) / total + (sums[kept] / total).log()
    divergence[(last == 0) & (outliers > 0)] = math.inf  # outliers where q is 0
    # The last of equal minima, where equal allows for the rounding of the sums.
    return int(kept[(divergence <= divergence.min() + 1e-12).nonzero()[-1]])


def _check_enough(observer: Observer, method: str, bits: int, both_signs: bool, percentile: float) -> None:
    if method not in METHODS:
        raise ValueError(f"calibration method {method!r} is not one of {', '.join(METHODS)}")
    if not observer.count:
        raise ValueError("the observer has seen no values; update it with calibration batches first")
    if method == "minmax":
        return
    if not observer.bins:
        raise ValueError(f"calibration by {method} needs a histogram: create the observer with bins, not bins=0")
    if method == "percentile":
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile is {percentile}; it must lie above 50 and not above 100")
        if percentile < 100 and observer.count * (100 - percentile) < 100 * (1 - 1e-9):
            raise ValueError(
                f"the {percentile} percentile needs {math.ceil(100 / (100 - percentile))} values, the observer has "
                f"seen {observer.count}; give more calibration data, a lower percentile, or use minmax"
            )
        return
    needed = VALUES_PER_LEVEL * 2 ** (bits - both_signs)
    if observer.bins // 2 < needed:
        raise ValueError(f"{observer.bins} bins are too few for {bits} bits by {method}; use {2 * needed} or more")
    if method == "entropy" and observer.count < needed:
        raise ValueError(
            f"entropy calibration of {bits} bits needs {needed} values, the observer has seen {observer.count}; "
            "give more calibration data or use minmax"
        )


def _histogram(rows: Tensor, exponent: Tensor, bins: int) -> Tensor:
    """int64 `[C, 2, bins]` of float32 rows `[C, n]` with |x| < 2^exponent."""
    channels = rows.shape[0]
    # 2^k put together from its bits: exp2 may round, and a product with a power of two is exact.
    inv_width = ((bins.bit_length() - 1 - exponent + 127) << 23).to(torch.int32).view(torch.float32).to(rows.device)
    first = torch.arange(channels, device=rows.device, dtype=torch.int32)[:, None] * (2 * bins)
    counts = torch.zeros(channels * 2 * bins, dtype=torch.int64)
    for part in rows.split(max(_CHUNK, counts.numel()) // channels, dim=1):
        index = (part.abs() * inv_width[:, None]).int()
        index += (part < 0).int() * bins
        index += first
        counts += torch.bincount(index.flatten(), minlength=counts.numel()).cpu()
    return counts.view(channels, 2, bins)


def _coarsen(counts: Tensor, doublings: Tensor) -> Tensor:
    """The histogram over a range that is `2^doublings` (int64 `[C]`) times as wide."""
    index = torch.arange(counts.shape[2]) >> doublings.clamp(max=62)[:, None]
    return torch.zeros_like(counts).scatter_add_(2, index[:, None].expand_as(counts), counts)


def _cumulative(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def _used_bins(counts: Tensor) -> int:
    used = counts.nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def _percentile_range(
    counts: Tensor, width: float, extremes: tuple[float, float], percentile: float, symmetric: bool
) -> tuple[float, float]:
    needed = math.ceil(int(counts.sum()) * (percentile / 100) * (1 - 1e-12))  # the rounding must not add a value
    if symmetric:
        index = int(torch.searchsorted(counts.sum(0).cumsum(0), needed))
        bound = min((index + 1) * width, max(-extremes[0], extremes[1]))
        # An unsigned range starts at 0; a signed one takes the larger of the two.
        return -bound if extremes[0] < 0 else 0.0, bound
    bins = counts.shape[1]
    ascending = torch.cat([counts[1].flip(0), counts[0]])  # bin i starts at (i - bins) * width
    high = int(torch.searchsorted(ascending.cumsum(0), needed)) + 1 - bins
    low = bins - 1 - int(torch.searchsorted(ascending.flip(0).cumsum(0), needed))
    return max(low * width, extremes[0]), min(high * width, extremes[1])


def _entropy_range(
    counts: Tensor, width: float, extremes: tuple[float, float], bits: int, symmetric: bool, signed: bool
) -> tuple[float, float]:
    low, high = extremes
    if symmetric:
        levels = 2 ** (bits - signed)
        folded = counts.sum(0)
        bound = min(entropy_threshold(folded[: _used_bins(folded)], levels) * width, max(-low, high))
        return -bound if low < 0 else 0.0, bound
    levels = 2 ** (bits - (low < 0 < high))
    bounds = []
    for side, extreme in zip(counts, (max(high, 0.0), max(-low, 0.0)), strict=True):
        enough = int(side.sum()) >= VALUES_PER_LEVEL * levels
        bound = entropy_threshold(side[: _used_bins(side)], levels) * width if enough else extreme
        bounds.append(min(bound, extreme))
    return -bounds[1], bounds[0]


def _mse_qparams(
    counts: Tensor, width: float, extremes: tuple[float, float], bits: int, symmetric: bool, signed: bool
) -> tuple[float, int]:
    """Scale and zero point of least squared error on the histogram."""
    quant_min, quant_max = integer_range(bits, signed=signed)
    low, high = min(extremes[0], 0.0) / width, max(extremes[1], 0.0) / width  # in bins
    if symmetric:
        largest = max(-low, high)
        bounds = torch.cat([torch.arange(1, math.ceil(largest)), torch.tensor([largest])]).double()
        scales = bounds / quant_max
        error = _side_errors(counts[0], scales, quant_max)[:, quant_max]
        error = error + _side_errors(counts[1], scales, -quant_min)[:, -quant_min]
        return float(scales[error.argmin()]) * width, 0
    top = quant_max - quant_min
    scales = torch.arange(1, _ASYMMETRIC_SCALES + 1).double() * ((high - low) / _ASYMMETRIC_SCALES / top)
    # Zero at the code quant_min + z leaves z codes below it and top - z above: [scales, z].
    error = _side_errors(counts[0], scales, top).flip(1) + _side_errors(counts[1], scales, top)
    best, zero = divmod(int(error.argmin()), top + 1)
    return float(scales[best]) * width, quant_min + zero


def _side_errors(counts: Tensor, scales: Tensor, top: int) -> Tensor:
    """Squared error of a histogram of magnitudes, quantized with the codes 0 .. m, for every scale and every m from 0
    to `top`: float64 `[S, top + 1]`. scales: float64 `[S]`. Magnitudes and scales in bins."""
    # Moment p of a uniform density c_k in each bin, from 0 to t: cumulative[k] + c_k (t^(p+1) - k^(p+1)) / (p + 1).
    counts = counts.double()
    edges = torch.arange(len(counts) + 1).double()
    cumulative = [_cumulative(counts * (edges ** (p + 1) / (p + 1)).diff()) for p in range(3)]
    density = torch.cat([counts, counts.new_zeros(1)])
    codes = torch.arange(top + 1).double()
    values = codes * scales[:, None]  # [S, top + 1]
    # Code q takes what lies from (q - 1/2) scale to (q + 1/2) scale; the last code takes everything above, too.
    ends = (values + scales[:, None] / 2).clamp(max=len(counts))
    k = ends.floor()
    bins = k.long()
    upto = [cumulative[p][bins] + density[bins] * (ends ** (p + 1) - k ** (p + 1)) / (p + 1) for p in range(3)]
    below = [torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], dim=1) for m in upto]

    def error(moments: list[Tensor]) -> Tensor:
        return moments[2] - 2 * values * moments[1] + values.square() * moments[0]

    within = error([u - b for u, b in zip(upto, below, strict=True)])
    return within.cumsum(1) - within + error([c[-1] - b for c, b in zip(cumulative, below, strict=True)])
