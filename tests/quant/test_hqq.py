"""HQQ: no group is worse than its range alone. The hqq package itself: `conformance_methods.py`."""

import pytest
import torch

from bitnet.quant.grouped import round_scale
from bitnet.quant.hqq import NORM, hqq_quantize
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
