"""The table of a comparison: its rows, in Markdown and for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, field


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


COLUMNS = (
    "model", "bits", "stored", "file MB", "perplexity", "gap", "KL", "top-1", "prefill", "decode", "kernel", "MB",
    "quantize",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    perplexity = f"{row.perplexity:.2f} \u00b1 {row.perplexity_error:.2f}" if row.perplexity < 1e4 else ">10000"
    return [
        row.name, f"{row.bits:.2f}", f"{row.effective_bits:.2f}", f"{row.file_mb:.2f}", perplexity,
        f"{row.gap:+.4f} \u00b1 {row.gap_error:.4f}", f"{row.kl:.4f}",
        f"{row.top1:.1%}", number(row.prefill, ".0f"), number(row.decode, ".1f"), row.kernel,
        number(row.peak_mb, ".0f"), number(row.seconds, ".1f") + ("" if row.seconds is None else " s"),
    ]  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, in the order of the rows."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal(rows: Sequence[Row]) -> str:
    """The table in aligned columns."""
    lines = [list(COLUMNS), *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join(line.rstrip() for line in text)
