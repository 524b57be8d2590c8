"""A server under load: tokens a second, time to the first token and between tokens, for 1, 4, 8, 16 and 64 streams.

    python benchmarks/serve_load.py runs/demo --threads 2 --json result.json
    python benchmarks/serve_load.py --preset 700m --threads 2 --llama-server PATH      in turn with llama.cpp's server,
                                                  or benchmarks/llama_server.py for PATH: the one of a wheel
    python benchmarks/serve_load.py --url http://127.0.0.1:8080 --no-gate      another server with OpenAI's interface
    python benchmarks/serve_load.py MODEL --prompts benchmarks/prompts.jsonl --kind code --prompt-lookup-num-tokens 15 \
        --streams 1 2 4 8 --new-tokens 128        in turn without and with drafts

Every request has a prompt of its own, of random tokens, of which `--shared` begin all prompts, or one of `--prompts` in
turn, whose text ends where the model ends it. When all is measured, some of ours are asked again, alone: their texts
must be equal, and with drafts those without, or the number is not printed. A text behind random tokens must have the
tokens that were asked for, of any server. With `--llama-server` both servers have the same GGUF file, ours and
llama.cpp's in turn for each number of streams; `--preset` makes one of random weights. Needs `pip install -e '.[serve]'
httpx`. The soak is benchmarks/serve_soak.py.
"""

import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from bitnet.__main__ import read_options
from bitnet.bench.report import describe_machine
from bitnet.console import note, table
from bitnet.serving.jobs import SLACK

TYPE = "TQ2_0"
"""llama.cpp's fastest ternary type on a CPU."""


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str | None] = None
    """A model to serve for the time of the measurement; for --llama-server a GGUF file."""
    preset: str | None = None
    """Instead: a shape (demo, 700m, ...), with random ternary weights."""
    url: str | None = None
    """A server that runs already, instead."""
    llama_server: Path | None = None
    """llama.cpp's llama-server, or a Python file that takes its options, to be measured on the same file."""
    threads: int | None = None
    """Of each server; its own choice unless given."""
    streams: tuple[int, ...] = (1, 4, 8, 16, 64)
    """Clients at a time; each sends its next request when the last one has ended."""
    requests: int = 2
    """Of each client, and more where few clients would make fewer than 8 in all."""
    prompt_tokens: int = 64
    new_tokens: int = 64
    shared: int = 0
    """Tokens that all prompts begin with."""
    prompts: Path | None = None
    """A file of JSON lines, {"messages": [...]}, that are asked in turn instead of random tokens. A model without a
    template goes on from what they say."""
    kind: str | None = None
    """Of these the ones with this "kind" alone."""
    temperature: float = 0.8
    prompt_lookup_num_tokens: int = 0
    """Measure our server in turn with such drafts too."""
    checked: int = 16
    """Texts of ours that are compared with their text alone."""
    gate: bool = True
    """Compare them."""
    json: Path | None = None


@dataclass
class Run:
    """One number of streams on one server."""

    server: str
    streams: int
    tokens_per_second: float = 0.0
    first_median: float = 0.0
    first_p95: float = 0.0
    between_p95: float = 0.0
    processor_ms_per_token: float | None = None
    """Of the server; a machine that is busy with other things changes it least."""
    tokens: int = 0
    different: int = 0
    drafted: int = 0
    accepted: int = 0
    """Of the drafted tokens."""
    first: list[float] = field(default_factory=list, repr=False)
    between: list[float] = field(default_factory=list, repr=False)
    texts: dict[int, str] = field(default_factory=dict, repr=False)
    """By the number of the request."""


@dataclass(frozen=True)
class Peer:
    """A server to measure."""

    name: str
    url: str
    ours: bool
    process: int | None = None
    chats: bool = True
    """Its model has a template."""


@lru_cache
def conversations(path: Path, kind: str | None) -> list[list[dict[str, str]]]:
    """Of a file, those of a kind. Raises ValueError where there is none."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not (found := [line["messages"] for line in lines if kind in (None, line.get("kind"))]):
        raise ValueError(f"{path} has no conversation of the kind {kind!r}")
    return found


def asked_of(peer: Peer, options: Options, number: int, vocab_size: int) -> dict[str, Any]:
    """The prompt of a request, the same in every call, and how its text ends."""
    if options.prompts is None:
        return {"prompt": prompt_of(options, number, vocab_size), "ignore_eos": True}
    found = conversations(options.prompts, options.kind)
    messages = found[number % len(found)]
    return {"messages": messages} if peer.chats else {"prompt": "\n\n".join(one["content"] for one in messages)}


def prompt_of(options: Options, number: int, vocab_size: int) -> list[int]:
    """Random tokens for a request."""
    shared, own = random.Random(-1), random.Random(number)
    begin = [shared.randrange(10, vocab_size) for _ in range(options.shared)]
    return begin + [own.randrange(10, vocab_size) for _ in range(options.prompt_tokens - options.shared)]


async def lines_of(url: str, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a completion, read with as little work as can be: a client takes time from the server beside it.

    Raises ValueError for an answer that is no stream.
    """
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        if (status := await reader.readline()).split()[1:2] != [b"200"]:
            raise ValueError(f"{url} answered {(status + await reader.read(1000)).decode(errors='replace')}")
        async for line in reader:  # headers, sizes of chunks and empty lines among them
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        writer.close()


