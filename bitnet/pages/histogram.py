"""A tensor's values as a histogram, and what a quantizer makes of them over it."""

from typing import Any

from bitnet.evaluation.table import Distribution, Quantized
from bitnet.pages.figure import COLORS, figure


def histogram(found: Distribution, each: Quantized, alt: str, size: tuple[float, float] = (4.2, 2.3)) -> str:
    """A figure: grey what the values were; in color each level as high as its share, or how many values lie where."""

    def paint(axes: Any) -> None:
        edges = [found.low + (found.high - found.low) * i / len(found.counts) for i in range(len(found.counts) + 1)]
        axes.stairs(found.counts, edges, fill=True, color=COLORS["line"])
        axes.set_yticks([])
        levels = [level for level, _ in each.levels]
        axes.set_xlim(
            min([found.low, *(1.1 * level for level in levels)]), max([found.high, *(1.1 * x for x in levels)])
        )
        if not levels:
            axes.stairs(each.counts, edges, color=COLORS["c1"])
            return
        shares = [share for _, share in each.levels]
        twin = axes.twinx()
        twin.vlines(levels, 0, shares, color=COLORS["c1"], lw=1.4 if len(levels) > 3 else 3)
        twin.plot(levels, shares, "o", color=COLORS["c1"], ms=2.5)
        twin.set(ylim=(0, 1.25 * max(shares)), yticks=[])
        for level, share in each.levels if len(levels) <= 3 else ():
            twin.annotate(f"{share:.0%}", (level, share), (0, 4), textcoords="offset points", ha="center", fontsize=9)

    return figure(paint, alt, size=size)
