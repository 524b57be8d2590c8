"""The searches for a scale: squared error, entropy, and what every method must do."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver

from bitnet.quant import (
    Observer,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    calibrate,
    choose_qparams_asymmetric,
    choose_qparams_mse,
    choose_qparams_symmetric,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
    quantize_symmetric,
)
from bitnet.quant.affine import scale_shape
from bitnet.quant.calibration import METHODS, _side_errors, entropy_threshold
from tests.quant.builders import DATA, assert_same_statistics, observe

SEARCHES = ["percentile", "mse", "entropy"]
SCHEMES = [
    {"symmetric": True, "signed": True}, {"symmetric": True, "signed": True, "restricted": False},
    {"symmetric": False, "signed": True}, {"symmetric": False, "signed": False},
]  # fmt: skip


def mse(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8, *, signed: bool = True, **_: Any) -> float:
    return float(
        (fake_quantize(x, scale, zero_point, *integer_range(bits, signed=signed)) - x).double().square().mean()
    )


# Mean squared error


def brute_force_mse(
    observer: Observer, scales: np.ndarray, zero_points: list[int], low: int, high: int
) -> tuple[float, int, float]:
    """Best of all scales and zero points, one at a time, with the values of a bin at 16 points of it."""
    width = 2.0 ** int(observer.exponent) / observer.bins
    points = (np.arange(observer.bins * 16) + 0.5) * width / 16
    x = np.concatenate([points, -points])
    counts = observer.counts[0].flatten().numpy().repeat(16) / 16
    x, counts = x[counts > 0], counts[counts > 0]
    best = (0.0, 0, math.inf)
    for scale in scales:
        for zero in zero_points:
            codes = np.clip(np.round(x / scale) + zero, low, high)
            error = float((counts * ((codes - zero) * scale - x) ** 2).sum())
            best = (scale, zero, error) if error < best[2] else best
    return best


def test_squared_error_of_every_scale_and_number_of_codes() -> None:
    counts = torch.randint(0, 50, (64,))
    scales = torch.tensor([0.7, 1.0, 3.3, 4.0, 9.5, 40.0, 200.0], dtype=torch.float64)
    errors = _side_errors(counts, scales, 7)
    points = (np.arange(64 * 256) + 0.5) / 256
    weights = counts.numpy().repeat(256) / 256
    for i, scale in enumerate(scales.tolist()):
        for top in range(8):
            expected = (weights * (np.clip(np.round(points / scale), 0, top) * scale - points) ** 2).sum()
            assert float(errors[i, top]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_mse_is_the_best_of_all_candidates(name: str, scheme: dict[str, bool]) -> None:
    x, bits, bins = DATA[name](), 3, 128
    observer = observe(*x.split(512, dim=1), bins=bins)
    quant_min, quant_max = integer_range(bits, signed=scheme["signed"])
    width = 2.0 ** int(observer.exponent) / bins
    if scheme["symmetric"]:
        absmax = float(observer.absmax)
        bounds = np.array([*(k * width for k in range(1, math.ceil(absmax / width))), absmax])
        scales, zero_points = bounds / quant_max, [0]
    else:
        span = max(float(observer.maximum), 0) - min(float(observer.minimum), 0)
        scales, zero_points = np.arange(4, 1025, 4) / 1024 * span / 7, list(range(quant_min, quant_max + 1))
    _, _, error = brute_force_mse(observer, scales, zero_points, quant_min, quant_max)
    scale, zero_point = calibrate(observer, "mse", bits, **scheme)
    zero = 0 if zero_point is None else int(zero_point)
    _, _, ours = brute_force_mse(observer, np.array([float(scale)]), [zero], quant_min, quant_max)
    assert ours <= error * 1.001  # 16 points a bin are not quite the even spread


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_on_the_data_beats_the_other_methods(name: str, scheme: dict[str, bool], bits: int) -> None:
    x = DATA[name]()
    observer = observe(*x.split(512, dim=1))
    errors = {method: mse(x, *calibrate(observer, method, bits, **scheme), bits, **scheme) for method in METHODS}
    assert errors["mse"] <= min(errors.values()) * 1.005, errors


@pytest.mark.parametrize("name", DATA)
def test_mse_beats_torch(name: str) -> None:
    # HistogramObserver looks for the same minimum, step by step from the outside.
    x = DATA[name]()
    reference = HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    reference(x)
    scale, zero_point = reference.calculate_qparams()
    theirs = mse(x, scale[:, None], zero_point[:, None], signed=False)
    scheme = {"symmetric": False, "signed": False}
    ours = mse(x, *calibrate(observe(x), "mse", **scheme), **scheme)
    assert ours <= theirs * 1.002
    assert ours < theirs * 0.9 or name not in ("heavy tails",)


# Entropy


def published_threshold(histogram: list[int], levels: int, start: int = 128) -> tuple[int, list[float]]:
    """The search of pytorch-quantization's calib/histogram.py, bin by bin: number of bins and divergences."""
    bins = [histogram[1], *histogram[1:]]
    n, divergences = len(bins), []
    for i in range(start, n + 1):
        edges = [i * j / levels for j in range(levels + 1)]
        level_of, level = [], 0
        for k in range(i):
            while level + 1 < levels and k >= edges[level + 1]:
                level += 1
            level_of.append(level)
        total, filled = [0.0] * levels, [0] * levels
        for k in range(i):
            if bins[k]:
                total[level_of[k]] += bins[k]
                filled[level_of[k]] += 1
        q = [total[level_of[k]] / filled[level_of[k]] if bins[k] else 0.0 for k in range(i)]
        p = [float(b) for b in bins[:i]]
        p[-1] += sum(bins[i:])
        p_sum, q_sum = sum(p), sum(q)
        divergence = 0.0
        for a, b in zip(p, q, strict=True):
            if a and not b:
                divergence = math.inf
                break
            if a:
                divergence += a / p_sum * math.log((a / p_sum) / (b / q_sum))
        divergences.append(divergence)
    last = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return start + last, divergences


