"""HQQ: no group is worse than its range alone, and what the package gives, which `conformance_methods.py` imports."""

import pytest
import torch

from bitnet.quant.grouped import round_scale
from bitnet.quant.hqq import BETA, NORM, hqq_quantize, step
from tests.quant.builders import heavy_tailed


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_norm_of_the_error_falls(bits: int) -> None:
    weight = heavy_tailed()
    found = hqq_quantize(weight, bits, 64)
    assert int(found.codes.max()) == 2**bits - 1
    groups = weight.view(-1, 64)
    low, quant_max = groups.amin(1, keepdim=True), 2**bits - 1
    scale = round_scale((groups.amax(1, keepdim=True) - low) / quant_max)
    plain = ((groups - low) / scale).round().clamp(0, quant_max) * scale + low

    def norm(values: torch.Tensor) -> float:
        return float((values.reshape(groups.shape) - groups).abs().pow(NORM).sum())

    assert norm(found.dequantize()) < norm(plain) * 1.001
    if bits < 8:
        assert norm(found.dequantize()) < 0.99 * norm(plain)


# Of hqq 0.2.8.post1, which needs a build: zero points of the first turns of two groups, norms after all of them.
TURNS = [[7.70839, 3.80613], [7.70928, 3.75926], [7.70946, 3.68113], [7.70949, 3.64988]]
NORMS = {3: 32.81617, 4: 19.27324}


def test_turns_and_norms_of_the_package() -> None:
    n = torch.arange(128)
    groups = (((n * 37 % 101 - 50) * (1 + 3 * (n % 19 == 0)) + (n * n % 13) / 7) / 61.3).view(2, 64)
    low = groups.amin(1, keepdim=True)
    scale = (groups.amax(1, keepdim=True) - low) / 15
    zero = -low / scale
    for expected in TURNS:
        zero = step(groups, scale, zero, 15, BETA)
        torch.testing.assert_close(zero.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for bits, norm in NORMS.items():
        assert float((hqq_quantize(groups, bits, 64).dequantize() - groups).abs().pow(NORM).sum()) <= norm


def test_hard_rows_and_bad_input() -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 0.25
    weight[2, 5] = 3.0
    torch.testing.assert_close(hqq_quantize(weight, 4, 32).dequantize(), weight, atol=2e-3, rtol=0)
    assert hqq_quantize(weight, 4, -1).scale.shape == (4, 1)
    for bad, message in ((weight + 1e6, "too large for float16"), (weight * torch.nan, "NaN")):
        with pytest.raises(ValueError, match=message):
            hqq_quantize(bad, 4, 32)
    with pytest.raises(ValueError, match="bits is 5"):
        hqq_quantize(weight, 5)
    with pytest.raises(ValueError, match="group_size 48"):
        hqq_quantize(weight, 4, 48)
