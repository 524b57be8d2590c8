"""Mixed load on `bitnet serve` for some minutes, with clients that leave: texts and memory are looked at.

    python benchmarks/serve_soak.py runs/demo --minutes 30 --threads 2 --json soak.json
    python benchmarks/serve_soak.py --preset demo

Prompts of any length, one or two samples, greedy or drawn, streamed or whole, vectors of texts, and requests that are
given up in the middle or before they begin. Each text is compared with the one that the same request gave alone before.
Memory is the server's resident set, every two seconds: its median over the last tenth of the time may be at most 2 %
above that over the second tenth. Ends with 1 where a text differs, an answer is an error or memory grows. Linux only.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from serve_load import our_server, random_model, vocabulary_of

from bitnet.__main__ import read_options
from bitnet.bench.report import describe_machine
from bitnet.console import note, progress_bar

GROWTH = 0.02
TURNS = 40
"""Different requests."""
LOOK = 2.0
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str | None] = None
    """A model to serve."""
    preset: str | None = None
    """Instead: a shape (demo, 700m, ...), with random ternary weights."""
    minutes: float = 30.0
    clients: int = 8
    threads: int | None = None
    pause: float = 0.0
    """Longest rest of a client between two requests, in seconds."""
    parallel: int = 4
    """Texts at a time: fewer than clients, so that some wait."""
    json: Path | None = None


@dataclass
class Found:
    """What has been seen."""

    counts: Counter[str] = field(default_factory=Counter)
    different: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds, and bytes of the server."""


@dataclass(frozen=True)
class Turn:
    """A request whose answer is known by its body alone."""

    path: str
    body: dict[str, Any]


def turns(vocab_size: int) -> list[Turn]:
    """The requests, the same in every call. Some begin as others do."""
    numbers, made = random.Random(0), []
    begin = [numbers.randrange(10, vocab_size) for _ in range(80)]
    for number in range(TURNS):
        own = [numbers.randrange(10, vocab_size) for _ in range(numbers.choice((1, 5, 30, 90)))]
        prompt = (begin[: numbers.choice((0, 0, 33, 80))] + own)[:160]
        if number % 8 == 7:
            made.append(Turn("/v1/embeddings", {"input": [prompt], "encoding_format": "float"}))
            continue
        made.append(
            Turn(
                "/v1/completions",
                {
                    "prompt": prompt, "max_tokens": numbers.choice((1, 8, 30, 60)), "seed": number,
                    "temperature": numbers.choice((0.0, 0.8, 1.2)), "n": numbers.choice((1, 1, 2)),
                    "logprobs": numbers.choice((None, 2)), "ignore_eos": number % 2 == 0,
                },
            )
        )  # fmt: skip
    return made


def what_is_said(answer: dict[str, Any]) -> object:
    """Of an answer what must be the same each time."""
    if "choices" not in answer:
        return answer["data"][0]["embedding"]
    return [(choice["text"], choice["finish_reason"], choice["logprobs"]) for choice in answer["choices"]]


async def ask(client: httpx.AsyncClient, turn: Turn) -> object:
    answer = await client.post(turn.path, json=turn.body)
    if answer.status_code != 200:
        raise ValueError(f"{turn.path} answered {answer.status_code}: {answer.text[:300]}")
    return what_is_said(answer.json())


async def stream(client: httpx.AsyncClient, turn: Turn, chunks: int | None) -> list[str] | None:
    """Texts of a stream; None where it is left behind so many chunks."""
    texts = [""] * turn.body["n"]
    async with client.stream("POST", turn.path, json={**turn.body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise ValueError(f"a stream was answered {answer.status_code}: {(await answer.aread()).decode()[:300]}")
        if chunks == 0:
            return None
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["text"]
                chunks = None if chunks is None else chunks - 1
                if chunks == 0:
                    return None
    return texts


async def one_client(
    number: int,
    client: httpx.AsyncClient,
    asked: list[Turn],
    alone: list[Any],
    end: float,
    options: Options,
    found: Found,
) -> None:
    """Requests one behind the other until the time is up."""
    draw = random.Random(1000 + number)
    while time.monotonic() < end:
        index = draw.randrange(len(asked))
        turn, streamed = asked[index], "prompt" in asked[index].body
        try:
            if streamed and draw.random() < 0.5:
                leaves = draw.choice((None, None, 0, 1, 5))
                texts = await stream(client, turn, leaves)
                kind = "left" if texts is None else "streamed"
                same = texts is None or texts == [text for text, _, _ in alone[index]]
            else:
                kind, same = "whole" if streamed else "vectors", await ask(client, turn) == alone[index]
            found.counts[kind] += 1
            if not same:
                found.different.append(index)
        except (ValueError, httpx.HTTPError) as error:
            found.errors.append(f"{type(error).__name__}: {error}"[:500])
        await asyncio.sleep(draw.random() * options.pause)


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


async def watch(process: int, started: float, end: float, found: Found) -> None:
    """Memory, every two seconds, and how long it still takes."""
    with progress_bar(total=int(end - started), title="under load", unit="s") as bar:
        told = 0
        while (now := time.monotonic()) < end:
            found.memory.append((now - started, resident(process)))
            bar.update(int(now - started) - told)
            told = int(now - started)
            await asyncio.sleep(LOOK)


async def soak(url: str, process: int, options: Options, found: Found) -> None:
    asked = turns(vocabulary_of(url))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        alone = [await ask(client, turn) for turn in asked]
        started = time.monotonic()
        end = started + 60 * options.minutes
        many = (one_client(i, client, asked, alone, end, options, found) for i in range(options.clients))
        await asyncio.gather(watch(process, started, end, found), *many)


def growth(memory: list[tuple[float, int]]) -> float:
    """Memory over the last tenth of the time against that over the second tenth, as a share."""
    tenth = memory[-1][0] / 10
    early = statistics.median(size for at, size in memory if tenth <= at <= 2 * tenth)
    return statistics.median(size for at, size in memory if at >= 9 * tenth) / early - 1


def main(options: Options) -> int:
    if (options.model is None) == (options.preset is None):
        raise ValueError("give a model or --preset, one of them")
    found = Found()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = options.model or random_model(str(options.preset), folder)
        more = ("--parallel", str(options.parallel), "--cache-tokens", "4096")
        peer = stack.enter_context(our_server(model, options.threads, *more))
        assert peer.process is not None
        asyncio.run(soak(peer.url, peer.process, options, found))
    share = growth(found.memory)
    for message in found.errors[:5]:
        note(message)
    bad = bool(found.different or found.errors or share > GROWTH)
    note(f"{dict(found.counts)}; {len(found.different)} texts other than alone, {len(found.errors)} errors")
    note(f"memory {found.memory[-1][1] / 2**20:.1f} MiB at the end, {share:+.2%} since the second tenth")
    if options.json:
        about = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k != "json"}
        kept = {"counts": found.counts, "different": found.different, "errors": found.errors, "growth": share}
        memory = [[round(at, 1), size] for at, size in found.memory]
        options.json.write_text(
            json.dumps({"machine": describe_machine(), "options": about, **kept, "memory": memory}) + "\n"
        )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(read_options(sys.modules[__name__], "benchmarks/serve_soak.py", sys.argv[1:])))
