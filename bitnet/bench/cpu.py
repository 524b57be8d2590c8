"""Speeds of generation on this CPU, beside the machine's own limits, float twins and other engines.

    bitnet bench --threads 1 2 --json result.json      a random model of the 2B shape
    bitnet bench runs/demo --batch 1 4 16              a trained one
    bitnet bench --preset 700m --kernels --twins
    bitnet bench --peer ik=ik/build/bin/llama-bench:2b.iq2_bn.gguf

First the kernels of every instruction set must give the reference's integers, and the engine its logits: while one of
them does not, no speed is printed and the exit code is 1. Then, median (min..max) of the rounds:

    prefill     prompt tokens / time to the first token, sampling and detokenizing included
    GOPS        2 * weights * prompt tokens / the same time: head and attention take time and do not count
    decode      tokens of all rows / time of the decoding steps behind the prompt
    GB/s        weights and filled cache, once a step, / the same time
    of limit    its share of one read through 1 GiB of memory; of peak: GOPS' share of multiply-adds on registers only

Everything goes through `bitnet.inference.generation.generate`, as in generate.py, on a CPU. Models of any
weight format run on the native engine; of one that is not ternary the gate checks a layer of every format that it has.
"""

import dataclasses
import itertools
import json
import pydoc_data.topics
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet import console
from bitnet.bench.cpu_gate import check_engine, check_layers, check_products
from bitnet.bench.limits import integer_peak, read_bandwidth
from bitnet.bench.plan import Options, Peer, Plan, make_plan
from bitnet.bench.random_models import float_twin, random_tensors, ternary_weights
from bitnet.bench.report import Report, Row, Value, describe_machine, headings, share, spread
from bitnet.console import stage
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel
from bitnet.inference.generation import GenerationStats, TextStream, time_generation
from bitnet.inference.loading import DEFAULT_ACTIVATIONS, open_model
from bitnet.inference.options import DEFAULTS
from bitnet.inference.weights import PackedWeights
from bitnet.kernels import cpu, use_backend
from bitnet.kernels.cpu import native
from bitnet.machine import DTYPES, process_memory, reset_peak_memory
from bitnet.model import BitNetForCausalLM
from bitnet.tokenizer import BaseTokenizer, train_tokenizer

Limits = dict[tuple[str, int], float]
"""By ("memory", threads) in GB/s and (instruction set, threads) in GOPS; empty without the native library."""
TEXT = "\n\n".join(pydoc_data.topics.topics.values())  # 0.4 MB of English that every Python has


def passes_gate(plan: Plan, report: Report) -> bool:
    """Run the correctness gate and print how it went."""
    if not plan.native:
        report.notes.append(
            "the native kernels are missing or switched off: the torch reference ran, without gate and limits"
        )
        return True
    stage("checking the kernels and the engine")
    wrong = [*check_products(plan.config)]
    for dtype in sorted({"float32", plan.options.cache}):
        wrong += check_engine(dtype)
    if plan.source is not None and plan.config.quantizer == "none":
        model = plan.source.stored() or plan.source.model()
        wrong += check_layers(model, plan.options.activations or DEFAULT_ACTIVATIONS)
    state = "RED, so no speed is measured" if wrong else "green: every instruction set gives the reference's numbers"
    print("\n".join([f"gate {state}", *(f"  {line}" for line in wrong)]))
    report.results["gate"] = state
    return not wrong


def measure_limits(plan: Plan) -> tuple[Limits, list[Row]]:
    """Memory bandwidth, best of five reads of a block, and the integer peak of every instruction set here."""
    limits, rows = Limits(), list[Row]()
    for threads in plan.threads:
        stage(f"limits: {threads} threads")
        limits["memory", threads] = read_bandwidth(threads, 2**24 if plan.options.quick else 2**30)
        for isa in native.instruction_sets():
            with native.use_instruction_set(isa):
                limits[isa, threads] = integer_peak(threads, 0.001 if plan.options.quick else 0.1)
        rows.append({"threads": threads} | {name: v for (name, count), v in limits.items() if count == threads})
    return limits, rows


