"""What is printed to a person: notes, progress, aligned tables; and streams that no character or closed pipe upsets.

Results go to standard output, everything else to standard error. Lines printed here appear above a progress bar.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal to show a bar on."""


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, above the progress bar if there is one; to standard output unless `file` is given."""
    file = sys.stdout if file is None else file
    if "tqdm" in sys.modules:  # else no bar has been shown, and its import can be saved
        sys.modules["tqdm"].tqdm.write(text, file=file)
    else:
        print(text, file=file)
    file.flush()


def note(message: str) -> None:
    """Something that the reader may want to know, on standard error."""
    say(f"note: {message}", sys.stderr)


def warn(message: str) -> None:
    """Something that the reader should look at, on standard error."""
    say(f"warning: {message}", sys.stderr)


def error(message: object) -> None:
    """Why the program ends or leaves something out, on standard error."""
    say(f"error: {message}", sys.stderr)


def stage(message: str) -> None:
    """The next part of some long work, with the time, on standard error."""
    say(f"{datetime.datetime.now():%H:%M:%S} {message}", sys.stderr)


def progress_bar(
    items: Iterable[T] | None = None,
    title: str | None = None,
    *,
    total: int | None = None,
    done: int = 0,
    unit: str = "it",
    enabled: bool = True,
    leave: bool = True,
) -> "tqdm[T]":
    """A progress bar with rate and remaining time, on standard error where that is a terminal; silent elsewhere.

    items: what to go through, or None for a bar that is told of `total` units by `update(n)`; done: units of an
    earlier call; unit: "B" is counted in kB and MB; leave: keep the full bar on the screen.
    """
    from tqdm import tqdm

    columns, lines = _screen_size(sys.stderr)
    bar = tqdm(
        items,
        title,
        total,
        leave,
        ncols=columns,
        nrows=lines,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        disable=None if enabled else True,  # None: silent unless standard error is a terminal
    )
    bar.dynamic_ncols = _screen_size
    return bar


def _screen_size(stream: TextIO) -> tuple[int, int]:
    """Columns and lines of a terminal, 80 and 24 where it does not tell; tqdm's own guess would then show nothing."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return 80, 24
    return columns or 80, lines or 24


class EveryFewSeconds:
    """Says when the next line of progress is due, where it stands for a bar."""

    def __init__(self, seconds: float = LINE_SECONDS) -> None:
        self.seconds, self.last = seconds, -float("inf")

    def due(self) -> bool:
        """True at the first call, and whenever so many seconds have passed since it last was."""
        now = time.perf_counter()
        if now - self.last <= self.seconds:
            return False
        self.last = now
        return True


def clock(seconds: float) -> str:
    """A time as minutes:seconds, as in "12:05"."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it, as in "3.5 hours"."""
    for size, unit in ((365 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def table(rows: Sequence[Sequence[str]], right: Collection[int] = (), *, indent: str = "") -> str:
    """Rows of as many cells each, in columns two spaces apart, those of `right` aligned to the right; no line ends in
    spaces."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if index in right else str.ljust for index in range(len(widths))]
    lines = (
        "  ".join(pad(*cell) for pad, cell in zip(pads, zip(row, widths, strict=True), strict=True)) for row in rows
    )
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


@contextlib.contextmanager
def tolerant_streams(*, line_buffering: bool = False) -> Iterator[None]:
    """Inside the block a character that the terminal lacks is printed as "?", and a reader that has had enough (as in
    `| head`) ends the block quietly. With `line_buffering` a pipe sees every line at once."""
    with contextlib.suppress(AttributeError):  # a test's or an IDE's stream need not be a TextIOWrapper
        options = {"line_buffering": True} if line_buffering else {}
        sys.stdout.reconfigure(errors="replace", **options)  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends; that must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
