"""What programs and expressions that come with a model compute, in a process that is ended where they do not end: see
bitnet/tokenizer/limited_worker.py.

A process serves all requests of its kind of a program. It starts with the first one, in a tenth of a second, and ends
with the program.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet.tokenizer import limited_worker

CLOCK = 30.0
"""Seconds by the clock, more than those of the processor, behind which a process is ended that the system has not
ended: it is asleep, or this is Windows, where processor time has no limit."""


class OverLimitError(Exception):
    """A request took more time or memory than it may."""


class LimitedProcess:
    """The process, one request at a time; a forked child has its own."""

    def __init__(self, program: str, packages: Sequence[str], memory: int, wanted: str) -> None:
        """program: the file with `prepare`; packages: that it imports; memory: bytes it may have in all; wanted: what
        is said where it does not start, before the reason."""
        self._program, self._packages, self._memory, self._wanted = program, packages, memory, wanted
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """The answer to a request, which JSON must be able to say. Raises OverLimitError where it takes more than so
        many seconds of processor time, or too much memory; ValueError where the process does not start; TypeError for
        requests of other kinds."""
        line = json.dumps({**request, "seconds": seconds}).encode()
        with self._lock:
            for attempt in range(2):
                process = self._process or self._start()
                clock = threading.Timer(seconds + CLOCK, process.kill) if os.name == "nt" else None
                try:
                    if clock:
                        clock.start()
                    assert process.stdin is not None
                    assert process.stdout is not None
                    process.stdin.write(line + b"\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
                    if answer.endswith(b"\n"):
                        reply: dict[str, Any] = json.loads(answer)
                        return reply
                except BrokenPipeError:  # it was ended from outside since the last answer
                    if attempt == 0:
                        self._end()
                        continue
                except BaseException:  # Ctrl-C: its answer must not be taken for that of the next request
                    self._end()
                    raise
                finally:
                    if clock:
                        clock.cancel()
                self._end()
                break
        raise OverLimitError

    def _start(self) -> subprocess.Popen[bytes]:
        keep = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # which Windows' Python needs
        specs = [importlib.util.find_spec(name) for name in self._packages]
        places = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
        program = [limited_worker.__file__, self._program, json.dumps(places), str(self._memory)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", *program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=keep,
        )  # fmt: skip
        assert process.stdout is not None
        greeting = json.loads(process.stdout.readline() or b'{"missing": "Python did not start"}')
        if "missing" in greeting:
            process.kill()
            process.wait()
            raise ValueError(self._wanted.format(greeting["missing"]))
        self._process = process
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def _forget(self) -> None:
        """In a forked child: the process and its pipes are the parent's."""
        self._lock, self._process = threading.Lock(), None

    def close(self) -> None:
        """End the process; the next request starts another one."""
        with self._lock:
            self._end()
