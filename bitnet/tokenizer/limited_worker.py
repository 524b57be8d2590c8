"""The other side of limited.py: a program of its own, in which whatever a request does ends in time.

It has no environment variables, may write no file, start no other process and open no more than it has open, and the
system ends it behind the processor time that a request may take or where it wants more memory than it may have.
(Windows and macOS know fewer of these limits: there the parent ends it by the clock.)

What it does is in another file, whose `prepare()` imports what is needed and returns the function that answers.
Requests come as lines of JSON on standard input, `{"seconds": 1.0, ...}`, and answers go as lines to standard output.
This file imports nothing of the package, which would take seconds.
"""

import contextlib
import importlib.util
import json
import signal
import sys


def limit(memory: int) -> None:
    """Take from this process what a request has no use for."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, value in (("AS", memory), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0), ("NOFILE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def main(program: str, places: list[str], memory: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    sys.path += places
    spec = importlib.util.spec_from_file_location("program", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        answer = module.prepare()
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return 1
    print("{}", flush=True)
    limit(memory)
    timer = getattr(signal, "setitimer", None)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        seconds = request.pop("seconds")
        if timer:  # of processor time; its signal ends the process, whatever it does
            timer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(answer(request)).encode()
        if timer:
            timer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])))
