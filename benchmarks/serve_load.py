"""A server under load: tokens a second, time to the first token and between tokens, for 1, 4, 16 and 64 streams.

    python benchmarks/serve_load.py runs/demo --json result.json
    python benchmarks/serve_load.py --url http://127.0.0.1:8080 --no-gate      another server with OpenAI's interface

Every text is compared with the one that the same prompt and seed gave alone: a number is only printed where all are
equal. Prompts share no beginning unless `--shared` tokens of them do. Needs `pip install bitnet[serve] httpx`.
"""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from bitnet.console import note, table


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str | None] = None
    """A model to serve for the time of the measurement."""
    url: str | None = None
    """A server that runs already, instead."""
    streams: tuple[int, ...] = (1, 4, 16, 64)
    """Clients at a time; each sends its next request when the last one has ended."""
    requests: int = 2
    """Of each client."""
    prompt_tokens: int = 64
    new_tokens: int = 64
    shared: int = 0
    """Tokens that all prompts begin with."""
    texts: int = 8
    """Different prompts, in turn."""
    gate: bool = True
    """Compare every text with its text alone."""
    json: Path | None = None


@dataclass
class Run:
    """One number of streams."""

    streams: int
    tokens_per_second: float = 0.0
    first_median: float = 0.0
    first_p95: float = 0.0
    between_p95: float = 0.0
    different: int = 0
    first: list[float] = field(default_factory=list, repr=False)
    between: list[float] = field(default_factory=list, repr=False)
    tokens: int = 0


def prompts_of(options: Options, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens, the same in every call."""
    numbers = random.Random(0)

    def some(count: int) -> list[int]:
        return [numbers.randrange(10, vocab_size) for _ in range(count)]

    begin = some(options.shared)
    return [begin + some(options.prompt_tokens - options.shared) for _ in range(options.texts)]


async def ask(client: httpx.AsyncClient, options: Options, prompt: list[int], seed: int, run: Run) -> str:
    """The text of one request, its times added to the run."""
    body = {
        "prompt": prompt, "max_tokens": options.new_tokens, "seed": seed, "temperature": 0.8, "ignore_eos": True,
        "stream": True, "logprobs": 0, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started = last = time.perf_counter()
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise ValueError(f"the server answered {answer.status_code}: {(await answer.aread()).decode()[:300]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            if usage := chunk.get("usage"):
                run.tokens += usage["completion_tokens"]
            if not chunk["choices"]:
                continue
            now = time.perf_counter()
            (run.between if text else run.first).append(now - (last if text else started))
            last = now
            text += chunk["choices"][0]["text"]
    return text


async def measure(url: str, options: Options, prompts: list[list[int]]) -> list[Run]:
    """All numbers of streams, one after the other."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        alone = [await ask(client, options, prompt, seed, Run(0)) for seed, prompt in enumerate(prompts)]
        runs = []
        for streams in options.streams:
            run = Run(streams)

            async def one(number: int, run: Run = run) -> None:
                for turn in range(options.requests):
                    index = (number + turn) % len(prompts)
                    text = await ask(client, options, prompts[index], index, run)
                    run.different += text != alone[index]

            started = time.perf_counter()
            await asyncio.gather(*(one(number) for number in range(streams)))
            run.tokens_per_second = run.tokens / (time.perf_counter() - started)
            run.first_median, run.first_p95 = statistics.median(run.first), percentile(run.first)
            run.between_p95 = percentile(run.between)
            runs.append(run)
            note(f"{streams} streams: {run.tokens} tokens, {run.different} texts other than alone")
        return runs


def percentile(values: list[float], share: float = 0.95) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


@contextmanager
def server(options: Options) -> Iterator[str]:
    """The address to measure."""
    if (options.url is None) == (options.model is None):
        raise ValueError("give a model to serve or --url of a server, one of them")
    if options.url is not None:
        yield options.url
        return
    command = [sys.executable, "-m", "bitnet", "serve", f"model={options.model}", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = None
        for line in process.stderr:
            if address := re.search(r"http://\S+", line):
                break
        if address is None:
            raise ValueError("the server did not start; run bitnet serve with this model to see why")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield address[0]
    finally:
        process.terminate()
        process.wait()


def main(options: Options) -> int:
    with server(options) as url:
        vocab_size = 32_000
        if options.model is not None:  # of ours the size is known: the first id that it does not have
            answer = httpx.post(f"{url}/detokenize", json={"tokens": [2**31 - 1]}).json()
            found = re.search(r"vocabulary of (\d+)", answer["error"]["message"])
            vocab_size = int(found[1]) if found else vocab_size
        runs = asyncio.run(measure(url, options, prompts_of(options, vocab_size)))
    rows = [["streams", "tokens/s", "first token, median", "p95", "between tokens, p95"]]
    for run in runs:
        good = not options.gate or not run.different
        times = [f"{1000 * t:.0f} ms" for t in (run.first_median, run.first_p95, run.between_p95)]
        rows.append([str(run.streams), *([f"{run.tokens_per_second:.1f}", *times] if good else ["red: texts differ"])])
        rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))
    print(table(rows, right=range(5)))
    if options.json:
        kept = [{k: v for k, v in asdict(run).items() if k not in ("first", "between")} for run in runs]
        options.json.write_text(
            json.dumps({"options": asdict(options) | {"json": None}, "runs": kept}, indent=1) + "\n"
        )
    return int(options.gate and any(run.different for run in runs))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
