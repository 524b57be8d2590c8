"""Post-training quantization of a whole float model, by name.

    model = quantize_model(model, "gptq-4", calibration_ids)

The projections are quantized; embedding, head and norms stay float, but in the GGUF mixtures and the 16-bit formats.
Calibrated methods go through the model block by block. For GPTQ each block is calibrated on the quantized output of the
earlier ones, and within a block in the order of the computation (q k v, o, gate up, down), each on the quantized output
of the one before ("true sequential"). The others are calibrated on the float model.

A quantized model is saved as its state_dict and `describe_quantized`, plain JSON, from which `build_quantized` makes
the modules to load it into.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.linear import BitLinear, PackedEmbedding, PackedLinear
from bitnet.model.quantized import (
    FloatEmbedding,
    FloatLinear,
    GroupLinear,
    NF4Linear,
    StaticInt8Linear,
    bits_per_weight,
    build,
    describe,
)
from bitnet.model.transformer import DecoderLayer, RMSNorm, rope_tables
from bitnet.quant import PerTensor
from bitnet.quant.awq import awq_scale, clip_quantize
from bitnet.quant.calibration import Observer, calibrate
from bitnet.quant.gptq import HessianSum, gptq_quantize
from bitnet.quant.gptq_layout import TERNARY, Grid, QuantizedWeight, round_to_nearest
from bitnet.quant.smoothquant import smooth_scale

MIN_CALIBRATION_TOKENS = 128
NF4_BLOCK = 64
# Projections that share an input, in the order of the computation.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`."""

    description: str
    bits: float
    """Nominal bits of a weight."""
    needs_calibration: bool = False
    int8_activations: bool = False


@dataclass(frozen=True)
class Options:
    """What `quantize_model` takes beside the method; each concerns the methods it names."""

    group_size: int = 128
    """Input channels that share a scale (rtn, awq, gptq); -1: all of a row."""
    symmetric: bool = False
    """Without zero points (rtn, awq, gptq)."""
    algorithm: str = "refined"
    """gptq: refined or original."""
    damping: float | None = None
    """gptq: share of the Hessian's mean diagonal that is added to it."""
    act_order: bool = True
    """gptq: largest activations first."""
    clip: bool = True
    """awq: search clip ranges."""
    alpha: float = 0.5
    """smoothquant: migration strength."""
    calibration: str = "mse"
    """w8a8-static, smoothquant: minmax, percentile, mse or entropy."""
    activations: str = "static"
    """smoothquant: static, or dynamic (a scale a token)."""
    double_quant: bool = True
    """nf4: scales in 8 bits."""
    embeddings: str = "float32"
    """Embedding and head: float32, float16, bfloat16 or int8; the 16-bit methods take their own type."""
    version: int = 1
    """Convention for zero points in the GPTQ layout (rtn, awq, gptq)."""
    batch_size: int = 8
    """Calibration sequences at a time."""
    progress: bool = True
    """Show a progress bar."""


METHODS: dict[str, Method] = {
    "fp16": Method("16-bit floats", 16),
    "bf16": Method("16-bit brain floats", 16),
    "fp8": Method("FP8 E4M3 weights, a scale a row", 8),
    "nf4": Method("4-bit NormalFloat weights (QLoRA)", 4),
    **{f"rtn-int{b}": Method(f"INT{b} weights in groups, rounded to nearest", b) for b in (8, 4, 3, 2)},
    "w8a8-dynamic": Method("INT8 weights a row, INT8 activations a token", 8, int8_activations=True),
    "w4a8-dynamic": Method("INT4 weights a row, INT8 activations a token", 4, int8_activations=True),
    "w8a8-static": Method("INT8 weights a row, INT8 activations by calibrated scales", 8, True, True),
    "smoothquant": Method("W8A8 with outliers moved into the weights", 8, True, True),
    "awq": Method("INT4 weights in groups, channels scaled by their activations", 4, True),
    **{f"gptq-{b}": Method(f"GPTQ: INT{b} weights in groups", b, True) for b in (8, 4, 3, 2)},
    "gptq-ternary": Method("GPTQ on the ternary grid, in groups", 2, True),
}


