"""BitLinear in plain torch: the specification that every other kernel is tested against.

    activations   s_x = max(absmax(x), 1e-5) / 127 per token      x_q = clamp(round(x / s_x), -128, 127)
    weights       (w_q, s_w) = the weight quantizer's codes and scale
    product       y = (x_q @ w_q^T) * s_x * s_w + bias            integer accumulation, exact
    in groups     y = s_x * sum over groups of s_w (x_q @ w_q^T) + bias      exact sums, rounded once to float32
    backward      grad_x = grad_y @ W~, grad_W = grad_y^T @ x~    W~ = w_q * s_w and x~ = x_q * s_x; straight-through:
                                                                  both quantizers count as the identity

Source: arXiv 2402.17764, and "Training Tips, Code and FAQ" beside it. The normalization that the published snippet
folds into its layer belongs to the model here, as in BitNet b1.58 2B-4T.

Letters: M tokens, N out_features, K in_features.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.quant import affine, packing, ternary
from bitnet.quant.straight_through import straight_through

ACTIVATION_BITS = 8
GROUP_SIZES = {"ternary-g64": 64, "ternary-g128": 128}
"""Columns that share a scale, of the quantizers whose rows have several."""
TERNARY_QUANTIZERS = ("ternary", *GROUP_SIZES)
WEIGHT_QUANTIZERS = ("ternary", "binary", "int8", "int4", "none", *GROUP_SIZES)
PACKED_BITS = {"ternary": 2, "binary": 2, **dict.fromkeys(GROUP_SIZES, 2), "int4": 4, "int8": 8}
INT32_COLUMNS = {bits: (2**31 - 1) // (128 * (1 if bits == 2 else 2 ** (bits - 1))) for bits in (2, 4, 8)}
"""Columns K of a weight of so many bits whose int32 sums no int8 codes can overflow."""


def check_quantizer(quantizer: str) -> str:
    """Return the name, or raise ValueError listing the ones there are."""
    if quantizer not in WEIGHT_QUANTIZERS:
        raise ValueError(f"weight quantizer {quantizer!r} is unknown; choose one of {', '.join(WEIGHT_QUANTIZERS)}")
    return quantizer


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token absmax INT8: float `[.., K]` to codes int8 `[.., K]` and scale float32 `[.., 1]`."""
    return affine.quantize_symmetric(x, ACTIVATION_BITS, affine.PerToken())


def quantize_weight(weight: Tensor, quantizer: str) -> tuple[Tensor, Tensor]:
    """Codes int8 `[N, K]` and float32 scale of a weight, by the quantizer's name.

    The scale is `[1, 1]` for the whole matrix (ternary, binary), `[N, ceil(K / g)]` for groups of g columns
    (`GROUP_SIZES`) or `[N, 1]` per output channel (int8, int4, absmax on [-127, 127] and [-7, 7]).
    """
    if quantizer in GROUP_SIZES:
        return ternary.quantize_ternary_groups(weight, GROUP_SIZES[quantizer])
    if quantizer == "ternary":
        codes, scale = ternary.quantize_ternary(weight)
        return codes, scale.view(1, 1)
    if quantizer == "binary":
        codes, scale = ternary.quantize_binary(weight)
        return codes, scale.view(1, 1)
    if quantizer in ("int8", "int4"):
        return affine.quantize_symmetric(weight, PACKED_BITS[quantizer], affine.PerChannel(0))
    raise ValueError(f"the weight quantizer {check_quantizer(quantizer)!r} has no integer codes")


def dequantize_weight(codes: Tensor, scale: Tensor, quantizer: str) -> Tensor:
    """W~ float32 `[N, K]` of what `quantize_weight` returns."""
    if quantizer in GROUP_SIZES:
        scale = ternary.scale_of_columns(scale.float(), GROUP_SIZES[quantizer], codes.shape[1])
    return codes * scale


def integer_matmul(x_codes: Tensor, weight_codes: Tensor, *, bits: int = 8) -> Tensor:
    """`x_codes @ weight_codes^T`, exactly: int8 `[.., K]` and int8 `[N, K]` of `bits` bits to int32 `[.., N]`.

    Runs as a float product, since torch has no fast exact int8 matmul on every device: every partial sum is an
    integer, which float32 holds up to 2^24 and float64 up to 2^53, in whatever order it is summed. Raises ValueError
    for more columns than int32 sums hold (`INT32_COLUMNS`).
    """
    check_columns(x_codes.shape[-1], bits)
    return _exact_matmul(x_codes, weight_codes, bits).to(torch.int32)


def check_columns(in_features: int, bits: int) -> None:
    """Raise ValueError where int32 sums over so many columns could overflow."""
    if in_features > INT32_COLUMNS[bits]:
        raise ValueError(
            f"int32 sums of {bits}-bit weights hold {INT32_COLUMNS[bits]:,} columns, and these have {in_features:,}; "
            "use fewer bits, or leave this layer in float"
        )


def _exact_matmul(x_codes: Tensor, weight_codes: Tensor, bits: int) -> Tensor:
    """The integers of `integer_matmul` as float32 or, of many columns, float64."""
    largest_weight = 1 if bits == 2 else 2 ** (bits - 1)
    dtype = torch.float32 if 128 * largest_weight * x_codes.shape[-1] <= 2**24 else torch.float64
    return _matmul(x_codes.to(dtype), weight_codes.to(dtype))


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    # Somebody's autocast region must not turn the exact product into a bfloat16 one; the meta device has none, and
    # torch.compile of torch 2.11 can't ask which device has.
    kind = x.device.type
    with contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        return F.linear(x, weight)


