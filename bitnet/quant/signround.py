"""AutoRound's rounding (SignRound, arXiv 2309.05516): which way each weight is rounded is learned, and so is each
group's range.

    q = clamp(round(W / s + z + V), 0, quant_max)      V in [-1/2, 1/2] for each weight
    s = (high b - low a) / quant_max                   a, b in [1/2, 1] for each group; the paper clips at 0 and 1

Gradients pass through the rounding as if it were not there, and only their sign counts: a step moves V, a and b by
the learning rate, which falls to 0 in a straight line. So no weight moves by more than half a step, and 200 steps are
enough. Scales are rounded to float16 in every step, as they will be stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.quant.grouped import Grid, QuantizedWeight, check_weight, group_index, round_scale
from bitnet.quant.straight_through import straight_through

LEAST_RANGE = 0.5


@dataclass
class Rounding:
    """What is learned of one weight `[N, K]`: offset V `[N, G, S]`, low and high a and b `[N, G, 1]`."""

    weight: Tensor
    grid: Grid
    offset: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, weight: Tensor, grid: Grid, group_size: int) -> "Rounding":
        """Rounding to nearest of the whole range. Raises ValueError as `round_to_nearest` does."""
        weight = check_weight(weight)
        count = int(group_index(weight.shape[1], group_size)[-1]) + 1
        groups = weight.view(len(weight), count, weight.shape[1] // count)
        ends = torch.ones_like(groups[..., :1])
        return cls(groups, grid, torch.zeros_like(groups), ends, ends * (0.75 if grid.ternary else 1.0))

    def parameters(self) -> list[Tensor]:
        """What is learned; a ternary grid has one range."""
        return [self.offset, self.high] if self.grid.ternary else [self.offset, self.low, self.high]

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[N, G, S]`, scale and zero point `[N, G, 1]`, float32, with straight-through gradients."""
        grid = self.grid
        bottom, top = (end(self.weight, -1, keepdim=True) for end in (torch.amin, torch.amax))
        low, high = bottom.clamp(max=0) * self.low, top.clamp(min=0) * self.high
        if grid.ternary:
            # 1 to 2 times the mean: for Gaussian weights the least error is at 1.5.
            scale = self.weight.abs().mean(-1, keepdim=True) * (2 * self.high)
            zero = torch.ones_like(scale)
        elif grid.symmetric:
            scale = 2 * torch.maximum(-low, high) / grid.quant_max
            zero = torch.full_like(scale, grid.middle)
        else:
            low = torch.minimum(low, -high / (grid.quant_max - 1))  # zero point 1 or more, as the layout wants it
            scale = (high - low) / grid.quant_max
            zero = -low
        scale = straight_through(scale, round_scale)
        if not grid.symmetric:
            zero = straight_through(zero / scale, lambda z: z.round().clamp(1, grid.quant_max))
        # The zero point is an integer: outside the rounding it is the same, and added without an error.
        codes = straight_through(self.weight / scale + self.offset, torch.round) + zero
        return codes.clamp(0, grid.quant_max), scale, zero

    def dequantize(self) -> Tensor:
        """The rounded weight, float32 `[N, K]`."""
        codes, scale, zero = self.codes()
        return ((codes - zero) * scale).flatten(1)

    @torch.no_grad()
    def move(self, gradients: list[Tensor], rate: float) -> None:
        """A step against the signs of the gradients, and back to where each may be."""
        for value, gradient in zip(self.parameters(), gradients, strict=True):
            value.sub_(gradient.sign(), alpha=rate)
        self.offset.clamp_(-0.5, 0.5)
        self.low.clamp_(LEAST_RANGE, 1.0)
        self.high.clamp_(LEAST_RANGE, 1.0)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """What is stored."""
        codes, scale, zero = self.codes()
        g_idx = group_index(codes[0].numel(), codes.shape[2]).to(codes.device)
        codes, scale, zero = codes.flatten(1).to(torch.uint8), scale[..., 0].half(), zero[..., 0].to(torch.int32)
        return QuantizedWeight(codes, scale, zero, g_idx, self.grid.bits)
