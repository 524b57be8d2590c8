"""Commands of this project in forked children, of which some are killed: each line of the input is a command with the
seconds behind which it is killed, each line of the output how it ended and after how long.

Everything is imported once, and a child begins at once with its work: a kill falls into that, not into the imports.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
import warnings

import torch

import train
from bitnet import __main__ as commands
from bitnet.commands import compare, export, quantize  # noqa: F401
from bitnet.data.corpus import open_corpus
from bitnet.data.tokens_write import tokenize_corpus
from bitnet.inference import loading  # noqa: F401
from bitnet.tokenizer import load_tokenizer


def run(arguments: list[str]) -> int:
    name, *rest = arguments
    if name == "tokenize":
        corpus, tokenizer, out = rest
        tokenize_corpus(open_corpus(corpus), load_tokenizer(tokenizer), out, workers=1, progress=False)
        return 0
    return train.main(rest) if name == "train" else commands.main(arguments)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        child = os.fork()
        if not child:
            with open(request["log"], "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = 1
            try:
                code = run(request["command"])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if request["kill"] is not None:
            time.sleep(request["kill"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, time.perf_counter() - start]), flush=True)


if __name__ == "__main__":
    main()
