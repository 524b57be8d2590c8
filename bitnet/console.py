"""What is printed to a person: notes, progress, aligned tables; and streams that no character or closed pipe upsets.

Results go to standard output, everything else to standard error. Lines printed here appear above a progress bar.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, Generic, TextIO, TypeVar, cast

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
    lines: bool = True,
) -> "tqdm[T]":
    """A progress bar with rate and remaining time, on standard error where that is a terminal; elsewhere a line every
    `LINE_SECONDS`, or with `lines=False` nothing.

    items: what to go through, or None for a bar that is told of `total` units by `update(n)`; done: units of an
    earlier call; unit: "B" is counted in kB and MB; leave: keep the full bar on the screen.
    """
    from tqdm import tqdm

    if enabled and lines and not sys.stderr.isatty():
        return cast("tqdm[T]", _Lines(items, title or "progress", total, done, unit))
    columns, rows = _screen_size(sys.stderr)
    bar = tqdm(
        items,
        title,
        total,
        leave,
        ncols=columns,
        nrows=rows,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        disable=None if enabled else True,  # None: silent unless standard error is a terminal
    )
    bar.dynamic_ncols = _screen_size
    return bar


class _Lines(Generic[T]):
    """What the callers of `progress_bar` use of a bar, for a log: lines that are some seconds apart, and none of what
    takes less."""

    disable = True

    def __init__(self, items: Iterable[T] | None, title: str, total: int | None, done: int, unit: str) -> None:
        self.items, self.title, self.total, self.n, self.unit = items, title, total, done, unit
        if total is None and isinstance(items, Sized):
            self.total = len(items)
        self._lines = EveryFewSeconds()
        self._lines.due()  # the first line is not due at once
        self._started, self._first = time.perf_counter(), done

    def __iter__(self) -> Iterator[T]:
        for item in self.items or ():
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.n += count
        if not self._lines.due():
            return
        scale, unit = (1_000_000, " MB") if self.unit == "B" else (1, f" {self.unit.strip()}")
        line = f"{self.title}: {self.n // scale:,}" + (f" of {self.total // scale:,}" if self.total else "") + unit
        if self.total and self.n > self._first:
            seconds = time.perf_counter() - self._started
            line += f", {clock(seconds * (self.total - self.n) / (self.n - self._first))} left"
        say(line, sys.stderr)

    def set_description(self, title: str) -> None:
        self.title = title

    def set_postfix_str(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> "_Lines[T]":
        return self

    def __exit__(self, *error: object) -> None:
        pass


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


_failed: set[str] = set()


@contextlib.contextmanager
def only_for_looking(what: str) -> Iterator[None]:
    """Inside the block is what a person looks at and no result needs: where it fails, one warning says so, and the work
    goes on."""
    try:
        yield
    except Exception as failure:
        if what not in _failed:
            _failed.add(what)
            warn(f"{what} failed, and the work goes on without it: {type(failure).__name__}: {failure}")


class _Lasting:
    """A text stream that goes nowhere once it cannot be written, as when a pipe's reader has left or a disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _to_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_nowhere(stream: TextIO) -> None:
    # Its file, since what the stream still holds is written when the interpreter ends, and must not fail then either.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def _quiet_end() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _to_nowhere(sys.stdout)


@contextlib.contextmanager
def tolerant_streams(*, line_buffering: bool = False, lasting: bool = False) -> Iterator[None]:
    """Inside the block a character that a stream's encoding lacks is printed as "?". A reader of standard output that
    has had enough (as in `| head`) ends the block quietly, or with `lasting` nothing but the output: what the block
    makes is more than what it prints. With `line_buffering` a pipe sees every line at once."""
    for stream, options in ((sys.stdout, {"line_buffering": True} if line_buffering else {}), (sys.stderr, {})):
        with contextlib.suppress(AttributeError):  # a test's or an IDE's stream need not be a TextIOWrapper
            stream.reconfigure(errors="replace", **options)  # type: ignore[union-attr]
    # Messages about the work must never end it.
    with contextlib.redirect_stderr(cast("TextIO", _Lasting(sys.stderr))), contextlib.ExitStack() as stack:
        if lasting:
            stack.enter_context(contextlib.redirect_stdout(cast("TextIO", _Lasting(sys.stdout))))
        try:
            with _quiet_end():
                yield
        finally:  # behind --help too, which exits
            with _quiet_end():
                sys.stdout.flush()