def quantize_model(
    model: BitNetForCausalLM, method: str, calibration_ids: Tensor | None = None, **options: Any
) -> BitNetForCausalLM:
    """Quantize a float model in place and return it, in evaluation mode.

    method: a key of `METHODS`; calibration_ids: token ids int64 `[B, T]`, for the methods that need them; options:
    fields of `Options`. Raises ValueError for an unknown method or option, a model that is not float or already
    quantized, a group size that does not divide, NaN weights, and calibration ids that are missing, too few or not ids.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    known = {field.name for field in fields(Options)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"options {', '.join(unknown)} are unknown; there are {', '.join(sorted(known))}")
    chosen = Options(**options)
    linears = _float_projections(model)
    if METHODS[method].needs_calibration:
        _check_ids(model, method, calibration_ids)
    _check_options(method, chosen, linears)
    with torch.no_grad():
        _DRIVERS[method.partition("-")[0]](model.eval(), method, calibration_ids, chosen)
        _convert_embeddings(model, {"fp16": "float16", "bf16": "bfloat16"}.get(method, chosen.embeddings))
    return model


def describe_quantized(model: BitNetForCausalLM, method: str) -> dict[str, Any]:
    """Plain JSON from which `build_quantized` makes the model's modules again: the method's name, and every quantized
    module under its name."""
    named = ((name, describe(module)) for name, module in model.named_modules())
    return {"method": method, "modules": {name: about for name, about in named if about is not None}}


def build_quantized(config: ModelConfig, description: dict[str, Any]) -> BitNetForCausalLM:
    """The model that `describe_quantized` described, without weights: load them with `load_state_dict(tensors,
    assign=True)`. Raises ValueError for modules that the model does not have."""
    with torch.device("meta"):
        model = BitNetForCausalLM(config)
        for name, about in description["modules"].items():
            try:
                model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"the description names {name}, which the model does not have") from None
            _replace(model, name, build(about))
    model.model.cos, model.model.sin = rope_tables(config)
    return model.eval()


def model_bits(model: nn.Module) -> tuple[float, float]:
    """Nominal and effective bits of a projection's weight, averaged over all of them; 32 where they are float32."""
    total, sums = 0, [0.0, 0.0]
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            size = module.in_features * module.out_features
            bits = bits_per_weight(module) or (8.0 * module.weight.element_size(),) * 2
            total += size
            sums = [s + b * size for s, b in zip(sums, bits, strict=True)]
    return sums[0] / total, sums[1] / total


def _simple(model: BitNetForCausalLM, method: str, ids: Tensor | None, options: Options) -> None:
    """The methods that look at one weight at a time."""

    def convert(linear: nn.Linear) -> nn.Module:
        match method:
            case "fp16" | "bf16" | "fp8":
                return FloatLinear.from_linear(linear, {"fp16": "float16", "bf16": "bfloat16", "fp8": "float8"}[method])
            case "nf4":
                return NF4Linear.from_linear(linear, block_size=NF4_BLOCK, double_quant=options.double_quant)
            case "w8a8-dynamic" | "w4a8-dynamic":
                return PackedLinear.from_linear(linear, "int8" if method == "w8a8-dynamic" else "int4")
        grid = Grid(METHODS[method].bits, options.symmetric)  # type: ignore[arg-type]
        return _group_linear(linear, round_to_nearest(linear.weight, grid, options.group_size), options)

    for name, linear in _bar(list(_projections(model)), method, options):
        _replace(model, name, convert(linear))


def _gptq(model: BitNetForCausalLM, method: str, ids: Tensor, options: Options) -> None:
    grid = TERNARY if method == "gptq-ternary" else Grid(int(METHODS[method].bits), options.symmetric)

    def quantize(layer: DecoderLayer, names: tuple[str, ...], statistics: "_Statistics") -> None:
        hessian = statistics.hessian.matrix()
        for name in names:
            linear = _linear(layer, name)
            quantized = gptq_quantize(
                linear.weight, hessian, grid, group_size=options.group_size, damping=options.damping,
                act_order=options.act_order, algorithm=options.algorithm,
            )  # fmt: skip
            _replace(layer, name, _group_linear(linear, quantized, options, ternary=grid.ternary))

    for layer, run in _walk(model, ids, method, options):
        for names in STAGES:
            statistics = run([names], _Statistics)
            quantize(layer, names, statistics[names])


def _awq(model: BitNetForCausalLM, method: str, ids: Tensor, options: Options) -> None:
    grid = Grid(4, options.symmetric)
    for layer, run in _walk(model, ids, method, options, sequential=False):
        statistics = run(STAGES, _Statistics)
        hessians, input_scales = {}, {}
        for names in STAGES:
            linears = [_linear(layer, name) for name in names]
            seen = statistics[names]
            hessian = seen.hessian.matrix()
            weights = [linear.weight for linear in linears]
            scale, _ = awq_scale(weights, seen.magnitude(), hessian, grid, options.group_size)
            input_scales[names] = None if _fold(layer, names, scale) else scale
            for linear in linears:
                linear.weight.mul_(scale)
            hessians[names] = hessian / torch.outer(scale, scale)
        for names in STAGES:
            for name in names:
                linear = _linear(layer, name)
                # The product of queries and keys is too sensitive to their largest values, says the published code.
                if options.clip and name not in ("self_attn.q_proj", "self_attn.k_proj"):
                    quantized = clip_quantize(linear.weight, hessians[names], grid, options.group_size)
                else:
                    quantized = round_to_nearest(linear.weight, grid, options.group_size)
                module = _group_linear(linear, quantized, options, input_scale=input_scales[names])
                _replace(layer, name, module)


