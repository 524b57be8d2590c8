"""The native engine beside llama.cpp and ik_llama.cpp, in turn on the same files, within a number of minutes.

    taskset -c 0,1 python3 benchmarks/beside_peers.py --llama DIR --ik DIR --files /dev/shm/peers --out peers.json \\
        --threads 2 --minutes 9

DIR has llama-bench and llama-batched-bench (of ik_llama.cpp also llama-quantize, which makes its ternary types). Files
of random weights are made in `--files` unless they are there; `--gguf NAME=PATH` adds one of a real model. What is
measured, each in `--rounds` rounds in which everybody has a turn:

    prefill N     N tokens in one call from an empty cache, tokens/s; a second, longer N in the first round alone
    decode N      N tokens one by one behind an empty cache, tokens/s
    rows N        N texts behind one prompt of 128 tokens, one token each a step, tokens/s of all

No engine draws tokens or makes text, as llama-bench does not. Caches are float16. Ours runs twice where weights have
scales of groups: with activations `int8` by groups, as llama.cpp's are, and as it does by itself, `int16` or `float`.
`ik_llama.cpp r4` repacks rows when it loads. `share` is bytes of the weights times tokens/s over the read bandwidth.
First comes the gate: every instruction set gives the reference's integers, and the file types give the logits of their
dequantized weights; on red nothing is measured. `--out` is written anew behind every turn. Needs torch and numpy, no
command line of the package.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bitnet.bench.cpu_gate import check_engine, check_products
from bitnet.bench.limits import integer_peak, read_bandwidth
from bitnet.bench.random_models import write_random_gguf
from bitnet.bench.report import describe_machine
from bitnet.files import write_atomic
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import open_model
from bitnet.kernels import use_backend
from bitnet.kernels.cpu import native
from bitnet.model import PRESETS, ModelConfig

PROMPT, STEPS = 128, 16
"""Tokens behind which rows decode, and steps of each number of rows."""
ROWS = (1, 2, 4, 8, 16)
PEERS_READ = 2000
LLAMA = PRESETS["700m"].replace(quantizer="none", sub_norm=False, tie_word_embeddings=False)
TERNARY = PRESETS["700m"].replace(hidden_act="silu", tie_word_embeddings=True)
TERNARY_2B = PRESETS["2b-4t"].replace(hidden_act="silu", tie_word_embeddings=True)
QWEN3 = ModelConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, rope_theta=1e6, rms_norm_eps=1e-6,
    quantizer="none", sub_norm=False, qk_norm=True, tie_word_embeddings=True,
)  # fmt: skip
Rates = dict[str, float]
"""Tokens/s by what was measured."""
Turn = Callable[[bool], Rates]
"""One run of one engine, in the first round or a later one."""


@dataclass(frozen=True)
class Case:
    """A file and what is measured on it. A peer that computes a type in scalar code gets `slow` prompt and steps."""

    config: ModelConfig
    kind: str
    prefill: int = 512
    decode: int = 64
    rows: bool = False
    long: int = 0
    """Tokens of a second, longer prompt; peers read it once, and not beyond PEERS_READ."""
    slow: tuple[int, int] | None = None


CASES = {
    "ternary": Case(TERNARY, "TQ2_0", rows=True, long=2000),
    "q4_k_m": Case(LLAMA, "Q4_K_M"),
    "q4_0": Case(LLAMA, "Q4_0"),
    "q8_0": Case(LLAMA, "Q8_0"),
    "bf16": Case(LLAMA, "BF16", decode=32),
    "q2_0": Case(LLAMA, "Q2_0", slow=(32, 8)),
    "ternary-2b": Case(TERNARY_2B, "TQ2_0", decode=32, long=3900),
    "qwen3-q2_0": Case(QWEN3, "Q2_0", decode=32, slow=(32, 4)),
}


@dataclass
class Run:
    """What all parts of a run share."""

    given: argparse.Namespace
    deadline: float
    bandwidth: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        write_atomic(self.given.out, json.dumps(self.results, indent=1) + "\n")


def tokens(count: int, vocab: int) -> torch.Tensor:
    return torch.randint(vocab, (1, count), generator=torch.Generator().manual_seed(count))


def prefill(engine: Engine, count: int) -> float:
    ids, cache = tokens(count, engine.config.vocab_size), engine.new_cache(1, count)
    started = time.perf_counter()
    engine(ids, cache, last_only=True)
    return count / (time.perf_counter() - started)


def decode(engine: Engine, count: int) -> float:
    ids, cache = tokens(count + 1, engine.config.vocab_size), engine.new_cache(1, count + 1)
    engine(ids[:, :1], cache)
    started = time.perf_counter()
    for step in range(1, count + 1):
        engine(ids[:, step : step + 1], cache)
    return count / (time.perf_counter() - started)


def decode_rows(engine: Engine, count: int) -> float:
    rows, ids = engine.rows, tokens(PROMPT + STEPS, engine.config.vocab_size)[0].tolist()
    cache = rows.new_cache((count + 1) * (PROMPT + STEPS + 64))
    first = cache.new_row()
    rows.step([(first, ids[:PROMPT])])
    texts = [first, *(first.fork() for _ in range(count - 1))]
    started = time.perf_counter()
    for step in range(STEPS):
        rows.step([(text, [ids[(step + row) % len(ids)]]) for row, text in enumerate(texts)])
    return count * STEPS / (time.perf_counter() - started)


def ours(engine: Engine, case: Case, first: bool) -> Rates:
    """One turn of the native engine. The first calls touch the workspace and do not count."""
    decode(engine, 2)
    rates = {f"decode {case.decode}": decode(engine, case.decode)}
    for count in filter(None, (case.prefill, case.long if first else 0)):
        rates[f"prefill {count}"] = prefill(engine, count)
    if case.rows:
        rates |= {f"rows {count}": decode_rows(engine, count) for count in ROWS}
    return rates


def call(run: Run, *command: object) -> str:
    """Standard output of a peer. Raises ValueError where it fails or the time is up."""
    words = list(map(str, command))
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=max(1.0, run.left))
    except subprocess.TimeoutExpired:
        raise ValueError("the time is up") from None
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
    return done.stdout


def peer(run: Run, folder: Path, file: Path, case: Case, cold: list[object], more: list[object], long: bool) -> Rates:
    """One turn of a peer: llama-bench, then llama-batched-bench for rows. `cold` keeps llama-bench from a whole prompt
    of warming up, for which 16 tokens come first."""
    prompt, steps = case.slow or (case.prefill, case.decode)
    counts = [case.long] if long and case.long <= PEERS_READ else []
    counts = [count for count in (prompt, *counts) if count]
    text = call(
        run, folder / "llama-bench", "-m", file, "-p", ",".join(map(str, (16, *counts))), "-n", steps,
        "-t", run.given.threads, "-r", 1, "-o", "json", *cold, *more,
    )  # fmt: skip
    results = json.loads(text[text.index("[") : text.rindex("]") + 1])
    rates = {f"decode {r['n_gen']}": float(r["avg_ts"]) for r in results if r["n_gen"]}
    rates |= {f"prefill {r['n_prompt']}": float(r["avg_ts"]) for r in results if r["n_prompt"] in counts}
    if case.rows:
        sizes = ["-npp", PROMPT, "-ntg", STEPS, "-npl", ",".join(map(str, ROWS)), "-pps", "-c", 4096]
        flags = [word for word in more if word != 1]  # -rtr is a flag of its own here
        text = call(run, folder / "llama-batched-bench", "-m", file, "-t", run.given.threads, *sizes, *flags)
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) > 8 and cells[1] == str(PROMPT):
                rates[f"rows {cells[3]}"] = float(cells[8])
    return rates


def gate(run: Run) -> list[str]:
    """What is wrong with the kernels or with the types of the chosen files: nothing, or nothing is measured."""
    wrong = [*check_products(TERNARY), *check_engine("float16")]
    for kind in sorted({CASES[name].kind for name in run.given.cases if name in CASES} - {"TQ2_0"}):
        shape = QWEN3 if kind == "Q2_0" else LLAMA
        small = shape.replace(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64,
        )  # fmt: skip
        path = run.given.files / f"gate-{kind.lower()}.gguf"
        write_random_gguf(path, small, kind)
        ids = tokens(70, small.vocab_size)
        with torch.inference_mode():
            with use_backend("reference"):
                expected = open_model(path)(ids)
            for activations, limit in (("float", 1e-4), ("int16", 1e-3), ("int8", 0.1)):
                bits = None
                for isa in native.instruction_sets():
                    with native.use_instruction_set(isa):
                        logits = open_model(path, activations=activations)(ids)
                    error = float((logits - expected).norm() / expected.norm())
                    if not error < limit:
                        wrong.append(f"{kind}, {isa}, {activations}: logits are off by {error:.1e}, limit {limit:.0e}")
                    if bits is not None and not torch.equal(bits, logits):
                        wrong.append(f"{kind}, {isa}, {activations}: other bits than {native.instruction_sets()[0]}")
                    bits = logits if bits is None else bits
        path.unlink()
    return wrong


def ternary_of_ik(run: Run, name: str, case: Case) -> Path:
    """The ternary file of ik_llama.cpp, which it makes itself of float16."""
    file = run.given.files / f"{name}-iq2_bn.gguf"
    if not file.exists():
        floats = run.given.files / f"{name}-f16.gguf"
        write_random_gguf(floats, case.config, "F16")
        call(
            run,
            run.given.ik / "llama-quantize",
            "--token-embedding-type",
            "q6_K",
            floats,
            file,
            "IQ2_BN",
            os.cpu_count(),
        )
        floats.unlink()
    return file


def contenders(run: Run, name: str, case: Case, file: Path) -> Iterator[tuple[str, int, Turn]]:
    """Everybody who runs a file: name, bytes of its weights that a step reads (0: unknown), and a turn."""
    given, ternary = run.given, case.config.quantizer != "none"
    for activations in ("int8",) if ternary or case.kind == "BF16" else ("int8", None):
        engine = open_model(file, cache_dtype="float16", activations=activations)
        assert isinstance(engine, Engine)
        label = "ours" if ternary else f"ours {engine.kernel.removeprefix('native ')}"
        yield label, engine.weight_bytes(), partial(ours, engine, case)
    size = file.stat().st_size
    if given.llama:
        yield "llama.cpp", size, partial(peer, run, given.llama, file, case, ["--no-warmup"], [])
    if given.ik and case.kind != "Q2_0":  # which it does not know
        theirs = ternary_of_ik(run, name, case) if ternary else file
        size = theirs.stat().st_size
        yield "ik_llama.cpp", size, partial(peer, run, given.ik, theirs, case, ["-w", 0], [])
        yield "ik_llama.cpp r4", size, partial(peer, run, given.ik, theirs, case, ["-w", 0], ["-rtr", 1])


def measure(run: Run, name: str, case: Case, file: Path) -> None:
    """All turns of a case; its rows stand in the results behind every turn."""
    rates: dict[tuple[str, str], list[float]] = {}
    sizes, failed = dict[str, int](), set[str]()
    turns = list(contenders(run, name, case, file))
    others = [row for row in run.results["rows"] if row["case"] != name]
    for number in range(run.given.rounds):
        for label, size, turn in turns:
            if label in failed or run.left < 5:
                continue
            started, sizes[label] = time.monotonic(), size
            try:
                for quantity, rate in turn(number == 0).items():
                    rates.setdefault((label, quantity), []).append(rate)
            except (ValueError, OSError, KeyError) as error:
                failed.add(label)
                run.results["failed"].append(f"{name}, {label}: {error}")
            print(f"{name}: round {number + 1}, {label}, {time.monotonic() - started:.1f} s", flush=True)
            run.results["rows"] = others + table(run, name, rates, sizes)
            run.save()
    for row in run.results["rows"]:
        if row["case"] == name:
            of = "" if row["ratio"] is None else f"   {row['ratio']:.2f} of the best peer"
            share = "" if row["share"] is None else f"   {row['share']:.0%} of reading"
            print(
                f"  {row['case']:12} {row['engine']:16} {row['quantity']:13} {row['median']:9.1f}{share}{of}",
                flush=True,
            )


def table(
    run: Run, name: str, rates: dict[tuple[str, str], list[float]], sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """One row for every engine and quantity: all rates, their median, and ours over the best peer's median."""
    medians = {key: statistics.median(values) for key, values in rates.items()}
    best: dict[str, float] = {}
    for (label, quantity), median in medians.items():
        # A slow peer's shorter prompts stand for the long ones.
        if not label.startswith("ours"):
            key = quantity if not CASES.get(name, Case(LLAMA, "")).slow else quantity.split()[0]
            best[key] = max(median, best.get(key, 0.0))
    rows = []
    for (label, quantity), median in sorted(medians.items()):
        rival = best.get(quantity) or best.get(quantity.split()[0])
        share = median * sizes[label] / run.bandwidth / 1e9 if quantity.startswith("decode") and run.bandwidth else None
        row = {"case": name, "engine": label, "quantity": quantity, "median": median, "rates": rates[label, quantity]}
        ratio = median / rival if rival and label.startswith("ours") else None
        rows.append(row | {"bytes": sizes[label], "share": share, "ratio": ratio})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--ik", type=Path, help="folder of ik_llama.cpp's programs")
    parser.add_argument("--files", type=Path, required=True, help="folder for the files, best in memory")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, required=True, help="everything ends within this time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="what to measure, in turn")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=PATH", help="a file of a real model")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all works: no measurement")
    given = parser.parse_args()
    given.files.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    run = Run(given, time.monotonic() + 60 * given.minutes)
    cases = {name: (CASES[name], given.files / f"{name}.gguf") for name in given.cases}
    if given.quick:
        small = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 2048}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
        for name, (case, file) in cases.items():
            short = replace(case, prefill=64, decode=8, long=case.long and 128, slow=case.slow and (16, 4))
            short = replace(short, config=case.config.replace(**small, **heads))
            cases[name] = short, file.with_name(f"quick-{file.name}")
    for text in given.gguf:
        name, _, path = text.partition("=")
        cases[name] = Case(LLAMA, "", rows=True), Path(path)
    run.results |= {
        "machine": describe_machine(),
        "options": {name: str(value) for name, value in vars(given).items()},
        "rows": [], "failed": [],
    }  # fmt: skip
    if not native.instruction_sets():
        raise SystemExit("the native kernels are not built: python3 setup.py build_ext --inplace")
    started = time.monotonic()
    run.results["gate"] = wrong = gate(run)
    print(f"gate: {'RED' if wrong else 'green'}, {time.monotonic() - started:.1f} s", *wrong, sep="\n  ", flush=True)
    if not wrong:
        run.bandwidth = read_bandwidth(given.threads, 2**26 if given.quick else 2**30)
        seconds = 0.01 if given.quick else 0.1
        run.results["limits"] = {"read_gbs": run.bandwidth, "gops": integer_peak(given.threads, seconds)}
        print(f"limits: {run.results['limits']}", flush=True)
        for name, (case, file) in cases.items():
            if run.left < 20:
                run.results["failed"].append(f"{name}: no time left")
                continue
            if not file.exists():
                started = time.monotonic()
                write_random_gguf(file, case.config, case.kind)
                print(
                    f"{file.name}: {file.stat().st_size / 1e6:.0f} MB, {time.monotonic() - started:.1f} s", flush=True
                )
            measure(run, name, case, file)
    run.save()
    print(*run.results["failed"], sep="\n")
    return int(bool(wrong) or bool(run.results["failed"]))


if __name__ == "__main__":
    sys.exit(main())
