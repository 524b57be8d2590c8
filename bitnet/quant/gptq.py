"""GPTQ: rounding a weight so that its layer's output changes least (arXiv 2210.17323).

    minimize  |(W - Q) X|^2 = tr((W - Q) H (W - Q)^T) / 2        H = 2 X X^T over calibration inputs, damped

The paper's sweep goes over the input channels. It rounds channel j of every row, divides the error by the diagonal of
U, the upper Cholesky factor of H^-1, and takes it out of the channels that are still to come:

    e = (w_j - q_j) / U_jj        w_k -= e U_jk  for k > j

Within a block of 128 channels the update is done at once, for the rest after the block (lazy batches).

`algorithm="original"` is IST-DASLab's code step by step. The default, "refined", minimizes the same sum further:

1. Each group's grid is searched before the sweep, on scales already rounded to float16. The error of channel j weighs
   1 / U_jj^2: what the sweep cannot take out of it again. Groups are neighbouring channels whatever the order of the
   sweep, which goes from the largest H_jj to the smallest.
2. The grids are searched again, for the values that the sweep really rounded, and the sweep repeated. Each row keeps
   its best attempt, or plain rounding.
3. Coordinate descent moves one code at a time, then one group's scale (by least squares, rounded to float16) and zero
   point; every step is accepted only if the sum falls.
4. A row that is not better than `round_to_nearest` on the undamped H becomes that, so no row is ever worse.

Letters: N output channels (rows), K input channels (columns), G groups, S channels of a group.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bitnet.quant.gptq_original import quantize_original
from bitnet.quant.grouped import (
    Grid,
    QuantizedWeight,
    check_weight,
    group_index,
    min_max_qparams,
    qparams_of_range,
    round_scale,
    round_to_nearest,
)

MAX_DAMPING = 1e4
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SAMPLED_ROWS = 64


def choose_damping(
    weight: Tensor, fitted: Tensor, held_out: Tensor, grid: Grid | None = None, *, group_size: int = 128, **options: Any
) -> float | None:
    """The damping of `DAMPINGS` whose quantized weight does best on inputs that it was not fitted to, or None where
    rounding to nearest does better.

    weight: float `[N, K]`, of which up to `SAMPLED_ROWS` rows are tried; fitted, held_out: Hessians `[K, K]` of two
    parts of the calibration inputs; options: those of `gptq_quantize`. The fewer the tokens for each channel, the more
    damping a fit needs not to learn their noise: no constant is right. Raises ValueError as `gptq_quantize` does.
    """
    grid = grid or Grid()
    rows = weight[:: -(-len(weight) // SAMPLED_ROWS)] if len(weight) else weight

    @functools.cache
    def error(index: int) -> float:
        quantized = gptq_quantize(rows, fitted, grid, group_size=group_size, damping=DAMPINGS[index], **options)
        return float(layer_error(rows, quantized.dequantize(), held_out).sum())

    # Too little damping learns noise and too much learns nothing: one valley but for some 1 % of noise, which is not
    # worth twice the time.
    best = len(DAMPINGS) // 2
    for step in (-1, 1):
        while 0 <= best + step < len(DAMPINGS) and error(best + step) < error(best):
            best += step
    nearest = layer_error(rows, round_to_nearest(rows, grid, group_size).dequantize(), held_out).sum()
    return DAMPINGS[best] if error(best) < nearest else None


class HessianSum:
    """Accumulates `H = 2 X X^T / tokens` over batches of a layer's input."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add inputs float `[.., K]`. Raises ValueError for NaN or infinite ones."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        product = rows.t() @ rows
        if not product.diagonal().isfinite().all():
            raise ValueError("a layer's input is NaN or infinite during calibration; is the float model sound?")
        self.total += product
        self.tokens += len(rows)

    def matrix(self) -> Tensor:
        """H, float32 `[K, K]`. Raises ValueError where no input came."""
        if not self.tokens:
            raise ValueError("the Hessian has seen no input; calibrate on at least one token")
        return (self.total * (2 / self.tokens)).float()


