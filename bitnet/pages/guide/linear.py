"""Linear quantization: absmax, zero-point, their errors, an outlier, and clipping it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.pages.guide.subject import CLIP, NEIGHBOUR, OUTLIER_VECTOR, VECTOR, Subject
from bitnet.pages.guide.worked import bars, squeeze, text, vector_table
from bitnet.pages.page import Section, caption, escape, frames, paragraph, side_by_side, slip, table
from bitnet.plots import sample_values
from bitnet.quant.affine import (
    PerTensor,
    choose_qparams_asymmetric,
    choose_qparams_from_range,
    choose_qparams_symmetric,
    dequantize,
    integer_range,
    quantization_error,
    quantize,
)

BITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Worked:
    """A vector that was quantized: x, integer codes and what they become again, `[n]` each."""

    x: Tensor
    codes: Tensor
    back: Tensor
    limits: tuple[int, int]
    scale: float
    """The guide's s is one divided by it."""
    zero_point: int = 0

    @property
    def errors(self) -> list[float]:
        return (self.x - self.back).tolist()

    def of(self, value: float) -> tuple[int, float]:
        """Code of another value, and what that becomes again."""
        found = _quantized(
            torch.tensor([value]), torch.tensor([self.scale]), torch.tensor([self.zero_point]), self.limits
        )
        return int(found.codes[0]), float(found.back[0])


def absmax(values: tuple[float, ...] | Tensor, bits: int) -> Worked:
    """Symmetric quantization of a vector `[n]`, to the codes -(2^(bits-1) - 1) to 2^(bits-1) - 1."""
    x = torch.as_tensor(values, dtype=torch.float32)
    scale = choose_qparams_symmetric(x, bits, PerTensor())
    return _quantized(x, scale, None, integer_range(bits, restricted=True))


def zero_point(values: tuple[float, ...] | Tensor, bits: int) -> Worked:
    """Asymmetric quantization of a vector `[n]`, to all signed codes of so many bits."""
    x = torch.as_tensor(values, dtype=torch.float32)
    scale, zero = choose_qparams_asymmetric(x, bits, PerTensor(), signed=True)
    return _quantized(x, scale, zero, integer_range(bits))


def clipped(values: tuple[float, ...] | Tensor, bound: float, bits: int) -> Worked:
    """Symmetric quantization of the range [-bound, bound]; what lies outside becomes its end."""
    x = torch.as_tensor(values, dtype=torch.float32)
    scale, _ = choose_qparams_from_range(torch.tensor([-bound]), torch.tensor([bound]), bits, symmetric=True)
    return _quantized(x, scale, None, integer_range(bits, restricted=True))


def _quantized(x: Tensor, scale: Tensor, zero: Tensor | None, limits: tuple[int, int]) -> Worked:
    codes = quantize(x, scale, zero, *limits)
    back = dequantize(codes, scale, zero)
    return Worked(x, codes, back, limits, float(scale), 0 if zero is None else int(zero))


def section(subject: Subject) -> Section:
    """The guide's vector and a row of the layer, by both methods, and the outlier."""
    row = subject.row(8)
    kinds = (
        ("The guide's vector", torch.tensor(VECTOR), "guide"),
        (f"The first weights of {subject.layer}", row, "layer"),
    )
    body = paragraph(
        "Squeeze a line of numbers onto a few integers, and stretch it again: what does not come back is the error. "
        "Each slider sets the bits of an integer."
    )
    body += "<h3>Absmax: the largest magnitude decides</h3>"
    body += slip(
        "b in its formula for the scale counts bits, not bytes. Its s multiplies a value to make it an integer; a "
        "scale in this project is 1/s and makes an integer a value again."
    )
    body += side_by_side(*(_worked(name, x, f"absmax-{key}", symmetric=True) for name, x, key in kinds))
    body += "<h3>Zero-point: smallest and largest decide</h3>"
    body += slip("The asymmetric scale is s = 255 / (largest - smallest) for 8 bits, all of the range.")
    body += side_by_side(*(_worked(name, x, f"zero-{key}", symmetric=False) for name, x, key in kinds))
    body += "<h3>Both side by side, and the error vector</h3>"
    body += side_by_side(*(_compared(name, x, f"both-{key}") for name, x, key in kinds))
    body += "<h3>An outlier, and clipping it</h3>" + _outlier(subject)
    return Section("linear", "Onto integers and back", body)


