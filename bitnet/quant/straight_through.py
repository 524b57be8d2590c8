"""The straight-through rule: what rounds counts as the identity when the gradient comes back (arXiv 1308.3432)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    # It takes the rounded value instead of making it: torch.compile of torch 2.11 gives no gradient at all to what a
    # Function computed and then cast to the dtype that it had.
    @staticmethod
    def forward(x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.clips = inputs[2] is not None
        if ctx.clips:
            ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0] if ctx.clips else grads[0], None, None


def straight_through(x: Tensor, quantizer: Callable[[Tensor], Tensor], inside: Tensor | None = None) -> Tensor:
    """`quantizer(x)`, of x's shape and dtype, with the identity as its gradient: where `inside` (bool, x's shape) is
    given, 0 outside it. No gradient goes to anything else that the quantizer uses."""
    with torch.no_grad():
        rounded = quantizer(x)
    return _StraightThrough.apply(x, rounded, inside)
