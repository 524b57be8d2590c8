"""AutoRound: the rounding of a block's weights is learned from what the block gives (arXiv 2309.05516).

Block by block, from the quantized output of those before it, all projections of a block together: the mean squared
error against the float model's output of the same block (`bitnet/quant/signround.py` has the steps).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM
from bitnet.model.quantized import replace_module
from bitnet.ptq.drivers import Grouped, Options, group_linear
from bitnet.ptq.walk import STAGES, CalibratedLayer, projection, walk
from bitnet.quant.signround import Rounding

TOKENS = 2048
"""In a step, or one sequence where that is longer."""
NAMES = [name for names in STAGES for name in names]


@dataclass(frozen=True)
class AutoRound(Grouped):
    """Integers in groups, rounded as was learned."""

    calibration = "required"
    heeds = Grouped.heeds | {"tuning_steps"}

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        assert ids is not None
        floats: list[Tensor] | None = None
        for step in walk(model, ids, title, options.batch_size, options.progress):
            targets = step.forward(floats)
            roundings = self._learn(step, torch.cat(targets), options)
            for name, rounding in roundings.items():
                linear = projection(step.layer, name)
                module = group_linear(linear, rounding.quantized(), options, ternary=self.ternary)
                replace_module(step.layer, name, module)
            floats = targets

    def _learn(self, step: CalibratedLayer, targets: Tensor, options: Options) -> dict[str, Rounding]:
        """Of a layer's projections by name, from targets float `[B, T, C]`."""
        found = self._start(step, options)
        parameters = [parameter for rounding in found.values() for parameter in rounding.parameters()]
        inputs, generator = torch.cat(step.inputs), torch.Generator().manual_seed(0)
        before = _losses(step, found, inputs, targets)
        best, kept = 1.0, [parameter.clone() for parameter in parameters]
        rows = max(1, TOKENS // inputs.shape[1])
        for turn in range(options.tuning_steps):
            chosen = torch.randperm(len(inputs), generator=generator)[:rows].to(inputs.device)
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                loss = _loss(step, found, inputs[chosen], targets[chosen])
                gradients = iter(torch.autograd.grad(loss, parameters))
            for parameter in parameters:
                parameter.requires_grad_(False)
            # Some sequences are harder than others: each is compared with what it was in the beginning.
            ratio = float(loss.detach() / before[chosen].mean().clamp(min=1e-30))
            if ratio < best:
                best, kept = ratio, [parameter.clone() for parameter in parameters]
            rate = (1 - turn / options.tuning_steps) / options.tuning_steps
            for rounding in found.values():
                rounding.move([next(gradients) for _ in rounding.parameters()], rate)
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
        # The last word has all of the text.
        return found if _losses(step, found, inputs, targets).mean() <= before.mean() else self._start(step, options)

    def _start(self, step: CalibratedLayer, options: Options) -> dict[str, Rounding]:
        """Rounding to nearest."""
        grid = self.grid(options)
        return {name: Rounding.of(projection(step.layer, name).weight, grid, options.group_size) for name in NAMES}


def _losses(step: CalibratedLayer, found: dict[str, Rounding], inputs: Tensor, targets: Tensor) -> Tensor:
    """Of each sequence, float32 `[B]`."""
    pairs = zip(inputs.split(1), targets.split(1), strict=True)
    return torch.stack([_loss(step, found, hidden, wanted) for hidden, wanted in pairs])


def _loss(step: CalibratedLayer, found: dict[str, Rounding], inputs: Tensor, targets: Tensor) -> Tensor:
    weights = {f"{name}.weight": rounding.dequantize() for name, rounding in found.items()}
    return nn.functional.mse_loss(step.forward_with(weights, inputs), targets)
