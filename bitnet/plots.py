"""Every picture of the project, as PNG files or as SVG for a page: matplotlib is imported here and nowhere else."""

import io
import os
import warnings
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
    "cache": "#8c6d1f",
}
"""The families of methods and their colors, the same in all pictures."""
MARKERS = "osDPXvph*"
"""Shapes of the families' points, for those who tell colors badly."""


@contextmanager
def _figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.2)) -> Iterator[Any]:
    """The axes of a new figure (an array of them for several), written to `path` as a PNG at the end."""
    with _canvas(rows, columns, size, {}) as (canvas, axes):
        yield axes
        canvas.print_png(path)


@contextmanager
def vector_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (5, 3.2), settings: Mapping[str, Any] | None = None
) -> Iterator[tuple[Any, io.StringIO]]:
    """The axes of a new figure (an array of them for several), and what holds its SVG at the end.

    Letters stay letters, in the font of the page that the SVG is put into; what was drawn with a `gid` has it as its
    id; the same drawing has the same bytes. settings: of matplotlib, in the place of its defaults.
    """
    own = {"svg.fonttype": "none", "svg.hashsalt": "bitnet"} | dict(settings or {})
    with _canvas(rows, columns, size, own) as (canvas, axes):
        out = io.StringIO()
        yield axes, out
        canvas.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})


@contextmanager
def _canvas(rows: int, columns: int, size: tuple[float, float], settings: Mapping[Any, Any]) -> Iterator[Any]:
    """A new figure's canvas, and its axes, under the default settings of matplotlib but for these."""
    # A notebook's MPLBACKEND may be one that this process lacks, and its matplotlibrc another font or LaTeX.
    with _environment(MPLBACKEND="agg"):
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    own = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    # Names of runs and methods are names, whatever "$" is in them. A letter that the font lacks becomes a box.
    with _without_warnings(), matplotlib.rc_context(own | {"text.parse_math": False, **settings}):
        canvas = FigureCanvasAgg(Figure(figsize=size, layout="constrained"))
        yield canvas, canvas.figure.subplots(rows, columns)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def draw_loss(runs: dict[str, list[dict[str, float]]], path: Path, *, switch: tuple[int, int] | None = None) -> None:
    """Training and validation loss over steps for one or several runs, as a PNG; `switch` are the steps at which the
    quantizers begin to count and from which they count in full."""
    with _figure(path) as axes:
        last = max((row["step"] for rows in runs.values() for row in rows), default=0)
        if switch is not None and switch[0] <= last:
            begin, full = switch
            if full > begin:
                axes.axvspan(begin, min(full, last), color="#bbbbbb", alpha=0.3, lw=0, label="quantizers fade in")
            else:
                axes.axvline(begin, color="#888888", lw=1, ls="--", label="float before, quantized from here")
        for index, (name, rows) in enumerate(runs.items()):
            color = f"C{index}"
            training = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
            validation = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
            axes.plot(*zip(*training, strict=True), color=color, alpha=0.35, lw=1) if training else None
            if validation:
                axes.plot(*zip(*validation, strict=True), "o-", color=color, ms=4, label=f"{name}, validation")
                axes.annotate(
                    f"{validation[-1][1]:.3f}",
                    validation[-1],
                    (0, 8 - 20 * (index % 2)),
                    textcoords="offset points",
                    ha="right",
                    color=color,
                )
        axes.margins(y=0.08)
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
    hollow: bool = False
    """Draw a ring instead of a dot."""


def draw_scatter(
    points: Sequence[Point],
    path: Path,
    *,
    xlabel: str,
    title: str,
    ylabel: str = "perplexity",
    lower_is_better: bool = True,
) -> None:
    """Methods over a logarithmic x, low (or high, if not `lower_is_better`) x and low y being best, with the border
    that nothing beats.

    Methods whose y lies above 1.6 times the best are drawn at the upper edge with an arrow and their value: one
    broken method must not flatten the differences between the others. Names that find no room are left out, those of
    methods inside the border first.
    """
    with _figure(path, size=(9, 6)) as axes:
        axes.set_title(title, fontsize=10)
        scatter(axes, points, xlabel=xlabel, ylabel=ylabel, lower_is_better=lower_is_better)
        axes.figure.set_layout_engine("none")  # it was laid out for the names


