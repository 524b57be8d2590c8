"""After training: GPTQ step by step, and a super-block of Q4_K taken apart."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitnet.pages.figure import COLORS, figure
from bitnet.pages.guide.subject import Subject
from bitnet.pages.page import Section, caption, escape, frames, paragraph, side_by_side, slip, table
from bitnet.quant.affine import PerTensor, choose_qparams_symmetric, fake_quantize, integer_range
from bitnet.quant.blocks import TYPES, dequantize_blocks, kquants, quantize_blocks
from bitnet.quant.gptq import HessianSum, layer_error

EXAMPLE = ((0.5, -0.7, -0.14), (0.87, -0.06, 0.65), (-0.23, 0.43, -0.28))
"""Weights of the 3 × 3 example, a row an output."""
EXAMPLE_INPUTS = ((1.0, 0.8, 0.2), (0.3, 0.9, 1.0), (1.2, 0.7, 0.4), (0.2, -0.5, 0.9), (0.9, 1.1, 0.1))
"""Its inputs, a row a token: the first two channels go together, so one can make up for the other."""
EXAMPLE_BITS = 3
DAMPING = 0.01
COLUMNS = 256
MARKS = 8
"""Positions at which the sweep over a real row is drawn."""
SUPER_BLOCK = "Q4_K"
HEADER = (("d", 2), ("dmin", 2), ("scales and minimums", 12), ("codes", 128))
"""Fields of a Q4_K super-block and their bytes."""


@dataclass(frozen=True)
class Step:
    """GPTQ after one more column: the quantized columns so far, and the others with what they make up for."""

    column: int
    weight: Tensor
    """float64 `[N, K]`"""
    error: Tensor
    """`(w - q) / U_jj` of the column, `[N]`"""


def sweep(weight: Tensor, hessian: Tensor, scale: Tensor, bits: int, *, guide: bool = False) -> list[Step]:
    """GPTQ's sweep over the columns of a weight `[N, K]` on one symmetric grid.

    guide: as the guide does it: the error is divided by the diagonal entry of the inverse Hessian, which stays the same
    matrix for all columns. Right is U, the upper Cholesky factor of the inverse, whose rows are those of the inverses
    of what is left; for the first column the two agree.
    """
    inverse = torch.linalg.inv(hessian.double())
    factor = inverse if guide else torch.linalg.cholesky(inverse, upper=True)
    work = weight.double().clone()
    steps = []
    for j in range(work.shape[1]):
        rounded = fake_quantize(work[:, j].float(), scale, None, *integer_range(bits, restricted=True)).double()
        error = (work[:, j] - rounded) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        work[:, j] = rounded
        steps.append(Step(j, work.clone(), error))
    return steps


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Weight `[3, 3]`, Hessian `[3, 3]` and scale `[1]` of the example."""
    weight = torch.tensor(EXAMPLE)
    hessian = HessianSum(3)
    hessian.update(torch.tensor(EXAMPLE_INPUTS))
    return weight, hessian.matrix(), choose_qparams_symmetric(weight, EXAMPLE_BITS, PerTensor()).flatten()


