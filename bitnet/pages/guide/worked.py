"""What several parts of the guide draw: numbers squeezed onto integers, bars of errors, vectors step by step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bitnet.pages.figure import COLORS, figure
from bitnet.pages.page import table


def text(value: float) -> str:
    """A number in at most four significant digits, without an exponent where it needs none."""
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"


def squeeze(x: Tensor, codes: Tensor, limits: tuple[int, int], alt: str) -> str:
    """A figure: the numbers x `[n]` on a line above, their integer codes on one below, joined."""

    def paint(axes: Any) -> None:
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        span = (high - low) or 1.0
        first, last = limits
        above = [(value - low) / span for value in x.tolist()]
        below = [(code - first) / (last - first) for code in codes.tolist()]
        axes.hlines([1, 0], 0, 1, color=COLORS["soft"], lw=1)
        steps = last - first
        if steps <= 32:
            axes.plot([i / steps for i in range(steps + 1)], [0] * (steps + 1), "|", color=COLORS["soft"], ms=7)
        for a, b in zip(above, below, strict=True):
            axes.plot([a, b], [1, 0], color=COLORS["accent"], lw=1, alpha=0.7)
        axes.plot(above, [1] * len(above), "o", color=COLORS["c2"], ms=5)
        axes.plot(below, [0] * len(below), "s", color=COLORS["c1"], ms=5)
        for place, y, labels in ((above, 1.06, x.tolist()), (below, -0.06, codes.tolist())):
            shown: list[float] = []
            for position, label in sorted(zip(place, labels, strict=True)):
                level = 1 if shown and position - shown[-1] < 0.09 else 0
                level = 2 if level and len(shown) > 1 and position - shown[-2] < 0.09 else level
                shown.append(position)
                shift = level * 0.14 * (1 if y > 0.5 else -1)
                align = "bottom" if y > 0.5 else "top"
                name = text(label) if isinstance(label, float) else str(label)
                axes.text(position, y + shift, name, ha="center", va=align, fontsize=8.5)
        axes.text(-0.04, 1, text(low), ha="right", va="center", fontsize=8.5, color=COLORS["soft"])
        axes.text(1.04, 1, text(high), ha="left", va="center", fontsize=8.5, color=COLORS["soft"])
        axes.text(-0.04, 0, str(first), ha="right", va="center", fontsize=8.5, color=COLORS["soft"])
        axes.text(1.04, 0, str(last), ha="left", va="center", fontsize=8.5, color=COLORS["soft"])
        axes.set(xlim=(-0.16, 1.16), ylim=(-0.55, 1.55))
        axes.set_axis_off()

    return figure(paint, alt, size=(5, 2.4))


def vector_table(title: str, x: Tensor, codes: Tensor, back: Tensor) -> str:
    """Every number of x `[n]` with its code, what it becomes again, and the error."""
    rows = [
        [text(a), int(q), text(b), text(a - b)]
        for a, q, b in zip(x.tolist(), codes.tolist(), back.tolist(), strict=True)
    ]
    return table(["value", "integer", "back again", "error"], rows, title=title)


def bars(values: Sequence[float], labels: Sequence[str], alt: str, *, ylabel: str = "error") -> str:
    """A figure: a bar each, with its number."""

    def paint(axes: Any) -> None:
        colors = [COLORS["c1"] if value < 0 else COLORS["accent"] for value in values]
        axes.bar(range(len(values)), values, color=colors, width=0.6)
        axes.axhline(0, color=COLORS["soft"], lw=1)
        axes.set_xticks(range(len(values)), labels)
        axes.set_ylabel(ylabel)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)

    return figure(paint, alt, size=(5, 2.4))
