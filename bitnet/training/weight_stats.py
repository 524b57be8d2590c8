"""What the latent weights of a run do: how many codes are zero, how many flip in a step, how large they are."""

import torch
from torch import Tensor

from bitnet.kernels.reference import quantize_weight
from bitnet.model import BitNetForCausalLM, bit_linears
from bitnet.training.processes import World
from bitnet.training.sharding import without_wrapper


@torch.no_grad()
def weight_codes(model: BitNetForCausalLM) -> list[Tensor]:
    """Integer codes of every quantized layer, int8; of this process's rows where the model is sharded, by the scale of
    its own rows, which differs from the whole matrix's by noise."""
    return [
        quantize_weight(_rows(layer.weight), layer.quantizer)[0]
        for _, layer in bit_linears(model)
        if layer.quantizer != "none"
    ]


@torch.no_grad()
def weight_statistics(model: BitNetForCausalLM, before: list[Tensor], world: World) -> dict[str, float]:
    """Over all quantized weights: share of zero codes, share of codes that differ from `before` (the codes of one step
    ago), and the latent weights' mean magnitude. Empty for a float model."""
    after = weight_codes(model)
    if not after:
        return {}
    magnitude = torch.stack(
        [
            _rows(layer.weight).abs().sum(dtype=torch.float64)
            for _, layer in bit_linears(model)
            if layer.quantizer != "none"
        ]
    ).sum()
    pairs = list(zip(before, after, strict=True))
    zeros = torch.stack([(new == 0).sum() for new in after]).sum()
    flips = torch.stack([(new != old).sum() for old, new in pairs]).sum()
    sums = torch.stack([zeros.double(), flips.double(), magnitude, magnitude.new_tensor(sum(c.numel() for c in after))])
    if world.strategy == "fsdp":
        world.sum(sums)
    shares = (sums[:3] / sums[3]).tolist()
    return dict(zip(("zero_fraction", "flip_fraction", "latent_magnitude"), shares, strict=True))


def _rows(weight: Tensor) -> Tensor:
    return without_wrapper(weight.to_local()) if hasattr(weight, "to_local") else weight
