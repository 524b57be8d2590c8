"""A figure of matplotlib as SVG inside a page: in the page's colors and font, as wide as its place.

A color is drawn as the light one of `COLORS` and becomes the page's variable of that name, which the style sheet has
twice, for light and dark. Ids are made unique, so that many figures fit on one page; those of `gid` are left out and
stand as `data-gid`.
"""

import hashlib
import html
import re
from collections.abc import Callable
from typing import Any

from bitnet import plots

COLORS = {
    "text": "#1d2322", "soft": "#5b6462", "line": "#d5d2ca", "accent": "#1f5f5b", "back": "#fbfaf8",
    "c1": "#b3411e", "c2": "#2563a8", "c3": "#7a3f98", "c4": "#6b6a12", "c5": "#a8326e",
}  # fmt: skip
"""Names of the page's colors, and what stands for them in a drawing."""
_DRAWN = {
    **{color: f"var(--{name})" for name, color in COLORS.items()},
    **{color: f"var(--f{index})" for index, color in enumerate(plots.FAMILIES.values())},
    "#bbbbbb": "var(--soft)", "#b0b0b0": "var(--soft)", "#ffffff": "var(--back)", "#000000": "var(--text)",
}  # fmt: skip
SETTINGS = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": COLORS["soft"],
    "axes.labelcolor": COLORS["text"], "text.color": COLORS["text"], "xtick.color": COLORS["soft"],
    "ytick.color": COLORS["soft"], "xtick.labelcolor": COLORS["text"], "ytick.labelcolor": COLORS["text"],
    "axes.titlesize": 10, "axes.grid": False, "grid.color": COLORS["line"], "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.prop_cycle": f"cycler('color', {[COLORS[name] for name in ('accent', 'c1', 'c2', 'c3', 'c4', 'c5')]})",
}  # fmt: skip
SIZE = (5.0, 3.0)
"""Inches; a phone's width is about five of them, so letters keep their size there."""


def figure(
    paint: Callable[[Any], None],
    alt: str,
    *,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = SIZE,
    interactive: bool = False,
) -> str:
    """The SVG of what `paint(axes)` draws, for a page. alt: what it shows, in a sentence, for those who do not see it;
    interactive: its parts can be reached one by one, so it is no picture as a whole."""
    with plots.vector_figure(rows, columns, size, SETTINGS) as (axes, out):
        paint(axes)
    return _inline(out.getvalue(), alt, interactive)


def _inline(svg: str, alt: str, interactive: bool) -> str:
    """The SVG of matplotlib without its head, fixed size and colors."""
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body[body.index(">") + 1 :], flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    prefix = "s" + hashlib.sha256(body.encode()).hexdigest()[:8]

    def renamed(match: re.Match[str]) -> str:
        name = match[1]
        if name in used:
            return f' id="{prefix}{name}"'
        return f' data-gid="{name}"' if re.fullmatch(r"(point|border|mark).*", name) else ""

    body = re.sub(r' id="([^"]+)"', renamed, body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}', body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda match: _DRAWN.get(match[0], match[0]), body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    # Places need no more than hundredths of a point; letters between the tags stay as they are.
    body = re.sub(r"<[^>]+>", lambda match: re.sub(r"(\d+\.\d\d)\d+", r"\1", match[0]), body)
    body = re.sub(r">\s+<", "><", body)
    role = "group" if interactive else "img"
    return (
        f'<svg viewBox="0 0 {box[1]} {box[2]}" role="{role}" aria-label="{html.escape(alt)}" '
        f'style="--width:{float(box[1]) * 1.45:.0f}px">{body}'
    )
