"""Processes of this project that need no seconds for their imports: children of one that has imported everything."""

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import ROOT


@functools.cache
def _server(owner: int) -> subprocess.Popen[str]:
    """The process that forks, one for each process of the tests; it ends with the pipe from it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.forked_worker"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _line() -> Any:
    line = _server(os.getpid()).stdout.readline()
    assert line, "the process that forks has ended"
    return json.loads(line)


class Forked:
    """A running command, or group of processes, of which there may be one at a time."""

    def __init__(
        self, folder: Path, kill: float | None = None, *, bare: bool = False,
        environment: dict[str, str] | None = None, **request: Any,
    ) -> None:  # fmt: skip
        """request: `command`, a list as `bitnet` takes it, or `train ...` or `tokenize CORPUS TOKENIZER OUT`; `code` of
        Python, which with `bare` finds torch imported and nothing of this project; or `jobs` of
        tests/training/distributed_worker.py. For a group `processes`, their number; with `restarts` torchrun's agent
        runs a command in two, one of which dies. It is killed behind so many seconds."""
        self._texts = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._texts.name) / name for name in ("out", "err"))
        self._out.touch()
        self._err.touch()
        request |= {"folder": str(folder), "kill": kill, "out": str(self._out), "err": str(self._err)}
        request |= {"bare": bare, "environment": environment or {}}
        _server(os.getpid()).stdin.write(json.dumps(request) + "\n")
        self.children: list[int] = _line()
        self._end: tuple[list[int], float] | None = None

    def ended(self) -> bool:
        return self._end is not None or bool(select.select([_server(os.getpid()).stdout], [], [], 0)[0])

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Exit code, of several the first that is none of success, and what was written."""
        if self._end is None:
            self._end = _line()
        code = next(filter(None, self._end[0]), 0)
        return subprocess.CompletedProcess([], code, self._out.read_text(), self._err.read_text())

    @property
    def seconds(self) -> float:
        self.wait()
        return self._end[1]