async def ask(peer: Peer, options: Options, number: int, vocab_size: int, run: Run) -> None:
    """One request, its text and times added to the run."""
    body = asked_of(peer, options, number, vocab_size) | {
        "max_tokens": options.new_tokens, "seed": number, "temperature": options.temperature, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    started = last = time.perf_counter()
    text, tokens = "", None
    async for chunk in lines_of(peer.url, path, body):
        if "error" in chunk:
            raise ValueError(f"{peer.name}: {chunk['error']['message']}")
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if not chunk["choices"] or (choice := chunk["choices"][0]).get("delta", {}).get("role"):  # nothing written
            continue
        now = time.perf_counter()
        (run.between if last > started else run.first).append(now - last)
        last = now
        text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    if not tokens or (options.prompts is None and (tokens != options.new_tokens or not text)):
        raise ValueError(f"{peer.name} wrote {tokens} tokens, {text!r}, and {options.new_tokens} were asked for")
    run.tokens += tokens
    run.texts[number] = text


def processor_seconds(process: int | None) -> float | None:
    """What a process has taken of the processors; None where that is not told."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(peers: list[Peer], options: Options, vocab_size: int) -> list[Run]:
    """All numbers of streams, one after the other, on every server in turn."""
    runs, number = [], 0
    for peer in peers:  # what is made late is there then
        await ask(peer, options, 10**6, vocab_size, Run("", 0))
    for streams in options.streams:
        turns = max(options.requests, 8 // streams)
        for peer in peers:
            run, before = Run(peer.name, streams), drafts_of(peer)

            async def one(first: int, peer: Peer = peer, run: Run = run, turns: int = turns) -> None:
                for turn in range(turns):
                    await ask(peer, options, first + turn, vocab_size, run)

            started, spent = time.perf_counter(), processor_seconds(peer.process)
            await asyncio.gather(*(one(number + i * turns) for i in range(streams)))
            run.tokens_per_second = run.tokens / (time.perf_counter() - started)
            if spent is not None and (now := processor_seconds(peer.process)) is not None:
                run.processor_ms_per_token = 1000 * (now - spent) / run.tokens
            run.drafted, run.accepted = (now - was for now, was in zip(drafts_of(peer), before, strict=True))
            run.first_median, run.first_p95 = statistics.median(run.first), percentile(run.first)
            run.between_p95 = percentile(run.between)
            runs.append(run)
            note(f"{peer.name}, {streams} streams: {run.tokens_per_second:.1f} tokens/s")
        number += streams * turns
        ours = [run for run, peer in zip(runs[-len(peers) :], peers, strict=True) if peer.ours]
        for run in ours[1:]:
            run.different += sum(ours[0].texts[one] != text for one, text in run.texts.items())
    if options.gate:
        for peer in peers:
            if peer.ours:
                await compare([run for run in runs if run.server == peer.name], peer, options, vocab_size)
    return runs


def drafts_of(peer: Peer) -> tuple[int, int]:
    """Tokens of drafts that our server has read, and those of them that were right."""
    if not peer.ours:
        return 0, 0
    metrics = httpx.get(f"{peer.url}/metrics").text
    read, accepted = (
        sum(float(value) for value in re.findall(rf"^bitnet_{name}_total\S* (\S+)$", metrics, re.MULTILINE))
        for name in ("draft_tokens", "accepted_draft_tokens")
    )
    return int(read), int(accepted)


async def compare(runs: list[Run], peer: Peer, options: Options, vocab_size: int) -> None:
    """Ask some requests of every run again, alone, and count the texts that are others."""
    for run in runs:
        numbers = sorted(run.texts)
        share = -(-options.checked // len(runs))
        for number in numbers[:: max(1, len(numbers) // share)][:share]:
            alone = Run("", 1)
            await ask(peer, options, number, vocab_size, alone)
            run.different += alone.texts[number] != run.texts[number]


def percentile(values: list[float], share: float = 0.95) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def random_model(preset: str, folder: Path) -> str:
    """A GGUF file of this shape with random ternary weights, and a vocabulary of this project's own words."""
    from bitnet.bench.random_models import write_random_gguf
    from bitnet.model import PRESETS
    from bitnet.tokenizer import train_tokenizer
    from bitnet.tokenizer.gguf_write import vocabulary

    if preset not in PRESETS:
        raise ValueError(f"the preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    sources = sorted((Path(__file__).parent.parent / "bitnet").rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)[:300_000]
    path, config = folder / f"{preset}.gguf", PRESETS[preset]
    tokenizer = train_tokenizer([text], min(2048, config.vocab_size), threads=1)
    write_random_gguf(path, config, TYPE, vocabulary(tokenizer, config.vocab_size))
    return str(path)


@contextmanager
def our_server(model: str, threads: int | None, *more: str) -> Iterator[Peer]:
    """`bitnet serve` with a model."""
    command = [sys.executable, "-m", "bitnet", "serve", f"model={model}", "--port", "0", *more]
    command += ["--threads", str(threads)] if threads else []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        read = ""
        for line in process.stderr:
            read += line
            if address := re.search(r"http://\S+", line):
                break
        else:
            raise ValueError(f"bitnet serve did not start: {read[-2000:]}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        chats = httpx.get(f"{address[0]}/v1/models").json()["data"][0]["chat"]
        yield Peer("bitnet", address[0], True, process.pid, chats)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def llama_server(program: Path, model: str, options: Options) -> Iterator[Peer]:
    """llama.cpp's server with the same file: a slot for each stream."""
    most = max(options.streams)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tokens = most * (options.prompt_tokens + options.new_tokens + 16)
    command = [
        *([sys.executable] if program.suffix == ".py" else []),
        str(program),
        "-m",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-np",
        str(most),
    ]
    command += ["-c", str(tokens), *(["-t", str(options.threads)] if options.threads else [])]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while True:
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise ValueError(f"{program} did not start: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield Peer("llama-server", url, False, process.pid)
        finally:
            process.terminate()
            process.wait()


def vocabulary_of(url: str) -> int:
    """Tokens of our server's model: the first id that it does not have."""
    message = httpx.post(f"{url}/detokenize", json={"tokens": [2**31 - 1]}).json()["error"]["message"]
    found = re.search(r"vocabulary of (\d+)", message)
    if not found:
        raise ValueError(f"the server does not tell its vocabulary: {message}")
    return int(found[1])


def main(options: Options) -> int:
    if sum(given is not None for given in (options.model, options.preset, options.url)) != 1:
        raise ValueError("give a model, --preset or --url of a server, one of them")
    with ExitStack() as stack:
        vocab_size = 32_000
        if options.url is not None:
            peers = [Peer("server", options.url, options.gate)]
            if options.gate:
                vocab_size = vocabulary_of(options.url)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = options.model or random_model(str(options.preset), folder)
            most = max(options.streams)
            room = most * (options.prompt_tokens + options.new_tokens + 2 * SLACK)  # so that all run at once
            more = ("--parallel", str(most), *(("--cache-tokens", str(room)) if options.prompts is None else ()))
            peers = [stack.enter_context(our_server(model, options.threads, *more))]
            if tokens := options.prompt_lookup_num_tokens:
                more = (*more, "--prompt-lookup-num-tokens", str(tokens))
                drafting = stack.enter_context(our_server(model, options.threads, *more))
                peers.append(replace(drafting, name=f"bitnet, drafts of {tokens}"))
            vocab_size = vocabulary_of(peers[0].url)
            if options.llama_server is not None:
                peers.append(stack.enter_context(llama_server(options.llama_server, model, options)))
        runs = asyncio.run(measure(peers, options, vocab_size))
    rows = [
        ["streams", "server", "tokens/s", "first token, median", "p95", "between tokens, p95", "processor", "drafts"]
    ]
    for run in runs:
        times = [f"{1000 * t:.0f} ms" for t in (run.first_median, run.first_p95, run.between_p95)]
        spent = run.processor_ms_per_token
        times.append("" if spent is None else f"{spent:.2f} ms a token")
        times.append(f"{run.accepted} of {run.drafted}" if run.drafted else "")
        shown = ["red: texts differ"] if run.different else [f"{run.tokens_per_second:.1f}", *times]
        shown += [""] * (len(rows[0]) - 2 - len(shown))
        rows.append([str(run.streams), run.server, *shown])
    print(table(rows, right=(0, 2, 3, 4, 5, 6, 7)))
    if options.json:
        kept = [{k: v for k, v in asdict(run).items() if k not in ("first", "between", "texts")} for run in runs]
        about = {k: v.name if isinstance(v, Path) else v for k, v in asdict(options).items() if k != "json"}
        about["model"] = options.model and Path(options.model).name
        options.json.write_text(
            json.dumps({"machine": describe_machine(), "options": about, "runs": kept}, indent=1) + "\n"
        )
    return int(any(run.different for run in runs))


if __name__ == "__main__":
    sys.exit(main(read_options(sys.modules[__name__], "benchmarks/serve_load.py", sys.argv[1:])))