def _static(model: BitNetForCausalLM, method: str, ids: Tensor, options: Options) -> None:
    if method == "smoothquant":
        for layer, run in _walk(model, ids, "smoothing", options, sequential=False):
            statistics = run(STAGES, _Maxima)
            for names in STAGES:
                linears = [_linear(layer, name) for name in names]
                scale = smooth_scale([linear.weight for linear in linears], statistics[names].absmax, options.alpha)
                if _fold(layer, names, scale):
                    for linear in linears:
                        linear.weight.mul_(scale)
        if options.activations == "dynamic":
            return _simple(model, "w8a8-dynamic", ids, options)
    for layer, run in _walk(model, ids, method, options, sequential=False):
        for names, observer in run(STAGES, _observer).items():
            scale, zero_point = calibrate(observer, options.calibration, symmetric=False)
            for name in names:
                linear = _linear(layer, name)
                _replace(layer, name, StaticInt8Linear.from_linear(linear, scale, zero_point))


_DRIVERS: dict[str, Callable[..., None]] = {
    "fp16": _simple, "bf16": _simple, "fp8": _simple, "nf4": _simple, "rtn": _simple, "w4a8": _simple, "gptq": _gptq,
    "awq": _awq, "smoothquant": _static,
    "w8a8": lambda model, method, ids, options: (_static if method == "w8a8-static" else _simple)(
        model, method, ids, options
    ),
}  # fmt: skip


class _Statistics:
    """Of a projection's input: the Hessian and the mean magnitude of each channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.hessian = HessianSum(in_features, device)
        self.sum = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        self.hessian.update(x)
        self.sum += x.reshape(-1, x.shape[-1]).float().abs().sum(0)

    def magnitude(self) -> Tensor:
        return (self.sum / self.hessian.tokens).float()


class _Maxima:
    """Of a projection's input: the largest magnitude of each channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.absmax = torch.zeros(in_features, device=device)

    def update(self, x: Tensor) -> None:
        self.absmax = torch.maximum(self.absmax, x.reshape(-1, x.shape[-1]).float().abs().amax(0))


def _observer(in_features: int, device: torch.device) -> Observer:
    return Observer(PerTensor())


def _walk(
    model: BitNetForCausalLM, ids: Tensor, title: str, options: Options, *, sequential: bool = True
) -> Iterator[tuple[DecoderLayer, Callable[..., Any]]]:
    """Each layer, and a function `run(stages, statistic)` that feeds the calibration inputs through it and returns what
    `statistic(in_features, device)` saw before each stage.

    The next layer gets the output of this one as it was left, or with `sequential=False` as it was found.
    """
    decoder = model.model
    batches = ids.to(model.device).split(options.batch_size)
    hidden = [decoder.embed_tokens(batch) for batch in batches]
    cos, sin = decoder.cos[: ids.shape[1]], decoder.sin[: ids.shape[1]]
    for layer in _bar(list(decoder.layers), title, options):
        outputs: list[Tensor] = []

        def forward(layer: nn.Module = layer, inputs: list[Tensor] = hidden) -> list[Tensor]:
            return [layer(h, cos, sin, None) for h in inputs]

        def run(
            stages: Any, statistic: Callable[[int, torch.device], Any], layer: nn.Module = layer,
            forward: Callable[[], list[Tensor]] = forward, outputs: list[Tensor] = outputs,
        ) -> dict[tuple[str, ...], Any]:  # fmt: skip
            seen, hooks = {}, []
            for names in stages:
                first = _linear(layer, names[0])
                seen[names] = statistic(first.in_features, model.device)
                update = seen[names].update
                hooks.append(first.register_forward_pre_hook(lambda _, args, update=update: update(args[0])))
            try:
                outputs[:] = forward()
            finally:
                for hook in hooks:
                    hook.remove()
            return seen

        yield layer, run
        hidden = forward() if sequential else outputs


def _fold(layer: DecoderLayer, names: tuple[str, ...], scale: Tensor) -> bool:
    """Divide what produces the input of these projections by the scale; returns whether there is something that can."""
    attention, mlp = layer.self_attn, layer.mlp
    norm, before = {
        "self_attn.q_proj": (layer.input_layernorm, None),
        "self_attn.o_proj": (attention.attn_sub_norm, attention.v_proj),
        "mlp.gate_proj": (layer.post_attention_layernorm, None),
        "mlp.down_proj": (mlp.ffn_sub_norm, mlp.up_proj),
    }[names[0]]
    if isinstance(norm, RMSNorm):
        norm.weight.div_(scale)
        return True
    if before is None or before.out_features != len(scale):  # several query heads share a row of v_proj
        return False
    before.weight.div_(scale[:, None])
    if before.bias is not None:
        before.bias.div_(scale)
    return True


