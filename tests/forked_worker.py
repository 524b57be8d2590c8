"""What tests/forked.py asks: commands of this project and groups of processes, in forked children of one process.

Everything is imported once, and a child begins at once with its work: that saves some seconds a process, and a kill
falls into the work, not into the imports. Requests are lines of JSON; the first line of an answer has the children's
numbers, the second their exit codes and the seconds that they took.
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
from typing import Any

import torch
import torch.distributed as dist

import train
from bitnet import __main__ as commands
from bitnet.commands import compare, export, quantize  # noqa: F401
from bitnet.data.corpus import open_corpus
from bitnet.data.tokens_write import tokenize_corpus
from bitnet.inference import loading  # noqa: F401
from bitnet.tokenizer import load_tokenizer
from bitnet.training.processes import exit_process
from tests.training import distributed_worker


def run(arguments: list[str]) -> int:
    name, *rest = arguments
    if name == "tokenize":
        corpus, tokenizer, out = rest
        tokenize_corpus(open_corpus(corpus), load_tokenizer(tokenizer), out, workers=1, progress=False)
        return 0
    return train.main(rest) if name == "train" else commands.main(arguments)


def work(request: dict[str, Any]) -> int:
    if "jobs" in request:
        distributed_worker.work(request["jobs"])
    code = run(request["command"])
    if "processes" in request:
        exit_process(code)
    return code


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


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        start, store = time.perf_counter(), None
        places = request["folder"], request["out"], request["err"]
        environments: list[dict[str, str]] = [{}]
        if "processes" in request:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environments = group(request["processes"], "127.0.0.1", store.port)
        children = [fork(partial(work, request), *places, environment) for environment in environments]
        print(json.dumps(children), flush=True)
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
        print(json.dumps([codes, time.perf_counter() - start]), flush=True)
        del store


if __name__ == "__main__":
    main()
