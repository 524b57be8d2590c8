"""PTQTP: a weight as the sum of two ternary planes, without calibration (arXiv 2509.16989).

    W ~ a1 T1 + a2 T2        T1, T2 in {-1, 0, 1}, a1 and a2 for each group of input channels

Each plane multiplies by adding and subtracting, as BitNet does, and both have nine values together. Two steps in turn
lower |W - a1 T1 - a2 T2|^2 until nothing changes: a1 and a2 by least squares (ridge regression, whose damping grows
where the planes are nearly the same), and each pair of trits by trying all nine. The paper starts with both planes at
sign(W); here that is one of several starts, the others at nine levels that are evenly spaced, and the best is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.quant.grouped import check_weight, group_index

TURNS = 50
REACHES = (1.0, 0.7)
RIDGE, LARGEST_RIDGE, LARGEST_CONDITION = 1e-8, 1.0, 1e6


@dataclass(frozen=True)
class TritPlanes:
    """planes: int8 `[2, N, K]`, -1, 0 and 1; scale: float16 `[2, N, G]`."""

    planes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        _, rows, groups = self.scale.shape
        values = self.planes.view(2, rows, groups, -1) * self.scale.float()[..., None]
        return values.sum(0).view(rows, -1)


def quantize_planes(weight: Tensor, group_size: int = 128) -> TritPlanes:
    """Two planes of a float weight `[N, K]`; group_size -1 is one group a row. Raises ValueError for a group size that
    does not divide K, NaN or infinite weights and ones beyond float16."""
    weight = check_weight(weight)
    rows, columns = weight.shape
    count = int(group_index(columns, group_size)[-1]) + 1
    groups = weight.reshape(-1, columns // count)
    largest = groups.abs().amax(1)
    # Thirds make nine levels that are evenly spaced, as far as the largest weight or less.
    even = [_best_trits(groups, torch.stack([0.75 * largest, 0.25 * largest]) * reach) for reach in REACHES]
    starts = [torch.stack([groups.sign(), groups.sign()]), *even]
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start in starts:
        planes, scale = _alternate(groups, start)
        error = (groups - (planes * scale[..., None]).sum(0)).square().sum(1)
        if best is not None:
            kept = best[2] <= error
            planes, scale = torch.where(kept[:, None], best[0], planes), torch.where(kept, best[1], scale)
            error = torch.minimum(best[2], error)
        best = (planes, scale, error)
    assert best is not None
    planes, scale, _ = best
    stored = scale.half()
    if stored.isinf().any():
        raise ValueError(f"a scale of {float(scale.max()):.3g} is too large for float16; rescale the weight")
    # The trits are chosen once more, for the scales as they are stored.
    planes = _best_trits(groups, stored.float())
    return TritPlanes(planes.to(torch.int8).view(2, rows, columns), stored.view(2, rows, count))


def ridge_scales(groups: Tensor, planes: Tensor) -> Tensor:
    """a1 and a2 of least squares, float32 `[2, M]`, of M groups `[M, S]` and their planes `[2, M, S]`."""
    x, y = planes.double(), groups.double()
    g11, g22, g12 = (x[0] * x[0]).sum(1), (x[1] * x[1]).sum(1), (x[0] * x[1]).sum(1)
    b1, b2 = (x[0] * y).sum(1), (x[1] * y).sum(1)
    ridge = torch.full_like(g11, RIDGE)
    # The eigenvalues of [[g11, g12], [g12, g22]] tell how nearly the planes are one: then more damping.
    centre, spread = (g11 + g22) / 2, (((g11 - g22) / 2).square() + g12.square()).sqrt()
    while True:
        condition = (centre + spread + ridge) / (centre - spread + ridge).clamp(min=1e-300)
        grow = (condition > LARGEST_CONDITION) & (ridge < LARGEST_RIDGE)
        if not grow.any():
            break
        ridge = torch.where(grow, (ridge * 10).clamp(max=LARGEST_RIDGE), ridge)
    a, d = g11 + ridge, g22 + ridge
    determinant = a * d - g12.square()
    return torch.stack([(d * b1 - g12 * b2) / determinant, (a * b2 - g12 * b1) / determinant]).float()


def _alternate(groups: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Planes `[2, M, S]` and scales `[2, M]` at which neither step changes anything."""
    scale = ridge_scales(groups, planes)
    for _ in range(TURNS):
        planes = _best_trits(groups, scale)
        before, scale = scale, ridge_scales(groups, planes)
        if torch.allclose(scale, before, rtol=1e-5, atol=0):
            break
    return _best_trits(groups, scale), scale


def _best_trits(groups: Tensor, scale: Tensor) -> Tensor:
    """Of the nine pairs the nearest for each weight, float32 `[2, M, S]`."""
    trits = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).to(groups)  # [9, 2]
    levels, order = (trits @ scale).t().sort(1)  # [M, 9], ascending
    borders = (levels[:, 1:] + levels[:, :-1]) / 2
    places = order.gather(1, torch.searchsorted(borders.contiguous(), groups))
    return trits[places].permute(2, 0, 1)