def _group_linear(linear: Any, quantized: QuantizedWeight, options: Options, **more: Any) -> GroupLinear:
    return GroupLinear.from_quantized(quantized, linear.bias, version=options.version, **more)


def _convert_embeddings(model: BitNetForCausalLM, dtype: str) -> None:
    table = model.model.embed_tokens
    if dtype == "float32" or not isinstance(table, nn.Embedding):
        return
    if dtype == "int8":
        if model.lm_head is not None:
            model.lm_head = PackedLinear.from_linear(model.lm_head, "int8")
        model.model.embed_tokens = PackedEmbedding.from_weight(table.weight)
        return
    columns, rows = table.embedding_dim, table.num_embeddings
    with torch.device("meta"):
        new = FloatEmbedding(columns, rows, dtype=dtype)
    shell = nn.Linear(columns, rows, bias=False, device="meta")
    shell.weight = table.weight
    new.stored = FloatLinear.from_linear(shell, dtype).stored
    model.model.embed_tokens = new.eval()
    if model.lm_head is not None:
        model.lm_head = FloatLinear.from_linear(model.lm_head, dtype)


def _projections(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            yield name, module


def _float_projections(model: BitNetForCausalLM) -> list[tuple[str, Any]]:
    linears = list(_projections(model))
    count = sum(len(names) for names in STAGES) * len(model.model.layers)
    if len(linears) != count or not isinstance(model.model.embed_tokens, nn.Embedding):
        raise ValueError("the model is packed or quantized already; quantize the float model it was made from")
    trained = {linear.quantizer for _, linear in linears} - {"none"}
    if trained:
        raise ValueError(
            f"the model was trained with {', '.join(sorted(trained))} weights, which are quantized by pack(); "
            "post-training quantization takes a float model (quantizer none)"
        )
    return linears


def _check_ids(model: BitNetForCausalLM, method: str, ids: Tensor | None) -> None:
    if ids is None:
        raise ValueError(f"{method} needs calibration text; give calibration_ids, int64 [B, T]")
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"calibration_ids are {ids.dtype} {list(ids.shape)}; give int64 [B, T]")
    if ids.numel() < MIN_CALIBRATION_TOKENS:
        raise ValueError(
            f"the calibration text has {ids.numel()} tokens; give at least {MIN_CALIBRATION_TOKENS}, better 10,000"
        )
    longest, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if ids.shape[1] > longest:
        raise ValueError(f"calibration sequences have {ids.shape[1]} tokens and the model takes {longest}; cut them")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"calibration ids reach {int(ids.max())} and the vocabulary ends at {vocabulary - 1}")
    if method.startswith("gptq") and ids.numel() < model.config.intermediate_size:
        warnings.warn(
            f"{ids.numel()} calibration tokens are fewer than the {model.config.intermediate_size} channels of a "
            "layer, so GPTQ fits noise; give more text",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_options(method: str, options: Options, linears: list[tuple[str, Any]]) -> None:
    """Everything that can be refused before an hour of work."""
    if options.embeddings not in ("float32", "float16", "bfloat16", "int8"):
        raise ValueError(f"embeddings {options.embeddings!r} are unknown; choose float32, float16, bfloat16 or int8")
    if options.activations not in ("static", "dynamic"):
        raise ValueError(f"activations {options.activations!r} are unknown; choose static or dynamic")
    for name, linear in linears:
        if not linear.weight.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite weights; was the model's training diverging?")
    if method == "nf4" and (odd := [name for name, linear in linears if linear.in_features % NF4_BLOCK]):
        raise ValueError(f"NF4 takes blocks of {NF4_BLOCK}, which do not divide the input channels of {odd[0]}")
    if method.partition("-")[0] not in ("rtn", "awq", "gptq"):
        return
    bits = int(METHODS[method].bits)
    for name, linear in linears:
        size = linear.in_features if options.group_size == -1 else options.group_size
        if size < 1 or linear.in_features % size:
            raise ValueError(
                f"group_size {options.group_size} does not divide the {linear.in_features} input channels of {name}; "
                "choose a divisor, or -1 for whole rows"
            )
        step = 32 if bits == 3 else 32 // bits
        if linear.in_features % step or linear.out_features % step:
            raise ValueError(
                f"{name} is {linear.out_features} x {linear.in_features}; the GPTQ layout in {bits} bits wants "
                f"multiples of {step}"
            )


def _bar(items: list[Any], title: str, options: Options) -> Any:
    return tqdm(items, desc=title, leave=False, disable=not options.progress)


def _linear(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(name)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