HISTOGRAMS: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: torch.randn(40_000),
    "heavy tails": lambda: torch.randn(40_000) ** 3,
    "relu": lambda: torch.randn(40_000).relu(),
    "uniform": lambda: torch.rand(40_000),
    "few values": lambda: torch.randn(300) ** 2,
    "integers": lambda: torch.randint(0, 50, (40_000,)).float(),
    "exponential": lambda: -torch.rand(40_000).clamp(min=1e-6).log(),
}


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("levels", [4, 8, 100, 128, 256])
def test_entropy_against_the_published_algorithm(name: str, levels: int) -> None:
    x = HISTOGRAMS[name]().abs()
    counts = torch.histc(x, 400, min=0, max=float(x.max())).long()
    expected, divergences = published_threshold(counts.tolist(), levels)
    got = entropy_threshold(counts, levels)
    assert divergences[got - 128] == pytest.approx(min(divergences), abs=1e-12)
    # The same bin, unless two candidates are equal but for the rounding of their sums; then the last of them.
    equal = [i + 128 for i, d in enumerate(divergences) if d <= min(divergences) + 1e-13]
    assert got >= expected
    assert got == max(equal) or divergences[got - 128] > min(divergences) + 1e-13
    assert counts.sum() == x.numel()


def test_entropy_of_random_counts_with_empty_bins() -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, 40, 300) * (rng.random(300) < 0.4)
        counts[-1] = 3
        expected, divergences = published_threshold(counts.tolist(), 32)
        assert sorted(divergences)[1] > min(divergences) + 1e-9  # no ties, so the answer is one number
        assert entropy_threshold(torch.from_numpy(counts), 32) == expected


def test_entropy_of_a_full_sized_histogram() -> None:
    x = torch.cat([torch.randn(200_000), torch.tensor([9.0])]).abs()
    counts = torch.histc(x, 1024, min=0, max=float(x.max())).long()
    expected, _ = published_threshold(counts.tolist(), 128)
    assert entropy_threshold(counts, 128) == expected
    assert 300 < expected < 900


def test_entropy_keeps_short_and_concentrated_histograms_whole() -> None:
    assert entropy_threshold(torch.ones(128, dtype=torch.int64), 128) == 128
    assert entropy_threshold(torch.ones(5, dtype=torch.int64), 128) == 5
    spike = torch.zeros(500, dtype=torch.int64)
    spike[-1] = 1000
    assert entropy_threshold(spike, 128) == 500


def test_entropy_takes_the_last_of_equal_minima() -> None:
    # Equal counts and no outliers: every candidate from 150 on loses nothing.
    counts = torch.cat([torch.full((150,), 5), torch.zeros(100, dtype=torch.int64)])
    _, divergences = published_threshold(counts.tolist(), 16)
    assert [d < 1e-12 for d in divergences] == [i >= 150 for i in range(128, 251)]
    assert entropy_threshold(counts, 16) == 250


