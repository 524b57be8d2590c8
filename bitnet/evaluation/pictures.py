"""The pictures of a comparison: quality against size and speed, errors by layer, distributions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitnet import kernels, plots
from bitnet.evaluation.table import Distribution, Quantized, Row
from bitnet.kernels import blocks
from bitnet.model import BitNetForCausalLM
from bitnet.model.transformer import DecoderLayer
from bitnet.model.weight_only import nominal_bits
from bitnet.quant import PerTensor, PerToken, choose_qparams_symmetric, fake_quantize
from bitnet.quant.nf4 import dequantize_nf4, quantize_nf4

NF4_BLOCK = 64
BINS = 120
MOST_LEVELS = 40


def draw_table(rows: Sequence[Row], folder: Path) -> None:
    """size.png, speed.png and layers.png of what was measured."""
    _draw_quality(rows, "file_mb", folder / "size.png", xlabel="file, MB", title="Perplexity against size on disk")
    _draw_quality(
        rows, "decode", folder / "speed.png", xlabel="decode, tokens/s", title="Perplexity against decode speed"
    )
    errors = {row.name: row.layer_errors for row in rows if row.layer_errors}
    if errors:
        title = "Relative error of the residual stream behind each layer"
        plots.draw_layers(errors, folder / "layers.png", title=title)


def _draw_quality(rows: Sequence[Row], column: str, path: Path, *, xlabel: str, title: str) -> None:
    points = []
    for row in rows:
        if x := getattr(row, column):
            error = row.perplexity * row.gap_error
            hollow = row.kernel == "dequantizes"
            points.append(plots.Point(row.name, row.family, x, row.perplexity, error, hollow=hollow))
    if points:
        title += " (bars: standard error of the difference to the float model; hollow: dequantizes)"
        plots.draw_scatter(points, path, xlabel=xlabel, title=title, lower_is_better=column == "file_mb")


def draw_distributions(model: BitNetForCausalLM, ids: Tensor, folder: Path) -> list[Distribution]:
    """weights.png and activations.png: one layer's weights and the input of its last product for ids int64 `[1, T]`,
    before and after quantizers of each kind; and the same as numbers."""
    layer = model.model.layers[len(model.model.layers) // 2]
    assert isinstance(layer, DecoderLayer)
    inputs: list[Tensor] = []
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.inference_mode():
        model(ids)
    hook.remove()
    return [
        _draw_weights(layer.mlp.gate_proj.weight.detach().float(), folder / "weights.png"),
        _draw_activations(inputs[0].float()[0], folder / "activations.png"),
    ]


def distribution(tensor: str, before: Tensor, after: Mapping[str, Tensor], notes: Mapping[str, str]) -> Distribution:
    """A tensor's values, and what quantizers made of them, as histograms; `after` holds dequantized values."""
    values = plots.sample_values(before).float()
    limit = (float(values.abs().quantile(0.999)) or float(values.abs().max()) or 1.0) * 1.4

    def counted(x: Tensor) -> list[int]:
        return [int(count) for count in torch.histc(x, BINS, -limit, limit)]

    quantized = []
    for name, found in after.items():
        flat = plots.sample_values(found).float()
        levels, counts = flat.unique(return_counts=True)
        few = len(levels) <= MOST_LEVELS
        pairs = list(zip(levels.tolist(), (counts / len(flat)).tolist(), strict=True)) if few else []
        zeros = float((flat == 0).float().mean())
        quantized.append(Quantized(name, notes.get(name, ""), zeros, pairs, [] if few else counted(flat)))
    return Distribution(tensor, -limit, limit, counted(values), quantized)


def _draw_weights(weight: Tensor, path: Path) -> Distribution:
    codes = {name: kernels.quantize_weight(weight, name) for name in ("ternary", "binary", "int4", "int8")}
    after = {name: values * scale for name, (values, scale) in codes.items()}
    levels = {name: len(values.unique()) for name, (values, _) in codes.items()}
    columns = weight.shape[1]
    if columns % NF4_BLOCK == 0:
        after["nf4"], levels["nf4"] = dequantize_nf4(quantize_nf4(weight, block_size=NF4_BLOCK)), 16
    # The first type whose blocks fill the rows.
    for kind in [kind for kind in ("Q2_K", "Q4_0") if columns % blocks.TYPES[kind].block_size == 0][:1]:
        after[kind] = blocks.dequantize(blocks.quantize(weight, kind), kind)
        levels[kind] = 2 ** int(nominal_bits(kind))
    notes = {
        name: f"{levels[name]} levels a scale, {float((values == 0).float().mean()):.1%} zeros"
        for name, values in after.items()
    }
    title = "gate_proj of the middle layer: float weights (grey) and what quantizers make of them (red)"
    samples = {name: plots.sample_values(values) for name, values in after.items()}
    plots.draw_histograms(plots.sample_values(weight), samples, path, title=title, notes=notes)
    return distribution("weights: gate_proj of the middle layer", weight, after, notes)


def _draw_activations(x: Tensor, path: Path) -> Distribution:
    after = {
        "int8 per token": fake_quantize(x, choose_qparams_symmetric(x, 8, PerToken()), None, -128, 127),
        "int8 per tensor": fake_quantize(x, choose_qparams_symmetric(x, 8, PerTensor()), None, -128, 127),
        "int4 per token": fake_quantize(x, choose_qparams_symmetric(x, 4, PerToken()), None, -8, 7),
    }
    title = "input of down_proj in the middle layer: float (grey) and quantized (red), logarithmic"
    samples = {name: plots.sample_values(values) for name, values in after.items()}
    plots.draw_histograms(plots.sample_values(x), samples, path, title=title, log=True)
    return distribution("activations: input of down_proj in the middle layer", x, after, {})
