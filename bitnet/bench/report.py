"""Tables of a benchmark on standard output, and the same numbers in a JSON file."""

import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bitnet.bench.plan import Plan
from bitnet.files import write_atomic
from bitnet.kernels.cpu import native
from bitnet.machine import cpu_capabilities

Row = dict[str, Any]


class Report:
    """Tables on standard output, and the same numbers in a JSON file that is written anew after every section."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.notes = plan.options.json, list[str]()
        machine = {
            "cpu": cpu_capabilities().get("cpu_name", platform.machine()), "cores": os.cpu_count(),
            "system": platform.platform(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "torch": torch.__version__, "threads": plan.threads, "instruction_sets": plan.isas,
            "instruction_sets_here": native.instruction_sets(),
        }  # fmt: skip
        self.results: dict[str, Any] = {"machine": machine, "options": dataclasses.asdict(plan.options)}
        print(f"{machine['cpu']}, {machine['cores']} cores | {machine['date']} | torch {torch.__version__}")
        print(f"{' '.join(plan.isas)} of {' '.join(native.instruction_sets()) or 'no native kernels'}")

    def section(self, key: str, title: str, rows: Sequence[Row], columns: dict[str, str]) -> None:
        """Print rows, one line each, and keep them under `key`; `columns` is the heading of each field."""
        self.results[key] = rows
        if rows:
            lines = [list(columns.values()), *([_text(row.get(name), name) for name in columns] for row in rows)]
            sides = ["<" if isinstance(rows[0].get(name), str) else ">" for name in columns]
            widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
            formats = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
            print(f"\n{title}")
            for line in lines:
                print("  " + "  ".join(map(format, line, formats)).rstrip())
        if self.path:
            text = json.dumps(self.results | {"notes": self.notes}, default=str)
            rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
            write_atomic(self.path, json.dumps(rounded, indent=1) + "\n")


def _text(value: Any, name: str) -> str:
    if isinstance(value, dict):
        middle, low, high = (_text(value[part], name) for part in ("median", "min", "max"))
        return middle if low == high else f"{middle} ({low}..{high})"
    if isinstance(value, float):
        if name.endswith("share"):
            return f"{value:.0%}"
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"  # three digits
    return "-" if value is None else str(value)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def share(value: float, limit: float | None) -> float | None:
    return value / limit if limit else None
