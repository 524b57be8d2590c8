"""AWQ: scaling the input channels that matter up before rounding, activation-aware (arXiv 2306.00978).

    y = W x = (W s) (x / s)        s_k = m_k^alpha,  m_k = mean |x_k| over calibration inputs

A channel whose weights are multiplied by s_k > 1 is rounded s_k times finer, as long as its group's range does not grow
with it. `alpha` in [0, 1) is the one of least output error. 1 / s goes into whatever produces x (the weight of a norm,
the rows of the projection before). Afterwards each group's range is clipped where that lowers the error further.

Both searches minimize the error of the layers' outputs, `tr((W - Q) H (W - Q)^T)` with H = X X^T (any multiple of it),
which needs no stored activations. The published code measures the error of the attention block for q, k and v instead;
everything else, the grids of candidates too, is as published.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet.quant.grouped import Grid, QuantizedWeight, check_weight, min_max_qparams, round_to_nearest

SMALLEST_MAGNITUDE = 1e-4


def awq_scale(
    weights: Sequence[Tensor],
    magnitude: Tensor,
    hessian: Tensor,
    grid: Grid,
    group_size: int = 128,
    *,
    points: int = 20,
) -> tuple[Tensor, float]:
    """Factor of each input channel, float32 `[K]`, and its alpha, for layers that share one input.

    weights: float `[N_i, K]` each; magnitude: mean absolute input `[K]`; hessian: `[K, K]`. The factors are normalized
    so that their largest and smallest multiply to 1. alpha = 0, all ones, is among the `points` that are tried: the
    layers' summed error is never above round-to-nearest. Raises ValueError for a negative, NaN or infinite magnitude.
    """
    if not magnitude.numel():
        raise ValueError("a weight without input channels has none to scale; leave this layer as it is")
    if not magnitude.isfinite().all() or (magnitude < 0).any():
        raise ValueError("magnitudes of activations must be finite and not negative; they are means of |x|")
    magnitude = magnitude.float()
    # A channel that never fires must not be scaled away altogether.
    magnitude = magnitude.clamp(min=SMALLEST_MAGNITUDE * (float(magnitude.max()) or 1.0))
    floats, hessian = [check_weight(weight) for weight in weights], hessian.float()
    best = (torch.inf, torch.ones_like(magnitude), 0.0)
    for i in range(points):
        alpha = i / points
        scale = magnitude**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in floats:
            change = round_to_nearest(weight * scale, grid, group_size).dequantize() / scale - weight
            error += float(((change @ hessian) * change).sum())  # float32 ranks them as well as float64 would
        if error < best[0]:
            best = (error, scale, alpha)
    return best[1], best[2]


def clip_quantize(
    weight: Tensor, hessian: Tensor, grid: Grid, group_size: int = 128, *, smallest: float = 0.5, points: int = 20
) -> QuantizedWeight:
    """Round to nearest after clipping each group to `p * absmax`, p from 1 down to `smallest`, of least output error
    of the group by itself.

    weight: float `[N, K]`; hessian: `[K, K]`. Raises ValueError as `round_to_nearest` does.
    """
    result = round_to_nearest(weight, grid, group_size)
    rows, columns = weight.shape
    count = result.scale.shape[1]
    groups = check_weight(weight).view(rows, count, columns // count)
    # The diagonal blocks of H, [G, S, S].
    blocks = hessian.float().view(count, columns // count, count, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    absmax = groups.abs().amax(-1, keepdim=True)
    best = torch.full((rows, count), torch.inf, device=weight.device)
    scale, zero = result.scale.float(), result.zero_point.float()
    for i in range(max(1, int((1 - smallest) * points))):
        limit = absmax * (1 - i / points)
        new_scale, new_zero = min_max_qparams(groups.clamp(-limit, limit), grid)
        error = (_round(groups, new_scale, new_zero, grid) - new_zero[..., None]) * new_scale[..., None] - groups
        loss = torch.einsum("ngs,gst,ngt->ng", error, blocks, error)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
    result.codes = _round(groups, scale, zero, grid).view(rows, columns).to(torch.uint8)
    result.scale, result.zero_point = scale.half(), zero.to(torch.int32)
    return result


def _round(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return (groups / scale[..., None]).round().add(zero[..., None]).clamp(0, grid.quant_max)
