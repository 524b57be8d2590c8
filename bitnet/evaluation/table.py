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
    """One model of the table, and the columns of table.json and table.csv. None where it was not measured."""

    name: str
    family: str
    """float, weight-only, weights and activations, gguf, native (trained like that), or cache (keys and values)."""
    bits: float
    """Bits of one weight of the projections, by the method's name."""
    effective_bits: float
    """The same with scales, zero points and padding, as stored."""
    file_mb: float
    """Size of model.safetensors, 10^6 bytes."""
    perplexity: float
    perplexity_error: float
    """Standard error, over windows of the held-out text."""
    gap: float
    """Loss above the float model's, nats a token."""
    gap_error: float
    """Standard error of the gap, from the windows in pairs."""
    kl: float
    """Mean KL divergence from the float model, nats a token."""
    top1: float
    """Share of tokens whose likeliest successor is the float model's."""
    kernel: str
    """What multiplies the projections."""
    prefill: float | None = None
    """Tokens a second, 256 of them at once."""
    decode: float | None = None
    """Tokens a second, one at a time."""
    peak_mb: float | None = None
    """Memory that loading and running the model added to a process with torch in it."""
    seconds: float | None = None
    """Time to quantize; None for trained models."""
    layer_errors: list[float] = field(default_factory=list)
    """Relative error of the residual stream behind each layer, post-training methods only."""
    cache_bits: float | None = None
    """Bits of a key's or value's number in the cache, scales included, where that is quantized (family cache)."""
    cache_mb: float | None = None
    """Keys and values that a decoding step reads behind the longest text (2,048 tokens, or as many as the model takes),
    10^6 bytes. Of the float model and of family cache: all others have the float model's cache."""
    far_decode: float | None = None
    """Tokens a second there, one at a time."""
    whole_bits: float | None = None
    """Bits of everything that is stored (embedding, head, norms, scales) for each parameter of the float model."""
    cloze: float | None = None
    """Accuracy on a task of our own (`bitnet/evaluation/tasks.py`), 0 to 1: last words of held-out sentences."""
    cloze_error: float | None = None
    """Standard error of an accuracy, over the questions."""
    grammar: float | None = None
    """The same: minimal pairs of grammar."""
    grammar_error: float | None = None
    definitions: float | None = None
    """The same: definitions of WordNet, by four choices."""
    definitions_error: float | None = None


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of the values of a `Distribution`."""

    name: str
    note: str
    zeros: float
    """Share of the values that became 0."""
    levels: list[tuple[float, float]]
    """Values and their shares, where there are at most 40; empty otherwise."""
    counts: list[int]
    """Values in each bin of the distribution, where there are more levels; empty otherwise."""


@dataclass(frozen=True)
class Distribution:
    """A histogram of some tensor, in bins of equal width from `low` to `high`, and what quantizers make of it."""

    tensor: str
    low: float
    high: float
    counts: list[int]
    after: list[Quantized]


@dataclass(frozen=True)
class Table:
    """What table.json holds."""

    settings: str
    """A sum of what all rows depend on."""
    context: int
    tokens: int
    rows: list[Row]
    distributions: list[Distribution] = field(default_factory=list)
    """Weights and activations of the float model, measured when all rows were there."""
    runs: dict[str, str | None] = field(default_factory=dict)
    """Sums of the weights that rows of trained models were measured with."""


_OPTIONAL = ("whole", "cloze", "grammar", "definitions", "cache MB", "far decode")
LEGEND = (
    "bits: of a code; stored: with scales; whole: of all that is stored, a parameter. gap: loss above the float "
    "model's, nats; KL and top-1 against it too. cloze, grammar, definitions: right answers in tasks of our own. "
    "prefill, decode: tokens/s. MB: memory of the running model. cache MB, far decode: keys and values behind the "
    "longest text (at most 2,048 tokens), and tokens/s there; where they are empty, the cache is that of float32."
)
"""What the headings mean."""


def cells(row: Row) -> dict[str, str]:
    """A row as text, by the headings of its columns."""

    def number(value: float | None, form: str, unit: str = "") -> str:
        return "" if value is None else format(value, form) + unit

    return {
        "model": row.name,
        "bits": f"{row.bits:.2f}",
        "stored": f"{row.effective_bits:.2f}",
        "whole": number(row.whole_bits, ".2f"),
        "file MB": f"{row.file_mb:.2f}",
        "perplexity": f"{row.perplexity:.2f} \u00b1 {row.perplexity_error:.2f}" if row.perplexity < 1e4 else ">10000",
        "gap": f"{row.gap:+.4f} \u00b1 {row.gap_error:.4f}",
        "KL": f"{row.kl:.4f}",
        "top-1": f"{row.top1:.1%}",
        "cloze": number(row.cloze, ".1%"),
        "grammar": number(row.grammar, ".1%"),
        "definitions": number(row.definitions, ".1%"),
        "prefill": number(row.prefill, ".0f"),
        "decode": number(row.decode, ".1f"),
        "kernel": row.kernel,
        "MB": number(row.peak_mb, ".0f"),
        "cache MB": number(row.cache_mb, ".3g"),
        "far decode": number(row.far_decode, ".1f"),
        "quantize": number(row.seconds, ".1f", " s"),
    }


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, in the order of the rows."""
    heading, *lines = grid(rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heading, ["---"] * len(heading), *lines])


def terminal(rows: Sequence[Row]) -> str:
    """The table in aligned columns."""
    lines = grid(rows)
    return table(lines, right=range(1, len(lines[0])))


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """The headings, and the rows below them, at least one; an optional column only where it has a value."""
    lines = [cells(row) for row in rows]
    headings = [name for name in lines[0] if name not in _OPTIONAL or any(line[name] for line in lines)]
    return [headings, *([line[name] for name in headings] for line in lines)]


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
