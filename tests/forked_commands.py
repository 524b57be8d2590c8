"""What a child of tests/forked_worker.py does: everything that it needs is imported here, or by distributed_worker."""

from typing import Any

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
    if "restarts" in request:
        distributed_worker.launch(request["command"], request["restarts"])
        return 0
    code = run(request["command"])
    if "processes" in request:
        exit_process(code)
    return code