def scatter(
    axes: Any,
    points: Sequence[Point],
    *,
    xlabel: str,
    ylabel: str = "perplexity",
    lower_is_better: bool = True,
    ceiling: float = 1.6,
    text: float = 6.5,
) -> None:
    """What `draw_scatter` draws, on these axes. ceiling: the upper edge, in multiples of the best y; text: size of the
    names, pt. The gid of the i-th point is `point-i`, of its bar and its name `mark-i`, of the border `border`."""
    edge = min(ceiling * min(point.y for point in points), max(point.y for point in points))
    axes.set_xscale("log")
    # The legend shows the first point of each family, one with a value if there is one.
    shown: dict[str, Point] = {}
    for point in sorted(points, key=lambda p: p.y > edge):
        shown.setdefault(point.family, point)
    for index, point in enumerate(points):
        color = FAMILIES[point.family]
        drawn = axes.errorbar(
            point.x,
            min(point.y, edge),
            # At the edge stands an arrow in the place of a value, which has no bar.
            yerr=point.error if point.y <= edge else 0,
            fmt=MARKERS[list(FAMILIES).index(point.family) % len(MARKERS)] if point.y <= edge else "^",
            color=color,
            ms=5,
            lw=1,
            capsize=2,
            markerfacecolor="white" if point.hollow else color,
            label=point.family if shown[point.family] is point else None,
        )
        line, caps, bars = drawn.lines
        line.set_gid(f"point-{index}")
        for part in (*caps, *bars):
            part.set_gid(f"mark-{index}")
    border = front(points, edge, lower_is_better)
    axes.plot([p.x for p in border], [p.y for p in border], color="#bbbbbb", lw=1, zorder=0, gid="border")
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=max(8.0, text))
    axes.figure.draw_without_rendering()  # the final limits and sizes, for placing the names
    important = sorted(
        enumerate(points), key=lambda e: (e[1] not in border, e[1].family not in ("native", "float"), e[1].y)
    )
    _place_names(axes, [(f"mark-{index}", p, min(p.y, edge)) for index, p in important], text)


def draw_speed(points: Sequence[Point], path: Path, *, title: str, bits_per_second: float) -> None:
    """Tokens a second over bits a weight, both logarithmic, with what reading allows: `bits_per_second` of one weight.
    Rings are formats with the activations that they take by themselves, INT16 or floats; dots with INT8."""
    with _figure(path, size=(10, 6.5)) as axes:
        axes.set_title(title, fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel="bits read per weight, scales included", ylabel="tokens/s")
        ends = [min(point.x for point in points) / 1.1, max(point.x for point in points) * 1.1]
        axes.plot(ends, [bits_per_second / x for x in ends], color="#bbbbbb", lw=1, label="what reading allows")
        seen = set[tuple[str, bool]]()
        for point in points:
            color, kind = FAMILIES[point.family], (point.family, point.hollow)
            axes.plot(
                point.x,
                point.y,
                MARKERS[list(FAMILIES).index(point.family) % len(MARKERS)],
                color=color,
                ms=5,
                markerfacecolor="white" if point.hollow else color,
                label=None
                if kind in seen
                else f"{point.family}{', INT16 or float activations' if point.hollow else ''}",
            )
            seen.add(kind)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=8)
        axes.figure.draw_without_rendering()  # the final limits and sizes, for placing the names
        named = sorted(points, key=lambda point: (point.family != "native", point.hollow, -point.y))
        _place_names(axes, [("", point, point.y) for point in named], 6.5)
        axes.figure.set_layout_engine("none")  # it was laid out for the names


def front(points: Sequence[Point], edge: float, lower_is_better: bool) -> list[Point]:
    """The points up to `edge` that no other beats in both x and y, from the best x on."""
    border: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x if lower_is_better else -p.x, p.y)):
        if point.y <= edge and (not border or point.y < border[-1].y):
            border.append(point)
    return border


