"""The page of a comparison, from its table.json alone: what to choose, quality against size and speed, errors by layer,
distributions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet import plots
from bitnet.evaluation.table import LEGEND, Distribution, Row, Table, cells, grid
from bitnet.files import write_atomic
from bitnet.pages.figure import figure
from bitnet.pages.histogram import histogram
from bitnet.pages.page import Section, caption, escape, frames, page, paragraph, side_by_side, table
from bitnet.storage.json_files import load_record

TABLE = "table.json"
CHARTS = {
    "file_mb": ("file, MB", "Perplexity against size", "smaller and better is to the lower left"),
    "decode": ("decode, tokens/s", "Perplexity against speed", "faster and better is to the lower right"),
}
CEILINGS = (1.05, 1.2, 1.6, math.inf)
"""Upper edges of the charts, in multiples of the best perplexity."""
START = 1
SHAPES = {"wide": (8.0, 4.8), "narrow": (4.4, 4.4)}
"""Inches of the charts on a desk and on a phone; the style sheet shows one of them."""


def read_table(path: Path) -> Table:
    """The table of a comparison: its folder, or its table.json. Raises ValueError for anything else."""
    path = path / TABLE if path.is_dir() else path
    return load_record(path, Table)


def write_report(path: Path, found: Table) -> None:
    """Write the page. Raises ValueError for a table without rows."""
    write_atomic(path, report(found))


def report(found: Table) -> str:
    """The page, as HTML. Raises ValueError for a table without rows."""
    rows = found.rows
    if not rows:
        raise ValueError("the comparison has no rows yet; run bitnet compare again, it goes on where it was")
    charts = {column: [index for index, row in enumerate(rows) if getattr(row, column)] for column in CHARTS}
    sections = [Section("choose", "What would I choose?", _choice(rows))]
    for column, indices in charts.items():
        if indices:
            sections.append(Section(column, CHARTS[column][1], _chart([rows[i] for i in indices], column)))
    sections.append(Section("table", "Every number", _numbers(rows)))
    if any(row.layer_errors for row in rows):
        sections.append(Section("layers", "Errors by layer", _layers(rows)))
    if found.distributions:
        body = "".join(_distribution(each) for each in found.distributions)
        sections.append(Section("distributions", "What becomes of the values", body))
    best = min(rows, key=lambda row: row.perplexity)
    intro = paragraph(
        f"{len(rows)} models, measured on the same {found.tokens:,} held-out tokens in windows of {found.context}. "
        f"Best perplexity: {best.name}, {best.perplexity:.2f}. Smallest file: {_smallest(rows)}."
    ) + _filters(rows)
    data = {"rows": [_facts(row) for row in rows], "charts": charts, "lower": {"file_mb": True, "decode": False}}
    return page("Quantization methods on one model", intro, sections, script="report.js", data=data)


def _smallest(rows: Sequence[Row]) -> str:
    row = min(rows, key=lambda row: row.file_mb)
    return f"{row.name}, {row.file_mb:.2f} MB"


def _families(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.family for row in rows))


def _color(family: str) -> str:
    return f"var(--f{list(plots.FAMILIES).index(family)})"


def _filters(rows: Sequence[Row]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" class="family" value="{escape(family)}" checked>'
        f'<i style="background:{_color(family)}"></i>{escape(family)}</label>'
        for family in _families(rows)
    )
    return f"<fieldset><legend>Show these families, everywhere on this page</legend>{boxes}</fieldset>"


def _facts(row: Row) -> dict[str, Any]:
    """What the script needs of a row: numbers as they are, and the cells of the table as text."""
    numbers = {name: getattr(row, name) for name in ("file_mb", "decode", "perplexity", "gap", "gap_error")}
    return {"name": row.name, "family": row.family, "cells": cells(row), **numbers}


def _choice(rows: Sequence[Row]) -> str:
    def slider(name: str, label: str, values: Sequence[float], texts: Sequence[str], start: int) -> str:
        return (
            f'<div class="control"><label for="{name}">{label}: <output for="{name}">{texts[start]}</output></label>'
            f'<input type="range" id="{name}" min="0" max="{len(values) - 1}" value="{start}" '
            f'aria-valuetext="{texts[start]}" data-values="{",".join(f"{value:.17g}" for value in values)}" '
            f'data-texts="{"|".join(texts)}"></div>'
        )

    sizes = sorted({row.file_mb for row in rows})
    body = slider("budget", "The file may have at most", sizes, [f"{size:.4g} MB" for size in sizes], len(sizes) // 3)
    if speeds := sorted({row.decode for row in rows if row.decode}):
        texts = ["any speed", *(f"{speed:,.0f} tokens/s" for speed in speeds)]
        body += slider("speed", "It must write at least", [0.0, *speeds], texts, 0)
    return body + '<div class="choice" id="choice" role="status"></div>'


def _chart(rows: Sequence[Row], column: str) -> str:
    xlabel, title, hint = CHARTS[column]
    lower = column == "file_mb"
    points = [
        plots.Point(
            row.name, row.family, getattr(row, column), row.perplexity, row.perplexity * row.gap_error,
            hollow=row.kernel == "dequantizes",
        )
        for row in rows
    ]  # fmt: skip
    best = min(row.perplexity for row in rows)
    # Each edge once: where all are close together, the wider ones show nothing more.
    worst = max(row.perplexity for row in rows) / best
    ceilings = [edge for index, edge in enumerate(CEILINGS) if index == 0 or CEILINGS[index - 1] < worst]
    entries = []
    for ceiling in ceilings:

        def paint(axes: Any, ceiling: float = ceiling) -> None:
            plots.scatter(axes, points, xlabel=xlabel, lower_is_better=lower, ceiling=min(ceiling, 1e9), text=8)
            if axes.get_ylim()[1] > 20 * best:
                axes.set_yscale("log")

        edge = min(ceiling, worst) * best
        name = "all" if ceiling >= worst else f"up to {ceiling:g} times the best"
        pictures = ""
        for shape, size in SHAPES.items():
            picture = figure(paint, f"{title}: {len(rows)} models", size=size, interactive=True)
            pictures += f'<div class="chart {shape}" data-chart="{column}" data-edge="{edge:.17g}">{picture}</div>'
        entries.append((name, pictures))
    start = min(START, len(entries) - 1)
    note = (
        f"Each point is a model; {hint}. The line joins what nothing beats in both. Bars: standard error of the "
        "difference to the float model. Hollow: weights are unpacked to floats before they are multiplied. Triangles "
        "at the upper edge lie above it. Point at a model for its numbers, or go through them with the arrow keys."
    )
    return caption(frames(f"zoom-{column}", "Perplexity shown", entries, start=start), note)


def _numbers(rows: Sequence[Row]) -> str:
    headings, *lines = grid(rows)
    return paragraph(f"{LEGEND} A heading sorts.") + _by_family(
        table(headings, lines, title="All models and what was measured"), rows
    )


def _by_family(html: str, rows: Sequence[Row]) -> str:
    """A table whose rows, in this order, know their families."""
    start, heading, *lines = html.split("<tr>")
    tagged = [f'<tr data-family="{escape(row.family)}">{line}' for row, line in zip(rows, lines, strict=True)]
    return f"{start}<tr>{heading}{''.join(tagged)}"


def _layers(rows: Sequence[Row]) -> str:
    shown = sorted((row for row in rows if row.layer_errors), key=lambda row: row.layer_errors[-1])
    values = [max(error, 1e-6) for row in shown for error in row.layer_errors]
    low, high = math.log(min(values)), math.log(max(values))

    def cell(error: float) -> str:
        share = (math.log(max(error, 1e-6)) - low) / ((high - low) or 1)
        mix = f"color-mix(in srgb, var(--heat) {100 * share:.0f}%, var(--back))"
        return f'<td class="heat" style="background:{mix}">{error:.2g}</td>'

    layers = len(shown[0].layer_errors)
    head = "".join(f'<th scope="col">{index}</th>' for index in range(1, layers + 1))
    body = "".join(
        f'<tr data-family="{escape(row.family)}"><th scope="row">{escape(row.name)}</th>'
        f"{''.join(map(cell, row.layer_errors))}</tr>"
        for row in shown
    )
    title = "Relative error of the residual stream behind each layer, the best method on top"
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{title}"><table><caption>{title}</caption>'
        f'<thead><tr><th scope="col">behind layer</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _distribution(found: Distribution) -> str:
    parts = []
    for each in found.after:
        levels = f"{len(each.levels)} levels, " if each.levels else ""
        note = each.note or f"{levels}{each.zeros:.1%} zeros"
        picture = histogram(found, each, f"{found.tensor}, as {each.name}: {note}")
        parts.append(caption(picture, f"{each.name}: {note}"))
    text = "Grey: the float values. In color: each level as high as its share of the values, or how many lie where."
    return f"<h3>{escape(found.tensor)}</h3>{paragraph(text)}{side_by_side(*parts)}"
