"""A template's text, from a process that is ended where a template does not end: see bitnet/tokenizer/chat_worker.py.

One such process serves all templates of a program. It starts with the first conversation, in a tenth of a second, and
ends with the program.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitnet.tokenizer import chat_worker

CLOCK = 30.0
"""Seconds by the clock behind which a process is ended that the system has not ended: it is asleep, or this is Windows,
where processor time has no limit."""


class TemplateError(ValueError):
    """What a template complains of, or that it does not end."""


class DamagedTemplate(ValueError):
    """Why a text is no template."""


class _Worker:
    """The process, one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        with self._lock:
            for attempt in range(2):
                process = self._process or self._start()
                clock = threading.Timer(CLOCK, process.kill) if os.name == "nt" else None
                try:
                    if clock:
                        clock.start()
                    assert process.stdin is not None
                    assert process.stdout is not None
                    process.stdin.write(request + b"\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                    if line.endswith(b"\n"):
                        reply: dict[str, Any] = json.loads(line)
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
        return {"limit": ""}

    def _start(self) -> subprocess.Popen[bytes]:
        keep = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # which Windows' Python needs
        specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        places = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", chat_worker.__file__, json.dumps(places), str(chat_worker.SECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=keep,
        )  # fmt: skip
        assert process.stdout is not None
        greeting = json.loads(process.stdout.readline() or b'{"missing": "Python did not start"}')
        if "missing" in greeting:
            process.kill()
            process.wait()
            raise ValueError(
                f"chat templates need jinja2 3.1.6 or newer ({greeting['missing']}): pip install -U jinja2"
            )
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

    def close(self) -> None:
        with self._lock:
            self._end()


_worker = _Worker()
atexit.register(_worker.close)


def _forget() -> None:
    """In a forked child: the process and its pipes are the parent's."""
    global _worker
    _worker = _Worker()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def render(source: str, variables: Mapping[str, object]) -> str:
    """The text that a template makes of variables, which JSON must be able to say. Raises TemplateError with what the
    template complains of, or that it takes more time or memory than a template may; DamagedTemplate for a text that is
    none; TypeError for variables of other kinds."""
    text: str = _ask({"source": source, "variables": variables})["text"]
    return text


@lru_cache(8)
def variables_of(source: str) -> frozenset[str]:
    """The names of the variables that a template looks at. Raises as `render` does."""
    return frozenset(_ask({"source": source})["names"])


def _ask(request: Mapping[str, object]) -> dict[str, Any]:
    reply = _worker.ask(json.dumps(request).encode())
    if "damaged" in reply:
        raise DamagedTemplate(reply["damaged"])
    if "limit" in reply:
        raise TemplateError(
            f"it does not end within {chat_worker.SECONDS:g} s of processor time and {chat_worker.MEMORY >> 20} MiB of "
            "memory, which no conversation needs: it is broken, or made to do harm"
        )
    if "error" in reply:
        raise TemplateError(reply["error"])
    return reply