def layer_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """`diag((W - Q) H (W - Q)^T)`: the error of each row's output, float32 `[N]`."""
    error = (weight.float() - quantized.float()).double()
    return ((error @ hessian.double()) * error).sum(1).float()


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid | None = None,
    *,
    group_size: int = 128,
    damping: float | None = None,
    act_order: bool = True,
    static_groups: bool = True,
    search: bool = True,
    sweeps: int = 3,
    rounds: int = 3,
    block_size: int = 128,
    algorithm: str = "refined",
) -> QuantizedWeight:
    """Quantize a weight for inputs with this Hessian; explained at the top of this file.

    weight: float `[N, K]`; hessian: `[K, K]`, symmetric; group_size: -1 is one group a row. `damping` times the mean of
    H's diagonal is added to it (0.003, which wants many tokens a channel, see `choose_damping`; the paper's 0.01 in the
    original), ten times more until it can be inverted.
    Without `search`, each group's grid is that of `min_max_qparams` and stays (in the original, `search` is the paper
    code's `mse`). `sweeps` is how often the sweep is done, `rounds` how often coordinate descent follows. A channel
    whose input was always 0 is rounded to its grid (the original makes it 0). `static_groups` concerns the original
    only, which otherwise takes its groups in the order of the sweep.

    Raises ValueError for a group size that does not divide K, NaN or infinite values, and a Hessian of another shape or
    with a negative diagonal.
    """
    grid = grid or Grid()
    weight = check_weight(weight)
    hessian = _check_hessian(hessian, weight)
    group_index(weight.shape[1], group_size)  # refuses what does not divide
    if algorithm == "original":
        damping = 0.01 if damping is None else damping
        return quantize_original(
            weight, hessian, grid, group_size, damping, act_order, static_groups, search, block_size
        )
    if algorithm != "refined":
        raise ValueError(f"algorithm {algorithm!r} is unknown; choose refined or original")

    order = hessian.diagonal().argsort(descending=True, stable=True)
    if not act_order:
        order = torch.arange(len(hessian), device=weight.device)
    damped, factor = inverse_factor(hessian, order, 0.003 if damping is None else damping)
    # How much a rounding error of a channel costs once the later ones have made up for it, 1 / U_jj^2.
    sensitivity = torch.empty_like(factor[0])
    sensitivity[order] = factor.diagonal() ** -2
    nearest = round_to_nearest(weight, grid, group_size)
    count = nearest.scale.shape[1]
    groups = weight.view(len(weight), count, weight.shape[1] // count)
    scale, zero = _search_grid(groups, sensitivity, grid) if search else min_max_qparams(groups, grid)
    state = _Solution(weight, damped, grid, scale, zero)
    for remaining in reversed(range(sweeps if search else 1)):
        attempt = _Solution(weight, damped, grid, scale, zero)
        attempt.codes, targets = _sweep(weight, factor, order, attempt, block_size)
        state.replace_rows(attempt, attempt.loss() < state.loss())
        if remaining:
            # The sweep moved the weights: grids that fit what was really rounded serve the next sweep better.
            scale, zero = _search_grid(targets.view(groups.shape), sensitivity, grid)
    state.descend(order, rounds, block_size, search)

    # The last word has the undamped sum, on the very numbers that are stored.
    result = state.quantized()
    worse = layer_error(weight, result.dequantize(), hessian) > layer_error(weight, nearest.dequantize(), hessian)
    for field in ("codes", "scale", "zero_point"):
        getattr(result, field)[worse] = getattr(nearest, field)[worse]
    return result


class _Solution:
    """Codes (as float32), scale and zero point of a weight, and the sum that they give."""

    def __init__(self, weight: Tensor, hessian: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> None:
        self.weight, self.hessian, self.grid = weight, hessian, grid
        self.scale, self.zero = scale.clone(), zero.clone()
        self.group_size = weight.shape[1] // scale.shape[1]
        self.codes = (weight / self.per_column(scale)).round().add(self.per_column(zero)).clamp(0, grid.quant_max)

    def per_column(self, values: Tensor) -> Tensor:
        """Values of groups `[N, G]` for each column `[N, K]`."""
        return values.repeat_interleave(self.group_size, 1)

    def error(self) -> Tensor:
        """Q - W."""
        return (self.codes - self.per_column(self.zero)) * self.per_column(self.scale) - self.weight

    def loss(self) -> Tensor:
        """The damped sum of each row, `[N]`."""
        error = self.error()
        return ((error @ self.hessian) * error).sum(1)

    def replace_rows(self, other: "_Solution", rows: Tensor) -> None:
        for name in ("codes", "scale", "zero"):
            getattr(self, name)[rows] = getattr(other, name)[rows]

    def quantized(self) -> QuantizedWeight:
        g_idx = group_index(self.weight.shape[1], self.group_size).to(self.codes.device)
        return QuantizedWeight(
            self.codes.to(torch.uint8), self.scale.half(), self.zero.to(torch.int32), g_idx, self.grid.bits
        )

    def descend(self, order: Tensor, rounds: int, block_size: int, move_grid: bool) -> None:
        """Coordinate descent on the codes, then on the grids, `rounds` times."""
        for _ in range(rounds):
            gradient = self.error() @ self.hessian  # afresh: the updates below round
            moved = self._move_codes(gradient, order, block_size)
            if move_grid:
                moved |= self._move_grids(gradient)
            if not moved:
                return

    def _move_codes(self, gradient: Tensor, order: Tensor, block_size: int) -> bool:
        """Each code to the best value while the others stand still; `gradient` [N, K] follows the moves."""
        moved = False
        for block in order.split(block_size):
            inner, group = self.hessian[block][:, block], block // self.group_size
            # Transposed copies, so that a column of the weight is contiguous.
            local, codes, scale = (
                values.t().contiguous() for values in (gradient[:, block], self.codes[:, block], self.scale[:, group])
            )
            curvature = inner.diagonal().tolist()
            steps = torch.zeros_like(local)
            for i in range(len(block)):
                # The best real value of q_i is q_i - gradient_i / H_ii, and the sum is a parabola around it.
                best = (codes[i] - local[i] / (scale[i] * curvature[i])).round_().clamp_(0, self.grid.quant_max)
                steps[i] = (best - codes[i]) * scale[i]
                codes[i] = best
                local[i:].addr_(inner[i, i:], steps[i])
            if steps.any():
                moved = True
                self.codes[:, block] = codes.t()
                gradient += steps.t() @ self.hessian[block]
        return moved

    def _move_grids(self, gradient: Tensor) -> bool:
        """Each group's scale to its least-squares value, and its zero point by one, where that lowers the sum."""
        moved = False
        size = self.group_size
        for g in range(self.scale.shape[1]):
            columns = slice(g * size, (g + 1) * size)
            inner = self.hessian[columns, columns]
            centred = self.codes[:, columns] - self.zero[:, g : g + 1]
            curvature = ((centred @ inner) * centred).sum(1)
            slope = (gradient[:, columns] * centred).sum(1)
            # The sum is a parabola in the scale of this group, with the codes as they are.
            wanted = self.scale[:, g] - slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
            rounded = round_scale(torch.where(wanted > 0, wanted, self.scale[:, g]).clamp(max=65504.0))
            delta = rounded - self.scale[:, g]
            gain = -(2 * delta * slope + delta**2 * curvature)
            delta = torch.where(gain > 0, delta, 0.0)
            self.scale[:, g] += delta
            change = delta[:, None] * centred
            if not self.grid.symmetric:
                total, weight = (gradient[:, columns] + change @ inner).sum(1), inner.sum()
                shift = torch.where(total > 0, 1.0, -1.0)  # a larger zero point makes every weight smaller
                step = shift * self.scale[:, g]
                allowed = (self.zero[:, g] + shift >= 1) & (self.zero[:, g] + shift <= self.grid.quant_max)
                shift = torch.where(allowed & (2 * step * total - step**2 * weight > 0), shift, 0.0)
                self.zero[:, g] += shift
                change = change - (shift * self.scale[:, g])[:, None]
            if change.any():
                moved = True
                gradient += change @ self.hessian[columns]
        return moved


def _sweep(weight: Tensor, factor: Tensor, order: Tensor, grid: _Solution, block_size: int) -> tuple[Tensor, Tensor]:
    """The paper's sweep over the columns in this order, on fixed grids: codes, and the values that were rounded to
    them, float32 `[N, K]` both."""
    weight = weight[:, order]  # a copy
    codes, targets = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, weight.shape[1], block_size):
        block = slice(start, min(start + block_size, weight.shape[1]))
        inner, group = factor[block, block], order[block] // grid.group_size
        # Transposed copies, so that a column of the weight is contiguous.
        local, scale, zero = (
            values.t().contiguous() for values in (weight[:, block], grid.scale[:, group], grid.zero[:, group])
        )
        errors = torch.empty_like(local)
        for i, diagonal in enumerate(inner.diagonal().tolist()):
            code = (local[i] / scale[i]).round_().add_(zero[i]).clamp_(0, grid.grid.quant_max)
            codes[:, start + i] = code
            # What rounding changed, made up for by the columns to come.
            errors[i] = (local[i] - (code - zero[i]) * scale[i]) / diagonal
            local[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        targets[:, block] = local.t()
        weight[:, block.stop :] -= errors.t() @ factor[block, block.stop :]
    inverse = order.argsort()
    return codes[:, inverse], targets[:, inverse]


def _search_grid(groups: Tensor, sensitivity: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[N, G]` of least weighted rounding error: the range shrinks as a whole, then (asymmetric)
    each end alone."""
    importance = sensitivity.view(groups.shape[1:])
    scale, zero = min_max_qparams(groups, grid)
    best = torch.full_like(scale, torch.inf)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)

    def consider(candidates: Iterable[tuple[Tensor, Tensor]]) -> None:
        nonlocal scale, zero, best, low, high
        for new_low, new_high in candidates:
            new_scale, new_zero = (
                (round_scale(new_high), torch.ones_like(zero))
                if grid.ternary
                else qparams_of_range(new_low, new_high, grid)
            )
            codes = (groups / new_scale[..., None]).round().add_(new_zero[..., None]).clamp_(0, grid.quant_max)
            errors = codes.sub_(new_zero[..., None]).mul_(new_scale[..., None]).sub_(groups).square_()
            error = torch.einsum("ngs,gs->ng", errors, importance)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
            low, high = torch.where(better, new_low, low), torch.where(better, new_high, high)

    top, bottom = high.clone(), low.clone()
    if grid.ternary:
        mean = groups.abs().mean(-1)
        consider((-mean * p, mean * p) for p in torch.linspace(0.8, 3.2, 25).tolist())
        return scale, zero
    consider((bottom * p, top * p) for p in torch.linspace(1, 0.25, 26).tolist())
    if not grid.symmetric:
        start, end = low.clone(), high.clone()
        ends = torch.linspace(0.7, 1.3, 13).tolist()
        consider((start * p, end) for p in ends)
        start = low.clone()
        consider((start, end * p) for p in ends)
    return scale, zero


def _check_hessian(hessian: Tensor, weight: Tensor) -> Tensor:
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"the Hessian is {list(hessian.shape)}; a weight {list(weight.shape)} wants [{columns}] * 2")
    hessian = hessian.float()
    if not hessian.isfinite().all() or (hessian.diagonal() < 0).any():
        raise ValueError("the Hessian has NaN, infinite or negative diagonal values; collect it with HessianSum")
    return hessian


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian, and the upper Cholesky factor of its inverse in this order, float32 `[K, K]` both.

    A Hessian that cannot be inverted (fewer tokens than channels and no damping, or nothing but zeros) is damped ten
    times more until it can.
    """
    mean = float(hessian.diagonal().double().mean()) or 1.0
    if damping < 0:
        raise ValueError(f"damping is {damping}; it must be 0 or more (the paper has 0.01)")
    while damping <= MAX_DAMPING:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order].double())
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            factor = factor.float()
            if not failed and factor.isfinite().all() and (factor.diagonal() > 0).all():
                return damped, factor
        damping = max(10 * damping, 1e-6)
    raise ValueError("the Hessian cannot be inverted however much it is damped; it is not positive semidefinite")
