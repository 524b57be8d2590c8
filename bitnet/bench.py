"""Speeds of generation on this CPU, beside the machine's own limits, float twins and other engines.

    python -m bitnet.bench --threads 1 2 --json result.json      a random model of the 2B shape
    python -m bitnet.bench runs/demo --batch 1 4 16              a trained one
    python -m bitnet.bench --preset 700m --kernels --twins
    python -m bitnet.bench --peer ik=ik/build/bin/llama-bench:2b.iq2_bn.gguf

First the kernels of every instruction set must give the reference's integers, and the engine its logits: while one of
them does not, no speed is printed and the exit code is 1. Then, median (min..max) of the rounds:

    prefill     prompt tokens / time to the first token, sampling and detokenizing included
    GOPS        2 * weights * prompt tokens / the same time: head and attention take time and do not count
    decode      tokens of all rows / time of the decoding steps behind the prompt
    GB/s        weights and filled cache, once a step, / the same time
    of limit    its share of one read through 1 GiB of memory; of peak: GOPS' share of multiply-adds on registers only

Everything goes through `bitnet.generation.generate`, as in generate.py, on a CPU. A float model runs in torch.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import pydoc_data.topics
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from bitnet import checkpoint
from bitnet.engine import Engine
from bitnet.files import write_atomic
from bitnet.generation import GenerationStats, LanguageModel, SamplingConfig, TextStream, generate
from bitnet.kernels import cpu, native_wanted, reference, use_backend
from bitnet.kernels.cpu import native
from bitnet.loading import find, kind_of, open_model, open_tokenizer
from bitnet.model import PRESETS, BitNetForCausalLM, KVCache, ModelConfig
from bitnet.quant import pack_codes, packed_width
from bitnet.runtime import DTYPES, cpu_capabilities
from bitnet.tokenizer import BaseTokenizer, train_tokenizer

Row = dict[str, Any]
Limits = dict[tuple[str, int], float]
"""By ("memory", threads) in GB/s and (instruction set, threads) in GOPS; empty without the native library."""
SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)
TEXT = "\n\n".join(pydoc_data.topics.topics.values())  # 0.4 MB of English that every Python has
LOGIT_STD = 3.0
"""Of random models: top-p 0.95 then keeps some 2 % of the vocabulary; with flat logits it sorts nearly all of it."""


@dataclass(frozen=True)
class Options:
    """Speeds of prefill and decoding on this CPU, beside the machine's limits, float twins and other engines."""

    model: tyro.conf.Positional[Path | None] = None
    """Any model that generate.py takes; without one, a random model of --preset."""
    preset: str | None = None
    """Shape of a random model: 2b-4t unless given (tiny with --quick)."""
    threads: tuple[int, ...] = ()
    """One or several numbers of CPU threads; torch's own choice unless given."""
    batch: tuple[int, ...] = (1,)
    """One or several numbers of texts at once; decoding counts the tokens of all."""
    prompt: int | None = None
    """Tokens of the prompt: 512 unless given (32 with --quick), or what fits the model."""
    new: int | None = None
    """Decoding steps: 64 unless given (8 with --quick)."""
    cache: Literal["float32", "float16", "int8"] = "float32"
    """Of keys and values in the native engine."""
    isa: tuple[str, ...] = ()
    """One or several instruction sets; the one in force unless given."""
    repeat: int = 3
    """Rounds of every measurement."""
    kernels: bool = False
    """Also time the products alone, at the shapes of the model."""
    twins: bool = False
    """Also time float32 and bfloat16 torch models of the same shape."""
    peer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=BINARY:MODEL, a llama-bench and its model, to run in turn with ours; may be given several times."""
    json: Path | None = None
    """Write all results into this file."""
    device: str = "cpu"
    """cuda measures the Triton kernels, the GPU engine and training instead (bitnet/gpu_bench.py), of --preset or of
    two shapes; of the other options --json and --quick count."""
    quick: bool = False
    """A few seconds, to see that everything works: the numbers are no measurements."""


class Peer(NamedTuple):
    name: str
    binary: str
    model: str


@dataclass(frozen=True)
class Plan:
    """The options, checked and filled in. `isas` is ("reference",) without the native engine, `folder` the model's
    folder or file, None for a random one, `twins` the dtypes of the float twins."""

    options: Options
    name: str
    folder: Path | None
    config: ModelConfig
    threads: tuple[int, ...]
    isas: tuple[str, ...]
    prompt: int
    new: int
    peers: tuple[Peer, ...]
    twins: tuple[str, ...]

    @property
    def native(self) -> bool:
        return self.isas != ("reference",)


class Report:
    """Tables on standard output, and the same numbers in a JSON file that is written anew after every section."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.notes = plan.options.json, list[str]()
        machine = {
            "cpu": cpu_capabilities().get("cpu_name", platform.machine()), "cores": os.cpu_count(),
            "system": platform.platform(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "torch": torch.__version__, "threads": plan.threads, "instruction_sets": plan.isas,
            "instruction_sets_here": native.instruction_sets(),
        }  # fmt: skip
        self.results: dict[str, Any] = {"machine": machine, "options": dataclasses.asdict(plan.options)}
        print(f"{machine['cpu']}, {machine['cores']} cores | {machine['date']} | torch {torch.__version__}")
        print(f"{' '.join(plan.isas)} of {' '.join(native.instruction_sets()) or 'no native kernels'}")

    def section(self, key: str, title: str, rows: Sequence[Row], columns: dict[str, str]) -> None:
        """Print rows, one line each, and keep them under `key`; `columns` is the heading of each field."""
        self.results[key] = rows
        if rows:
            lines = [list(columns.values()), *([_text(row.get(name), name) for name in columns] for row in rows)]
            sides = ["<" if isinstance(rows[0].get(name), str) else ">" for name in columns]
            widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
            formats = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
            print(f"\n{title}")
            for line in lines:
                print("  " + "  ".join(map(format, line, formats)).rstrip())
        if self.path:
            text = json.dumps(self.results | {"notes": self.notes}, default=str)
            rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
            write_atomic(self.path, json.dumps(rounded, indent=1) + "\n")


def _text(value: Any, name: str) -> str:
    if isinstance(value, dict):
        middle, low, high = (_text(value[part], name) for part in ("median", "min", "max"))
        return middle if low == high else f"{middle} ({low}..{high})"
    if isinstance(value, float):
        if name.endswith("share"):
            return f"{value:.0%}"
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"  # three digits
    return "-" if value is None else str(value)


def progress(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def share(value: float, limit: float | None) -> float | None:
    return value / limit if limit else None


def process_memory(field: str = "VmHWM") -> float | None:
    """MB (10^6 bytes) of this process: VmRSS is what it holds, VmHWM the most since `reset_peak_memory`.

    Without /proc both are the most it ever held (ru_maxrss), and None on Windows.
    """
    with contextlib.suppress(OSError):
        if found := re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> float:
    """Bytes that could be taken now; infinite where the system does not tell."""
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def check_products(config: ModelConfig) -> Iterator[str]:
    """Compare the integer sums of every instruction set and codec with the reference; yields what differs."""
    generator = torch.Generator().manual_seed(0)
    wide = [(M, 80, K) for M in (1, 70) for K in (config.hidden_size, config.intermediate_size)]
    for M, N, K in [(1, 16, 64), (1, 37, 131), (5, 48, 257), (33, 40, 384), (513, 64, 200), *wide]:
        x = torch.randn(M, K, generator=generator)
        x[0] = 1  # the largest sum there can be: all codes 127 against all weights at their bound
        codes = reference.quantize_activations(x)[0]
        for codec, bits in {"base3": 2, "two_bit": 2, "four_bit": 4, "eight_bit": 8}.items():
            if codec == "base3" and K > native.BASE3_MAX_K:
                continue
            high = 1 if bits == 2 else 2 ** (bits - 1) - 1
            weight = torch.randint(-1 if bits == 2 else -high - 1, high + 1, (N, K), generator=generator).to(torch.int8)
            weight[0] = high
            expected = reference.integer_matmul(codes, weight, bits=bits)
            lines = native.Lines(N, K, codec)
            lines.fill(pack_codes(weight, bits), torch.ones(1, 1), bits)
            for isa in native.instruction_sets():
                with native.use_instruction_set(isa):
                    wrong = int((cpu.integer_matmul(x, lines) != expected).sum())
                if wrong:
                    yield f"{isa}, {codec}, {M} x {N} x {K}: {wrong} of {M * N} integer sums differ from the reference"


@torch.inference_mode()
def _gate_logits(model: LanguageModel, ids: Tensor, cache: Any) -> Tensor:
    return torch.cat([model(ids[:, :-1], cache), model(ids[:, -1:], cache)], 1)


def check_engine(dtype: str) -> Iterator[str]:
    """Compare the logits of a small random model, prompt and one cached step; yields what differs.

    Reference and engine may round a value on a border to neighbouring INT8 codes, which moves logits by 0.5 %: of
    four models one must be free of that. Instruction sets and codecs give equal bits always.
    """
    config = ModelConfig(
        vocab_size=300, hidden_size=160, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    B, T = 2, 71
    first, *_ = sets = native.instruction_sets()
    # The reference has no INT8 cache, which costs 3 %.
    limit, reference_dtype = (1e-4, DTYPES[dtype]) if dtype in DTYPES else (0.05, torch.float32)
    for seed in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BitNetForCausalLM(config).pack().eval()
            ids = torch.randint(config.vocab_size, (B, T))
        with use_backend("reference"):
            expected = _gate_logits(model, ids, KVCache(config, B, T, dtype=reference_dtype))
        with native.use_instruction_set(first):
            engine = Engine.from_model(model, cache_dtype=dtype)
            logits = _gate_logits(engine, ids, engine.new_cache(B, T))
        if (error := float((logits - expected).norm() / expected.norm())) < limit:
            break
    else:
        yield f"{first}: the engine's logits are off by {error:.1e} (relative, limit {limit:.0e}) with a {dtype} cache"
    for isa, codec in itertools.product(sets, ("base3", "two_bit")):
        with native.use_instruction_set(isa):
            engine = Engine.from_model(model, cache_dtype=dtype, codec=codec)
            if not torch.equal(_gate_logits(engine, ids, engine.new_cache(B, T)), logits):
                yield f"{isa}, {codec}: the engine's logits have other bits than {first}'s with a {dtype} cache"


def timed(function: Callable[..., int], *arguments: int) -> tuple[float, int]:
    """Seconds of one call, and its result."""
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def integer_peak(threads: int, seconds: float) -> float:
    """GOPS of multiply-adds on registers with the instruction set in force: best of five runs of `seconds` each."""
    peak, rounds = native.kernels().peak, 256
    while timed(peak, rounds, threads)[0] < seconds:
        rounds *= 2
    return max(operations / elapsed for elapsed, operations in (timed(peak, rounds, threads) for _ in range(5))) / 1e9


def measure_limits(plan: Plan) -> tuple[Limits, list[Row]]:
    """Memory bandwidth, best of five reads of a block, and the integer peak of every instruction set here."""
    library, limits, rows = native.library(), Limits(), list[Row]()
    assert library is not None
    block = native.huge_pages(2**24 if plan.options.quick else 2**30).fill_(1)
    for threads in plan.threads:
        progress(f"limits: {threads} threads")
        reads = [timed(library.bn_read, block.data_ptr(), block.numel(), threads)[0] for _ in range(5)]
        limits["memory", threads] = block.numel() / min(reads) / 1e9
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
    arguments = (
        codes.data_ptr(), codes.stride(0), scale.data_ptr(), total.data_ptr(), tokens, None, y.data_ptr(), rows, rows,
        0, threads,
    )  # fmt: skip
    matmul = native.kernels().matmul
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
        progress(f"kernels: {isa}, {threads} threads, {codec}")
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


def random_tensors(config: ModelConfig) -> Callable[[str], Tensor]:
    """Tensors of a packed ternary model by name, for `Engine`: random codes, in every layer the same ones."""
    C, shapes, norms = config.hidden_size, config.projections(), config.norms()
    generator = torch.Generator().manual_seed(0)
    # A byte is four fields of 0, 1 or 2.
    bytes_of_codes = (torch.cartesian_prod(*[torch.arange(3)] * 4) @ torch.tensor([1, 4, 16, 64])).to(torch.uint8)
    size = max(N * packed_width(K, 2) for N, K in shapes.values())
    codes = bytes_of_codes[torch.randint(81, (size,), generator=generator)]

    def tensor(name: str) -> Tensor:
        path, _, kind = name.rpartition(".")
        module = path.split(".", 3)[-1]  # inside a layer
        if module in shapes:
            N, K = shapes[module]
            return torch.full((1, 1), 0.02) if kind == "weight_scale" else codes[: N * packed_width(K, 2)].view(N, -1)
        if kind == "weight_scale":  # embedding or head; uniform bytes have a standard deviation of 74
            return torch.full((config.vocab_size, 1), LOGIT_STD / math.sqrt(C) / 74)
        if kind == "packed_weight":
            return torch.randint(256, (config.vocab_size, packed_width(C, 8)), dtype=torch.uint8, generator=generator)
        return torch.ones(norms.get(module, C))

    return tensor


def load(plan: Plan) -> LanguageModel:
    """The model of the plan, packed, for the instruction set in force."""
    if plan.folder is not None:
        with use_backend("native" if plan.native else "reference"):
            return open_model(plan.folder, cache_dtype=plan.options.cache).model
    if plan.native:
        return Engine(plan.config, random_tensors(plan.config), cache_dtype=plan.options.cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BitNetForCausalLM(plan.config).pack().eval()


def float_twin(config: ModelConfig, dtype: torch.dtype) -> BitNetForCausalLM:
    """A float model of this shape, filled from one tile of random numbers: drawing all of them would take minutes."""
    tile = torch.empty(2**20 + 7).normal_(generator=torch.Generator().manual_seed(0))  # a prime: no two rows are alike
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in config.tensor_shapes().items()}
    for name, tensor in tensors.items():
        is_table = "embed_tokens" in name or "lm_head" in name
        scaled = (tile * (LOGIT_STD / math.sqrt(config.hidden_size) if is_table else 0.02)).to(dtype)
        for part in tensor.view(-1).split(len(tile)):
            part.copy_(scaled[: len(part)] if tensor.dim() > 1 else torch.ones(1))
    return BitNetForCausalLM.from_tensors(config.replace(quantizer="none"), tensors)


def ternary_weights(config: ModelConfig) -> int:
    return config.num_hidden_layers * sum(N * K for N, K in config.projections().values())


def fitting_twins(config: ModelConfig) -> tuple[str, ...]:
    """dtypes of the float twins that memory holds. Raises ValueError where it holds none."""
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    available, fitting = available_memory(), list[str]()
    for dtype in ("float32", "bfloat16"):
        need = (ternary_weights(config) + tables) * DTYPES[dtype].itemsize
        if need <= 0.8 * available:
            fitting.append(dtype)
            continue
        message = f"the {dtype} twin takes {need / 1e9:.2f} GB, above 80 % of the {available / 1e9:.2f} GB available"
        if dtype == "bfloat16":
            raise ValueError(f"{message}; choose a smaller --preset, or leave --twins out")
        progress(f"note: {message}, and is left out")
    return tuple(fitting)


def generate_once(
    model: LanguageModel, tokenizer: BaseTokenizer, prompt: list[int], new: int, batch: int
) -> GenerationStats:
    """Generate the prompt's first token and `new` more in every row; times include the way to text."""
    stats = GenerationStats()
    streams = [TextStream(tokenizer) for _ in range(batch)]
    ids = torch.tensor([prompt] * batch)
    for step in generate(model, ids, max_new_tokens=new + 1, sampling=SAMPLING, seed=0, stats=stats):
        started = time.perf_counter()
        for row, token in enumerate(step.tolist()):
            if streams[row].finished:  # by an end-of-text token
                streams[row] = TextStream(tokenizer)
            streams[row].push(token % tokenizer.vocab_size)
        seconds = time.perf_counter() - started  # which generate() leaves out
        if stats.decode_steps:
            stats.decode_seconds += seconds
        else:
            stats.prefill_seconds += seconds
    return stats


def measure(model: LanguageModel, tokenizer: BaseTokenizer, prompt: list[int], plan: Plan, label: str) -> list[Row]:
    """Rates of prefill and decoding for every number of threads and texts."""
    rows, single = list[Row](), {}
    for threads, batch in itertools.product(plan.threads, plan.options.batch):
        torch.set_num_threads(threads)
        progress(f"{label}: {threads} threads, batch {batch}")
        generate_once(model, tokenizer, prompt, 1, batch)
        runs = [generate_once(model, tokenizer, prompt, plan.new, batch) for _ in range(plan.options.repeat)]
        prefill, decode = (spread([getattr(r, f"{part}_rate") for r in runs]) for part in ("prefill", "decode"))
        if batch == 1:
            single[threads] = decode["median"]
        rows.append({
            "threads": threads, "batch": batch, "prefill": prefill, "decode": decode,
            "batch_ratio": share(decode["median"], single.get(threads)),
            "gbs": statistics.median(r.bandwidth for r in runs), "peak_mb": process_memory(),
        })  # fmt: skip
    return rows


def measure_ours(
    plan: Plan, limits: Limits, tokenizer: BaseTokenizer, prompt: list[int]
) -> tuple[list[Row], list[Row], list[Row]]:
    """On every instruction set: how the model was loaded and how fast it generates; and on the first one the peers."""
    loads, rows, peers = list[Row](), list[Row](), list[Row]()
    weights = ternary_weights(plan.config)
    for isa in plan.isas:
        with native.use_instruction_set(isa) if plan.native else use_backend("reference"):
            reset_peak_memory()
            progress(f"{plan.name}, {isa}: loading")
            started = time.perf_counter()
            model = load(plan)
            loads.append({
                "isa": isa, "ternary_m": None if plan.config.quantizer == "none" else weights / 1e6,
                "weights_mb": model.weight_bytes() / 1e6, "peak_mb": process_memory(),
                "seconds": time.perf_counter() - started,
            })  # fmt: skip
            for row in measure(model, tokenizer, prompt, plan, f"{plan.name}, {isa}"):
                gops = row["prefill"]["median"] * 2 * weights / 1e9
                row |= {"gops": gops, "peak_share": share(gops, limits.get((isa, row["threads"])))}
                row["limit_share"] = share(row["gbs"], limits.get(("memory", row["threads"])))
                rows.append({"isa": isa, **row})
            if isa == plan.isas[0]:
                pairs = itertools.product(plan.peers, plan.threads)
                peers = [compare(peer, threads, model, tokenizer, prompt, plan) for peer, threads in pairs]
            del model
    return loads, rows, peers


def measure_twins(plan: Plan, ours: Sequence[Row], tokenizer: BaseTokenizer, prompt: list[int]) -> list[Row]:
    """Float models of the same shape, and how many times faster ours is on its first instruction set."""
    rows: list[Row] = []
    for dtype in plan.twins:
        reset_peak_memory()
        progress(f"{dtype} twin: building")
        twin = float_twin(plan.config, DTYPES[dtype])
        # Both go through threads and batches in the same order.
        for row, own in zip(measure(twin, tokenizer, prompt, plan, f"{dtype} twin"), ours, strict=False):
            row |= {f"{part}_ratio": own[part]["median"] / row[part]["median"] for part in ("prefill", "decode")}
            rows.append({"twin": dtype, "weights_mb": twin.weight_bytes() / 1e6, **row})
        del twin
    return rows


def parse_peer(text: str) -> Peer:
    """A peer from NAME=BINARY:MODEL. Raises ValueError for another form and for files that don't exist."""
    name, _, rest = text.partition("=")
    binary, _, model = rest.rpartition(":")
    if not (name and binary and model):
        raise ValueError(f"--peer {text} is not NAME=BINARY:MODEL, e.g. ik=build/bin/llama-bench:2b.gguf")
    if missing := [path for path in (binary, model) if not (Path(path).exists() or shutil.which(path))]:
        raise ValueError(f"--peer {name}: {' and '.join(missing)} cannot be found")
    return Peer(name, str(Path(shutil.which(binary) or binary).absolute()), model)


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
        progress(f"peer {peer.name}: {threads} threads, round {number + 1} of {plan.options.repeat}")
        try:
            theirs.append(run_peer(peer, len(prompt), plan.new, threads))
        except (ValueError, OSError) as error:
            print(f"error: peer {peer.name} failed: {error}", file=sys.stderr)
            return {"peer": peer.name, "threads": threads, "error": str(error), "prefill_peer": "failed"}
        generate_once(model, tokenizer, prompt[:1], 1, 1)
        prefill = generate_once(model, tokenizer, prompt, 0, 1).prefill_rate
        ours.append((prefill, generate_once(model, tokenizer, prompt[:1], plan.new, 1).decode_rate))
    row: Row = {"peer": peer.name, "threads": threads}
    for index, part in enumerate(("prefill", "decode")):
        row[f"{part}_peer"], row[f"{part}_ours"] = (spread([rates[index] for rates in who]) for who in (theirs, ours))
        row[f"{part}_ratio"] = row[f"{part}_ours"]["median"] / row[f"{part}_peer"]["median"]
    return row


def pick_model(options: Options) -> tuple[str, Path | None, ModelConfig]:
    """Name, checkpoint folder (None for a random model) and shape. Raises ValueError for one that cannot be run."""
    if options.model is None:
        name = options.preset or ("tiny" if options.quick else "2b-4t")
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return name, None, PRESETS[name]
    if options.preset is not None:
        raise ValueError(f"{options.model} has its own shape; leave out --preset {options.preset}")
    path = find(options.model)
    if kind_of(path) in ("run", "packed"):
        path = checkpoint.resolve(path, "best")
        config, _ = checkpoint.load_config(path)
    else:
        config = open_model(path).model.config
    if config.quantizer == "none" and (options.isa or options.twins or options.kernels):
        raise ValueError(
            f"{options.model} is a float model, which runs in torch; leave out --isa, --kernels and --twins"
        )
    return str(options.model), path, config


def make_plan(options: Options) -> Plan:
    """Check the options and fill in what depends on model and machine. Raises ValueError, naming what is wrong."""
    for option in ("threads", "batch", "prompt", "new", "repeat"):
        value, empty = getattr(options, option), 1 if option == "threads" else 0
        if value is not None and min(value if isinstance(value, tuple) else (value,), default=empty) < 1:
            raise ValueError(f"--{option} is {value}; give at least 1")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {options.json} is a folder or in one that does not exist; give a file to write")
    name, folder, config = pick_model(options)
    isas: tuple[str, ...] = ("reference",)
    if options.isa or (config.quantizer != "none" and native_wanted(torch.device("cpu"))):
        isas = ()
        for isa in options.isa or (native.kernels().name.decode(),):
            with native.use_instruction_set(isa):  # raises where it isn't there
                isas = (*isas, native.kernels().name.decode())
    new = options.new or (8 if options.quick else 64)
    room = config.max_position_embeddings - new - 1  # one token more is drawn behind the prompt
    prompt = options.prompt or max(1, min(32 if options.quick else 512, room))
    if prompt > room:
        raise ValueError(
            f"--prompt {prompt} and --new {new} exceed {name}'s {config.max_position_embeddings} positions"
        )
    return Plan(
        options, name, folder, config, options.threads or (torch.get_num_threads(),), isas, prompt, new,
        tuple(map(parse_peer, options.peer)), fitting_twins(config) if options.twins else (),
    )  # fmt: skip


def pick_tokenizer(plan: Plan, report: Report) -> BaseTokenizer:
    """The model's own, or one trained in a moment."""
    if plan.folder is not None:
        return open_tokenizer(plan.folder, kind_of(plan.folder))[0]
    tokenizer = train_tokenizer([TEXT], min(4096, plan.config.vocab_size), max_bytes=400_000, threads=1)
    report.notes.append(
        f"random weights; the cost of detokenizing is that of a throw-away tokenizer of {tokenizer.vocab_size} pieces, "
        "which gets the ids modulo this number"
    )
    return tokenizer


def passes_gate(plan: Plan, report: Report) -> bool:
    """Run the correctness gate and print how it went."""
    if not plan.native:
        reason = "the native kernels are missing or switched off: the torch reference ran"
        reason = "a float model: torch ran it" if plan.config.quantizer == "none" else reason
        report.notes.append(f"{reason}, without gate and limits")
        return True
    progress("checking the kernels and the engine")
    wrong = [*check_products(plan.config)]
    for dtype in sorted({"float32", plan.options.cache}):
        wrong += check_engine(dtype)
    state = "RED, so no speed is measured" if wrong else "green: every instruction set gives the reference's numbers"
    print("\n".join([f"gate {state}", *(f"  {line}" for line in wrong)]))
    report.results["gate"] = state
    return not wrong


def run(options: Options) -> int:
    """Gate, measurements and tables; returns 1 where the gate is red or a peer failed."""
    imported = process_memory("VmRSS")
    plan = make_plan(options)
    torch.set_num_threads(max(plan.threads))
    report, limits = Report(plan), Limits()
    if not passes_gate(plan, report):
        return 1
    if plan.native:
        limits, rows = measure_limits(plan)
        columns = {name: f"{name} GOPS" for name in native.instruction_sets()}
        report.section("limits", "Limits", rows, {"threads": "threads", "memory": "read GB/s", **columns})
    if options.kernels and plan.native:
        many = {k: v for M in (8, 64, 512) for k, v in ((f"gops_{M}", f"M={M} GOPS"), (f"peak_{M}_share", "of peak"))}
        report.section("kernels", "Products of M tokens", measure_kernels(plan, limits), {
            "isa": "isa", "codec": "codec", "threads": "threads", "rows": "rows", "columns": "columns",
            "us": "M=1 us", "gbs": "GB/s", "limit_share": "of limit", **many,
        })  # fmt: skip

    tokenizer = pick_tokenizer(plan, report)
    ids = tokenizer.encode(TEXT[: 8 * plan.prompt])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = [*bos, *(ids * (plan.prompt // len(ids) + 1))][: plan.prompt]
    report.notes += [
        f"medians of {options.repeat}; {plan.prompt} prompt tokens a row, {plan.new} steps behind them; "
        f"temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}",
        "a model that fits the caches can exceed the limit, which is the memory's",
        *(["llama-bench's decoding draws no token and makes no text, ours does both"] if plan.peers else []),
        *(["--quick: too short to be a measurement"] if options.quick else []),
    ]
    loads, rows, peers = measure_ours(plan, limits, tokenizer, prompt)
    loads = [{**row, "imported_mb": imported} for row in loads]
    report.section("model", f"{plan.name}, {options.cache} cache", loads, {
        "isa": "isa", "ternary_m": "ternary weights M", "weights_mb": "read a step MB",
        "imported_mb": "memory before MB", "peak_mb": "peak in loading MB", "seconds": "loading s",
    })  # fmt: skip
    shape = {"threads": "threads", "batch": "batch"}
    report.section("generation", "Generation", rows, {
        "isa": "isa", **shape, "prefill": "prefill tok/s", "gops": "GOPS", "peak_share": "of peak",
        "decode": "decode tok/s", "batch_ratio": "x batch 1", "gbs": "GB/s", "limit_share": "of limit",
        "peak_mb": "peak MB",
    })  # fmt: skip
    report.section("peers", "Peers in turn with ours, decoding from an empty cache", peers, {
        "peer": "peer", "threads": "threads", "prefill_peer": f"prefill {plan.prompt} tok/s", "prefill_ours": "ours",
        "prefill_ratio": "ours/peer", "decode_peer": f"decode {plan.new} tok/s", "decode_ours": "ours",
        "decode_ratio": "ours/peer",
    })  # fmt: skip
    report.section("twins", "Float twins in torch", measure_twins(plan, rows, tokenizer, prompt), {
        "twin": "twin", **shape, "prefill": "prefill tok/s", "prefill_ratio": "ours/twin", "decode": "decode tok/s",
        "decode_ratio": "ours/twin", "gbs": "GB/s", "weights_mb": "weights MB", "peak_mb": "peak MB",
    })  # fmt: skip
    print("\n" + "\n".join(f"note: {note}" for note in report.notes))
    return int(any("error" in row for row in peers))


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m bitnet.bench", args=argv)
    threads = torch.get_num_threads()
    try:
        if options.device != "cpu":
            from bitnet import gpu_bench

            presets = {"presets": (options.preset,)} if options.preset else {}
            return gpu_bench.run(
                gpu_bench.Options(device=options.device, json=options.json, quick=options.quick, **presets)
            )
        return run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
