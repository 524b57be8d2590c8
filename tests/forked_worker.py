"""What tests/forked.py asks: commands of this project, code and groups of processes, in forked children of one process.

Everything is imported once, and a child begins at once with its work: that saves some seconds a process, and a kill
falls into the work, not into the imports. Code that imports for itself is run by another process, which has imported
torch alone. Requests are lines of JSON; the first line of an answer has the children's numbers, the second their exit
codes and the seconds that they took.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

import torch


def execute(request: dict[str, Any]) -> int:
    exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    return 0


def fork(work: Callable[[], int], folder: str, out: str, err: str, environment: dict[str, str]) -> int:
    """The number of a child that does the work in a folder and writes to files."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def group(size: int, address: str, port: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes."""
    shared = {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def answer(request: dict[str, Any], work: Callable[[dict[str, Any]], int], out: TextIO) -> None:
    """Do what one request asks for."""
    start, store = time.perf_counter(), None
    places = request["folder"], request["out"], request["err"]
    environments: list[dict[str, str]] = [request["environment"]]
    if "processes" in request:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = group(request["processes"], "127.0.0.1", store.port)
    children = [fork(partial(work, request), *places, environment) for environment in environments]
    print(json.dumps(children), file=out, flush=True)
    if request["kill"] is not None:
        time.sleep(request["kill"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[0], signal.SIGKILL)
    codes, left = [], set(children)
    while left:
        child, status = os.wait()
        left.discard(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:  # as torchrun does
            for other in left:
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes, time.perf_counter() - start]), file=out, flush=True)
    del store


def bare_process() -> tuple[TextIO, TextIO]:
    """Another process, in which torch alone has been imported, as a file for requests and one for its answers."""
    (requests, to_it), (from_it, answers) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(to_it)
        with open(requests) as lines, open(answers, "w") as out:
            for line in lines:
                answer(json.loads(line), execute, out)
        os._exit(0)
    os.close(requests)
    os.close(answers)
    return open(to_it, "w"), open(from_it)


def main() -> None:
    to_bare, from_bare = bare_process()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from tests.forked_commands import work

    for line in sys.stdin:
        request = json.loads(line)
        if not request["bare"]:
            answer(request, execute if "code" in request else work, sys.stdout)
            continue
        print(line, end="", file=to_bare, flush=True)
        for _ in range(2):
            print(from_bare.readline(), end="", flush=True)


if __name__ == "__main__":
    main()
