"""BitLinear in training: an exact int8 product forward, straight-through matmuls of the quantized operands backward.

    forward     y = (x_q @ w_q^T) * s_x * s_w + bias         int8 matrix instructions; x_q, w_q, s_x, s_w are kept
    backward    grad_x = grad_y @ W~,  grad_W = grad_y^T @ x~        W~ = w_q * s_w, x~ = x_q * s_x in grad_y's type

What is kept for the backward is int8, half of what bfloat16 operands would take. The two matmuls of the backward are
torch's. Ternary weights only; the other quantizers train on the reference.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet.kernels.triton.activations import padded, quantize_activations
from bitnet.kernels.triton.language import check
from bitnet.kernels.triton.product import choose, dense
from bitnet.kernels.triton.weights import dequantize, quantize_ternary

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("bitnet::ternary_linear", mutates_args=())
def ternary_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Saved:
    """y `[M, N]` in `dtype`, with the codes and scales of x `[M, K]` and weight `[N, K]`, which the backward needs."""
    M, (N, K) = x.shape[0], weight.shape
    check("weight", weight, None, x.device, None, None)
    check("x", x, None, weight.device, None, K)
    if bias is not None:
        check("bias", bias, None, x.device, N)
    codes, scale, _ = quantize_activations(x)
    w_codes, w_scale = quantize_ternary(weight, packed=False)
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    if M:
        shared = {"N": N, "PER_ROW": False, "BIAS": bias is not None, "RESIDUAL": False}
        epilogue = (scale, w_scale, w_scale if bias is None else bias, w_scale)
        dense(w_codes, codes, epilogue, y, shared, choose(M, N, K, 2, x.device, "dense"))
    return y, codes, scale, w_codes, w_scale


@ternary_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Saved:
    M, (N, K) = x.shape[0], weight.shape
    return (
        x.new_empty(M, N, dtype=dtype), x.new_empty(M, padded(K), dtype=torch.int8),
        x.new_empty(M, dtype=torch.float32), x.new_empty(N, padded(K), dtype=torch.int8),
        x.new_empty(1, 1, dtype=torch.float32),
    )  # fmt: skip


@torch.library.custom_op("bitnet::dequantize", mutates_args=())
def dequantize_op(codes: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """See `weights.dequantize`."""
    return dequantize(codes, scale, in_features, dtype)


@dequantize_op.register_fake
def _(codes: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], in_features, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Saved) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.in_features = weight.shape[1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    codes, scale, w_codes, w_scale = ctx.saved_tensors
    x_dtype, w_dtype, bias_dtype = ctx.dtypes
    grad_x = grad_w = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad @ dequantize_op(w_codes, w_scale, ctx.in_features, grad.dtype)).to(x_dtype)
    if ctx.needs_input_grad[1]:
        grad_w = (grad.t() @ dequantize_op(codes, scale, ctx.in_features, grad.dtype)).to(w_dtype)
    if bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0).to(bias_dtype)
    return grad_x, grad_w, grad_bias, None


ternary_linear.register_autograd(_backward, setup_context=_setup)
