"""Post-training quantization of a whole float model, by name.

    model = quantize_model(model, "gptq-4", calibration_ids)

The projections are quantized; embedding, head and norms stay float, but in the GGUF mixtures and the 16-bit formats.
Calibrated methods go through the model block by block. For GPTQ each block is calibrated on the quantized output of the
earlier ones, and within a block in the order of the computation (q k v, o, gate up, down), each on the quantized output
of the one before ("true sequential"). The others are calibrated on the float model.

A quantized model is saved as its state_dict and `describe_quantized`, plain JSON, from which `build_quantized` makes
the model again.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.interop.gguf_names import projection_names, table_names
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.linear import BitLinear, PackedEmbedding, PackedLinear
from bitnet.model.quantized import (
    BlockEmbedding,
    BlockLinear,
    FloatEmbedding,
    FloatLinear,
    GroupLinear,
    NF4Linear,
    StaticInt8Linear,
    bits_per_weight,
    build,
    describe,
    nominal_bits,
)
from bitnet.model.transformer import DecoderLayer
from bitnet.model.walk import STAGES, Maxima, MeanSquares, Moments, fold, progress_bar, projection, walk
from bitnet.quant import PerTensor
from bitnet.quant.awq import awq_scale, clip_quantize
from bitnet.quant.blocks import TYPES as BLOCKS
from bitnet.quant.blocks import mixtures
from bitnet.quant.calibration import Observer, calibrate
from bitnet.quant.gptq import gptq_quantize
from bitnet.quant.gptq_layout import TERNARY, Grid, QuantizedWeight, round_to_nearest
from bitnet.quant.smoothquant import smooth_scale

MIN_CALIBRATION_TOKENS = 128
GGUF_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NF4_BLOCK = 64
BLOCK_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "Q3_K", "Q2_K")
MIXTURES = ("Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K_S")


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
    compatible: bool = False
    """gguf: ggml's own bytes instead of the better search."""
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
    **{f"gguf-{name.lower()}": Method(f"GGUF blocks {name}", nominal_bits(name)) for name in BLOCK_TYPES},
    **{
        f"gguf-{name.lower()}": Method(f"GGUF mixture {name}, embedding and head included", nominal_bits(name))
        for name in MIXTURES
    },
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
    if METHODS[method].needs_calibration or (calibration_ids is not None and method.startswith("gguf")):
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


def build_quantized(
    config: ModelConfig, description: dict[str, Any], tensors: Mapping[str, Tensor]
) -> BitNetForCausalLM:
    """The model that `describe_quantized` described, of the state_dict that it had, which it shares. Raises ValueError
    for tensors and modules that do not fit."""
    with torch.device("meta"):
        modules = {name: build(about) for name, about in description["modules"].items()}
    return BitNetForCausalLM.from_tensors(config, tensors, modules)


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

    for name, linear in _progress(list(_projections(model)), method, options):
        _replace(model, name, convert(linear))


def _gguf(model: BitNetForCausalLM, method: str, ids: Tensor | None, options: Options) -> None:
    importance: dict[str, Tensor] = {}
    if ids is not None:
        for number, (_, run) in enumerate(_walk(model, ids, "importance", options, sequential=False)):
            for names, seen in run(STAGES, MeanSquares).items():
                importance |= {f"model.layers.{number}.{name}": seen.mean() for name in names}
    for name, kind in _progress(list(_gguf_types(model, method).items()), method, options):
        matrix = model.get_submodule(name)
        if isinstance(matrix, nn.Embedding):
            module: nn.Module = _table(matrix, kind, options.compatible)
        elif kind in GGUF_FLOATS:
            module = FloatLinear.from_linear(projection(model, name), GGUF_FLOATS[kind])
        else:
            module = BlockLinear.from_linear(
                projection(model, name), kind, importance.get(name), compatible=options.compatible
            )
        _replace(model, name, module)


def _gguf_types(model: BitNetForCausalLM, method: str) -> dict[str, str]:
    """The type of each projection and, in a mixture, of embedding and head, by our names of the modules."""
    kind = method.removeprefix("gguf-").upper()
    config = model.config
    if kind not in MIXTURES:
        return {ours: kind for ours, _ in projection_names(config)}
    shapes, names = config.tensor_shapes(), [*projection_names(config), *table_names(config)]
    types = mixtures.tensor_types(kind, {f"{theirs}.weight": shapes[f"{ours}.weight"] for ours, theirs in names})
    return {ours: types[f"{theirs}.weight"] for ours, theirs in names}


