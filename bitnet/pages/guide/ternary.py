"""BitNet: BitLinear in five steps, what sign and absmean keep of the weights, and a product of additions alone."""

from typing import Any

import torch
from torch import Tensor

from bitnet import plots
from bitnet.pages.figure import COLORS, figure
from bitnet.pages.guide.subject import VECTOR, Subject
from bitnet.pages.guide.worked import text
from bitnet.pages.page import Section, caption, escape, frames, paragraph, side_by_side, slip, table
from bitnet.quant.affine import PerToken, integer_range, quantize_symmetric
from bitnet.quant.ternary import quantize_binary, quantize_ternary

EXAMPLE = (
    (0.61, -0.42, 0.08, 0.35, -0.73, 0.12, 0.54),
    (-0.17, 0.66, -0.58, 0.02, 0.31, -0.44, -0.09),
    (0.05, -0.29, 0.77, -0.63, 0.19, 0.48, -0.36),
)
"""Latent weights that the guide's vector goes through."""
OUTPUTS = 3
CHANNELS = 8
TERMS = 12
QUANTIZERS = {"absmean (b1.58)": quantize_ternary, "sign (1-bit)": quantize_binary}


def section(subject: Subject) -> Section:
    """The five steps, the histograms, and the product."""
    vector, example = torch.tensor(VECTOR), torch.tensor(EXAMPLE)
    token = subject.inputs[0, -1]
    body = paragraph(
        "A BitLinear layer keeps float weights while it is trained, and multiplies with what is left of them: -1, 0 "
        "and 1, or only -1 and 1 in the first BitNet."
    )
    body += slip(
        "The weights during training are latent floats and not INT8, and b1.58 scales activations into [-127, 127], "
        "the paper's [-Q_b, Q_b]."
    )
    body += "<h3>BitLinear in five steps</h3>" + side_by_side(
        _steps("The guide's vector, through three outputs", vector, example, "vector"),
        _steps(f"A token through {subject.layer}", token, subject.weight, "layer"),
    )
    body += "<h3>What sign and absmean keep</h3>" + side_by_side(_kept_vector(), _kept_layer(subject))
    body += "<h3>The product: add, skip, subtract</h3>" + side_by_side(
        _product("The guide's vector", vector, example[0], "add-vector"),
        _product(
            f"The first {TERMS} channels of {subject.layer}", token[:TERMS], subject.weight[0, :TERMS], "add-layer",
            quantize_ternary(subject.weight),
        ),
    )  # fmt: skip
    return Section("bitnet", "BitNet: what is left is a sign", body)


def bit_linear(x: Tensor, weight: Tensor) -> list[tuple[str, Tensor, float | None]]:
    """The five steps of a token `[K]` through a weight `[N, K]` in BitNet b1.58: name, result and scale of each."""
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:])
    codes, gamma = quantize_ternary(weight)
    integers, scale = quantize_symmetric(normed[None], 8, PerToken())
    product = integers.int() @ codes.int().t()
    return [
        ("1. Norm: the token, divided by its root mean square", normed, None),
        ("2. Weights: divided by their mean magnitude, rounded to -1, 0, 1", codes, float(gamma)),
        ("3. Activations: absmax to [-127, 127]", integers[0], float(scale)),
        ("4. Product: sums of integers, exact", product[0], None),
        ("5. Rescaled by both scales", product[0] * scale[0] * gamma, None),
    ]


def _steps(name: str, x: Tensor, weight: Tensor, anchor: str) -> str:
    shown = min(CHANNELS, len(x))
    rest = f" The first {shown} of {len(x)} channels and {OUTPUTS} of {len(weight)} outputs." if len(x) > shown else ""
    entries = []
    steps = bit_linear(x, weight)
    for index, (title, result, scale) in enumerate(steps):
        rows = result[:OUTPUTS] if result.ndim == 2 else result[None]
        count = OUTPUTS if index >= 3 else shown
        names = [f"output {i + 1}" for i in range(len(rows))] if result.ndim == 2 else ["token"]
        cells = [
            [label, *(text(float(value)) if row.is_floating_point() else int(value) for value in row[:count])]
            for label, row in zip(names, rows, strict=True)
        ]
        heads = ["of", *(f"{'out' if index >= 3 else 'in'} {i + 1}" for i in range(len(cells[0]) - 1))]
        note = f"scale {scale:.6g}" if scale is not None else ""
        if index == 4:
            exact = steps[0][1] @ weight.t()
            cells.append(["float weights give", *(text(float(value)) for value in exact[:count])])
            note = f"relative difference to the float layer {float((result - exact).norm() / exact.norm()):.1%}"
        entries.append((title, table(heads, cells, title=note or "no scale") if cells else ""))
    return f"<p><strong>{escape(name)}.</strong>{rest}</p>" + frames(f"steps-{anchor}", "Step", entries, play=True)