def test_entropy_clips_outliers_and_calibrates_both_sides() -> None:
    x = torch.randn(100_000)
    x[:5] = 40.0
    observer = observe(x)
    scale, _ = calibrate(observer, "entropy")
    folded = observer.counts[0].sum(0)
    kept = entropy_threshold(folded[: int(folded.nonzero()[-1]) + 1], 128)
    assert float(scale) * 127 == pytest.approx(kept * 2.0 ** int(observer.exponent) / 4096, rel=1e-6)
    assert 2 < float(scale) * 127 < 10
    scale, zero_point = calibrate(observer, "entropy", symmetric=False, signed=False)
    low, high = -int(zero_point) * float(scale), (255 - int(zero_point)) * float(scale)
    assert -6 < low < -2
    assert 2 < high < 10
    # One-sided values have all levels on their side.
    scale, zero_point = calibrate(observe(x.abs()), "entropy", symmetric=False, signed=False)
    folded_scale, none = calibrate(observe(x.abs()), "entropy", symmetric=True, signed=False)
    assert none is None
    assert int(zero_point) == 0
    assert torch.equal(scale, folded_scale)
    # A side with a handful of values keeps its extreme.
    few = torch.cat([torch.rand(50_000), torch.tensor([-0.5, -0.25])])
    scale, zero_point = calibrate(observe(few), "entropy", symmetric=False, signed=False)
    assert -int(zero_point) * float(scale) == pytest.approx(-0.5, abs=float(scale))


# Every method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-20, -1e30])
def test_constants_are_exact(method: str, scheme: dict[str, bool], value: float) -> None:
    x = torch.full((4, 5000), value)
    scale, zero_point = calibrate(observe(x), method, **scheme)
    back = fake_quantize(x, scale, zero_point, *integer_range(8, signed=scheme["signed"]))
    assert scale.isfinite().all()
    assert (scale > 0).all()
    if scheme.get("restricted", True) or value <= 0 or method == "mse":
        torch.testing.assert_close(back, x if abs(value) > 1e-9 else torch.zeros_like(x), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(back, x * 127 / 128, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("method", SEARCHES)
def test_tiny_values_get_the_smallest_scale(method: str) -> None:
    scale, _ = calibrate(observe(torch.randn(20_000) * 1e-30), method)
    assert 0 < float(scale) <= 1e-5 / 127 * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_keeps_a_code_of_its_own(method: str, scheme: dict[str, bool]) -> None:
    for make in DATA.values():
        scale, zero_point = calibrate(observe(make()), method, **scheme)
        limits = integer_range(8, signed=scheme["signed"])
        assert scale.shape == (1, 1)
        assert zero_point is None or (zero_point.dtype == torch.int32 and limits[0] <= int(zero_point) <= limits[1])
        assert fake_quantize(torch.zeros(1, 1), scale, zero_point, *limits).item() == 0


@pytest.mark.parametrize("method", METHODS)
def test_static_int8_product(method: str) -> None:
    weight, train, test = torch.randn(32, 64), torch.randn(4000, 64), torch.randn(200, 64)
    scale, zero_point = calibrate(observe(*train.split(500)), method, symmetric=False, signed=False)
    x_codes = quantize(test, scale, zero_point, 0, 255)
    w_codes, w_scale = quantize_symmetric(weight, 8, PerChannel(0))
    integers = (x_codes.int() - zero_point).long() @ w_codes.long().t()
    y = integers.float() * scale * w_scale.t()
    expected = test @ weight.t()
    assert (y - expected).norm() / expected.norm() < 0.03
    torch.testing.assert_close(y, dequantize(x_codes, scale, zero_point) @ dequantize(w_codes, w_scale).t())


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "1 NaN and 0 infinite"), (-math.inf, "0 NaN and 1 infinite")]
)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)])
def test_nan_and_infinity_are_named_and_nothing_is_kept(value: float, message: str, granularity: Any) -> None:
    observer = observe(torch.randn(3, 4), granularity=granularity)
    before = observe(granularity=granularity)
    before.merge(observer)
    bad = torch.randn(3, 4)
    bad[1, 2] = value
    with pytest.raises(ValueError, match=rf"\[3, 4\] holds {message}.*\[1, 2\]"):
        observer.update(bad)
    assert_same_statistics(observer, before)
    with pytest.raises(ValueError, match="1 infinite values"):
        observer.update(torch.tensor([[1e300, 1, 1, 1]], dtype=torch.float64))
    assert_same_statistics(observer, before)