def _place_names(axes: Any, points: Sequence[tuple[str, Point, float]], size: float) -> None:
    """Write each name beside its point (at the given y) under the given gid, at the first of some places where it
    covers no point and no name placed before, and not at all where there is none."""
    renderer = axes.figure.canvas.get_renderer()
    pixels = [axes.transData.transform((p.x, y)) for _, p, y in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in pixels]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer).extents)
    edges = axes.bbox.extents
    points_per_pixel = 72 / axes.figure.dpi  # an SVG is drawn with other pixels than those of the renderer
    for gid, point, y in points:
        text = axes.annotate(
            f"{point.name} \u2191{point.y:.3g}" if point.y > y else point.name,
            (point.x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=size,
            color=FAMILIES[point.family],
            gid=gid,
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        text.set_in_layout(False)
        for dx, dy in ((d, e) for e in (2, -10, 12, -20) for d in (7, -7 - width, -width / 2)):
            if abs(dy) < 8 and -7 - width < dx < 0:
                continue  # centered on the point itself
            left, bottom = extent.x0 + dx, extent.y0 + dy
            right, top = left + width, bottom + height
            inside = edges[0] < left and right < edges[2] and edges[1] < bottom and top < edges[3]
            if inside and not any(left < b[2] and b[0] < right and bottom < b[3] and b[1] < top for b in taken):
                taken.append((left, bottom, right, top))
                text.set_position((dx * points_per_pixel, dy * points_per_pixel))
                break
        else:
            text.remove()


def draw_histograms(
    before: Tensor,
    after: Mapping[str, Tensor],
    path: Path,
    *,
    title: str,
    notes: Mapping[str, str] | None = None,
    log: bool = False,
) -> None:
    """The values of a tensor before and after each of some quantizers, one panel a quantizer; `log` shows the tails.

    `after` holds dequantized values. A quantizer with few levels is drawn as a line at each level, as high as its share
    of the values; one with many as the outline of a density. `notes` stand behind the names; unless given, how many
    values there are and how many of them are 0.
    """
    columns = min(3, len(after))
    rows = -(-len(after) // columns)
    values = before.flatten().float()
    limit = (float(values.abs().quantile(0.999)) or float(values.abs().max()) or 1.0) * 1.4
    with _figure(path, rows, columns, size=(3.6 * columns, 2.6 * rows + 0.4)) as grid:
        panels = list(grid.flat) if hasattr(grid, "flat") else [grid]
        for axes, (name, quantized) in zip(panels, after.items(), strict=False):
            quantized = quantized.flatten().float()
            levels, counts = quantized.unique(return_counts=True)
            shares = counts / len(quantized)
            # One outline: a patch for each bin takes three times as long to lay out and draw.
            axes.hist(
                values.numpy(), bins=160, range=(-limit, limit), color="#bbbbbb", density=True, histtype="stepfilled"
            )
            twin = axes.twinx()
            for each in (axes, twin):
                each.set_yscale("log" if log else "linear")
                each.set_yticks([], minor=False)
                each.set_yticks([], minor=True)
            if len(levels) <= 40:
                twin.vlines(levels.numpy(), 0 if not log else float(shares.min()) / 2, shares.numpy(), color="#d62728")
                twin.plot(levels.numpy(), shares.numpy(), "o", color="#d62728", ms=3)
                twin.set_ylim(float(shares.min()) / 2 if log else 0, float(shares.max()) * 1.2)
                if len(levels) <= 3:
                    for level, share in zip(levels.tolist(), shares.tolist(), strict=True):
                        place = (float(level), float(share))
                        twin.annotate(f"{share:.0%}", place, (4, 2), textcoords="offset points", fontsize=7)
                axes.set_xlim(min(-limit, 1.1 * float(levels.min())), max(limit, 1.1 * float(levels.max())))
            else:
                twin.hist(
                    quantized.numpy(),
                    bins=160,
                    range=(-limit, limit),
                    color="#d62728",
                    density=True,
                    histtype="step",
                )
                axes.set_xlim(-limit, limit)
            zeros = float((quantized == 0).float().mean())
            note = f"{len(levels):,} values, {zeros:.1%} zeros" if notes is None else notes[name]
            axes.tick_params(labelsize=7)
            axes.set_title(f"{name}: {note}", fontsize=9)
        for axes in panels[len(after) :]:
            axes.set_axis_off()
        panels[0].figure.suptitle(title, fontsize=10)


def draw_layers(errors: Mapping[str, Sequence[float]], path: Path, *, title: str) -> None:
    """A row for each method, the best one on top: its relative error behind every layer as a color, the last one as a
    number too."""
    from matplotlib.colors import LogNorm

    rows = sorted(errors.items(), key=lambda item: item[1][-1])
    values = torch.tensor([row for _, row in rows]).clamp_min(1e-6).numpy()  # a logarithm is drawn
    layers = values.shape[1]
    # The bar needs a height that its numbers find room in, however few the rows are.
    size = (max(5.0, min(10.0, 2.5 + 0.3 * layers)), max(2.6, 1.2 + 0.17 * len(rows)))
    with _figure(path, size=size) as axes:
        image = axes.imshow(values, aspect="auto", cmap="viridis", norm=LogNorm())
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
        axes.set_xticks(range(0, layers, max(1, layers // 10)), range(1, layers + 1, max(1, layers // 10)))
        for index, (_, row) in enumerate(rows):
            axes.text(layers - 0.4, index, f"{row[-1]:.2g}", va="center", fontsize=7)
        axes.set_xlabel("behind layer")
        axes.set_title(title, fontsize=9)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.12)
        low, high = float(values.min()), float(values.max())
        # Ticks of our own: few enough for any height, and without the mathematical text of a logarithmic axis.
        ticks = sorted({low, (low * high) ** 0.5, high})
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks], fontsize=7)
        bar.minorticks_off()


def sample_values(tensor: Tensor, count: int = 200_000) -> Tensor:
    """At most `count` evenly spaced entries of a tensor, flat: enough for a histogram."""
    flat = tensor.detach().flatten()
    return flat if len(flat) <= count else flat[torch.linspace(0, len(flat) - 1, count).long()]


def png_bytes(pixels: Tensor) -> bytes:
    """A picture `[height, width, 3]` of values from 0 to 1 as a PNG."""
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, pixels.clamp(0, 1).numpy(), format="png")
    return out.getvalue()
