"""SmoothQuant: moving outliers from activations, where INT8 suffers from them, into weights (arXiv 2211.10438).

    y = W x = (W s) (x / s)        s_k = max|x_k|^alpha / max|W_k|^(1 - alpha)        (eq. 4)

`alpha` is the migration strength: 0 leaves the whole difficulty to the activations, 1 to the weights, and 0.5 makes the
largest value of channel k the same in both. 1 / s goes into the weight of the norm that produces x, so the float model
computes what it did before, and both operands are easier to quantize.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5


def smooth_scale(weights: Sequence[Tensor], absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """Factor of each input channel, float32 `[K]`, for layers that share one input.

    weights: float `[N_i, K]` each, whose columns it multiplies; absmax: largest |x_k| over calibration inputs, `[K]`. A
    channel whose inputs or weights are all 0 keeps the factor 1, since its ratio says nothing. Raises ValueError for an
    alpha outside [0, 1] or an absmax that is negative, NaN or infinite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; the migration strength is between 0 and 1 (0.5 is usual)")
    if not absmax.isfinite().all() or (absmax < 0).any():
        raise ValueError("maxima of activations must be finite and not negative; is the float model sound?")
    # One factor serves all layers that share the input, so the largest of their weights counts.
    rows = torch.cat([torch.zeros_like(absmax)[None].float(), *(weight.detach().float().abs() for weight in weights)])
    largest = rows.amax(0)
    scale = (absmax.float() ** alpha / largest ** (1 - alpha)).clamp(min=SMALLEST_SCALE)
    return torch.where((absmax > 0) & (largest > 0), scale, 1.0)