def _gptq(model: BitNetForCausalLM, method: str, ids: Tensor, options: Options) -> None:
    grid = TERNARY if method == "gptq-ternary" else Grid(int(METHODS[method].bits), options.symmetric)

    def quantize(layer: DecoderLayer, names: tuple[str, ...], statistics: "Moments") -> None:
        hessian = statistics.hessian.matrix()
        for name in names:
            linear = projection(layer, name)
            quantized = gptq_quantize(
                linear.weight, hessian, grid, group_size=options.group_size, damping=options.damping,
                act_order=options.act_order, algorithm=options.algorithm,
            )  # fmt: skip
            _replace(layer, name, _group_linear(linear, quantized, options, ternary=grid.ternary))

    for layer, run in _walk(model, ids, method, options):
        for names in STAGES:
            statistics = run([names], Moments)
            quantize(layer, names, statistics[names])


def _awq(model: BitNetForCausalLM, method: str, ids: Tensor, options: Options) -> None:
    grid = Grid(4, options.symmetric)
    for layer, run in _walk(model, ids, method, options, sequential=False):
        statistics = run(STAGES, Moments)
        hessians, input_scales = {}, {}
        for names in STAGES:
            linears = [projection(layer, name) for name in names]
            seen = statistics[names]
            hessian = seen.hessian.matrix()
            weights = [linear.weight for linear in linears]
            scale, _ = awq_scale(weights, seen.magnitude(), hessian, grid, options.group_size)
            input_scales[names] = None if fold(layer, names, scale) else scale
            for linear in linears:
                linear.weight.mul_(scale)
            hessians[names] = hessian / torch.outer(scale, scale)
        for names in STAGES:
            for name in names:
                linear = projection(layer, name)
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
            statistics = run(STAGES, Maxima)
            for names in STAGES:
                linears = [projection(layer, name) for name in names]
                scale = smooth_scale([linear.weight for linear in linears], statistics[names].absmax, options.alpha)
                if fold(layer, names, scale):
                    for linear in linears:
                        linear.weight.mul_(scale)
        if options.activations == "dynamic":
            return _simple(model, "w8a8-dynamic", ids, options)
    for layer, run in _walk(model, ids, method, options, sequential=False):
        for names, observer in run(STAGES, _histogram).items():
            scale, zero_point = calibrate(observer, options.calibration, symmetric=False)
            for name in names:
                linear = projection(layer, name)
                _replace(layer, name, StaticInt8Linear.from_linear(linear, scale, zero_point))


_DRIVERS: dict[str, Callable[..., None]] = {
    "fp16": _simple, "bf16": _simple, "fp8": _simple, "nf4": _simple, "rtn": _simple, "w4a8": _simple, "gptq": _gptq,
    "awq": _awq, "smoothquant": _static, "gguf": _gguf,
    "w8a8": lambda model, method, ids, options: (_static if method == "w8a8-static" else _simple)(
        model, method, ids, options
    ),
}  # fmt: skip


def _walk(model: BitNetForCausalLM, ids: Tensor, title: str, options: Options, *, sequential: bool = True) -> Any:
    return walk(model, ids, title, options.batch_size, options.progress, sequential=sequential)


def _progress(items: list[Any], title: str, options: Options) -> Any:
    return progress_bar(items, title, options.progress)


def _histogram(in_features: int, device: torch.device) -> Observer:
    return Observer(PerTensor())


def _group_linear(linear: Any, quantized: QuantizedWeight, options: Options, **more: Any) -> GroupLinear:
    return GroupLinear.from_quantized(quantized, linear.bias, version=options.version, **more)


def _convert_embeddings(model: BitNetForCausalLM, dtype: str) -> None:
    table = model.model.embed_tokens
    if dtype == "float32" or not isinstance(table, nn.Embedding):
        return
    if dtype == "int8":
        model.model.embed_tokens = PackedEmbedding.from_weight(table.weight)
        head: nn.Module | None = model.lm_head and PackedLinear.from_linear(model.lm_head, "int8")
    else:
        model.model.embed_tokens = _table(table, dtype)
        head = model.lm_head and FloatLinear.from_linear(model.lm_head, dtype)
    model.lm_head = head


def _table(table: nn.Embedding, kind: str, compatible: bool = False) -> nn.Module:
    """An embedding in a block type, or a float by our name or GGUF's."""
    matrix = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False, device="meta").eval()
    matrix.weight = table.weight
    if kind in BLOCKS:
        return BlockEmbedding.from_linear(matrix, kind, compatible=compatible)
    return FloatEmbedding.from_linear(matrix, GGUF_FLOATS.get(kind, kind))


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
    if method.startswith("gguf") and (kind := method.removeprefix("gguf-").upper()) in BLOCKS:
        size = BLOCKS[kind].block_size
        if odd := [name for name, linear in linears if linear.in_features % size]:
            raise ValueError(f"{kind} has blocks of {size}, which do not divide the input channels of {odd[0]}")
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


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
