"""Calibration: where to cut a histogram, and scales that are known beforehand against scales of the moment."""

from typing import Any

import torch
from torch import Tensor

from bitnet.pages.figure import COLORS, figure
from bitnet.pages.guide.subject import VECTOR, Subject
from bitnet.pages.guide.worked import text
from bitnet.pages.page import Section, caption, escape, frames, paragraph, side_by_side, table
from bitnet.quant.affine import (
    PerTensor,
    PerToken,
    choose_qparams_symmetric,
    fake_quantize,
    integer_range,
    quantization_error,
)
from bitnet.quant.calibration import Observer, calibrate

CUTS = {"minmax": "soft", "percentile": "c2", "mse": "c1", "entropy": "c3"}
"""Methods of calibration, and the color of each."""
PERCENTILES = (90.0, 95.0, 99.0, 99.5, 99.9, 99.99)
BITS = (8, 6, 4, 3)


def section(subject: Subject) -> Section:
    """Cuts by four methods, then dynamic against static activations."""
    generator = torch.Generator().manual_seed(0)
    bell = torch.randn(20_000, generator=generator)
    bell[:40] *= 4  # a few that lie far out, as in activations
    kinds = ((f"{len(bell):,} normal values, 40 of them four times as wide", bell, "bell"),
             (f"What comes into {subject.layer}", subject.inputs.flatten(), "layer"))  # fmt: skip
    body = paragraph(
        "A range that holds every value spends its few integers on values that hardly occur. Calibration cuts it: at a "
        "percentile, where the mean squared error is least, or where the histogram changes least (entropy)."
    )
    body += side_by_side(*(_cuts(name, x, key) for name, x, key in kinds))
    body += "<h3>Percentile: how much may be cut off?</h3>"
    body += side_by_side(*(_percentiles(name, x) for name, x, _ in kinds))
    body += "<h3>Dynamic or static?</h3>"
    body += paragraph(
        "A dynamic scale is taken from each token's own values while the model runs. A static one was found on other "
        "texts beforehand: cheaper, and wrong where a token is unlike them."
    )
    body += side_by_side(_dynamic_guide(), _dynamic_layer(subject))
    return Section("calibration", "Where to cut", body)


def bounds(x: Tensor, bits: int, percentile: float = 99.9) -> dict[str, tuple[float, float]]:
    """By each method: where it cuts the values of x, and the signal-to-noise ratio in dB that they then have."""
    observer = Observer(PerTensor())
    observer.update(x)
    found = {}
    low, high = integer_range(bits, restricted=True)
    for method in CUTS:
        scale, _ = calibrate(observer, method, bits, percentile=percentile)
        error = quantization_error(x, fake_quantize(x, scale, None, low, high))
        found[method] = (float(scale) * high, error.sqnr_db)
    return found


def _cuts(name: str, x: Tensor, key: str) -> str:
    limit = float(x.abs().max())
    counts = torch.histc(x, 100, -limit, limit).tolist()
    edges = torch.linspace(-limit, limit, 101).tolist()
    entries = []
    for bits in BITS:
        found = bounds(x, bits)

        def paint(axes: Any, found: dict[str, tuple[float, float]] = found) -> None:
            axes.stairs(counts, edges, fill=True, color=COLORS["line"])
            axes.set_yscale("log")
            axes.set_yticks([], minor=False)
            axes.set_yticks([], minor=True)
            axes.set_ylabel("values (logarithmic)")
            for style, (method, (bound, _)) in zip(("-", "--", "-.", ":"), found.items(), strict=True):
                for side in (-bound, bound):
                    axes.axvline(side, color=COLORS[CUTS[method]], ls=style, lw=1.6,
                                 label=method if side > 0 else None)  # fmt: skip
            axes.legend(fontsize=8.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

        listed = ", ".join(f"{method} {bound:.4g}" for method, (bound, _) in found.items())
        rows = [[method, text(bound), f"{ratio:.2f} dB"] for method, (bound, ratio) in found.items()]
        numbers = table(["method", "cuts at ±", "signal to noise"], rows, title=f"{bits} bits, percentile 99.9")
        entries.append((str(bits), figure(paint, f"{name}, cut for {bits} bits: {listed}", size=(5, 2.8)) + numbers))
    return f"<p><strong>{escape(name)}</strong></p>" + frames(f"cut-{key}", "Bits", entries)


def _percentiles(name: str, x: Tensor) -> str:
    rows = []
    for percentile in PERCENTILES:
        eight, four = (bounds(x, bits, percentile)["percentile"] for bits in (8, 4))
        rows.append([f"{percentile:g}", text(eight[0]), f"{eight[1]:.2f} dB", f"{four[1]:.2f} dB"])
    return table(["percentile", "cuts at ±", "8 bits", "4 bits"], rows, title=f"{name}: signal to noise")


def _dynamic_guide() -> str:
    x = torch.tensor(VECTOR)
    tokens = torch.stack([x, x / 4, x.flip(0) / 20])
    static = choose_qparams_symmetric(tokens[:1], 8, PerTensor())
    own = choose_qparams_symmetric(tokens, 8, PerToken())
    limits = integer_range(8)
    rows = []
    for index, (token, name) in enumerate(zip(tokens, ("the vector", "a quarter of it", "a twentieth"), strict=True)):
        errors = [quantization_error(token, fake_quantize(token, scale.view(1), None, *limits)).sqnr_db
                  for scale in (own[index], static)]  # fmt: skip
        rows.append([name, f"{float(own[index]):.4f}", *(f"{error:.1f} dB" for error in errors)])
    return "<p><strong>The guide's vector, and smaller ones after it</strong></p>" + table(
        ["token", "its own scale", "dynamic", "static"], rows,
        title=f"Signal to noise; the static scale is the first token's, {float(static):.4f}",
    )  # fmt: skip


def _dynamic_layer(subject: Subject) -> str:
    half = max(1, len(subject.inputs) // 2)
    known, fresh = subject.inputs[:half].flatten(0, 1), subject.inputs[-half:].flatten(0, 1)
    observer = Observer(PerTensor())
    observer.update(known)
    limits = integer_range(8)
    statics = {method: calibrate(observer, method, 8)[0] for method in CUTS}
    own = choose_qparams_symmetric(fresh, 8, PerToken())
    scales = own.flatten()[:200].tolist()

    def paint(axes: Any) -> None:
        axes.plot(scales, ".", color=COLORS["accent"], ms=3.5, label="dynamic: each token's own")
        for style, (method, scale) in zip(("-", "--", "-.", ":"), statics.items(), strict=True):
            axes.axhline(float(scale), color=COLORS[CUTS[method]], ls=style, lw=1.4, label=f"static, {method}")
        axes.set(xlabel="token", ylabel="scale")
        axes.legend(fontsize=8.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    rows = [["dynamic", f"{quantization_error(fresh, fake_quantize(fresh, own, None, *limits)).sqnr_db:.2f} dB"]]
    for method, scale in statics.items():
        error = quantization_error(fresh, fake_quantize(fresh, scale, None, *limits))
        rows.append([f"static, {method}", f"{error.sqnr_db:.2f} dB"])
    picture = figure(paint, f"Scales of tokens that come into {subject.layer}, against static ones", size=(5, 3))
    note = f"{len(fresh):,} tokens that the calibration, on {len(known):,} others, has not seen."
    return (
        f"<p><strong>What comes into {escape(subject.layer)}</strong></p>"
        + caption(picture, note)
        + table(["scale", "signal to noise"], rows, title="INT8 activations on unseen tokens")
    )