def _worked(name: str, x: Tensor, anchor: str, *, symmetric: bool) -> str:
    entries = []
    for bits in BITS:
        found = absmax(x, bits) if symmetric else zero_point(x, bits)
        low, high = found.limits
        largest, smallest = text(float(x.abs().max() if symmetric else x.max())), min(float(x.min()), 0.0)
        if symmetric:
            formula = f"s = {high} / {largest} = {1 / found.scale:.2f}"
        else:
            formula = (
                f"s = {high - low} / ({largest} + {text(-smallest)}) = {1 / found.scale:.2f}, z = {found.zero_point}"
            )
        extra = ""
        if symmetric and len(x) == len(VECTOR):
            (a, again), (b, _) = found.of(VECTOR[1]), found.of(NEIGHBOUR)
            verb = "both become" if a == b else "become"
            which = f"{a}" if a == b else f"{a} and {b}"
            extra = f" {VECTOR[1]} and {NEIGHBOUR} {verb} {which}" + (
                f", which is {again:.3f} again." if a == b else "."
            )
        picture = squeeze(x, found.codes, found.limits, f"{name}, squeezed onto {bits} bits: {found.codes.tolist()}")
        note = f"{formula}; codes from {low} to {high}.{extra}"
        shown = caption(picture, note) + vector_table(f"{name} in {bits} bits", x, found.codes, found.back)
        entries.append((str(bits), shown))
    return f"<p><strong>{escape(name)}</strong></p>" + frames(anchor, "Bits", entries, start=len(BITS) - 1)


def _compared(name: str, x: Tensor, anchor: str) -> str:
    entries = []
    for bits in BITS:
        pair = {"absmax": absmax(x, bits), "zero-point": zero_point(x, bits)}
        pictures = "".join(
            caption(
                bars(found.errors, [text(value) for value in x.tolist()], f"Errors of {kind} in {bits} bits"),
                f"{kind}: error of each value; mean square {quantization_error(x, found.back).mse:.3g}",
            )
            for kind, found in pair.items()
        )
        entries.append((str(bits), pictures))
    return f"<p><strong>{escape(name)}</strong></p>" + frames(anchor, "Bits", entries, start=len(BITS) - 1)


def _outlier(subject: Subject) -> str:
    largest = max(map(abs, OUTLIER_VECTOR))
    entries = []
    for bound in (0.5, 1.0, CLIP, 20.0, 100.0, largest):
        found = clipped(OUTLIER_VECTOR, bound, 8)
        used = len(set(found.codes.tolist()))
        # The outlier's own error is what clipping pays; the others' what it is paid for.
        small = quantization_error(found.x[:-1], found.back[:-1])
        note = (
            f"Clipped at [{-bound:g}, {bound:g}]: {used} different integers for {len(found.x)} values; mean square "
            f"error of the {len(found.x) - 1} small ones {small.mse:.2g}, the outlier becomes {found.back[-1]:g}."
        )
        name = "nothing clipped" if bound == largest else f"[{-bound:g}, {bound:g}]"
        numbers = vector_table(f"Clipped at {name}", found.x, found.codes, found.back)
        entries.append((name, paragraph(note) + numbers))
    left = frames("clip-guide", "Range", entries, start=2)
    inputs = sample_values(subject.inputs)
    rows = []
    for share in (0.9, 0.99, 0.999, 0.9999, 1.0):
        bound = float(inputs.abs().quantile(share))
        cells = []
        for bits in (8, 4):
            found = clipped(inputs, max(bound, 1e-5), bits)
            cells.append(f"{quantization_error(inputs, found.back).sqnr_db:.2f} dB")
        rows.append([f"{100 * share:g} %", text(bound), *cells])
    right = table(
        ["values inside", "clipped at", "8 bits: signal to noise", "4 bits: signal to noise"],
        rows, title=f"What comes into {subject.layer}, clipped",
    )  # fmt: skip
    return side_by_side(
        "<p><strong>The guide's vector with an outlier</strong></p>" + left,
        f"<p><strong>What comes into {escape(subject.layer)}</strong></p>" + right,
    )