def outcomes(weight: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> dict[str, float]:
    """Error of the layer's output, summed over its rows, by three ways of rounding."""
    plain = fake_quantize(weight, scale.view(1, 1), None, *integer_range(bits, restricted=True))
    ways = {
        "to the nearest": plain,
        "the guide's way": sweep(weight, hessian, scale, bits, guide=True)[-1].weight,
        "GPTQ": sweep(weight, hessian, scale, bits)[-1].weight,
    }
    return {name: float(layer_error(weight, found.float(), hessian).sum()) for name, found in ways.items()}


def section(subject: Subject) -> Section:
    """GPTQ on an example and on a row of the layer, and Q4_K."""
    body = "<h3>GPTQ on 3 × 3 weights</h3>" + paragraph(
        "GPTQ rounds one column of a weight after the other. What a column loses, the columns that are still to come "
        "make up for, as far as their inputs go together: that is what the inverse of the Hessian H = 2 X Xᵀ says."
    )
    body += slip(
        "It divides the error by the diagonal of the inverse Hessian itself, which with one matrix for all columns is "
        "right for the first column only. The error of column j is divided by U_jj, where U is the upper Cholesky "
        "factor of the inverse, and spread by row j of U. And a large entry of the inverse marks "
        "a weight that matters little: others can make up for it."
    )
    body += _example() + "<h3>GPTQ on a real row</h3>" + _row(subject)
    body += "<h3>A super-block of Q4_K, taken apart</h3>" + _super_block(subject)
    return Section("ptq", "After training: GPTQ and GGUF", body)


def _matrix(title: str, matrix: Tensor, names: str) -> str:
    rows = [[f"{names} {i + 1}", *(f"{value:+.3f}" for value in row)] for i, row in enumerate(matrix.tolist())]
    return table([names, *(f"column {j + 1}" for j in range(matrix.shape[1]))], rows, title=title)


def _example() -> str:
    weight, hessian, scale = example()
    inverse = torch.linalg.inv(hessian.double())
    factor = torch.linalg.cholesky(inverse, upper=True)
    entries = [("before", _matrix("Weights", weight, "row"))]
    for step in sweep(weight, hessian, scale, EXAMPLE_BITS):
        j = step.column
        before = weight if j == 0 else torch.zeros(0)
        first = ""
        if j == 0:
            w, q = float(before[0, 0]), float(step.weight[0, 0])
            first = f" Row 1: e = ({w:+.3f} - {q:+.3f}) / {float(factor[0, 0]):.3f} = {float(step.error[0]):+.3f}."
        rest = ", ".join(f"w{k + 1} -= e × {float(factor[j, k]):+.3f}" for k in range(j + 1, 3))
        note = f"Column {j + 1} is rounded.{first}" + (
            f" Then {rest} in every row." if rest else " Nothing is left to move."
        )
        entries.append((f"{j + 1} of 3", _matrix("Weights", step.weight, "row") + paragraph(note)))
    found = outcomes(weight, hessian, scale, EXAMPLE_BITS)
    errors = table(["rounding", "error of the output"], [[name, f"{error:.5f}"] for name, error in found.items()],
                   title="(W - Q) H (W - Q)ᵀ, summed over the rows")  # fmt: skip
    # Rounding weight j alone by e, with the others free to move, costs e² / [H^-1]_jj.
    sensitivity = [
        [f"column {j + 1}", f"{float(inverse[j, j]):.3f}", f"{1 / float(inverse[j, j]):.3f}"] for j in range(3)
    ]
    note = f"{2**EXAMPLE_BITS - 1} integers, one scale: {float(scale):.4f}. The example's numbers are this page's own."
    return paragraph(note) + side_by_side(
        frames("gptq", "Columns rounded", entries, play=True) + errors,
        _matrix("H = 2 X Xᵀ / tokens", hessian, "channel")
        + _matrix("U: its inverse is Uᵀ U", factor, "channel")
        + table(
            ["channel", "inverse Hessian", "cost of an error of 1"], sensitivity, title="What a weight's error costs"
        ),
    )


def _row(subject: Subject) -> str:
    columns = min(COLUMNS, subject.weight.shape[1])
    weight = subject.weight[:1, :columns]
    total = HessianSum(columns)
    total.update(subject.inputs[..., :columns])
    hessian = total.matrix()
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(columns)
    scale = choose_qparams_symmetric(weight, 4, PerTensor()).flatten()
    steps = sweep(weight, hessian, scale, 4)
    marks = [0, *(round(columns * i / MARKS) for i in range(1, MARKS + 1))]
    limit = 1.15 * float(weight.abs().max())
    entries = []
    for done in marks:
        now = weight[0].double() if done == 0 else steps[done - 1].weight[0]

        def paint(axes: Any, done: int = done, now: Tensor = now) -> None:
            axes[0].plot(weight[0].tolist(), color=COLORS["line"], lw=1)
            axes[0].plot(range(done), now[:done].tolist(), ".", color=COLORS["c1"], ms=2.5)
            axes[0].plot(range(done, columns), now[done:].tolist(), ".", color=COLORS["accent"], ms=2.5)
            axes[0].set(ylim=(-limit, limit), ylabel="weights", xticks=[])
            axes[1].stairs(
                (now - weight[0]).tolist(), [place - 0.5 for place in range(columns + 1)], fill=True, color=COLORS["c2"]
            )
            axes[1].axvline(done - 0.5, color=COLORS["soft"], lw=1)
            axes[1].set(ylabel="moved by", xlabel="input channel", ylim=(-limit / 3, limit / 3))

        entries.append((str(done), figure(paint, f"The row after {done} of {columns} columns", rows=2, size=(5, 3.4))))
    found = outcomes(weight, hessian, scale, 4)
    errors = table(["rounding", "error of the output"], [[name, f"{error:.4g}"] for name, error in found.items()],
                   title=f"First row of {subject.layer}, {columns} channels, 4 bits")  # fmt: skip
    note = (
        "Red: rounded. Green: still to come, already moved to make up for what was lost. Below: how far each weight "
        "lies from where it was. H is that of the tokens above."
    )
    return (
        caption(frames("gptq-row", f"Columns rounded, of {columns}", entries, start=MARKS // 3, play=True), note)
        + errors
    )


def _super_block(subject: Subject) -> str:
    flat = subject.weight.flatten()
    x = flat[: kquants.SUPER_BLOCK] if len(flat) >= kquants.SUPER_BLOCK else flat.repeat(kquants.SUPER_BLOCK)[:256]
    raw = quantize_blocks(x[None].contiguous(), SUPER_BLOCK)
    fields = kquants.unpack(raw, SUPER_BLOCK)
    assert fields.scales is not None
    assert fields.minimum is not None
    assert fields.minimums is not None
    back = dequantize_blocks(raw, SUPER_BLOCK)[0]
    d, dmin = float(fields.scale[0]), float(fields.minimum[0])
    groups = kquants.GROUPS[SUPER_BLOCK]
    size = kquants.SUPER_BLOCK // groups
    rows = []
    for g in range(groups):
        s, m = int(fields.scales[0, g]), int(fields.minimums[0, g])
        rows.append([g, s, f"{s:06b}", m, f"{m:06b}", f"{d * s:.6f}", f"{dmin * m:.6f}"])
    levels = table(
        ["group", "s", "its bits", "m", "its bits", "step d × s", "offset dmin × m"], rows,
        title=f"Second level: 8 groups of 32 weights; d = {d:.6g}, dmin = {dmin:.6g} (float16)",
    )  # fmt: skip
    entries = []
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        values, again, codes = x[part], back[part], fields.codes[0, part]

        def paint(axes: Any, values: Tensor = values, again: Tensor = again) -> None:
            axes.vlines(range(size), values.tolist(), again.tolist(), color=COLORS["soft"], lw=1)
            axes.plot(values.tolist(), "o", color=COLORS["c2"], ms=4, label="weight")
            axes.plot(again.tolist(), "s", color=COLORS["c1"], ms=3.5, label="(d × s) × code - dmin × m")
            axes.set(xlabel=f"weight of the group, {size} in all", ylabel="value")
            axes.legend(fontsize=8.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

        listed = " ".join(f"{code:04b}" for code in codes.tolist())
        picture = figure(paint, f"Group {g}: weights and what is stored of them", size=(5, 2.6))
        entries.append((str(g), caption(picture, f"Codes: {listed}")))
    kinds = [kind for kind in TYPES if kind.endswith("_K")]
    sizes = table(
        ["type", "bytes for 256 weights", "bits a weight"],
        [[kind, TYPES[kind].bytes, f"{TYPES[kind].bits_per_weight:.4g}"] for kind in kinds],
        title="The k-quants as ggml has them",
    )
    return (
        paragraph(
            f"The first 256 weights of {subject.layer} in {TYPES[SUPER_BLOCK].bytes} bytes: two scales in float16, and "
            "for every 32 weights a step and an offset in 6 bits that count in those. A weight is "
            "(d × s) × code - dmin × m."
        )
        + _dump(raw[0])
        + side_by_side(levels, frames("group", "Group", entries))
        + slip("Its table of the k-quants mixes up columns. These are the sizes of ggml's structs:")
        + sizes
    )


def _dump(raw: Tensor) -> str:
    """All bytes of the super-block, those of each field in a color."""
    names = ("sign", "exponent", "other", "mantissa")
    start, lines = 0, []
    for name, (field, size) in zip(names, HEADER, strict=True):
        part = raw[start : start + size]
        written = " ".join(f"{byte:02x}" for byte in part.tolist())
        bits = " ".join(f"{byte:08b}" for byte in part[:4].tolist()) + (" …" if size > 4 else "")
        lines.append(
            [escape(field), size, f'<span class="bits"><span class="{name}">{bits}</span></span>',
             f'<span class="mono wrap">{escape(written)}</span>']
        )  # fmt: skip
        start += size
    assert start == len(raw)
    return table(
        ["field", "bytes", "first bits", "all bytes"], lines, title="The super-block as it is stored", html=True
    )