def seconds_per_product(copies: Sequence[native.Lines], tokens: int, threads: int, budget: float) -> float:
    """Seconds of one product of `tokens` activations, going round the copies of the weights for `budget` seconds."""
    rows, columns = copies[0].rows, copies[0].columns
    codes, scale, total = cpu._quantize(torch.randn(tokens, columns))  # padded as the kernels want it
    y = torch.empty(tokens, rows)
    inputs = codes.data_ptr(), codes.stride(0), scale.data_ptr(), total.data_ptr(), tokens
    arguments = (*inputs, None, y.data_ptr(), rows, rows, 0, threads)
    matmul = native.kernels().matmul
    # One call that does not count: it touches the buffers and wakes the threads. Its copy is the last to come again.
    matmul(copies[-1].struct, *arguments)
    started = time.perf_counter()
    for calls, copy in enumerate(itertools.cycle(copies)):
        if calls and (elapsed := time.perf_counter() - started) >= budget:
            return elapsed / calls
        matmul(copy.struct, *arguments)
    raise AssertionError("there are no copies")


def measure_kernels(plan: Plan, limits: Limits) -> list[Row]:
    """Time of one token's product and rate of many tokens', for every codec and shape of a layer's matrices.

    The weights lie in as many copies as fill half a gigabyte, so that they come from memory as in a whole model.
    """
    quick, rows = plan.options.quick, list[Row]()
    shapes = set(plan.config.projections().values())
    arena = native.huge_pages(max(2**20 if quick else 2**29, *(native.Lines.size(*s, "two_bit") for s in shapes)))
    arena.random_()
    for isa, threads, codec in itertools.product(plan.isas, plan.threads, ("base3", "two_bit")):
        stage(f"kernels: {isa}, {threads} threads, {codec}")
        for N, K in sorted(shapes):
            if codec == "base3" and K > native.BASE3_MAX_K:
                continue
            size = native.Lines.size(N, K, codec)
            copies = [native.Lines(N, K, codec, part) for part in arena.split(size) if part.numel() == size]
            row: Row = {"isa": isa, "codec": codec, "threads": threads, "rows": N, "columns": K}
            for M in (1, 8, 64, 512):
                with native.use_instruction_set(isa):
                    budget, rounds = 0.002 if quick else 0.1, range(plan.options.repeat)
                    seconds = statistics.median(seconds_per_product(copies, M, threads, budget) for _ in rounds)
                gbs, gops = size / seconds / 1e9, 2 * M * N * K / seconds / 1e9
                if M == 1:
                    row |= {"us": seconds * 1e6, "gbs": gbs, "limit_share": share(gbs, limits.get(("memory", threads)))}
                else:
                    row |= {f"gops_{M}": gops, f"peak_{M}_share": share(gops, limits.get((isa, threads)))}
            rows.append(row)
    return rows


