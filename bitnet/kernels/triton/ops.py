"""The packed product as torch operators, which torch.compile and CUDA graphs take: activations in, floats out.

Opaque ones, and not `torch.library.triton_op`, whose kernels Inductor would launch itself: it takes `enable_fp_fusion`
and `launch_pdl` for arguments of the kernel (torch 2.11 and 2.13), and compiles without them. Multiplications would be
fused with additions, so results round otherwise than the reference's, and kernels would not wait for the one before.
The number of tokens chooses the plan of a product, too, so a graph for any number of them would become one for each.
"""

import torch
from torch import Tensor

from bitnet.kernels.triton.activations import padded, quantize_activations
from bitnet.kernels.triton.groups import group_product
from bitnet.kernels.triton.product import product

_Quantized = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("bitnet::quantize_activations", mutates_args=())
def quantize_op(x: Tensor, norm_weight: Tensor | None, eps: float, gate: str) -> _Quantized:
    """See `activations.quantize_activations`."""
    return quantize_activations(x, norm_weight, eps, gate)


@quantize_op.register_fake
def _(x: Tensor, norm_weight: Tensor | None, eps: float, gate: str) -> _Quantized:
    M, K = x.shape[0], x.shape[1] // (1 if gate == "none" else 2)
    return (
        x.new_empty(M, padded(K), dtype=torch.int8), x.new_empty(M, dtype=torch.float32),
        x.new_empty(M, dtype=torch.int32),
    )  # fmt: skip


@torch.library.custom_op("bitnet::packed_product", mutates_args=())
def product_op(
    codes: Tensor, x_scale: Tensor, total: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, bits: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `product.product`."""
    return product(
        codes, x_scale, total, packed, w_scale, bias, residual, bits=bits, in_features=in_features, dtype=dtype
    )


@product_op.register_fake
def _(
    codes: Tensor, x_scale: Tensor, total: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, bits: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty(codes.shape[0], packed.shape[0], dtype=dtype)


@torch.library.custom_op("bitnet::group_product", mutates_args=())
def group_op(
    codes: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, in_features: int,
    group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `groups.group_product`."""
    return group_product(
        codes, x_scale, packed, w_scale, bias, in_features=in_features, group_size=group_size, dtype=dtype
    )


@group_op.register_fake
def _(
    codes: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, in_features: int,
    group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty(codes.shape[0], packed.shape[0], dtype=dtype)
