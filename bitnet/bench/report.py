"""Tables of a benchmark on standard output, the same numbers in a JSON file, and the machine that they are of."""

import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bitnet.console import table
from bitnet.files import JsonObject, write_atomic
from bitnet.kernels.cpu import native
from bitnet.machine import cpu_capabilities

Value = str | float | None | list[str] | dict[str, float]
"""A number, a text, a `spread`, or None where nothing was measured."""
Row = dict[str, Value]


def describe_machine() -> JsonObject:
    """What a result was measured on, as every result's "machine": names of processor and GPU (None: none), cores and
    which of them this process may use (None: the system does not tell), torch's threads, instruction sets of the native
    kernels (best first), versions, and the time."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "cpu": cpu_capabilities().get("cpu_name", platform.machine()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "affinity": allowed,
        "threads": torch.get_num_threads(),
        "instruction_sets": native.instruction_sets(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def same_machine(one: JsonObject, other: JsonObject) -> bool:
    """Whether two descriptions are of one machine with one torch and as many threads, as far as both tell: earlier
    files had other fields, and the best instruction set alone as "isa"."""

    def told(about: JsonObject) -> JsonObject:
        return {"isa": next(iter(about.get("instruction_sets", ())), None), **about}

    names = ("cpu", "gpu", "cores", "threads", "isa", "torch")
    one, other = told(one), told(other)
    return all(one[name] == other[name] for name in names if name in one and name in other)


class Report:
    """Tables on standard output, and the same numbers in a JSON file that is written anew after every section.

    path: the file, or None for none; about: what the file says of machine and options.
    """

    def __init__(self, path: Path | None, about: Mapping[str, object]) -> None:
        self.path, self.notes = path, list[str]()
        self.results: dict[str, object] = dict(about)

    def section(self, key: str, title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
        """Print rows, one line each, and keep them under `key`; `columns` is the heading of each field."""
        self.results[key] = rows
        if rows:
            lines = [list(columns.values()), *([_text(row.get(name), name) for name in columns] for row in rows)]
            numbers = [i for i, name in enumerate(columns) if not isinstance(rows[0].get(name), str)]
            print(f"\n{title}\n{table(lines, right=numbers, indent='  ')}")
        self.save()

    def save(self) -> None:
        """Write everything so far, floats in five digits."""
        if self.path:
            text = json.dumps(self.results | {"notes": self.notes}, default=str)
            rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
            write_atomic(self.path, json.dumps(rounded, indent=1) + "\n")


def headings(text: str) -> dict[str, str]:
    """The columns of a table from "field, field: heading, ...": a field alone is its own heading."""
    columns = {}
    for part in text.split(","):
        field, _, heading = part.partition(":")
        columns[field.strip()] = heading.strip() or field.strip()
    return columns


def _text(value: Value, name: str) -> str:
    if isinstance(value, dict):
        middle, low, high = (_text(value[part], name) for part in ("median", "min", "max"))
        return middle if low == high else f"{middle} ({low}..{high})"
    if isinstance(value, float):
        if name.endswith("share"):
            return f"{value:.0%}"
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"  # three digits
    return "-" if value is None else str(value)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds of a measurement."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def share(value: float, limit: float | None) -> float | None:
    """The part of a limit that was reached, None where there is no limit."""
    return value / limit if limit else None
