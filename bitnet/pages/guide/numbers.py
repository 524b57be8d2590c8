"""How numbers are stored: their bits, ranges and memory, and a picture in a few colors."""

import base64
import math
import struct
from typing import Any

import torch
from torch import Tensor

from bitnet import plots
from bitnet.pages.figure import COLORS, figure
from bitnet.pages.guide.subject import VECTOR, Subject
from bitnet.pages.guide.worked import text
from bitnet.pages.page import Section, caption, escape, frames, paragraph, side_by_side, table
from bitnet.quant.affine import dequantize, integer_range, quantize
from bitnet.quant.formats import FORMATS, memory_bytes

VALUES = (3.1415927, 0.1, 1 / 3, 10.8, -7.59, 65504.0, 1e6, 6e-8, 0.0)
SIZES = {"1 billion": 1e9, "7 billion": 7e9, "70 billion": 70e9, "405 billion": 405e9}
WIDTHS = {
    "FP64": 64.0, "FP32": 32.0, "FP16, BF16": 16.0, "INT8, FP8": 8.0, "INT4": 4.0, "INT2": 2.0,
    "ternary": math.log2(3), "binary": 1.0,
}  # fmt: skip
COLOR_COUNTS = (2, 4, 8, 16, 32, 64, 256)
FP64_RANGE = (math.ldexp(1.0, -1074), math.nextafter(math.inf, 0))


def section(subject: Subject) -> Section:
    """Bits of a value in every format, ranges, memory, and pictures in a few colors."""
    weight = float(subject.row(1)[0])
    absmax = max(map(abs, VECTOR))
    values = [*((text(value), value) for value in VALUES), (f"{text(weight)} (the layer's first weight)", weight)]
    entries = [(name, _bits(value, absmax)) for name, value in values]
    key = "".join(
        f'<li><span class="bits {name}" style="border-bottom:3px solid var(--{color})">{name}</span></li>'
        for name, color in (("sign", "c1"), ("exponent", "c2"), ("mantissa", "accent"))
    )
    body = (
        paragraph(
            "A float has a sign, an exponent that says between which powers of two it lies, and a mantissa that says "
            "where between them. An integer has only a place in a row: it needs a scale to stand for anything else."
        )
        + f'<ul class="key">{key}</ul>'
        + frames("value", "Value", entries)
        + "<h3>What a format reaches</h3>"
        + caption(
            _ranges(subject),
            "From the smallest positive number to the largest, on a logarithmic line; FP64 goes on to 5e-324 and "
            "1.8e308. INT8 has steps of one size, so its "
            f"range is 1 to 127 steps, whatever a step is; the band is where the weights of {subject.layer} lie.",
        )
        + "<h3>Memory</h3>"
        + paragraph("memory = bits / 8 × parameters")
        + _memory(subject)
        + "<h3>Fewer colors, fewer levels</h3>"
        + _pictures(subject)
    )
    return Section("numbers", "How numbers are stored", body)


def _bits(value: float, absmax: float) -> str:
    double = f"{struct.unpack('>Q', struct.pack('>d', value))[0]:064b}"
    rows = [["FP64", 64, _fields([double[0], double[1:12], double[12:]]), repr(value), "0"]]
    for format in FORMATS:
        code = format.code(value)
        stored = format.value(code)
        fields = _fields(format.bit_string(code).split("|"))
        error = abs(stored - value)
        rows.append([format.name, format.bits, fields, f"{stored:.9g}", f"{error:.3g}"])
    scale = torch.tensor([absmax / 127])
    codes = quantize(torch.tensor([value]), scale, None, *integer_range(8))
    bits = f"{int(codes) & 255:08b}"
    stored = float(dequantize(codes, scale))
    fields = _fields([bits[0], "", bits[1:]])
    rows.append([f"INT8, absmax {absmax:g}", 8, fields, f"{stored:.9g}", f"{abs(stored - value):.3g}"])
    return table(
        ["format", "bits", "stored as", "value", "error"], rows, title=f"{value:.9g} in every format", html=True
    )


def _fields(parts: list[str]) -> str:
    names = ("sign", "exponent", "mantissa")
    spans = (f'<span class="{name}">{part}</span>' for name, part in zip(names, parts, strict=True) if part)
    return f'<span class="bits">{"".join(spans)}</span>'


def _ranges(subject: Subject) -> str:
    magnitudes = subject.weight.abs()[subject.weight != 0]
    band = (float(magnitudes.min()), float(magnitudes.max())) if len(magnitudes) else None
    lines = [("FP64", *FP64_RANGE), *((f.name, f.smallest_subnormal, f.largest) for f in FORMATS), ("INT8", 1.0, 127.0)]

    def paint(axes: Any) -> None:
        axes.set_xscale("log")
        for y, (_, low, high) in enumerate(reversed(lines)):
            axes.plot([low, high], [y, y], "|-", color=COLORS["accent"], lw=4, ms=9, solid_capstyle="butt")
        if band:
            axes.axvspan(*band, color=COLORS["c1"], alpha=0.25, lw=0)
        axes.set_yticks(range(len(lines)), [name for name, *_ in reversed(lines)])
        powers = (-40, -30, -20, -10, 0, 10, 20, 30, 40)
        axes.set_xlim(1e-50, 1e44)  # FP64 goes on far beyond both ends
        axes.set_xticks([10.0**power for power in powers], [f"1e{power}" for power in powers])
        axes.minorticks_off()
        axes.grid(axis="x", alpha=0.6)

    listed = "; ".join(f"{name} {low:.3g} to {high:.4g}" for name, low, high in lines)
    return figure(paint, f"Ranges of the formats: {listed}", size=(5, 2.7))