def _kept_vector() -> str:
    x = torch.tensor(VECTOR)
    rows = [[text(value)] for value in VECTOR]
    heads = ["value"]
    for name, quantizer in QUANTIZERS.items():
        codes, scale = quantizer(x[None])
        heads += [name, "times its scale"]
        for row, code in zip(rows, codes[0].tolist(), strict=True):
            row += [f"{code:+d}" if code else "0", text(code * float(scale))]
    scales = ", ".join(f"{name} {float(quantizer(x[None])[1]):.3f}" for name, quantizer in QUANTIZERS.items())
    return "<p><strong>The guide's vector</strong></p>" + table(heads, rows, title=f"Scales: {scales}")


def _kept_layer(subject: Subject) -> str:
    values = plots.sample_values(subject.weight)
    limit = float(values.abs().quantile(0.999)) * 1.3 or 1.0
    counts = torch.histc(values, 120, -limit, limit).tolist()
    edges = torch.linspace(-limit, limit, 121).tolist()
    entries = []
    for name, quantizer in QUANTIZERS.items():
        codes, scale = quantizer(subject.weight)
        gamma = float(scale)
        borders = [-gamma / 2, gamma / 2] if codes.eq(0).any() else [float(subject.weight.mean())]
        shares = {level: float((codes == level).float().mean()) for level in sorted(set(codes.flatten().tolist()))}

        def paint(
            axes: Any, gamma: float = gamma, borders: list[float] = borders, shares: dict[int, float] = shares
        ) -> None:
            axes.stairs(counts, edges, fill=True, color=COLORS["line"])
            for border in borders:
                axes.axvline(border, color=COLORS["soft"], ls=":", lw=1.2)
            twin = axes.twinx()
            twin.vlines([level * gamma for level in shares], 0, list(shares.values()), color=COLORS["c1"], lw=3)
            for level, share in shares.items():
                twin.annotate(f"{share:.0%}", (level * gamma, share), (0, 3), textcoords="offset points", ha="center")
            twin.set(ylim=(0, 1.25 * max(shares.values())), yticks=[])
            axes.set(xlim=(-limit, limit), yticks=[], xlabel="weight")

        listed = ", ".join(f"{level} {share:.1%}" for level, share in shares.items())
        picture = figure(paint, f"Weights of {subject.layer} by {name}: {listed}", size=(5, 2.8))
        note = (
            f"Scale {gamma:.5f}; {listed}. Dotted: where a weight changes sides. Red: each level as high as its share."
        )
        entries.append((name, caption(picture, note)))
    return f"<p><strong>{escape(subject.layer)}</strong></p>" + frames("kept", "Quantizer", entries)


def _product(name: str, x: Tensor, weight: Tensor, anchor: str, quantized: tuple[Tensor, Tensor] | None = None) -> str:
    """One output, a term at a time. quantized: codes and scale of the whole weight that the row belongs to."""
    codes, gamma = quantized or quantize_ternary(weight[None])
    signs = codes[0, : len(x)].tolist()
    integers, scale = quantize_symmetric(x[None], 8, PerToken())
    values = integers[0].tolist()
    assert integer_range(8, restricted=True)[1] >= max(map(abs, values))
    total, entries, terms = 0, [], []
    for index, (sign, value) in enumerate(zip(signs, values, strict=True)):
        total += sign * value
        kind, shown = {1: ("add", f"+ {value}"), -1: ("take", f"− {value}"), 0: ("none", f"{value}")}[sign]
        terms.append(f'<span class="term {kind}">{shown}</span>')
        word = {1: "add", -1: "subtract", 0: "skip"}[sign]
        line = (
            f"Weight {sign:+d}: {word} {value}. Sum so far: {total}."
            if sign
            else f"Weight 0: skip {value}. Sum so far: {total}."
        )
        entries.append((f"{index + 1} of {len(values)}", f"<p>{' '.join(terms)}</p>{paragraph(line)}"))
    adds, takes = signs.count(1), signs.count(-1)
    end = (
        f"{adds} additions, {takes} subtractions, {signs.count(0)} skipped, no multiplication; at the end one, by both "
        f"scales: {total} × {float(scale):.5g} × {float(gamma):.5g} = {total * float(scale) * float(gamma):.5g}."
    )
    return f"<p><strong>{escape(name)}</strong></p>" + frames(anchor, "Channel", entries, play=True) + paragraph(end)
