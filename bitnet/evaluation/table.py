"""The table of a comparison: its rows, for a terminal and in files."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitnet.console import table
from bitnet.files import write_atomic


@dataclass
class Row:
    """One model of the table. None where it was not measured."""

    name: str
    family: str
    bits: float
    """Bits of one weight of the projections, by the method's name."""
    effective_bits: float
    """The same with scales, zero points and padding, as stored."""
    file_mb: float
    perplexity: float
    perplexity_error: float
    gap: float
    gap_error: float
    kl: float
    top1: float
    kernel: str
    prefill: float | None = None
    """Tokens a second, 256 of them at once."""
    decode: float | None = None
    peak_mb: float | None = None
    """Memory that loading and running the model added to a process with torch in it."""
    seconds: float | None = None
    """Time to quantize; None for trained models."""
    layer_errors: list[float] = field(default_factory=list)
    """Relative error of the residual stream behind each layer, post-training methods only."""


@dataclass(frozen=True)
class Table:
    """What table.json holds."""

    settings: str
    """A sum of what all rows depend on."""
    context: int
    tokens: int
    rows: list[Row]


def cells(row: Row) -> dict[str, str]:
    """A row as text, by the headings of its columns."""

    def number(value: float | None, form: str, unit: str = "") -> str:
        return "" if value is None else format(value, form) + unit

    return {
        "model": row.name,
        "bits": f"{row.bits:.2f}",
        "stored": f"{row.effective_bits:.2f}",
        "file MB": f"{row.file_mb:.2f}",
        "perplexity": f"{row.perplexity:.2f} \u00b1 {row.perplexity_error:.2f}" if row.perplexity < 1e4 else ">10000",
        "gap": f"{row.gap:+.4f} \u00b1 {row.gap_error:.4f}",
        "KL": f"{row.kl:.4f}",
        "top-1": f"{row.top1:.1%}",
        "prefill": number(row.prefill, ".0f"),
        "decode": number(row.decode, ".1f"),
        "kernel": row.kernel,
        "MB": number(row.peak_mb, ".0f"),
        "quantize": number(row.seconds, ".1f", " s"),
    }


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, in the order of the rows."""
    heading, *lines = _grid(rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heading, ["---"] * len(heading), *lines])


def terminal(rows: Sequence[Row]) -> str:
    """The table in aligned columns."""
    grid = _grid(rows)
    return table(grid, right=range(1, len(grid[0])))


def _grid(rows: Sequence[Row]) -> list[list[str]]:
    """The headings, and the rows below them; there is at least one."""
    return [list(cells(rows[0])), *(list(cells(row).values()) for row in rows)]


def write(folder: Path, found: Table) -> None:
    """table.json, and where there are rows table.csv and table.md, in this folder, each replaced whole."""
    write_atomic(folder / "table.json", json.dumps(dataclasses.asdict(found), indent=1))
    if not found.rows:
        return
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in found.rows)
    write_atomic(folder / "table.csv", text.getvalue())
    write_atomic(folder / "table.md", markdown(found.rows))
