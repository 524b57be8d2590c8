"""A GGUF file's tokenizer against llama.cpp's on a whole corpus: equal ids first, then MB/s, one thread each.

    python benchmarks/tokenize_corpus.py model.gguf [--corpus sotu] [--rounds 3]

Both tokenize every document in turn, so that a machine that slows down slows both; the rates are medians of the
rounds. A document whose ids differ, or whose text does not come back, ends the script with exit code 1 and no rates.
Needs the shared libraries that tests/oracles/llama.py loads. Results go to benchmarks/results/tokenize_corpus.json.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bitnet.bench.report import describe_machine  # noqa: E402
from bitnet.data.corpus import open_corpus  # noqa: E402
from bitnet.storage.gguf.container import GGUFFile  # noqa: E402
from bitnet.tokenizer import from_gguf_metadata  # noqa: E402
from tests.tokenizer.test_gguf_read import Vocabulary  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "tokenize_corpus.json"


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A GGUF file with a tokenizer."""
    corpus: str = "sotu"
    """As in train.py."""
    rounds: int = 3


def timed(encode: Callable[[str], list[int]], text: str) -> tuple[list[int], float]:
    started = time.perf_counter()
    ids = encode(text)
    return ids, time.perf_counter() - started


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    ours = from_gguf_metadata(GGUFFile(options.model).metadata, str(options.model))
    documents = list(open_corpus(options.corpus).documents())
    size = sum(len(document.encode()) for document in documents)
    rates: dict[str, list[float]] = {"ours": [], "llama.cpp": []}
    with Vocabulary(options.model) as theirs:
        for number in range(options.rounds):
            seconds, tokens, different = dict.fromkeys(rates, 0.0), 0, 0
            for document in documents:
                ids, own = timed(ours.encode, document)
                expected, other = timed(theirs.tokenize, document)
                different += ids != expected or (number == 0 and ours.decode(ids) != document)
                tokens += len(ids)
                seconds = {"ours": seconds["ours"] + own, "llama.cpp": seconds["llama.cpp"] + other}
            if different:
                print(f"{different} of {len(documents)} documents differ from llama.cpp's ids or do not come back")
                return 1
            for name, spent in seconds.items():
                rates[name].append(size / spent / 1e6)
    result = {
        "model": options.model.name, "corpus": options.corpus, "documents": len(documents), "bytes": size,
        "tokens": tokens, "equal": True,
        "mb_per_second": {name: round(statistics.median(values), 2) for name, values in rates.items()},
        "machine": describe_machine(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
