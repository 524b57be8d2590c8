"""Methods beside the packages of others, which only `make conformance` installs: hqq, scipy."""

import hqq.core.optimize as theirs
import pytest
import scipy.linalg
import torch

from bitnet.quant.grouped import round_scale
from bitnet.quant.hadamard import hadamard
from bitnet.quant.hqq import BETA, NORM, hqq_quantize, step
from tests.quant.builders import heavy_tailed


def test_a_turn_is_that_of_the_published_code() -> None:
    groups = heavy_tailed().view(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero = ours = -low / scale
    for _ in range(4):
        expected = theirs.optimize_weights_proximal_legacy_step(groups, 1 / scale, zero, [0, 15], BETA, NORM, 1)[2]
        ours = step(groups, scale, ours, 15, BETA)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        zero = ours


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_norm_of_the_error_is_at_or_below_the_packages(bits: int) -> None:
    weight, quant_max = heavy_tailed(), 2**bits - 1
    groups = weight.view(-1, 64)
    low = groups.amin(1, keepdim=True)
    scale = round_scale((groups.amax(1, keepdim=True) - low) / quant_max)
    codes, inverse, zero = theirs.optimize_weights_proximal_legacy(groups, 1 / scale, -low / scale, [0, quant_max], 1)

    def norm(values: torch.Tensor) -> float:
        return float((values.reshape(groups.shape) - groups).abs().pow(NORM).sum())

    assert norm(hqq_quantize(weight, bits, 64).dequantize()) <= norm((codes - zero) / inverse) * 1.001


def test_powers_of_two_are_scipys() -> None:
    assert torch.equal(hadamard(32), torch.from_numpy(scipy.linalg.hadamard(32)).double())
