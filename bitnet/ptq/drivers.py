"""Post-training quantization of a whole float model, by name.

    model = quantize_model(model, "gptq-4", calibration_ids)

The projections are quantized; embedding, head and norms stay float, but in the GGUF mixtures and the 16-bit formats.
Calibrated methods go through the model block by block. For GPTQ each block is calibrated on the quantized output of the
earlier ones, and within a block in the order of the computation (q k v, o, gate up, down), each on the quantized output
of the one before ("true sequential"). The others are calibrated on the float model.

A quantized model is saved as its state_dict and `describe_quantized`, plain JSON, from which `build_quantized` makes
the model again.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM
from bitnet.model.linear import PackedEmbedding, PackedLinear
from bitnet.model.quantized import StaticInt8Linear, replace_module
from bitnet.model.transformer import DecoderLayer
from bitnet.model.weight_only import BlockEmbedding, BlockLinear, FloatEmbedding, FloatLinear, GroupLinear, NF4Linear
from bitnet.ptq.methods import (
    METHODS,
    MIXTURES,
    NF4_BLOCK,
    Options,
    check_ids,
    check_options,
    float_projections,
    named_projections,
)
from bitnet.ptq.walk import STAGES, Maxima, MeanSquares, Moments, fold, progress_bar, projection, walk
from bitnet.quant import PerTensor
from bitnet.quant.awq import awq_scale, clip_quantize
from bitnet.quant.blocks import TYPES as BLOCKS
from bitnet.quant.blocks import mixtures
from bitnet.quant.calibration import Observer, calibrate
from bitnet.quant.gptq import gptq_quantize
from bitnet.quant.grouped import TERNARY, Grid, QuantizedWeight, round_to_nearest
from bitnet.quant.smoothquant import smooth_scale
from bitnet.storage.gguf.names import projection_names, table_names

GGUF_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    linears = float_projections(model)
    if METHODS[method].needs_calibration or (calibration_ids is not None and method.startswith("gguf")):
        check_ids(model, method, calibration_ids)
    check_options(method, chosen, linears)
    with torch.no_grad():
        _DRIVERS[method.partition("-")[0]](model.eval(), method, calibration_ids, chosen)
        _convert_embeddings(model, {"fp16": "float16", "bf16": "bfloat16"}.get(method, chosen.embeddings))
    return model


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

    for name, linear in _progress(list(named_projections(model)), method, options):
        replace_module(model, name, convert(linear))


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
        replace_module(model, name, module)


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
            replace_module(layer, name, _group_linear(linear, quantized, options, ternary=grid.ternary))

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
                replace_module(layer, name, module)


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
                replace_module(layer, name, StaticInt8Linear.from_linear(linear, scale, zero_point))


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
