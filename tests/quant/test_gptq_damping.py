"""GPTQ's damping: chosen on inputs that it was not fitted to."""

import pytest
import torch
from torch import Tensor

from bitnet.quant.gptq import DAMPINGS, HessianSum, choose_damping, gptq_quantize, layer_error
from bitnet.quant.grouped import Grid, round_to_nearest

K, N, GROUP = 96, 48, 32


def hessian(x: Tensor) -> Tensor:
    total = HessianSum(K)
    total.update(x)
    return total.matrix()


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight, and inputs as those of a down_proj: products of a few directions, squared where above 0."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(K, K, generator=generator) * torch.logspace(0, -2, K)
    inputs = (torch.randn(9000, K, generator=generator) @ basis.t()).relu().square()
    return torch.randn(N, K, generator=generator) * 0.02, inputs


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_the_chosen_damping_is_no_worse_than_rounding_on_other_inputs(
    layer: tuple[Tensor, Tensor], tokens: int
) -> None:
    weight, inputs = layer
    grid, test = Grid(4), hessian(inputs[4000:])
    seen = inputs[:tokens]
    cut = tokens - tokens // 5
    damping = choose_damping(weight, hessian(seen[:cut]), hessian(seen[cut:]), grid, group_size=GROUP)
    assert damping in DAMPINGS

    def error(**options: float) -> float:
        quantized = gptq_quantize(weight, hessian(seen), grid, group_size=GROUP, **options)
        return float(layer_error(weight, quantized.dequantize(), test).sum())

    rounding = float(layer_error(weight, round_to_nearest(weight, grid, GROUP).dequantize(), test).sum())
    assert error(damping=damping) < rounding
    if tokens == 64:
        assert error() > rounding  # the constant learns noise
    assert error(damping=damping) < 1.02 * error()


def test_noise_is_rounded(layer: tuple[Tensor, Tensor]) -> None:
    """Inputs whose held-out part has nothing in common with the rest."""
    weight, _ = layer
    fitted, other = torch.zeros(64, K), torch.zeros(64, K)
    fitted[:, : K // 2] = torch.randn(64, 1) * torch.randn(K // 2)
    other[:, K // 2 :] = torch.randn(64, K // 2)
    other[:, : K // 2] = torch.randn(64, K // 2) * 3
    assert choose_damping(weight, hessian(fitted), hessian(other), Grid(4), group_size=GROUP) in (None, *DAMPINGS[-2:])


def test_ends() -> None:
    none = choose_damping(torch.randn(0, K), torch.eye(K), torch.eye(K), group_size=GROUP)
    assert none is None
    with pytest.raises(ValueError, match="the Hessian is"):
        choose_damping(torch.randn(4, K), torch.eye(K + 1), torch.eye(K), group_size=GROUP)
