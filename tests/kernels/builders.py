"""Codes, operands and products of the native kernels, for the tests that compare them with the reference."""

import pytest
import torch
from torch import Tensor

from bitnet import kernels
from bitnet.kernels import cpu, reference
from bitnet.kernels.cpu import native
from bitnet.quant import pack_codes

NOT_BUILT = "the native kernels were not built; install with a C++ compiler"
ISAS = native.instruction_sets() or [pytest.param("none", marks=pytest.mark.skip(reason=NOT_BUILT))]
BITS = {"base3": 2, "two_bit": 2, "four_bit": 4, "eight_bit": 8}
LIMITS = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}
needs_library = pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT)


def random_codes(N: int, K: int, bits: int) -> Tensor:
    low, high = LIMITS[bits]
    return torch.randint(low, high + 1, (N, K), dtype=torch.int8)


def lines_of(codes: Tensor, codec: str, scale: Tensor | None = None) -> native.Lines:
    lines = native.Lines(*codes.shape, codec)
    lines.fill(pack_codes(codes, BITS[codec]), torch.ones(1, 1) if scale is None else scale, BITS[codec])
    return lines


def operands(shape: tuple[int, ...], N: int, K: int, quantizer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the packed weight, its scale and a bias."""
    codes, scale = kernels.quantize_weight(torch.randn(N, K), quantizer)
    return torch.randn(*shape, K), pack_codes(codes, kernels.PACKED_BITS[quantizer]), scale, torch.randn(N)


def both(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """The product on the native kernels and on the reference."""
    options = {"bits": bits, "in_features": x.shape[-1]}
    return cpu.packed_linear(x, packed, scale, bias, **options), reference.packed_linear(
        x, packed, scale, bias, **options
    )
