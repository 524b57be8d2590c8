"""Mixtures to a target: each layer gets as many bits as its measured sensitivity asks for, and GPTQ rounds it.

The projections that share an input are one unit. What b bits of a unit cost is the mean KL divergence from the float
model's predictions when it alone is rounded to nearest in `PROBE` bits, measured on calibration text, times the error
of its output in b bits over that in PROBE (which is what KL follows, to second order). `bitnet/quant/allocation.py`
finds the choice of least summed cost under the target.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitnet.console import progress_bar
from bitnet.model import BitNetForCausalLM
from bitnet.model.loss import drawable_logits
from bitnet.ptq.drivers import GPTQ, NamedLinears, Options
from bitnet.ptq.walk import STAGES, HessianSum, Stage, projection, walk
from bitnet.quant.allocation import allocate
from bitnet.quant.gptq import layer_error
from bitnet.quant.grouped import Grid, round_to_nearest

BITS = (2, 3, 4, 8)
PROBE = 3
PROBED_TOKENS = 1024
Unit = tuple[int, Stage]
"""The number of a layer, and projections in it."""


@dataclass(frozen=True)
class Mixture(GPTQ):
    """GPTQ with bits for each unit, chosen for `target` bits of a weight with scales and zero points. `bits`: of the
    Hessian's probe."""

    heeds = GPTQ.heeds | {"target_bits"}
    target: float = 4.0

    def check(self, linears: NamedLinears, options: Options) -> None:
        for bits in BITS:
            GPTQ(bits).check(linears, options)

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        assert ids is not None
        chosen = self.choose(model, ids, options)
        _Chosen(self.bits, chosen=chosen).quantize(model, title, ids, options)

    def choose(self, model: BitNetForCausalLM, ids: Tensor, options: Options) -> dict[Unit, int]:
        """The bits of each unit."""
        errors = _errors(model, ids, options)
        probed = ids[: max(1, PROBED_TOKENS // ids.shape[1])].to(model.device)
        divergence = _divergences(model, probed, list(errors), options)
        sizes = {unit: sum(linear.weight.numel() for linear in _linears(model, unit)) for unit in errors}
        costs = [
            {bits: divergence[unit] * error / (found[PROBE] or 1.0) for bits, error in found.items()}
            for unit, found in errors.items()
        ]
        target = self.target if options.target_bits is None else options.target_bits
        # Stored: codes of b bits, for each group a float16 scale and a zero point of b bits, and the channels' groups.
        linears = [linear for unit in errors for linear in _linears(model, unit)]
        total = sum(sizes.values())
        groups = sum(
            c.out_features * (1 if options.group_size == -1 else c.in_features // options.group_size) for c in linears
        )
        each, fixed = 1 + groups / total, 16 * groups + 32 * sum(linear.in_features for linear in linears)
        try:
            bits = allocate(costs, list(sizes.values()), (target * total - fixed) / each)
        except ValueError:
            raise ValueError(
                f"a target of {target:g} bits is below the {BITS[0] * each + fixed / total:.2f} of {BITS[0]}-bit codes "
                "with scales; give a higher one, or larger groups"
            ) from None
        return dict(zip(errors, bits, strict=True))


@dataclass(frozen=True)
class _Chosen(GPTQ):
    chosen: dict[Unit, int] = field(default_factory=dict)

    def of(self, layer: int, names: Stage) -> GPTQ:
        return GPTQ(self.chosen[layer, names])


def _linears(model: BitNetForCausalLM, unit: Unit) -> list[nn.Linear]:
    number, names = unit
    return [projection(model.model.layers[number], name) for name in names]


def _errors(model: BitNetForCausalLM, ids: Tensor, options: Options) -> dict[Unit, dict[int, float]]:
    """Squared error of each unit's output in each number of bits, rounded to nearest."""
    found: dict[Unit, dict[int, float]] = {}
    steps = walk(model, ids, "output errors", options.batch_size, options.progress, sequential=False)
    for number, step in enumerate(steps):
        for names, seen in step.observe(STAGES, HessianSum).items():
            weight = torch.cat([projection(step.layer, name).weight for name in names])
            found[number, names] = {
                bits: float(layer_error(weight, _nearest(weight, bits, options), seen.matrix()).sum()) for bits in BITS
            }
    return found


def _divergences(model: BitNetForCausalLM, ids: Tensor, units: list[Unit], options: Options) -> dict[Unit, float]:
    """Mean KL divergence from the float model with one unit in PROBE bits, nats a token."""
    unused = None if options.unused is None else options.unused.to(ids.device)
    labels = ids.roll(-1, 1)  # a text's own tokens keep their rows
    float_logp = drawable_logits(model(ids), labels, unused).log_softmax(-1)
    found = {}
    for unit in progress_bar(units, "sensitivity", enabled=options.progress, leave=False):
        linears = _linears(model, unit)
        kept = [copy.deepcopy(linear.weight.data) for linear in linears]
        for linear in linears:
            linear.weight.data = _nearest(linear.weight.data, PROBE, options)
        logp = drawable_logits(model(ids), labels, unused).log_softmax(-1)
        found[unit] = max(0.0, float((float_logp.exp() * (float_logp - logp)).sum(-1).double().mean()))
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
    return found


def _nearest(weight: Tensor, bits: int, options: Options) -> Tensor:
    return round_to_nearest(weight, Grid(bits, options.symmetric), options.group_size).dequantize()
