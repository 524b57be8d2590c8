"""BitLinear in training on weights that were quantized once for the step, with an exact int8 product forward.

    forward     y = (x_q @ w_q^T) * s_x * s_w + bias         int32 accumulation, exact; x_q and s_x are kept
    backward    grad_x = grad_y @ W~,  grad_W = grad_y^T @ x~        W~ = w_q * s_w, x~ = x_q * s_x, in float

or, if asked for, of gradients that are quantized for each of both products, by absmax to int8 like activations:

                grad_x = Q(grad_y * s_w) @ w_q      a scale for each token
                grad_W = Q(grad_y * s_x)^T @ x_q    a scale for each output

It differs from `reference.fake_quant_linear` by rounding alone: that one sums products of dequantized floats. What is
kept for the backward is int8, a quarter of what a float layer keeps, and w_q serves every micro-batch and the backward.
Plain torch (`torch._int_mm`), so that torch.compile fuses what stands around the products.

Letters: M tokens, N out_features, K in_features.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from bitnet.kernels.reference import INT32_COLUMNS, quantize_activations, quantize_weight
from bitnet.quant import affine

INT32_SUM = INT32_COLUMNS[8]
"""Products of 8-bit codes in a sum of int32."""


@functools.cache
def sums_exactly() -> bool:
    """Whether `torch._int_mm` on this CPU sums products of 8-bit codes exactly. On x86 without VNNI it adds two of them
    in 16 bits, which 127 * 127 twice do not fit in, and cuts them off; ternary and 4-bit weights stay far below."""
    codes = torch.full((32, 256), 127, dtype=torch.int8)
    return int(torch._int_mm(codes, codes.t()).min()) == 127 * 127 * 256


def cuts_off(quantizer: str, *, gradients: bool) -> bool:
    """Whether products of this weight quantizer, and with `gradients` of the backward, would be wrong here."""
    return (quantizer == "int8" or gradients) and not sums_exactly()


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, gradients: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_codes, x_scale = quantize_activations(x)
        y = torch._int_mm(x_codes, codes.t()).float() * x_scale * scale.view(-1)
        # Codes and scale are results too, since a Function in torch.func's form saves only inputs and outputs.
        return y, x_codes, x_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, codes, scale, ctx.gradients = inputs
        _, x_codes, x_scale = output
        ctx.mark_non_differentiable(x_codes, x_scale)
        ctx.save_for_backward(x_codes, x_scale, codes, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad, (x_codes, x_scale, codes, scale) = grads[0], ctx.saved_tensors
        # Straight through: the derivative of x~ @ W~^T, handed on to x and the latent weight.
        if ctx.gradients and max(grad.shape) <= INT32_SUM:
            by_token, token_scale = _quantize_gradient(grad * scale.view(-1), affine.PerToken())
            by_channel, channel_scale = _quantize_gradient(grad * x_scale, affine.PerChannel(1))
            grad_x = torch._int_mm(by_token, codes).float() * token_scale
            grad_weight = torch._int_mm(by_channel.t(), x_codes).float() * channel_scale.view(-1, 1)
            return grad_x, grad_weight, None, None, None
        return grad @ (codes.float() * scale), grad.t() @ (x_codes.float() * x_scale), None, None, None


def _quantize_gradient(grad: Tensor, granularity: affine.Granularity) -> tuple[Tensor, Tensor]:
    """Absmax codes int8 and scale of float `[M, N]`; gradients are small."""
    return affine.quantize_symmetric(grad, 8, granularity, eps=torch.finfo(torch.float32).tiny * 256)


def int8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, *, gradients: bool = False
) -> Tensor:
    """Training product of float x `[.., K]` on a weight's codes int8 `[N, K]` and scale float32 `[1, 1]` or `[N, 1]`.

    The gradient goes to the latent `weight` `[N, K]`, straight through; with `gradients` by int8 products of its codes.
    Returns `[.., N]` in x's dtype.
    """
    y = _Int8Linear.apply(x.reshape(-1, x.shape[-1]), weight, codes, scale, gradients)[0]
    y = y.view(*x.shape[:-1], weight.shape[0])
    return (y if bias is None else y + bias).to(x.dtype)


class Int8Product:
    """`int8_linear` on the codes of a layer's weight `[N, K]`, which `refresh` makes again when the weight has changed.

    Attributes: `codes` int8 `[N, K]` and `scale` float32 `[1, 1]` or `[N, 1]`; `gradients` as there.
    """

    def __init__(self, weight: Tensor, quantizer: str, *, gradients: bool = False) -> None:
        self.codes, self.scale = quantize_weight(weight.detach(), quantizer)
        self.gradients = gradients

    def refresh(self, weight: Tensor, quantizer: str) -> None:
        codes, scale = quantize_weight(weight.detach(), quantizer)
        # In place: a compiled layer reads the tensors that it was compiled with.
        self.codes.copy_(codes)
        self.scale.copy_(scale)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
        return int8_linear(x, weight, bias, self.codes, self.scale, gradients=self.gradients)
