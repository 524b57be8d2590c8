"""The JSON beside weights, read with the kind of every field: the index of a run's checkpoints, the state of one."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from bitnet.files import JsonObject, is_plain_file, parse_json, read_json
from bitnet.records import Bounds, Form, checked, require_finite

__all__ = [
    "Bounds",
    "CheckpointError",
    "Count",
    "Form",
    "Index",
    "State",
    "StepName",
    "checked",
    "load_json",
    "load_record",
    "read_metrics",
    "require_finite",
]

T = TypeVar("T")
METRICS_LINE = 2**20  # characters

Count = Annotated[int, Bounds(0, 2**53)]
StepName = Annotated[str, Form(r"step-\d{8,16}", "the name of a checkpoint, like step-00000500")]


class CheckpointError(ValueError):
    """A model's file that is missing, damaged, or made for another model; the message says which and what to do."""


@dataclass
class Index:
    """The checkpoints of a run: checkpoints/index.json."""

    last: StepName | None = None
    best: StepName | None = None
    kept: Annotated[list[StepName], Bounds(0, 10_000)] = field(default_factory=list)
    """The newest ones, `last` in front."""
    removable: Annotated[list[StepName], Bounds(0, 10_000)] = field(default_factory=list)
    """What this run is about to write, or has written and names no more: nothing else in the folder may be removed."""

    def named(self) -> set[str]:
        return {name for name in (self.last, self.best, *self.kept) if name}


@dataclass(frozen=True)
class State:
    """How far a checkpoint's run was: state.json."""

    step: Count
    seconds: Annotated[float, Bounds(0, 1e12)] = 0.0
    best_loss: float | None = None
    """None for infinity, which JSON has no number for."""
    best_tokens: Count = 0
    """That `best_loss` is of, 0 in earlier versions."""
    data: Any = None
    """The feed's fingerprint."""
    teacher: str | None = None
    """The fingerprint of the model that the run learns from."""
    data_shift: Count = 0
    history: Annotated[list[tuple[float, float]], Bounds(0, 100_000)] = field(default_factory=list)


def load_json(path: Path) -> JsonObject:
    """A JSON object from a file. Raises CheckpointError, naming the file, where it is missing or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a run or checkpoint of this project?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def load_record(path: Path, kind: type[T]) -> T:
    """A JSON object from a file as a dataclass (bitnet/records.py). Raises CheckpointError, naming the file and the
    field, where it is missing, damaged or something else."""
    value = load_json(path)
    try:
        return checked(kind, value, str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_metrics(path: Path) -> list[JsonObject]:
    """Rows of a metrics.jsonl, `{"step": whole number, name: number, ...}` each, up to the first line that is none: a
    crash leaves half of one. None for numbers that are not finite; a missing file has no rows."""
    rows: list[JsonObject] = []
    if not is_plain_file(path):
        return rows
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in iter(lambda: file.readline(METRICS_LINE), ""):
            try:
                values = checked(dict[str, Any], parse_json(line), "row")
                finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
                checked(Count, finite.get("step"), "step")
                rows.append(checked(dict[str, float | None], finite, "row"))
            except ValueError:
                break
    return rows
