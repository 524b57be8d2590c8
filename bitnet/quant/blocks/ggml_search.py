"""ggml's own searches for scale, minimum and codes of a group, step by step, so that the bytes come out the same.

Everything is float32 and every sum runs from the first weight to the last, because another order rounds otherwise.
Groups are columns here: x and its weights are `[n, B]`, which keeps that order and is wide enough for torch. A search
gives the scale `[B]` and the codes `[n, B]` as floats.

What these searches minimize is their own: the error weighted with `importance * sqrt(sigma2 + x^2)` or with powers of
x, at scales that are rounded only afterwards. `search.py` minimizes the error of what is stored. Source: llama.cpp's
ggml-quants.c.
"""

import numpy as np
import torch
from torch import Tensor

TINY = 1e-15  # a group whose largest weight is smaller counts as zero
ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the integer nearest to a float in the low bits


def nearest_int(x: Tensor) -> Tensor:
    """Round half to even as ggml does, by adding 1.5 * 2^23: beyond +-2^22, at infinity and NaN it gives what the bits
    give, and ggml's bytes for denormal weights depend on that. float32."""
    return (((x + ROUND).view(torch.int32) & 0x7FFFFF) - 0x400000).float()


def divide(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once (torch multiplies a reciprocal where the dividend is a Python number)."""
    return torch.full_like(x, number).div_(x)


def divide_by(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once."""
    return x / torch.full_like(x, number)


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x != 0, divide(1, x), 0.0)


def truncate(x: Tensor) -> Tensor:
    """Toward 0; what is not finite becomes 0, as x86 converts it to the low byte of an integer."""
    return torch.where(x.isfinite(), x.trunc(), 0.0)


def round_away(x: Tensor) -> Tensor:
    """Round half away from zero; what is not finite becomes 0, as in `truncate`."""
    whole = x.trunc()
    return truncate(whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0.0))


def root(x: Tensor) -> Tensor:
    """Square root, rounded once (torch's own in float32 may be one bit off)."""
    return x.double().sqrt().float()


def total(terms: Tensor) -> Tensor:
    """Sum over the first dimension, from the first to the last."""
    result = torch.zeros_like(terms[0])
    for term in terms:
        result += term
    return result


def to_half(x: Tensor) -> Tensor:
    """float32 to float16, half to even; beyond its range infinity, as ggml stores it."""
    return x.to(torch.float16)


