"""Every picture of the project, as PNG files: matplotlib is imported here and nowhere else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FAMILIES = {
    "float": "#444444",
    "native": "#d62728",
    "weight-only": "#1f77b4",
    "weights and activations": "#2ca02c",
    "gguf": "#9467bd",
}
"""The families of methods and their colors, the same in all pictures."""


@contextmanager
def _figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.2)) -> Iterator[Any]:
    """The axes of a new figure (an array of them for several), written to `path` at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns)
    FigureCanvasAgg(figure).print_png(path)


def draw_loss(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training and validation loss over steps for one or several runs, as a PNG."""
    with _figure(path) as axes:
        for index, (name, rows) in enumerate(runs.items()):
            color = f"C{index}"
            training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
            validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
            axes.plot(*zip(*training, strict=True), color=color, alpha=0.35, lw=1) if training else None
            if validation:
                axes.plot(*zip(*validation, strict=True), "o-", color=color, ms=4, label=f"{name}, validation")
                axes.annotate(
                    f"{validation[-1][1]:.3f}",
                    validation[-1],
                    (4, 8 - 20 * (index % 2)),
                    textcoords="offset points",
                    color=color,
                )
        axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Loss (thin: training)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)


@dataclass(frozen=True)
class Point:
    """One method in a scatter plot."""

    name: str
    family: str
    x: float
    y: float
    error: float = 0.0
    """Standard error of y."""


def draw_scatter(points: Sequence[Point], path: Path, *, xlabel: str, title: str, ylabel: str = "perplexity") -> None:
    """Methods over a logarithmic x, the lower left corner being the best, with the border that nothing beats.

    Methods whose y lies above 1.6 times the best are drawn at the upper edge with an arrow and their value: one
    broken method must not flatten the differences between the others.
    """
    best = min(point.y for point in points)
    ceiling = min(1.6 * best, max(point.y for point in points))
    with _figure(path, size=(9, 6)) as axes:
        axes.set_xscale("log")
        for family, color in FAMILIES.items():
            chosen = [p for p in points if p.family == family]
            if chosen:
                axes.errorbar(
                    [p.x for p in chosen], [min(p.y, ceiling) for p in chosen],
                    yerr=[p.error if p.y < ceiling else 0 for p in chosen],
                    fmt="o", color=color, ms=5, lw=1, capsize=2, label=family,
                )  # fmt: skip
        border: list[Point] = []
        for point in sorted(points, key=lambda p: (p.x, p.y)):
            if point.y <= ceiling and (not border or point.y < border[-1].y):
                border.append(point)
        axes.plot([p.x for p in border], [p.y for p in border], color="#bbbbbb", lw=1, zorder=0)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.05 * (high - low))
        texts = [
            (p.x, min(p.y, ceiling), f"{p.name} \u2191{p.y:.3g}" if p.y > ceiling else p.name, FAMILIES[p.family])
            for p in points
        ]
        axes.figure.canvas.draw()  # the transform of the final limits, for placing the labels
        _place_labels(axes, texts)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=8)


def _place_labels(axes: Any, texts: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each text beside its point, at the first of some places where it covers no text placed before and no
    point."""
    pixel = axes.transData.transform
    points = [pixel((x, y)) for x, y, _, _ in texts]
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in points]
    places = [(6, 3), (6, -11), (-6, 3), (-6, -11), (6, 14), (6, -22), (-6, 14), (-6, -22), (10, 25), (10, -33)]
    for (px, py), (x, y, text, color) in zip(points, texts, strict=True):
        width, height = 4.4 * len(text) * axes.figure.dpi / 100, 9.0
        for dx, dy in places:
            left = px + dx - (width if dx < 0 else 0)
            box = (left, py + dy, left + width, py + dy + height)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        taken.append(box)
        axes.annotate(
            text, (x, y), (dx, dy), textcoords="offset pixels", fontsize=6.5, color=color,
            ha="right" if dx < 0 else "left",
        )  # fmt: skip


def draw_histograms(before: Tensor, after: Mapping[str, Tensor], path: Path, *, title: str) -> None:
    """The values of a tensor before and after each of some quantizers, one panel a quantizer.

    `after` holds dequantized values. A quantizer with few levels is drawn as bars of the share of each level."""
    columns = min(3, len(after))
    rows = -(-len(after) // columns)
    limit = float(before.abs().float().quantile(0.999)) * 1.4
    with _figure(path, rows, columns, size=(3.6 * columns, 2.6 * rows + 0.4)) as grid:
        panels = list(grid.flat) if hasattr(grid, "flat") else [grid]
        for axes, (name, values) in zip(panels, after.items(), strict=False):
            axes.hist(before.flatten().float().numpy(), bins=160, range=(-limit, limit), color="#bbbbbb", density=True)
            levels, counts = values.flatten().float().unique(return_counts=True)
            twin = axes.twinx()
            if len(levels) <= 256:
                twin.bar(
                    levels.numpy(), counts.numpy(), width=limit / (80 if len(levels) < 40 else 300), color="#d62728"
                )
                note = f"{len(levels)} levels"
            else:
                twin.hist(
                    values.flatten().float().numpy(), bins=160, range=(-limit, limit), color="#d62728", density=True,
                    histtype="step",
                )  # fmt: skip
                note = f"{len(levels):,} values"
            twin.set_yticks([])
            axes.set_yticks([])
            axes.set_xlim(-limit, limit)
            axes.tick_params(labelsize=7)
            axes.set_title(f"{name}: {note}", fontsize=9)
        for axes in panels[len(after) :]:
            axes.set_axis_off()
        panels[0].figure.suptitle(title, fontsize=10)


def draw_layers(errors: Mapping[str, Sequence[float]], path: Path, *, title: str) -> None:
    """A curve for each method: its relative error behind every layer, on a logarithmic axis."""
    with _figure(path, size=(8, 5)) as axes:
        for index, (name, values) in enumerate(errors.items()):
            style = ("-", "--", ":", "-.")[index // 10 % 4]
            axes.plot(range(1, len(values) + 1), values, style, color=f"C{index % 10}", marker=".", lw=1.2, label=name)
        axes.set_yscale("log")
        axes.set(xlabel="behind layer", ylabel="relative error of the residual stream", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def sample_values(tensor: Tensor, count: int = 200_000) -> Tensor:
    """At most `count` evenly spaced entries of a tensor, flat: enough for a histogram."""
    flat = tensor.detach().flatten()
    return flat if len(flat) <= count else flat[torch.linspace(0, len(flat) - 1, count).long()]
