"""GPTQ as it was published, step by step."""

import torch
from torch import Tensor

from bitnet.quant.grouped import Grid, QuantizedWeight


def quantize_original(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    group_size: int,
    damping: float,
    act_order: bool,
    static_groups: bool,
    mse: bool,
    block_size: int,
) -> QuantizedWeight:
    """IST-DASLab's `fasterquant`: scales stay float32, dead channels become 0, and a group's grid is found when the
    sweep reaches it, from weights that lack the updates of the block that is being worked on."""
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    grouped = [_original_qparams(part, grid, mse) for part in weight.split(size, 1)] if static_groups else []
    if group_size == -1:  # one grid a row, found before anything else
        grouped = [_original_qparams(weight, grid, mse)]
    fixed = bool(grouped)

    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns, device=weight.device)
    weight, hessian = weight[:, order], hessian[order][:, order]
    diagonal = torch.arange(columns, device=weight.device)
    hessian[diagonal, diagonal] += damping * hessian.diagonal().mean()
    try:
        # Row i of this factor is what the paper takes from the inverse Hessian of the columns from i on, for all i at
        # once.
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    except torch.linalg.LinAlgError:
        raise ValueError(f"the Hessian is singular with damping {damping}; raise it, or use 'refined'") from None

    codes = torch.zeros_like(weight)
    group = (order if fixed else diagonal) // size
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        local, inner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.zeros_like(local)
        for i in range(stop - start):
            if not fixed and (start + i) % size == 0:
                grouped.append(_original_qparams(weight[:, start + i : start + i + size], grid, mse))
            scale, zero = grouped[int(group[start + i])]
            w = local[:, i]
            code = torch.clamp(torch.round(w / scale) + zero, 0, grid.quant_max)
            codes[:, start + i] = code
            # The error of this column is made up for by the later ones, within the block at once.
            errors[:, i] = (w - scale * (code - zero)) / inner[i, i]
            local[:, i:] -= errors[:, i : i + 1].matmul(inner[i : i + 1, i:])
        # Columns behind the block get the whole block's updates in one product.
        weight[:, stop:] -= errors.matmul(factor[start:stop, stop:])

    inverse = order.argsort()
    scale, zero = (torch.stack(values, 1) for values in zip(*grouped, strict=True))
    return QuantizedWeight(
        codes[:, inverse].to(torch.uint8), scale, zero.to(torch.int32), group[inverse].to(torch.int32), grid.bits
    )


def _original_qparams(x: Tensor, grid: Grid, mse: bool) -> tuple[Tensor, Tensor]:
    """IST-DASLab's `find_params` per row: scale and zero point `[N]`; with `mse`, ranges shrunk by up to 80 % are
    compared by the sum of |error|^2.4."""
    if grid.ternary:
        scale = x.abs().mean(1).clamp(min=1e-5)
        return scale, torch.ones_like(scale)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)

    def qparams(p: float) -> tuple[Tensor, Tensor]:
        scale = (p * high - p * low) / grid.quant_max
        if not scale.isfinite().all():
            raise ValueError(f"weights of {float(high.max()):.3g} have a range beyond float32; rescale them")
        return scale, torch.full_like(scale, grid.middle) if grid.symmetric else torch.round(-(p * low) / scale)

    scale, zero = qparams(1.0)
    best = torch.full_like(scale, torch.inf)
    for i in range(80 if mse else 0):
        new_scale, new_zero = qparams(1 - i / 100)
        codes = torch.clamp(torch.round(x / new_scale[:, None]) + new_zero[:, None], 0, grid.quant_max)
        error = (new_scale[:, None] * (codes - new_zero[:, None]) - x).abs().pow(2.4).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
    return scale, zero