def packed_matmul(codes: Tensor, packed: Tensor, *, bits: int, in_features: int) -> Tensor:
    """The exact integer product behind `packed_linear`, for activations that were quantized elsewhere: int8 codes
    `[.., K]` and packed weights to int32 `[.., N]`."""
    return integer_matmul(codes, packing.unpack_codes(packed, bits, in_features), bits=bits)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    in_features: int,
    group_size: int | None = None,
) -> Tensor:
    """Inference product on packed weights.

    x: float `[.., K]`; packed: uint8 `[N, packed_width(K, bits)]` (drawn in `bitnet/quant/packing.py`); scale: float32
    `[1, 1]` or `[N, 1]`, or of groups of `group_size` columns float16 or float32 `[N, ceil(K / group_size)]`; bias:
    `[N]` or None. Returns `[.., N]` in x's dtype; scaled and biased in float32.
    """
    x_codes, x_scale = quantize_activations(x.detach())  # the scale alone would carry a wrong gradient
    codes = packing.unpack_codes(packed, bits, in_features)
    if group_size is None:
        y = _exact_matmul(x_codes, codes, bits).float() * x_scale * scale.view(-1)
    else:
        check_group_scale(scale, len(codes), in_features, group_size)
        # A code of x times a scale of 11 bits: float64 holds such sums, whatever their order, to far below float32.
        weight = codes * ternary.scale_of_columns(scale.double(), group_size, in_features)
        y = _matmul(x_codes.double(), weight).float() * x_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def check_group_scale(scale: Tensor, rows: int, in_features: int, group_size: int) -> None:
    """Raise ValueError for scales that are not one for each group of each row."""
    groups = -(-in_features // group_size)
    if list(scale.shape) != [rows, groups]:
        raise ValueError(
            f"the scale is {list(scale.shape)}; groups of {group_size} in {rows} rows of {in_features} have "
            f"{[rows, groups]}"
        )


def _round_activations(x: Tensor) -> Tensor:
    scale = affine.choose_qparams_symmetric(x, ACTIVATION_BITS, affine.PerToken())
    return affine.fake_quantize(x, scale, None, *affine.integer_range(ACTIVATION_BITS))


def _round_weight(weight: Tensor, quantizer: str) -> Tensor:
    if quantizer == "ternary":
        return ternary.fake_quantize_ternary(weight)
    if quantizer == "binary":
        return ternary.fake_quantize_binary(weight)
    if quantizer in GROUP_SIZES:
        return ternary.fake_quantize_ternary_groups(weight, GROUP_SIZES[quantizer])
    bits = PACKED_BITS[quantizer]
    scale = affine.choose_qparams_symmetric(weight, bits, affine.PerChannel(0))
    return affine.fake_quantize(weight, scale, None, *affine.integer_range(bits))


def fake_quantize_activations(x: Tensor) -> Tensor:
    """x~ = x_q * s_x in x's dtype, with the identity as its gradient."""
    return straight_through(x, _round_activations)


def fake_quantize_weight(weight: Tensor, quantizer: str) -> Tensor:
    """W~ = w_q * s_w in the weight's dtype, with the identity as its gradient; `none` returns the weight itself."""
    if check_quantizer(quantizer) == "none":
        return weight
    return straight_through(weight, lambda value: _round_weight(value, quantizer))


def fake_quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantizer: str,
    strength: Tensor | None = None,
    *,
    soft: bool = False,
) -> Tensor:
    """Training product: a float matmul of the dequantized operands, differentiable by the straight-through rule.

    x: float `[.., K]`; weight: `[N, K]` latent floats; bias: `[N]` or None. Returns `[.., N]`. With quantizer `none`
    this is `F.linear`, bit for bit.

    `strength`, a scalar tensor from 0 to 1, fades the quantizers in: each operand is `v + strength * (Q(v) - v)`, the
    gradual lambda for turning a trained float model into a quantized one. None is full strength. `soft`: ternary
    weights are what their codes are on average instead (`soft_ternary`), at the temperature (1 - strength)^2.
    """
    if quantizer == "none":
        return F.linear(x, weight, bias)
    x_q = fake_quantize_activations(x)
    if strength is None:
        return F.linear(x_q, fake_quantize_weight(weight, quantizer), bias)
    x_q = _fade(x, x_q, strength)
    if soft:
        group_size, temperature = GROUP_SIZES.get(quantizer, 0), (1 - strength).square()
        weight_q = straight_through(weight, lambda value: ternary.soft_ternary(value, temperature, group_size))
    else:
        weight_q = _fade(weight, fake_quantize_weight(weight, quantizer), strength)
    return F.linear(x_q, weight_q, bias)


def quantized_weight_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`fake_quant_linear` for a weight `[N, K]` that is W~ already: its gradient is that of the latent floats."""
    return F.linear(fake_quantize_activations(x), weight, bias)


def _fade(value: Tensor, quantized: Tensor, strength: Tensor) -> Tensor:
    return value + (strength * (quantized - value)).detach().to(value.dtype)  # the gradient stays the identity
