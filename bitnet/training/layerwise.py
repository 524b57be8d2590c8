"""The layer-wise start of a conversion: one layer after the other learns to say what it said in float.

    t = layer(h~) in float        y = layer(h) quantized        h, h~: what the layers before it make of the same tokens
    error = mean over tokens of log(1 + |y - t|^2 / |t|^2)

Of each layer first the codes: GPTQ in the order of the computation (of groups), or the scale of least squares with each
input channel weighted by its mean square. They become latent weights from which training can go on: the quantizer makes
these very codes and scales of them, and those that float weights had near a border stay near it. Then a few steps of
AdamW on latents and norms lower the error, on sequences of which a fifth is held out; a layer keeps its best form by
these. A layer learns from the errors of those before it, since its input is what they give quantized.

Only one layer's gradients and moments are in memory, and the hidden states of the tokens twice. Each finished layer is
written to OUT/layers, so that a start that was stopped goes on behind it with the numbers of one that was not; the
errors of all layers stay in OUT/layers.json.

Letters: B sequences, T tokens, C hidden_size, N rows and K columns of a weight.
"""

import contextlib
import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bitnet import kernels
from bitnet.console import progress_bar
from bitnet.files import write_atomic
from bitnet.kernels import GROUP_SIZES, TERNARY_QUANTIZERS
from bitnet.machine import compiled, eager
from bitnet.model import ModelConfig, bit_linears
from bitnet.model.transformer import DecoderLayer, document_mask
from bitnet.ptq.walk import STAGES, projection
from bitnet.quant.gptq import HessianSum, gptq_quantize
from bitnet.quant.grouped import TERNARY
from bitnet.quant.ternary import FLOAT16_TINY
from bitnet.storage.checksums import sum_of_weights
from bitnet.storage.json_files import CheckpointError, load_record
from bitnet.storage.safetensors import load_tensors, save_tensors
from bitnet.training.config import TrainConfig
from bitnet.training.memory import LAYER_STEP_TOKENS
from bitnet.training.processes import World
from bitnet.training.step import Trainer

HESSIAN_TOKENS = 16384
"""That GPTQ sees of the tokens: a few for each channel are enough."""
DAMPING = 0.03
"""GPTQ's, between what suits many tokens and few; the steps behind it are worth more than a search for the best."""
NORM_RATE = 0.1
"""Of the rate of matrices."""
BORDER = 0.49, 0.51
"""Shares of a scale: latents below the first become 0, from the second on 1."""
LAYERS, STATE = "layers", "layers.json"


@dataclass
class Found:
    """What is known of a start: OUT/layers.json."""

    fingerprint: str
    """Of what its numbers depend on."""
    errors: list[tuple[float, float, float]] = field(default_factory=list)
    """Of each finished layer: rounded, with codes of least squares, learned."""
    seconds: float = 0.0


def check_start(config: TrainConfig, init: ModelConfig, world: World) -> None:
    """Raise ValueError where a run cannot start layer by layer from this model, or not in these processes."""
    if not config.layer_steps:
        return
    if init.quantizer != "none":
        raise ValueError(
            f"{config.init} is {init.quantizer} already, and a layer-wise start brings a float model to few bits; "
            "give the float model, or --layer-steps 0"
        )
    if world.size > 1:
        raise ValueError(
            f"a layer-wise start runs in one process, and there are {world.size}; begin without torchrun, and go on "
            f"with --resume {config.out} under it once step 0 is saved"
        )


