"""Quantization of activations in one pass: [gate] -> [RMSNorm] -> per-token absmax INT8, with scale and row sum.

    gate     v = act(x[:K]) * x[K:]                              silu or relu2, before down_proj
    norm     v = weight * (v / sqrt(mean(v^2) + eps))            statistics in float32
    absmax   scale = max(absmax(v), 1e-5) / 127,  q = clamp(round(v / scale), -128, 127),  total = sum(q)

Every intermediate is rounded to the type in which torch would have stored it. The products need `total`: they multiply
unsigned codes and subtract `offset * total` once (`product.py`). One program takes one row and keeps it in
registers; rows of more than 16384 values spill some.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"

import torch
from torch import Tensor

from bitnet.kernels.triton.language import check, launch, power_of_2, round_half_even, tl, triton, wait_for_inputs
from bitnet.kernels.triton.limits import MAX_WIDTH
from bitnet.quant.affine import SCALE_EPS

PADDING = 128
"""Rows of codes are padded with zeros to a multiple of this, the longest block of `bitnet/quant/packing.py`."""


@triton.jit
def activation(x, at, inside, K: tl.constexpr, GATE: tl.constexpr):
    """Values of a token at these places, float32, rounded as torch would store them. x: its first value."""
    stored: tl.constexpr = x.dtype.element_ty
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if GATE != "none":
        up = tl.load(x + K + at, mask=inside, other=0.0).to(tl.float32)
        if GATE == "silu":
            v = (v / (1.0 + tl.exp(-v))).to(stored).to(tl.float32)
        else:
            v = tl.where(v < 0.0, 0.0, v)  # a NaN stays one
            v = (v * v).to(stored).to(tl.float32)
        v = (v * up).to(stored).to(tl.float32)
    return v


@triton.jit
def normalize(v, root, norm, stored: tl.constexpr):
    """RMSNorm of values v, whose token has 1 / sqrt(mean of squares + eps) in `root`; `norm` are their weights."""
    return (v * root).to(stored).to(tl.float32) * norm


@triton.jit
def scale_of(largest, SMALLEST: tl.constexpr):
    """The scale of a token whose absolute values, as integers, are at most `largest`. In that form they keep their
    order and a NaN is larger than any number: it becomes the scale, so that a token with one does not come out as
    numbers."""
    absmax = largest.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(absmax < SMALLEST, SMALLEST, absmax), 127.0)


@triton.jit
def codes_of(v, s):
    """INT8 codes as int32; a NaN gives 0."""
    q = round_half_even(tl.div_rn(v, s))
    return tl.where(q == q, tl.minimum(tl.maximum(q, -128.0), 127.0), 0.0).to(tl.int32)


@triton.jit
def quantize_kernel(
    x, weight, codes, scale, total, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    GATE: tl.constexpr, EPS: tl.constexpr, SMALLEST: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    stored: tl.constexpr = x.dtype.element_ty
    if NORM and AHEAD:
        norm = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    if NORM and not AHEAD:
        norm = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    v = activation(x + row * K * (1 if GATE == "none" else 2), k, inside, K, GATE)
    if NORM:
        mean = tl.div_rn(tl.sum(v * v, 0), K * 1.0)
        v = normalize(v, tl.rsqrt(mean + EPS), norm, stored)
        if weight.dtype.element_ty == stored:
            v = v.to(stored).to(tl.float32)
    s = scale_of(tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), SMALLEST)
    q = codes_of(v, s)
    tl.store(codes + row * WIDTH + k, q.to(tl.int8), mask=k < WIDTH)
    tl.store(scale + row, s)
    tl.store(total + row, tl.sum(q, 0))


def padded(in_features: int) -> int:
    """Length of a row of codes."""
    return -(-in_features // PADDING) * PADDING


def quantize_activations(
    x: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gate: str = "none",
    *,
    constant: bool = False,
    warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 `[M, padded(K)]`, scale float32 `[M]` and row sums int32 `[M]` of x, float `[M, K]`.

    With `gate` "silu" or "relu2" x is `[M, 2K]`, gate beside up. With `norm_weight` `[K]` an RMSNorm comes first.
    `constant` promises that no kernel still running writes `norm_weight`.
    Raises ValueError for other types and shapes, non-contiguous tensors, mixed devices and K above 65536.
    """
    if gate not in ("none", "silu", "relu2"):
        raise ValueError(f"gate is {gate!r}; choose none, silu or relu2")
    check("x", x, None, x.device, None, None)
    M, K = x.shape
    if gate != "none":
        if K % 2:
            raise ValueError(f"x has {K} columns; gate and up need an even number")
        K //= 2
    if not 1 <= K <= MAX_WIDTH:
        raise ValueError(f"a token of {K} values does not fit the quantization kernel, which holds 1 to {MAX_WIDTH}")
    if norm_weight is not None:
        check("norm_weight", norm_weight, None, x.device, K)
    width = padded(K)
    codes = torch.empty(M, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    total = torch.empty(M, dtype=torch.int32, device=x.device)
    if M:
        block = power_of_2(width)
        launch(
            quantize_kernel, (M,), x, x if norm_weight is None else norm_weight, codes, scale, total, K=K, WIDTH=width,
            BLOCK=block, NORM=norm_weight is not None, GATE=gate, EPS=eps, SMALLEST=SCALE_EPS,
            AHEAD=constant, warps=warps or min(16, max(1, block // 256)),
        )  # fmt: skip
    return codes, scale, total
