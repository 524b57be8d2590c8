"""GPTQ for values that are not evenly spaced, as those of 4-bit floats: what rounds is given.

The sum that is minimized is that of `bitnet/quant/gptq.py`, and so are the sweep and the coordinate descent; scales are
chosen before and stay. `nearest(column, values)` rounds float32 `[N]` of one input channel, for every row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet.quant.gptq import DAMPINGS, SAMPLED_ROWS, inverse_factor, layer_error

Rounding = Callable[[int, Tensor], Tensor]
ROUNDS = 3


def sensitivity(hessian: Tensor, damping: float) -> Tensor:
    """What a rounding error of each channel costs once later ones have made up for it, 1 / U_jj^2: float32 `[K]`."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    found = torch.empty_like(hessian[0])
    found[order] = inverse_factor(hessian, order, damping)[1].diagonal() ** -2
    return found


def fit_levels(weight: Tensor, hessian: Tensor, nearest: Rounding, damping: float = 0.01) -> Tensor:
    """The rounded weight, float32 `[N, K]`; no row is worse than the nearest values, by the undamped sum.

    weight: float32 `[N, K]`; hessian: `[K, K]`. Raises ValueError for a Hessian that cannot be inverted.
    """
    plain = torch.stack([nearest(k, weight[:, k]) for k in range(weight.shape[1])], 1)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped, factor = inverse_factor(hessian, order, damping)
    columns = weight.t()[order].contiguous()
    found = torch.empty_like(columns)
    for i, k in enumerate(order.tolist()):
        found[i] = nearest(k, columns[i])
        columns[i + 1 :].addr_(factor[i, i + 1 :], (columns[i] - found[i]) / factor[i, i], alpha=-1)
    result = found[order.argsort()].t().contiguous()
    for _ in range(ROUNDS):
        if not _descend(weight, result, damped, nearest, order):
            break
    worse = layer_error(weight, result, hessian) > layer_error(weight, plain, hessian)
    result[worse] = plain[worse]
    return result


def best_damping(
    weight: Tensor, fitted: Tensor, held_out: Tensor, quantize: Callable[[Tensor, Tensor, float | None], Tensor]
) -> float | None:
    """The damping whose weight does best on inputs that it was not fitted to, or None where rounding to nearest does.

    quantize(rows, hessian, damping) gives the rounded rows, with None by rounding to nearest. For the rest see
    `bitnet.quant.gptq.choose_damping`.
    """
    rows = weight[:: -(-len(weight) // SAMPLED_ROWS)]
    tried: list[float | None] = [None, *DAMPINGS]
    errors = [float(layer_error(rows, quantize(rows, fitted, each), held_out).sum()) for each in tried]
    return tried[errors.index(min(errors))]


def _descend(weight: Tensor, result: Tensor, hessian: Tensor, nearest: Rounding, order: Tensor) -> bool:
    """Each channel to its best value while the others stand still; whether one moved."""
    gradient = ((result - weight) @ hessian).t().contiguous()  # [K, N]
    moved = False
    for k in order.tolist():
        best = nearest(k, result[:, k] - gradient[k] / hessian[k, k])
        change = best - result[:, k]
        if change.any():
            moved = True
            result[:, k] = best
            gradient.addr_(hessian[k], change)
    return moved