def _memory(subject: Subject) -> str:
    sizes = {f"{subject.parameters:,} (this model)": float(subject.parameters)} | SIZES

    def picture(parameters: float) -> str:
        needed = {name: memory_bytes(parameters, bits) for name, bits in WIDTHS.items()}
        unit, name = (1e9, "GB") if max(needed.values()) >= 1e10 else (1e6, "MB")

        def paint(axes: Any) -> None:
            values = [size / unit for size in needed.values()]
            places = range(len(values))[::-1]
            axes.barh(places, values, color=COLORS["accent"], height=0.65)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    f"{value:,.4g} {name}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9
                )
            axes.set_yticks(places, [f"{key} ({WIDTHS[key]:.3g} bits)" for key in needed])
            axes.set_xlim(0, 1.3 * max(values))
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)

        listed = ", ".join(f"{key} {size / unit:.4g} {name}" for key, size in needed.items())
        return figure(paint, f"Memory of {parameters:,.0f} parameters: {listed}", size=(5, 2.7))

    return frames(
        "parameters", "Parameters", [(name, picture(count)) for name, count in sizes.items()], start=len(sizes) - 2
    )


def levels_of(x: Tensor, count: int, rounds: int = 12) -> Tensor:
    """Each row of x float `[n, d]` as one of `count` levels, found by Lloyd's algorithm from evenly spaced rows of x in
    the order of their sums: float `[n, d]`."""
    order = x.sum(1).argsort(stable=True)
    centers = x[order[torch.linspace(0, len(x) - 1, count).long()]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(x, centers).argmin(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, x)
        members = nearest.bincount(minlength=count)[:, None]
        centers = torch.where(members > 0, sums / members.clamp(min=1), centers)
    return centers[torch.cdist(x, centers).argmin(1)]


def scene(width: int = 96, height: int = 72) -> Tensor:
    """A picture with soft gradients, the kind that suffers from few colors: an evening sky over water, float
    `[height, width, 3]` from 0 to 1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    top, low, glow = (torch.tensor(c) for c in ((0.10, 0.16, 0.36), (0.98, 0.60, 0.36), (1.0, 0.93, 0.70)))
    horizon = 0.62
    sky = (y / horizon).clamp(0, 1)[..., None]
    picture = top * (1 - sky) + low * sky
    distance = ((x - 0.62) ** 2 * 1.6 + (y - 0.47) ** 2).sqrt()[..., None]
    picture = picture + (glow - picture) * torch.exp(-((distance / 0.16) ** 2))
    mirrored = picture[(2 * horizon * (height - 1) - torch.arange(height)).clamp(0, height - 1).long()]
    ripple = 0.82 + 0.10 * torch.sin(90 * (y - horizon) ** 1.0 / (0.15 + y) + 3 * torch.sin(9 * x))
    picture = torch.where(
        (y > horizon)[..., None], mirrored * ripple[..., None] * torch.tensor([0.75, 0.85, 1.0]), picture
    )
    hills = horizon - 0.07 - 0.05 * torch.sin(7 * x + 1) - 0.03 * torch.sin(17 * x)
    shade = torch.tensor([0.16, 0.17, 0.26]) * (0.7 + 0.6 * x[..., None])
    return torch.where(((y > hills) & (y <= horizon))[..., None], shade, picture).clamp(0, 1)


def _pictures(subject: Subject) -> str:
    picture = scene()
    side = min(64, *subject.weight.shape)
    patch = subject.weight[:side, :side].contiguous()
    spread = float(patch.abs().max()) or 1.0
    entries = []
    for count in (*COLOR_COUNTS, 0):  # 0: as it is
        flat, gray = picture.view(-1, 3), patch.view(-1, 1)
        few = levels_of(flat, count) if count else flat
        some = levels_of(gray, count) if count else gray
        error, relative = (few - flat).square().mean().sqrt(), (some - gray).norm() / gray.norm()
        colors = f"{count} colors, {math.log2(count):.0f} bits a pixel" if count else "all colors, 24 bits a pixel"
        levels = f"{count} levels, {math.log2(count):.0f} bits a weight" if count else "32 bits a weight"
        shown = (some / (2 * spread) + 0.5).clamp(0, 1).view(side, side, 1).expand(-1, -1, 3)
        entries.append(
            (
                f"{count}" if count else "all",
                side_by_side(
                    caption(_image(few.view_as(picture), f"An evening sky in {colors}"),
                            f"{colors}; root mean square error {255 * error:.1f} of 255"),
                    caption(_image(shown, f"Weights of {subject.layer} as grey values, {levels}"),
                            f"{side} × {side} weights of {subject.layer}: {levels}; relative error {relative:.1%}"),
                ),
            )
        )  # fmt: skip
    return frames("colors", "Colors", entries, start=2)


def _image(pixels: Tensor, alt: str) -> str:
    data = base64.b64encode(plots.png_bytes(pixels)).decode()
    height, width = pixels.shape[:2]
    return (
        f'<img class="pixel" src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{width}" height="{height}">'
    )