def test_bad_observers_and_batches_are_named() -> None:
    for granularity in (PerToken(), PerGroup(8), "rows"):
        with pytest.raises(ValueError, match="PerTensor"):
            Observer(granularity)  # type: ignore[arg-type]
    for bins in (-4, 1, 8, 100, 1 << 17):
        with pytest.raises(ValueError, match=f"bins is {bins}"):
            Observer(PerTensor(), bins=bins)
    observer = observe(torch.randn(3, 4), granularity=PerChannel(1))
    with pytest.raises(ValueError, match=r"\[1, 4\] and \[1, 5\]"):
        observer.update(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"\[1, 4\] and \[1, 4, 1\]"):
        observer.update(torch.randn(3, 4, 2))
    with pytest.raises(ValueError, match="int64"):
        observer.update(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="axis 1"):
        observer.update(torch.ones(3))
    with pytest.raises(ValueError, match="512"):
        observer.merge(Observer(PerChannel(1), bins=512))
    with pytest.raises(ValueError, match="PerTensor"):
        observer.merge(Observer(PerTensor()))


def test_bad_calibrations_are_named() -> None:
    with pytest.raises(ValueError, match="seen no values"):
        calibrate(Observer(PerTensor()))
    observer = observe(torch.randn(500))
    with pytest.raises(ValueError, match=r"'median'.*minmax, percentile, mse, entropy"):
        calibrate(observer, "median")
    with pytest.raises(ValueError, match=r"needs 10000 values.* 500;"):
        calibrate(observer, "percentile")
    with pytest.raises(ValueError, match=r"entropy calibration of 8 bits needs 1024 values.* 500;"):
        calibrate(observer, "entropy")
    calibrate(observer, "percentile", percentile=99.8)  # 1 / 0.2 % = 500: enough
    for percentile in (50.0, 0.0, 101.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"percentile is {percentile}"):
            calibrate(observer, "percentile", percentile=percentile)
    for signed, needed in ((True, 8192), (False, 16384)):
        with pytest.raises(ValueError, match=f"4096 bins are too few for 10 bits by mse; use {needed}"):
            calibrate(observe(torch.rand(500)), "mse", 10, signed=signed)
    for method in SEARCHES:
        with pytest.raises(ValueError, match="bins=0"):
            calibrate(observe(torch.randn(9), bins=0), method)
    for method in ("minmax", "mse"):
        with pytest.raises(ValueError, match="signed=True"):
            calibrate(observer, method, symmetric=True, signed=False)
    with pytest.raises(ValueError, match="bits is 1"):
        calibrate(observer, bits=1)


# Weights


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(16), PerToken()])
@pytest.mark.parametrize("scheme", SCHEMES[::2] + SCHEMES[3:], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_search_is_never_worse_than_minmax(granularity: Any, scheme: dict[str, bool], bits: int) -> None:
    weight = torch.randn(8, 64) ** 3
    weight[3] = 0
    weight[4] = -1.25
    scale, zero_point = choose_qparams_mse(weight, bits, granularity, **scheme)
    assert list(scale.shape) == scale_shape(weight.shape, granularity)
    if scheme["symmetric"]:
        plain: Any = (choose_qparams_symmetric(weight, bits, granularity), None)
    else:
        plain = choose_qparams_asymmetric(weight, bits, granularity, signed=scheme["signed"])
    limits = integer_range(bits, signed=scheme["signed"])
    errors = []
    for qparams in ((scale, zero_point), plain):
        error = (fake_quantize(weight, *qparams, *limits) - weight).square()
        groups = (1, 1) if scale.numel() == 1 else (8, scale.shape[1])
        errors.append(error.reshape(groups[0], -1, groups[1], 64 // groups[1]).sum((1, 3)))
    assert (errors[0] <= errors[1]).all()
    if bits <= 4:
        assert errors[0].sum() < errors[1].sum()


def test_weight_search_finds_the_best_ratio() -> None:
    weight = torch.randn(4, 256) ** 3
    scale, _ = choose_qparams_mse(weight, 3, PerChannel(0), steps=41, smallest_ratio=0.2)
    for row in range(4):
        absmax = weight[row].abs().max()
        candidates = [absmax * ratio / 3 for ratio in torch.linspace(1, 0.2, 41)]
        errors = [mse(weight[row], c.reshape(1), None, 3) for c in candidates]
        assert mse(weight[row], scale[row], None, 3) == pytest.approx(min(errors), rel=1e-6)
    with pytest.raises(ValueError, match="finite"):
        choose_qparams_mse(torch.tensor([[1.0, math.nan]]), 4, PerTensor())
