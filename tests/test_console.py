"""What is printed to a person: messages, progress, tables, and streams that refuse them."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet import console
from tests import ROOT


def test_a_table_aligns_its_columns_and_ends_no_line_in_spaces():
    rows = [["name", "bits", "note"], ["a", "10.50", ""], ["longer", "8", "x"]]
    lines = console.table(rows, right=[1], indent="> ").splitlines()
    assert lines == ["> name     bits  note", "> a       10.50", "> longer      8  x"]


def test_an_empty_table_is_empty():
    assert console.table([]) == ""
    assert console.table([["", ""]]) == ""


def test_a_table_of_rows_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        console.table([["a", "b"], ["c"]])


def test_messages_say_what_they_are_and_leave_standard_output_alone(capsys):
    console.note("one")
    console.warn("two")
    console.error(ValueError("three"))
    console.stage("four")
    console.say("five")
    captured = capsys.readouterr()
    assert captured.out == "five\n"
    *lines, last = captured.err.splitlines()
    assert lines == ["note: one", "warning: two", "error: three"]
    assert last[2] == last[5] == ":"
    assert last[8:] == " four"


def test_a_bar_is_silent_without_a_terminal_and_passes_its_items_on(capsys):
    assert list(console.progress_bar(range(3), "counting")) == [0, 1, 2]
    with console.progress_bar(total=10, done=4, unit="B") as bar:
        bar.update(6)
        assert bar.disable
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_stand_above_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with console.progress_bar(total=2, title="working") as bar:
        bar.update(1)
        console.warn("look")
    text = screen.getvalue()
    assert "working" in text
    assert "\rwarning: look\n" in text or "warning: look\n\r" in text
    off = Terminal()
    monkeypatch.setattr(sys, "stderr", off)
    list(console.progress_bar(range(3), enabled=False))
    assert off.getvalue() == ""


def test_lines_of_progress_are_some_seconds_apart(monkeypatch):
    now = 100.0
    monkeypatch.setattr(console.time, "perf_counter", lambda: now)
    timer = console.EveryFewSeconds(10)
    assert timer.due()
    assert not timer.due()
    now = 110.5
    assert timer.due()
    assert not timer.due()


def test_times_in_words():
    assert console.clock(725.9) == "12:05"
    assert console.duration(59) == "59 seconds"
    assert console.duration(600) == "10 minutes"
    assert console.duration(3 * 86400) == "3 days"


TALKER = """
from bitnet.console import tolerant_streams
with tolerant_streams():
    for number in range(100_000):
        print("\u2713", number)
print("done", file=__import__("sys").stderr)
"""


def test_a_closed_pipe_and_a_missing_character_end_nothing_with_a_traceback():
    with subprocess.Popen(
        [sys.executable, "-c", TALKER], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"? 0\n"
        child.stdout.close()
        assert child.stderr.read() == b"done\n"
    assert child.returncode == 0


def test_a_message_does_not_import_the_bar(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    console.note("x")
    assert "tqdm" not in sys.modules
    assert capsys.readouterr().err == "note: x\n"


def test_what_is_only_for_looking_fails_with_one_warning(capsys):
    for _ in range(3):
        with console.only_for_looking("the test's picture"):
            raise RuntimeError("no font")
    with console.only_for_looking("something else"):
        pass
    err = capsys.readouterr().err
    assert err == "warning: the test's picture failed, and the work goes on without it: RuntimeError: no font\n"
    with pytest.raises(KeyboardInterrupt), console.only_for_looking("x"):
        raise KeyboardInterrupt


LASTING = """
import sys
from pathlib import Path
from bitnet.console import note, tolerant_streams
with tolerant_streams(line_buffering=True, lasting=True):
    for i in range(20_000):
        print("a line \u00b1", i)
        note("\u00b1")
open(sys.argv[1], "w").write("made")
"""


@pytest.mark.parametrize("both", [False, True])
def test_work_that_lasts_outlives_its_readers(tmp_path, both):
    made = tmp_path / "made"
    child = subprocess.Popen(
        [sys.executable, "-c", LASTING, made],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.DEVNULL,
        env=dict(os.environ, PYTHONIOENCODING="ascii"),
    )
    assert child.stdout.readline() == b"a line ? 0\n"
    child.stdout.close()
    assert child.wait(300) == 0
    assert made.read_text() == "made"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_work_that_lasts_outlives_a_full_disk_under_its_output(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", LASTING, tmp_path / "made"], cwd=ROOT, stdout=full, stderr=full)
    assert done.returncode == 0
    assert (tmp_path / "made").read_text() == "made"