def largest(x: Tensor) -> Tensor:
    """The entry with the largest magnitude in each column, the first of equals; 0 for a column of -0."""
    # A NaN never wins ggml's comparison, so it counts as less than any magnitude.
    found = x.gather(0, x.abs().nan_to_num(nan=-1.0).argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(found == 0, 0.0, found)


def symmetric(x: Tensor, weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and codes `[0, 2 levels)`, centered at `levels`, by 19 trial scales with a least-squares refit each
    (ggml: make_qx_quants). A group of zeros gets scale 0 and codes 0."""
    extreme = largest(x)
    zero = extreme.abs() < TINY

    def trial(inv_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = nearest_int(inv_scale * x).clamp(-levels, levels - 1)
        return codes, total(weight * x * codes), total(weight * codes * codes)

    best_inv = divide(-levels, extreme)
    _, sum_xq, sum_qq = trial(best_inv)
    scale = torch.where(sum_qq != 0, sum_xq / sum_qq, 0.0)
    best = scale * sum_xq
    # Step 0 was the first trial. The factor is computed in float32, as C does.
    for step in [*range(-9, 0), *range(1, 10)]:
        inv_scale = divide(-float(np.float32(levels) + np.float32(0.1) * np.float32(step)), extreme)
        _, sum_xq, sum_qq = trial(inv_scale)
        # The error at the refitted scale is sum w x^2 - sum_xq^2 / sum_qq: the largest fraction wins, compared without
        # a division.
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        best_inv = torch.where(better, inv_scale, best_inv)
        scale = torch.where(better, sum_xq / sum_qq, scale)
        best = torch.where(better, scale * sum_xq, best)
    codes = nearest_int(best_inv * x).clamp(-levels, levels - 1) + levels
    return torch.where(zero, 0.0, scale), torch.where(zero, 0.0, codes)


def symmetric_descent(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """As `symmetric` with weights x^2, by moving one code at a time (ggml: make_q3_quants)."""
    extreme = largest(x)
    zero = extreme.abs() < TINY
    weight = x * x
    codes = nearest_int(divide(-levels, extreme) * x).clamp(-levels, levels - 1)
    sum_xq, sum_qq = total(weight * x * codes), total(weight * codes * codes)
    codes = codes.clone()
    _descend(x, weight, codes, sum_xq, sum_qq, -levels, levels - 1)
    scale = torch.where(sum_qq > 0, sum_xq / sum_qq, 0.0)
    return torch.where(zero, 0.0, scale), torch.where(zero, 0.0, codes + levels)


def _descend(
    x: Tensor, weight: Tensor, codes: Tensor, sum_xq: Tensor, sum_qq: Tensor, low: int | None, high: int
) -> None:
    """Up to five passes over the codes, each moved to its best value at the scale that the others give; in place."""
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            # The sums without this code, and the code that is best at the scale they give.
            wx, w, code = weight[i] * x[i], weight[i], codes[i].clone()
            xq, qq = sum_xq - wx * code, sum_qq - w * code * code
            moved = nearest_int(x[i] * qq / xq).clamp(low, high)
            new_xq, new_qq = xq + wx * moved, qq + w * moved * moved
            better = (xq > 0) & (moved != code) & (new_qq > 0)
            if low is None:  # unsigned codes: ggml asks for qq > 0 before the move, too
                better &= qq > 0
            better &= new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq
            codes[i] = torch.where(better, moved % 256 if low is None else moved, code)
            sum_xq.copy_(torch.where(better, new_xq, sum_xq))
            sum_qq.copy_(torch.where(better, new_qq, sum_qq))
            changed |= bool(better.any())
        if not changed:
            return


def affine(
    x: Tensor, weight: Tensor, levels: int, first: float, step: float, steps: int, *, absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum (of the sign that is subtracted, at least 0) and codes `[0, levels]`, by `steps + 1` trial ranges
    with a least-squares refit each; the range moves with the best minimum (ggml: make_qkx2_quants, make_qkx3_quants).
    `absolute` compares absolute instead of squared errors."""
    low, high = x.amin(dim=0).clamp(max=0), x.amax(dim=0)
    sum_w, sum_x = total(weight), total(weight * x)
    # Equal weights, none above 0: scale 0, and the minimum alone stands for them.
    constant = high <= low

    def error_of(scale: Tensor, codes: Tensor, low: Tensor) -> Tensor:
        difference = scale * codes + low - x
        return total(weight * (difference.abs() if absolute else difference * difference))

    inv_scale = divide(levels, high - low)
    scale = divide(1, inv_scale)
    best = nearest_int(inv_scale * (x - low)).clamp(0, levels)
    best_error = error_of(scale, best, low)
    for i in range(steps + 1):
        number = np.float32(first) + np.float32(step) * np.float32(i) + np.float32(levels)
        codes = nearest_int(divide(float(number), high - low) * (x - low)).clamp(0, levels)
        sum_q, sum_qq, sum_xq = total(weight * codes), total(weight * codes * codes), total(weight * codes * x)
        # Least squares for scale and low end at these codes; a low end above 0 is left out.
        determinant = sum_w * sum_qq - sum_q * sum_q
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant
        new_low = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        above = new_low > 0
        new_scale = torch.where(above, sum_xq / sum_qq, new_scale)
        new_low = torch.where(above, 0.0, new_low)
        error = error_of(new_scale, codes, new_low)
        better = (determinant > 0) & (error < best_error)
        best_error = torch.where(better, error, best_error)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
        best = torch.where(better, codes, best)
    return torch.where(constant, 0.0, scale), -low, torch.where(constant, 0.0, best)


def positive(x: Tensor, weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and codes `[0, levels]` of non-negative numbers, the scales of a super-block (ggml: make_qp_quants). A
    scale below 0, which rounding can make of a group without slope, gets a code that wraps in ggml's uint8 and exceeds
    levels."""
    high = x.amax(dim=0).clamp(min=0)
    zero = high < TINY

    def error_of(scale: Tensor, codes: Tensor) -> Tensor:
        difference = x - scale * codes
        return total(weight * difference * difference)

    best_inv = divide(levels, high)
    best_error = error_of(divide(1, best_inv), nearest_int(best_inv * x) % 256)
    for step in [*range(-4, 0), *range(1, 5)]:
        inv_scale = divide(float(np.float32(0.1) * np.float32(step) + np.float32(levels)), high)
        error = error_of(divide(1, inv_scale), nearest_int(inv_scale * x).clamp(max=levels))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_inv = torch.where(better, inv_scale, best_inv)
    codes = nearest_int(best_inv * x).clamp(max=levels)
    sum_xq, sum_qq = total(weight * x * codes), total(weight * codes * codes)
    codes = codes % 256
    _descend(x, weight, codes, sum_xq, sum_qq, None, levels)
    scale = torch.where(sum_qq > 0, sum_xq / sum_qq, 0.0)
    return torch.where(zero, 0.0, scale), torch.where(zero, 0.0, codes)
