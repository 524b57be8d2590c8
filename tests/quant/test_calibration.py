"""Observers: histogram, min-max and percentile."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.ao.quantization import MinMaxObserver

from bitnet.quant import (
    Observer,
    PerChannel,
    PerTensor,
    calibrate,
    choose_qparams_asymmetric,
    choose_qparams_symmetric,
)
from bitnet.quant.affine import scale_shape
from bitnet.quant.calibration import METHODS
from tests.quant.builders import DATA, assert_same_statistics, observe

# The histogram


def test_histogram_by_hand() -> None:
    observer = observe(torch.tensor([0.0, -0.0, 0.24, 0.25, 3.99, -0.25, -0.26, -3.0]), bins=16)
    assert observer.exponent.tolist() == [2]  # [0, 4) in 16 bins of 1/4
    assert {i: n for i, n in enumerate(observer.counts[0, 0].tolist()) if n} == {0: 3, 1: 1, 15: 1}
    assert {i: n for i, n in enumerate(observer.counts[0, 1].tolist()) if n} == {1: 2, 12: 1}
    observer.update(torch.tensor([4.0]))  # the range doubles: bins of 1/2
    assert observer.exponent.tolist() == [3]
    assert {i: n for i, n in enumerate(observer.counts[0, 0].tolist()) if n} == {0: 4, 7: 1, 8: 1}
    assert {i: n for i, n in enumerate(observer.counts[0, 1].tolist()) if n} == {0: 2, 6: 1}
    assert observer.counts.dtype == torch.int64
    assert observer.count == 9


@pytest.mark.parametrize("bins", [16, 1024, 65536])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e-3, 1.0, 1e10, 1e38])
def test_histogram_against_exact_arithmetic(bins: int, magnitude: float) -> None:
    x = (torch.rand(3000) * 2 - 1) * magnitude
    observer = observe(x, bins=bins)
    width = 2.0 ** int(observer.exponent) / bins
    values = x.double().numpy()
    for sign, part in ((0, values[values >= 0]), (1, -values[values < 0])):
        expected = np.bincount(np.floor(part / width).astype(np.int64), minlength=bins)
        assert observer.counts[0, sign].tolist() == expected.tolist()
    if magnitude > 1e-30:
        assert 0.5 <= float(x.abs().max()) / 2.0 ** int(observer.exponent) < 1
    else:
        assert int(observer.exponent) == -100


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(-1), PerChannel(1)])
def test_order_and_pieces_do_not_matter(granularity: Any) -> None:
    magnitudes = [1e-3, 700.0, 0.0, 1.0, 1e-30, 4.0]
    batches = [torch.randn(6, 40, 6) * m * torch.tensor([1, 0.01, 50, 0, 1e-9, 3]) for m in magnitudes]
    batches[1][0, 0, 0] = 2048.0  # a power of two: the first value of the next range
    expected = observe(*batches, granularity=granularity)
    for order in itertools.islice(itertools.permutations(batches), 0, 720, 37):
        assert_same_statistics(observe(*order, granularity=granularity), expected)
    joined = torch.cat(batches, dim=1) if granularity in (PerTensor(), PerChannel(0), PerChannel(-1)) else None
    if joined is not None:
        assert_same_statistics(observe(joined, granularity=granularity), expected)
        assert_same_statistics(observe(*joined.split(7, dim=1), granularity=granularity), expected)
    left, right = (observe(*part, granularity=granularity) for part in (batches[:2], batches[2:]))
    right.merge(left)
    right.merge(Observer(granularity))
    assert_same_statistics(right, expected)
    empty = Observer(granularity)
    empty.merge(right)
    assert_same_statistics(empty, expected)
    empty.update(batches[0])  # the two share nothing
    assert_same_statistics(right, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_count_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(50, 40).to(dtype)
    assert_same_statistics(observe(x), observe(x.float()))


def test_large_batches_are_binned_in_chunks() -> None:
    x = torch.randn(3, 500_000)
    for granularity in (PerTensor(), PerChannel(0)):
        assert_same_statistics(
            observe(x, granularity=granularity), observe(*x.split(99_999, 1), granularity=granularity)
        )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_observed_apart(axis: int) -> None:
    x = torch.randn(5, 3000, 4) ** 3 if axis == 1 else torch.randn(5, 900, 4) ** 3
    x = x.transpose(1, 2) if axis == 1 else x
    observer = observe(x, -x[:2] if axis else x * 3, granularity=PerChannel(axis))
    channels = x.shape[axis]
    for method in METHODS:
        scale, zero_point = calibrate(observer, method, 4, symmetric=False, percentile=99)
        assert zero_point is not None
        assert list(scale.shape) == list(zero_point.shape) == scale_shape(x.shape, PerChannel(axis))
        for channel in range(channels):
            parts = [part.select(axis, channel) for part in (x, -x[:2] if axis else x * 3)]
            single, zero = calibrate(observe(*parts), method, 4, symmetric=False, percentile=99)
            assert scale.flatten()[channel] == single.flatten()[0]
            assert zero_point.flatten()[channel] == zero.flatten()[0]


def test_one_dimension_and_no_values() -> None:
    observer = Observer(PerChannel(0))
    observer.update(torch.zeros(0))
    assert observer.count == 0
    observer.update(torch.tensor([1.0, -2.0, 0.5]))
    assert observer.minimum.tolist() == [1.0, -2.0, 0.5]
    assert observer.absmax.tolist() == [1.0, 2.0, 0.5]
    observer.update(torch.tensor([-3.0, -2.0, 0.25]))
    assert observer.minimum.tolist() == [-3.0, -2.0, 0.25]
    assert observer.absmax.tolist() == [3.0, 2.0, 0.5]
    assert observer.count == 2


# Min-max


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("bins", [0, 4096])
def test_minmax_equals_the_quantizer_of_all_data(name: str, bins: int) -> None:
    x = DATA[name]()
    for granularity in (PerTensor(), PerChannel(0)):
        observer = observe(*x.split(500, dim=1), granularity=granularity, bins=bins)
        for restricted in (True, False):
            scale, zero_point = calibrate(observer, restricted=restricted)
            assert zero_point is None
            assert torch.equal(scale, choose_qparams_symmetric(x, 8, granularity, restricted=restricted))
        for signed in (True, False):
            got = calibrate(observer, symmetric=False, signed=signed)
            for ours, theirs in zip(got, choose_qparams_asymmetric(x, 8, granularity, signed=signed), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", DATA)
def test_minmax_equals_torch(name: str) -> None:
    x = DATA[name]()
    cases = [
        ({"dtype": torch.quint8, "qscheme": torch.per_tensor_affine}, {"symmetric": False, "signed": False}),
        ({"dtype": torch.qint8, "qscheme": torch.per_tensor_affine}, {"symmetric": False, "signed": True}),
        ({"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric, "quant_min": -127, "quant_max": 127}, {}),
    ]
    for theirs, ours in cases:
        reference = MinMaxObserver(**theirs)
        for batch in x.split(1000, dim=1):
            reference(batch)
        scale, zero_point = calibrate(observe(*x.split(777, dim=1)), **ours)
        expected_scale, expected_zero = reference.calculate_qparams()
        torch.testing.assert_close(scale.flatten(), expected_scale, rtol=2e-7, atol=0)
        assert (0 if zero_point is None else int(zero_point)) == int(expected_zero)


# Percentile


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_the_edge_of_the_bin_that_holds_it(name: str, percentile: float) -> None:
    x = DATA[name]()
    observer = observe(*x.split(512, dim=1))
    width = 2.0 ** int(observer.exponent) / observer.bins
    # 15 bits unsigned: the scale resolves the bound far below a bin.
    scale, _ = calibrate(observer, "percentile", 15, percentile=percentile)
    exact = np.percentile(x.abs().double().numpy(), percentile, method="inverted_cdf")
    assert -1e-6 * exact <= float(scale) * (2**14 - 1) - exact <= width * 1.0001
    scale, zero_point = calibrate(observer, "percentile", 15, symmetric=False, signed=False, percentile=percentile)
    high = np.percentile(x.double().numpy(), percentile, method="inverted_cdf")
    low = -np.percentile(-x.double().numpy(), percentile, method="inverted_cdf")
    got_low, got_high = (-int(zero_point) * float(scale), (2**15 - 1 - int(zero_point)) * float(scale))
    slack = float(scale)  # the zero point rounds to a step
    assert -slack <= min(low, 0) - got_low <= width + slack
    assert -slack <= got_high - max(high, 0) <= width + slack


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentile_against_the_published_algorithm(percentile: float) -> None:
    # pytorch-quantization: the first bin whose cumulative share reaches p, and of it the lower edge; ours is the upper.
    observer = observe(torch.randn(99_991))  # a prime: no share is a tie
    share = np.cumsum(observer.counts[0].sum(0).numpy() / observer.count)
    width = 2.0 ** int(observer.exponent) / observer.bins
    theirs = np.searchsorted(share, percentile / 100) * width
    scale, _ = calibrate(observer, "percentile", percentile=percentile)
    assert float(scale) * 127 == pytest.approx(theirs + width, rel=1e-6)


def test_percentile_counts_values_exactly() -> None:
    x = torch.arange(1, 1001).float()  # bins of 1/4: each value begins its own
    for percentile, expected in ((99.0, 990.25), (99.9, 999.25), (50.1, 501.25), (100.0, 1000.0)):
        scale, zero_point = calibrate(observe(x), "percentile", signed=False, percentile=percentile)
        assert zero_point is None
        assert float(scale) * 255 == pytest.approx(expected, rel=1e-6)
