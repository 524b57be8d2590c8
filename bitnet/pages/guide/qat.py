"""Training that knows of rounding: fake quantization, the straight-through gradient, and the minima that it finds."""

from typing import Any

import torch
from torch import Tensor

from bitnet import kernels
from bitnet.evaluation.pictures import distribution
from bitnet.pages.figure import COLORS, figure
from bitnet.pages.guide.minima import Minima
from bitnet.pages.guide.subject import VECTOR, Subject
from bitnet.pages.guide.worked import text
from bitnet.pages.histogram import histogram
from bitnet.pages.page import Section, caption, escape, frames, paragraph, side_by_side, table
from bitnet.quant.affine import PerTensor, choose_qparams_symmetric, fake_quantize_ste, integer_range

BITS = (2, 3, 4, 8)
TELLING = 0.002
"""Nats a token: a smaller difference of two costs says nothing."""
WEIGHT_QUANTIZERS = ("int8", "int4", "ternary", "binary")


def section(subject: Subject, minima: Minima) -> Section:
    """Fake quantization of the guide's vector and of the layer, and the minima."""
    body = paragraph(
        "Quantization-aware training rounds the weights in every forward pass and keeps the floats: fake quantization. "
        "The steps of a rounding have no slope, so the gradient passes as if there were none (straight-through)."
    )
    body += side_by_side(_fake_vector(), _fake_layer(subject))
    body += "<h3>Wide against narrow minima, measured</h3>" + _minima(minima)
    return Section("qat", "Training that knows of rounding", body)


def _fake_vector() -> str:
    x = torch.tensor(VECTOR)
    scale_line = torch.linspace(-1.25 * float(x.abs().max()), 1.25 * float(x.abs().max()), 401)
    entries = []
    for bits in BITS:
        scale = choose_qparams_symmetric(x, bits, PerTensor())
        limits = integer_range(bits, restricted=True)

        def through(values: Tensor, scale: Tensor = scale, limits: tuple[int, int] = limits) -> tuple[Tensor, Tensor]:
            values = values.clone().requires_grad_()
            after = fake_quantize_ste(values, scale, None, *limits)
            after.sum().backward()
            assert values.grad is not None
            return after.detach(), values.grad

        curve, slope = through(scale_line)
        points, gradients = through(x)

        def paint(axes: Any, curve: Tensor = curve, slope: Tensor = slope, points: Tensor = points) -> None:
            axes.plot(scale_line.tolist(), scale_line.tolist(), color=COLORS["line"], lw=1)
            axes.plot(scale_line.tolist(), curve.tolist(), color=COLORS["accent"], lw=1.6, label="forward: rounded")
            axes.plot(scale_line.tolist(), (slope * 4).tolist(), color=COLORS["c1"], lw=1.2, ls="--",
                      label="backward: slope (× 4)")  # fmt: skip
            axes.plot(x.tolist(), points.tolist(), "o", color=COLORS["c2"], ms=5, label="the vector")
            axes.set(xlabel="weight", ylabel="what the layer sees")
            axes.legend(fontsize=8.5, loc="upper left")

        rows = [
            [text(a), text(b), f"{g:g}"]
            for a, b, g in zip(x.tolist(), points.tolist(), gradients.tolist(), strict=True)
        ]
        numbers = table(["weight", "forward", "gradient"], rows, title=f"{bits} bits")
        entries.append((str(bits), figure(paint, f"Fake quantization to {bits} bits", size=(5, 3)) + numbers))
    return "<p><strong>The guide's vector</strong></p>" + frames("fake", "Bits", entries, start=1)


def _fake_layer(subject: Subject) -> str:
    after = {}
    for name in WEIGHT_QUANTIZERS:
        codes, scale = kernels.quantize_weight(subject.weight, name)
        after[name] = codes * scale
    found = distribution(subject.layer, subject.weight, after, {})
    entries = []
    for each in found.after:
        error = float((after[each.name] - subject.weight).norm() / subject.weight.norm())
        note = f"{each.zeros:.1%} zeros, relative error {error:.1%}."
        picture = histogram(
            found, each, f"Weights of {subject.layer} and what {each.name} makes of them: {note}", (5, 2.6)
        )
        shown = caption(picture, f"Grey: the float weights. Red: what the forward pass sees. {note}")
        entries.append((each.name, shown))
    return f"<p><strong>{escape(subject.layer)}</strong></p>" + frames("fake-layer", "Quantizer", entries, start=1)


def _minima(minima: Minima) -> str:
    line = minima.line

    def along(axes: Any) -> None:
        axes.plot(line.at, line.plain, color=COLORS["accent"], lw=1.8, label="weights as they are")
        axes.plot(line.at, line.rounded, color=COLORS["c1"], lw=1.8, ls="--", label=f"rounded to {minima.quantizer}")
        for place, name in ((0.0, "float"), (1.0, "QAT")):
            axes.axvline(place, color=COLORS["soft"], lw=1, ls=":")
            axes.text(place, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        axes.set(xlabel="from the float weights (0) to those of QAT (1)", ylabel="loss, nats a token")
        axes.legend(fontsize=8.5)

    def apart(axes: Any) -> None:
        for (name, way), color, style in zip(minima.ways.items(), ("c2", "c1"), ("-", "--"), strict=True):
            least = way.plain[way.at.index(0.0)]
            axes.plot(way.at, [value - least for value in way.plain], color=COLORS[color], ls=style, lw=1.8, label=name)
        axes.axvline(1, color=COLORS["soft"], lw=1, ls=":")
        axes.text(1, 1.01, "rounded", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        axes.set(xlabel="from the weights (0) to their rounded values (1)", ylabel="loss above that at 0")
        axes.legend(fontsize=8.5)

    costs = {name: minima.cost(name) for name in minima.ways}
    rows = [
        [name, f"{way.plain[way.at.index(0.0)]:.4f}", f"{way.plain[way.at.index(1.0)]:.4f}", f"{costs[name]:+.4f}"]
        for name, way in minima.ways.items()
    ]
    found = "wider" if costs["QAT"] < costs["float"] else "narrower"
    if abs(costs["QAT"] - costs["float"]) < TELLING:
        found = "neither wider nor narrower, as far as these tokens can tell,"
    verdict = (
        f"Rounding costs the float model {costs['float']:+.4f} nats a token and the model that was trained with "
        f"rounding {costs['QAT']:+.4f}: here the minimum that training with rounding found is {found} in the direction "
        "that counts."
    )
    return (
        paragraph(f"Measured on {minima.what}, with weights rounded to {minima.quantizer} and activations in floats.")
        + side_by_side(
            caption(figure(along, "Loss along the line through both models"), "Along the line through both models."),
            caption(
                figure(apart, "Loss on each model's way to its rounded weights"), "On each model's own way to rounding."
            ),
        )
        + table(["model", "loss", "loss rounded", "cost"], rows, title="Loss, nats a token")
        + paragraph(verdict)
    )