class LayerwiseStart:
    """The start of a run whose model holds the float weights of `--init`. `run` changes them in place."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self.trainer, self.config, self.model = trainer, config, trainer.model
        self.folder = trainer.folder / LAYERS
        self.rows = max(1, LAYER_STEP_TOKENS // config.window)
        settings = (config.layer_steps, config.layer_tokens, config.layer_rate, config.window, config.batch_size,
                    config.seed, config.model.quantizer, str(trainer.dtype), trainer.feed.fingerprint)  # fmt: skip
        text = f"{settings} {sum_of_weights(self.model)}"
        self.found = Found(hashlib.sha256(text.encode()).hexdigest())
        try:
            before = load_record(trainer.folder / STATE, Found)
        except CheckpointError:
            before = self.found
            if self.folder.exists() and any(self.folder.iterdir()):  # which would be removed at the end
                raise ValueError(
                    f"{self.folder} is there already and this run has not written it; move it away"
                ) from None
        whole = all(self._file(index).is_file() for index in range(len(before.errors)))
        if before.fingerprint == self.found.fingerprint and whole:
            self.found = before
        else:
            self.remove()  # of another start

    def run(self, say: Callable[[str], None], stop: Callable[[float], bool]) -> bool:
        """Bring every layer near the float one; False where `stop`, which is told the seconds of a layer, wanted it
        to end before the last one."""
        layers, longest = self.model.model.layers, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save()  # from here on the folder is this run's
        ids, masks = self._sequences()
        own = theirs = self.model.model.embed_tokens(ids).detach()
        with eager(), progress_bar(range(len(layers)), "layers", enabled=True, leave=False) as bar:
            for index in bar:
                layer, started = layers[index], time.perf_counter()
                assert isinstance(layer, DecoderLayer)
                targets = self._forward(float_copy(layer), theirs, masks)
                if index < len(self.found.errors):
                    layer.load_state_dict(load_tensors(self._file(index)))
                else:
                    if stop(longest):
                        return False
                    errors = self._learn(index, layer, own, targets, masks)
                    if errors is None:
                        return False
                    longest = max(longest, time.perf_counter() - started)
                    save_tensors(self._file(index), layer.state_dict())
                    self.found.errors.append(errors)
                    self.found.seconds += time.perf_counter() - started
                    self._save()
                    say(f"layer {index:>3}/{len(layers)}  error {errors[0]:.4f} rounded, {errors[1]:.4f} with codes of "
                        f"least squares, {errors[2]:.4f} learned")  # fmt: skip
                own, theirs = self._forward(layer, own, masks), targets
        rounded, fitted, learned = (sum(column) / len(layers) for column in zip(*self.found.errors, strict=True))
        say(f"layers    mean error {rounded:.4f} rounded, {fitted:.4f} with codes of least squares, {learned:.4f} "
            f"learned, in {self.found.seconds:.0f} s")  # fmt: skip
        return True

    def _save(self) -> None:
        write_atomic(self.trainer.folder / STATE, json.dumps(asdict(self.found)))

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:03}.safetensors"

    def remove(self) -> None:
        """The files of the layers, once a checkpoint holds them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sequences(self) -> tuple[Tensor, Tensor | None]:
        """Ids int64 `[B, T]` of the training data's first `layer_tokens` tokens, and masks bool `[B, 1, T, T]`."""
        feed, batches, masks = self.trainer.feed, list[Tensor](), list[Tensor]()
        wanted = max(2, self.config.layer_tokens // self.config.window)
        while sum(map(len, batches)) < wanted:
            ids, _, *documents = (tensor.to(self.trainer.device) for tensor in feed.batch(len(batches)))
            if not documents and feed.document_ids:
                documents = [feed.document_ids(ids)]
            batches.append(ids)
            masks += [document_mask(each) for each in documents]
        return torch.cat(batches)[:wanted], torch.cat(masks)[:wanted] if masks else None

    def _parts(self, start: int, end: int) -> list[slice]:
        """As many sequences at once as a step has: the weights are quantized again for each part."""
        return [slice(i, min(i + self.rows, end)) for i in range(start, end, self.rows)]

    @torch.no_grad()
    def _forward(self, layer: DecoderLayer, inputs: Tensor, masks: Tensor | None) -> Tensor:
        """What a layer makes of hidden states `[B, T, C]`."""
        outputs = torch.empty_like(inputs)
        for part in self._parts(0, len(inputs)):
            outputs[part] = self._call(layer, inputs, masks, part)
        return outputs

    def _call(self, layer: DecoderLayer, inputs: Tensor, masks: Tensor | None, chosen: slice | list[int]) -> Tensor:
        decoder, T, dtype = self.model.model, inputs.shape[1], self.trainer.dtype
        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
            mask = None if masks is None else masks[chosen]
            return layer(inputs[chosen], decoder.cos[:T], decoder.sin[:T], None, mask)

    def _learn(
        self, index: int, layer: DecoderLayer, inputs: Tensor, targets: Tensor, masks: Tensor | None
    ) -> tuple[float, float, float] | None:
        """Codes, then steps; returns the errors on the held-out sequences, None where the run is to stop."""
        cut = len(inputs) - max(1, len(inputs) // 5)

        @torch.no_grad()
        def error() -> float:
            return sum(
                float(relative_error(self._call(layer, inputs, masks, part), targets[part])) * len(targets[part])
                for part in self._parts(cut, len(inputs))
            ) / (len(inputs) - cut)

        quantize_products(layer)
        best, kept = error(), state_of(layer)
        rounded = best
        if self.config.model.quantizer in TERNARY_QUANTIZERS:
            self._fit_codes(layer, inputs, targets, masks, cut)
        fitted = error()
        if fitted < best:
            best, kept = fitted, state_of(layer)
        else:
            layer.load_state_dict(kept)
        optimizer = layer_optimizer(layer, self.config.layer_rate)
        order = list[int]()
        generator = torch.Generator().manual_seed((self.config.seed * 100_003 + index) % 2**63)
        steps = self.config.layer_steps
        for step in range(steps):
            if self.trainer.stop_signal is not None:
                return None
            if len(order) < self.rows:
                order += torch.randperm(cut, generator=generator).tolist()
            chosen, order = order[: self.rows], order[self.rows :]
            with compiled():  # the shapes of the steps that follow
                given = self._call(layer, inputs, masks, chosen)
            relative_error(given, targets[chosen]).backward()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1 - step / steps) * min(1.0, (step + 1) / 5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        learned = error()
        if not learned <= best:  # NaN too
            layer.load_state_dict(kept)
            learned = best
        return rounded, fitted, learned

    @torch.no_grad()
    def _fit_codes(
        self, layer: DecoderLayer, inputs: Tensor, targets: Tensor, masks: Tensor | None, count: int
    ) -> None:
        """Latents whose codes and scales are near the weights by what they do to the layer's activations, of the first
        `count` sequences.

        A token counts as it does in the error, by 1 / |t|^2: pretrained models have a few with states thousands of
        times larger, which would be all that the codes suit.
        """
        quantizer = self.config.model.quantizer
        few = min(count, max(1, HESSIAN_TOKENS // self.config.window))
        for names in STAGES:
            # Anew for each stage: its inputs depend on the projections that were just quantized.
            first = projection(layer, names[0])
            seen = HessianSum(first.in_features, inputs.device)
            for part in self._parts(0, few):
                hidden = self._input_of(first, layer, inputs, masks, part)
                seen.update(hidden / targets[part].float().norm(dim=-1, keepdim=True).clamp(min=1e-6))
            hessian = seen.matrix()
            for name in names:
                fit(projection(layer, name), hessian, GROUP_SIZES.get(quantizer, 0))

    def _input_of(
        self, linear: nn.Linear, layer: DecoderLayer, inputs: Tensor, masks: Tensor | None, part: slice
    ) -> Tensor:
        """What reaches a projection; nothing behind it is computed."""
        found: list[Tensor] = []

        def end(_: nn.Module, arguments: tuple[Tensor]) -> None:
            found.append(arguments[0])
            raise _ReachedError

        with linear.register_forward_pre_hook(end), contextlib.suppress(_ReachedError):
            self._call(layer, inputs, masks, part)
        return found[0]


class _ReachedError(Exception):
    """A layer ends at a projection whose input was asked for."""


def fit(linear: nn.Linear, hessian: Tensor, group_size: int) -> None:
    """Latents of codes that suit the inputs of a projection: GPTQ's, or those of least squares where the groups are no
    whole ones (0: the matrix is one)."""
    if group_size and linear.in_features % group_size == 0:
        found = gptq_quantize(
            linear.weight, hessian, TERNARY, group_size=group_size, damping=DAMPING, sweeps=1, rounds=1
        )
        codes, scale = found.codes.float() - 1, found.scale.float().clamp(min=FLOAT16_TINY)
    else:
        codes, scale = least_squares_codes(linear.weight, hessian.diagonal(), group_size)
    linear.weight.copy_(nearby_latent(linear.weight, codes, scale, group_size))


def least_squares_codes(weight: Tensor, importance: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Ternary codes float32 `[N, K]` and scales with the least sum of importance (w - code * scale)^2, `importance`
    float `[K]`: float32 `[N, ceil(K / group_size)]` in groups, or `[1, 1]` of the whole matrix (group_size 0)."""
    w, h = grouped(weight.float(), group_size), grouped(importance.float().expand_as(weight), group_size)
    mean = w.abs().mean(-1, keepdim=True)
    best, scale = torch.full_like(mean, torch.inf), mean.clone()
    for factor in torch.linspace(0.8, 3.2, 25).tolist():
        wanted = (mean * factor).clamp(min=FLOAT16_TINY)
        codes = (w / wanted).round().clamp(-1, 1)
        hc = h * codes
        # The scale that suits these codes best.
        wanted = torch.where(hc.any(-1, keepdim=True), (hc * w).sum(-1, keepdim=True)
                             / (hc * codes).sum(-1, keepdim=True).clamp(min=1e-30), wanted)  # fmt: skip
        wanted = wanted.half().float().clamp(min=FLOAT16_TINY) if group_size else wanted
        error = (h * (w - (w / wanted).round().clamp(-1, 1) * wanted).square()).sum(-1, keepdim=True)
        scale, best = torch.where(error < best, wanted, scale), torch.minimum(error, best)
    codes = (w / scale).round().clamp(-1, 1)
    return codes.flatten(1)[:, : weight.shape[1]] if group_size else codes.view_as(weight), scale.flatten(1)


def grouped(values: Tensor, group_size: int) -> Tensor:
    """`[N, K]` as `[N, G, group_size]`, zeros behind a last group that is shorter; or as `[1, 1, N K]`."""
    if not group_size:
        return values.reshape(1, 1, -1)
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % group_size))
    return padded.view(len(values), -1, group_size)


def nearby_latent(weight: Tensor, codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Latents float32 `[N, K]` of which absmean makes these codes and scales, as near to the weights as their order
    allows.

    Absmean's scale is the mean magnitude and its border half of that. Weights whose code is 0 stay, cut off below the
    border; what the others have above it is multiplied by the number that brings the mean to the scale, so that the
    nearer one was to the border, the nearer it is. Groups without codes become 0, which is what they stand for.
    """
    c, w = grouped(codes.float(), group_size), grouped(weight.float(), group_size)
    wide = grouped(torch.ones_like(weight, dtype=torch.float32), group_size)  # 0 behind the end of a row
    s = scale.float().view(*c.shape[:-1], 1)
    zeros = w.clamp(-BORDER[0] * s, BORDER[0] * s) * (c == 0)
    above = (w * c - BORDER[1] * s).clamp(min=0) * c.abs()
    count = c.abs().sum(-1, keepdim=True)
    room = (s * wide.sum(-1, keepdim=True) - zeros.abs().sum(-1, keepdim=True) - BORDER[1] * s * count).clamp(min=0)
    total = above.sum(-1, keepdim=True)
    enough = total > 1e-3 * room
    above = torch.where(enough, above * (room / total.clamp(min=1e-30)), room / count.clamp(min=1) * c.abs())
    latent = torch.where(count > 0, zeros + c * (BORDER[1] * s + above), 0.0)
    return latent.flatten(1)[:, : weight.shape[1]] if group_size else latent.view_as(weight)


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of log(1 + |y - t|^2 / |t|^2), of hidden states `[B, T, C]`: a norm comes next, so that every
    token counts as much, even those whose states are thousands of times larger. The logarithm is for the one in a
    thousand that is made so large by mistake, whose square would be the whole mean."""
    difference = (y.float() - target.float()).square().sum(-1)
    return (difference / target.float().square().sum(-1).clamp(min=1e-12)).log1p().mean()


def quantize_products(layer: DecoderLayer) -> None:
    """Full strength of the quantizers in every projection."""
    for _, linear in bit_linears(layer):
        linear.product = kernels.training_product(linear.product, linear.weight, linear.quantizer, 1.0, int8=False)


def float_copy(layer: DecoderLayer) -> DecoderLayer:
    """The layer with float products, which stays when the layer learns."""
    copied = copy.deepcopy(layer).requires_grad_(False)
    for _, linear in bit_linears(copied):
        linear.product = kernels.float_linear
    return copied


def state_of(layer: DecoderLayer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def layer_optimizer(layer: DecoderLayer, rate: float) -> torch.optim.Optimizer:
    """AdamW whose steps are a share of each tensor's mean magnitude."""
    groups = []
    for parameter in layer.parameters():
        share = rate if parameter.ndim == 2 else rate * NORM_RATE
        peak = share * float(parameter.detach().abs().mean()) or share
        groups.append({"params": [parameter], "lr": peak, "peak_lr": peak})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