def load(plan: Plan) -> LanguageModel:
    """The model of the plan, packed, for the instruction set in force."""
    if plan.source is not None:
        with use_backend("native" if plan.native else "reference"):
            cache = plan.options.cache if plan.native else None
            return open_model(plan.source, cache_dtype=cache, activations=plan.options.activations)
    if plan.native:
        tensor = random_tensors(plan.config)
        weights = PackedWeights(lambda name, *_: tensor(name), set(), plan.config.quantizer)
        return Engine(plan.config, weights, cache_dtype=plan.options.cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BitNetForCausalLM(plan.config).pack().eval()


def generate_once(
    model: LanguageModel, tokenizer: BaseTokenizer, prompt: list[int], new: int, batch: int
) -> GenerationStats:
    """Generate the prompt's first token and `new` more in every row; times include the way to text."""
    streams = [TextStream(tokenizer) for _ in range(batch)]

    def to_text(ids: Tensor) -> None:
        for row, token in enumerate(ids.tolist()):
            # The ids are of random weights or go on behind an end: each text that ends begins another.
            if streams[row].finished:  # by an end-of-text token
                streams[row] = TextStream(tokenizer)
            streams[row].push(token % tokenizer.vocab_size)

    return time_generation(model, torch.tensor([prompt] * batch), new, sampling=DEFAULTS, consume=to_text)


@dataclass(frozen=True)
class Speed:
    """Prefill and decoding of one model with one number of threads and texts: `spread`s in tokens/s, and GB/s."""

    threads: int
    batch: int
    prefill: dict[str, float]
    decode: dict[str, float]
    gbs: float
    peak_mb: float | None
    batch_ratio: float | None = None
    """Decoding rate over that of one text with as many threads; None where that was not measured."""

    def row(self, **more: Value) -> Row:
        """As a row of a table."""
        return {**dataclasses.asdict(self), **more}


def measure(model: LanguageModel, tokenizer: BaseTokenizer, prompt: list[int], plan: Plan, label: str) -> list[Speed]:
    """Rates of prefill and decoding for every number of threads and texts."""
    speeds = list[Speed]()
    for threads, batch in itertools.product(plan.threads, plan.options.batch):
        torch.set_num_threads(threads)
        stage(f"{label}: {threads} threads, batch {batch}")
        generate_once(model, tokenizer, prompt, 1, batch)
        runs = [generate_once(model, tokenizer, prompt, plan.new, batch) for _ in range(plan.options.repeat)]
        prefill, decode = spread([run.prefill_rate for run in runs]), spread([run.decode_rate for run in runs])
        gbs = statistics.median(run.bandwidth for run in runs)
        speeds.append(Speed(threads, batch, prefill, decode, gbs, process_memory()))
    single = {speed.threads: speed.decode["median"] for speed in speeds if speed.batch == 1}
    return [
        dataclasses.replace(speed, batch_ratio=share(speed.decode["median"], single.get(speed.threads)))
        for speed in speeds
    ]


def measure_ours(
    plan: Plan, tokenizer: BaseTokenizer, prompt: list[int]
) -> tuple[list[Row], dict[str, list[Speed]], list[Row]]:
    """How the model was loaded on every instruction set, its speeds by instruction set, and on the first one the
    peers."""
    loads, speeds, peers = list[Row](), dict[str, list[Speed]](), list[Row]()
    for isa in plan.isas:
        with native.use_instruction_set(isa) if plan.native else use_backend("reference"):
            reset_peak_memory()
            stage(f"{plan.name}, {isa}: loading")
            started = time.perf_counter()
            model = load(plan)
            load_row: Row = {"isa": isa, "weights_mb": model.weight_bytes() / 1e6, "peak_mb": process_memory()}
            load_row["ternary_m"] = None if plan.config.quantizer == "none" else ternary_weights(plan.config) / 1e6
            loads.append(load_row | {"seconds": time.perf_counter() - started})
            speeds[isa] = measure(model, tokenizer, prompt, plan, f"{plan.name}, {isa}")
            if isa == plan.isas[0]:
                pairs = itertools.product(plan.peers, plan.threads)
                peers = [compare(peer, threads, model, tokenizer, prompt, plan) for peer, threads in pairs]
            del model
    return loads, speeds, peers


def generation_row(isa: str, speed: Speed, plan: Plan, limits: Limits) -> Row:
    """A speed beside the limits of its instruction set and of the memory."""
    # A multiplication and an addition for each ternary weight and token; embedding and head are left out.
    gops = speed.prefill["median"] * 2 * ternary_weights(plan.config) / 1e9
    peak_share = share(gops, limits.get((isa, speed.threads)))
    limit_share = share(speed.gbs, limits.get(("memory", speed.threads)))
    return speed.row(isa=isa, gops=gops, peak_share=peak_share, limit_share=limit_share)


def measure_twins(plan: Plan, ours: Sequence[Speed], tokenizer: BaseTokenizer, prompt: list[int]) -> list[Row]:
    """Float models of the same shape, and how many times faster ours is on its first instruction set."""
    rows: list[Row] = []
    for dtype in plan.twins:
        reset_peak_memory()
        stage(f"{dtype} twin: building")
        twin = float_twin(plan.config, DTYPES[dtype])
        # Both go through threads and batches in the same order.
        for speed, own in zip(measure(twin, tokenizer, prompt, plan, f"{dtype} twin"), ours, strict=True):
            prefill_ratio = own.prefill["median"] / speed.prefill["median"]
            decode_ratio = own.decode["median"] / speed.decode["median"]
            weights_mb = twin.weight_bytes() / 1e6
            rows.append(
                speed.row(twin=dtype, weights_mb=weights_mb, prefill_ratio=prefill_ratio, decode_ratio=decode_ratio)
            )
        del twin
    return rows


def run_peer(peer: Peer, prompt: int, new: int, threads: int) -> tuple[float, float]:
    """Tokens/s of prefill and of decoding from an empty cache, from one run of llama-bench.

    Raises ValueError or OSError where it does not run to its end or prints something else.
    """
    command = [peer.binary, "-m", peer.model, "-p", prompt, "-n", new, "-t", threads, "-r", 1, "-o", "json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    last = "\n".join(done.stderr.strip().splitlines()[-5:]) or "(nothing on standard error)"
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}:\n{last}")
    try:
        results = json.loads(done.stdout[done.stdout.index("[") : done.stdout.rindex("]") + 1])
        rates = {(int(r["n_prompt"]), int(r["n_gen"])): float(r["avg_ts"]) for r in results}
        return rates[prompt, 0], rates[0, new]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no llama-bench JSON on its standard output ({error!r}):\n{last}") from None


def compare(
    peer: Peer, threads: int, model: LanguageModel, tokenizer: BaseTokenizer, prompt: list[int], plan: Plan
) -> Row:
    """One peer and ours in turn; ours decodes behind one token then, since llama-bench starts from an empty cache."""
    theirs, ours = list[tuple[float, float]](), list[tuple[float, float]]()
    torch.set_num_threads(threads)
    for number in range(plan.options.repeat):
        stage(f"peer {peer.name}: {threads} threads, round {number + 1} of {plan.options.repeat}")
        try:
            theirs.append(run_peer(peer, len(prompt), plan.new, threads))
        except (ValueError, OSError) as error:
            console.error(f"peer {peer.name} failed: {error}")
            return {"peer": peer.name, "threads": threads, "error": str(error), "prefill_peer": "failed"}
        # Ours after the peer in every round: a machine that slows down slows both.
        generate_once(model, tokenizer, prompt[:1], 1, 1)
        prefill = generate_once(model, tokenizer, prompt, 0, 1).prefill_rate
        ours.append((prefill, generate_once(model, tokenizer, prompt[:1], plan.new, 1).decode_rate))
    row: Row = {"peer": peer.name, "threads": threads}
    for index, part in enumerate(("prefill", "decode")):
        own, other = (spread([rates[index] for rates in who]) for who in (ours, theirs))
        row |= {f"{part}_peer": other, f"{part}_ours": own, f"{part}_ratio": own["median"] / other["median"]}
    return row


def pick_tokenizer(plan: Plan, report: Report) -> BaseTokenizer:
    """The model's own, or one trained in a moment."""
    if plan.source is not None:
        return plan.source.tokenizer
    tokenizer = train_tokenizer([TEXT], min(4096, plan.config.vocab_size), max_bytes=400_000, threads=1)
    report.notes.append(
        f"random weights; the cost of detokenizing is that of a throw-away tokenizer of {tokenizer.vocab_size} pieces, "
        "which gets the ids modulo this number"
    )
    return tokenizer


def pick_prompt(plan: Plan, tokenizer: BaseTokenizer) -> list[int]:
    """As many tokens of English as the plan says, from the beginning of a text."""
    ids = tokenizer.encode(TEXT[: 8 * plan.prompt])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*bos, *(ids * (plan.prompt // len(ids) + 1))][: plan.prompt]


def begin(plan: Plan) -> Report:
    """The report of this machine and these options, with its first two lines printed."""
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores | {machine['date']} | torch {machine['torch']}")
    print(f"{' '.join(plan.isas)} of {' '.join(native.instruction_sets()) or 'no native kernels'}")
    options = dataclasses.asdict(plan.options) | {"threads": plan.threads, "isa": plan.isas}  # as they were chosen
    return Report(plan.options.json, {"machine": machine, "options": options})


def run(options: Options) -> int:
    """Gate, measurements and tables; returns 1 where the gate is red or a peer failed."""
    imported = process_memory("VmRSS")
    plan = make_plan(options)
    torch.set_num_threads(max(plan.threads))
    report, limits = begin(plan), Limits()
    if not passes_gate(plan, report):
        return 1
    if plan.native:
        limits, rows = measure_limits(plan)
        columns = {name: f"{name} GOPS" for name in native.instruction_sets()}
        report.section("limits", "Limits", rows, headings("threads, memory: read GB/s") | columns)
    if options.kernels and plan.native:
        many = "".join(f", gops_{M}: M={M} GOPS, peak_{M}_share: of peak" for M in (8, 64, 512))
        columns = headings(f"isa, codec, threads, rows, columns, us: M=1 us, gbs: GB/s, limit_share: of limit{many}")
        report.section("kernels", "Products of M tokens", measure_kernels(plan, limits), columns)

    tokenizer = pick_tokenizer(plan, report)
    prompt = pick_prompt(plan, tokenizer)
    report.notes += [
        f"medians of {options.repeat}; {plan.prompt} prompt tokens a row, {plan.new} steps behind them; "
        f"temperature {DEFAULTS.temperature}, top-p {DEFAULTS.top_p}, min-p {DEFAULTS.min_p}",
        "a model that fits the caches can exceed the limit, which is the memory's",
        *(["llama-bench's decoding draws no token and makes no text, ours does both"] if plan.peers else []),
        *(["--quick: too short to be a measurement"] if options.quick else []),
    ]
    loads, speeds, peers = measure_ours(plan, tokenizer, prompt)
    loads = [row | {"imported_mb": imported} for row in loads]
    report.section(
        "model",
        f"{plan.name}, {options.cache} cache",
        loads,
        headings(
            "isa, ternary_m: ternary weights M, weights_mb: read a step MB, imported_mb: memory before MB, "
            "peak_mb: peak in loading MB, seconds: loading s"
        ),
    )
    rows = [generation_row(isa, speed, plan, limits) for isa in speeds for speed in speeds[isa]]
    report.section(
        "generation",
        "Generation",
        rows,
        headings(
            "isa, threads, batch, prefill: prefill tok/s, gops: GOPS, peak_share: of peak, decode: decode tok/s, "
            "batch_ratio: x batch 1, gbs: GB/s, limit_share: of limit, peak_mb: peak MB"
        ),
    )
    report.section(
        "peers",
        "Peers in turn with ours, decoding from an empty cache",
        peers,
        headings(
            f"peer, threads, prefill_peer: prefill {plan.prompt} tok/s, prefill_ours: ours, prefill_ratio: ours/peer, "
            f"decode_peer: decode {plan.new} tok/s, decode_ours: ours, decode_ratio: ours/peer"
        ),
    )
    twins = measure_twins(plan, speeds[plan.isas[0]], tokenizer, prompt)
    report.section(
        "twins",
        "Float twins in torch",
        twins,
        headings(
            "twin, threads, batch, prefill: prefill tok/s, prefill_ratio: ours/twin, decode: decode tok/s, "
            "decode_ratio: ours/twin, gbs: GB/s, weights_mb: weights MB, peak_mb: peak MB"
        ),
    )
    print("\n" + "\n".join(f"note: {note}" for note in report.notes))
    return int(any("error" in row for row in peers))
