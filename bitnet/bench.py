"""Speeds of generation on this CPU, beside the machine's own limits, float twins and other engines.

    python -m bitnet.bench --threads 1 2 --json result.json      a random model of the 2B shape
    python -m bitnet.bench runs/demo --batch 1 4 16              a trained one
    python -m bitnet.bench --preset 700m --kernels --twins
    python -m bitnet.bench --peer ik=ik/build/bin/llama-bench:2b.iq2_bn.gguf

First the kernels of every instruction set must give the reference's integers and the engine its logits: while one does
not, no speed is printed and the exit code is 1. Then, median (min..max) of the rounds:

    prefill     prompt tokens / time to the first token, sampling and detokenizing included
    GOPS        2 * ternary weights * prompt tokens / that time: head and attention cost time and do not count
    decode      tokens of all rows / time of the decoding steps, behind the prompt
    GB/s        weights and filled cache, once a step, / the same time
    of limit    share of what one read through 1 GiB of memory, or multiply-adds on registers only, reach here

Everything goes through `bitnet.generation.generate`, as in generate.py. Packed models on a CPU only.
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
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from bitnet import checkpoint
from bitnet.engine import Engine
from bitnet.files import write_atomic
from bitnet.generation import GenerationStats, LanguageModel, SamplingConfig, TextStream, generate
from bitnet.kernels import cpu, native_wanted, reference, use_backend
from bitnet.kernels.cpu import native
from bitnet.model import PRESETS, BitNetForCausalLM, ModelConfig
from bitnet.model.transformer import rope_tables
from bitnet.quant import pack_codes, packed_width
from bitnet.runtime import DTYPES, cpu_capabilities
from bitnet.tokenizer import Tokenizer, train_tokenizer

Row = dict[str, Any]
SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)
CODEC_BITS = {"base3": 2, "two_bit": 2, "four_bit": 4, "eight_bit": 8}
LARGEST_ERROR = {"float32": 1e-4, "float16": 1e-2, "int8": 5e-2}
"""Of the engine's logits against the reference's, relative, by the cache's dtype."""
LOGIT_STD = 3.0
"""Of random models: top-p 0.95 then keeps some 2 % of the vocabulary, where flat logits would keep nearly all of it."""


@dataclass(frozen=True)
class Options:
    """Speeds of prefill and decoding on this CPU, beside the machine's limits, float twins and other engines."""

    model: tyro.conf.Positional[Path | None] = None
    """A run folder or a folder of packed weights; without one, a random model of --preset."""
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
    quick: bool = False
    """A few seconds, to see that everything works: the numbers are no measurements."""


@dataclass(frozen=True)
class Peer:
    """Another engine's llama-bench and the model it runs."""

    name: str
    binary: str
    model: str

    @classmethod
    def parse(cls, text: str) -> "Peer":
        """From NAME=BINARY:MODEL. Raises ValueError for another form and for files that don't exist."""
        name, _, rest = text.partition("=")
        binary, _, model = rest.rpartition(":")
        if not (name and binary and model):
            raise ValueError(f"--peer {text} is not NAME=BINARY:MODEL, e.g. ik=build/bin/llama-bench:2b.gguf")
        found = shutil.which(binary)
        if found is None or not Path(model).exists():
            what = f"program {binary}" if found is None else f"model {model}"
            raise ValueError(f"--peer {name}: the {what} does not exist" + (" or may not run" if not found else ""))
        return cls(name, str(Path(found).absolute()), model)


class PeerError(Exception):
    """A peer that did not run to its end or whose output is not llama-bench's."""


@dataclass(frozen=True)
class Plan:
    """The options, checked and filled in."""

    options: Options
    name: str
    folder: Path | None
    """Of the checkpoint; None for a random model."""
    config: ModelConfig
    threads: tuple[int, ...]
    isas: tuple[str, ...]
    """Of the native engine; "reference" alone where it isn't there."""
    prompt: int
    new: int
    peers: tuple[Peer, ...]
    twins: tuple[str, ...]
    """dtypes of the float twins to run"""

    @property
    def native(self) -> bool:
        return self.isas != ("reference",)


@dataclass(frozen=True)
class Limits:
    """What the machine can do, by threads and (instruction set, threads); empty without the native library."""

    bandwidth: dict[int, float]
    peak: dict[tuple[str, int], float]


class Report:
    """Tables on standard output, and the same numbers in a JSON file that is written anew after every section."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.notes = plan.options.json, list[str]()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if hasattr(os, "sysconf") else None
        machine = {
            "cpu": cpu_capabilities().get("cpu_name", platform.machine()), "cores": os.cpu_count(), "memory_gb": memory,
            "system": platform.platform(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "torch": torch.__version__, "threads": plan.threads, "instruction_set": plan.isas,
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
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            left = [isinstance(rows[0].get(name), str) for name in columns]
            print(f"\n{title}")
            for line in lines:
                cells = (f"{c:<{w}}" if l else f"{c:>{w}}" for c, w, l in zip(line, widths, left, strict=True))
                print("  " + "  ".join(cells).rstrip())
        self.save()

    def save(self) -> None:
        if self.path:
            self.results["notes"] = self.notes
            write_atomic(self.path, json.dumps(_rounded(self.results), indent=1, default=str) + "\n")


def _text(value: Any, name: str) -> str:
    if isinstance(value, dict):
        middle, low, high = (_text(value[part], name) for part in ("median", "min", "max"))
        return middle if low == high else f"{middle} ({low}..{high})"
    if isinstance(value, float):
        if name.endswith("share"):
            return f"{value:.0%}"
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"  # three digits
    return "-" if value is None else str(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def progress(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
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


def available_memory() -> int | None:
    """Bytes that a new process could take; None where the system does not tell."""
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


# The correctness gate


def check_products(config: ModelConfig) -> Iterator[str]:
    """Compare the integer sums of every instruction set and codec with the reference; yields what differs."""
    generator = torch.Generator().manual_seed(0)
    wide = [(M, 80, K) for M in (1, 70) for K in {config.hidden_size, config.intermediate_size}]
    for M, N, K in [(1, 16, 64), (1, 37, 131), (5, 48, 257), (33, 40, 384), (513, 64, 200), *wide]:
        x = torch.randn(M, K, generator=generator)
        x[0] = 1  # the largest sum there can be: all codes 127 against all weights at their bound
        for codec, bits in CODEC_BITS.items():
            if codec == "base3" and K > native.BASE3_MAX_K:
                continue
            high = 1 if bits == 2 else 2 ** (bits - 1) - 1
            weight = torch.randint(-1 if bits == 2 else -high - 1, high + 1, (N, K), generator=generator).to(torch.int8)
            weight[0] = high
            expected = reference.integer_matmul(reference.quantize_activations(x)[0], weight, bits=bits)
            lines = native.Lines(N, K, codec)
            lines.fill(pack_codes(weight, bits), torch.ones(1, 1), bits)
            for isa in native.instruction_sets():
                with native.use_instruction_set(isa):
                    wrong = int((cpu.integer_matmul(x, lines) != expected).sum())
                if wrong:
                    yield f"{isa}, {codec}, {M} x {N} x {K}: {wrong} of {M * N} integer sums differ from the reference"


def check_engine(cache_dtype: str) -> Iterator[str]:
    """Compare the logits of a small random model, prompt and one cached step; yields what differs."""
    config = ModelConfig(
        vocab_size=300, hidden_size=160, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BitNetForCausalLM(config).pack().eval()
        ids = torch.randint(300, (2, 71))

    @torch.inference_mode()
    def logits(runner: LanguageModel) -> Tensor:
        cache = runner.new_cache(*ids.shape)
        return torch.cat([runner(ids[:, :70], cache), runner(ids[:, 70:], cache)], 1)

    with use_backend("reference"):
        expected = logits(model)
    first: Tensor | None = None
    for isa, codec in itertools.product(native.instruction_sets(), ("base3", "two_bit")):
        with native.use_instruction_set(isa):
            found = logits(Engine.from_model(model, cache_dtype=cache_dtype, codec=codec))
        first = found if first is None else first
        error = float((found - expected).norm() / expected.norm())
        if not error < LARGEST_ERROR[cache_dtype]:
            yield f"{isa}, {codec}: the engine's logits are off by {error:.1e} (relative) with a {cache_dtype} cache"
        elif not torch.equal(found, first):
            yield f"{isa}, {codec}: the engine's logits have other bits than {native.instruction_sets()[0]}'s"


# The machine's limits


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


def measure_limits(plan: Plan, report: Report) -> Limits:
    """Memory bandwidth, best of five reads of a block, and the integer peak of every instruction set here."""
    library, limits = native.library(), Limits({}, {})
    if library is None or not plan.native:
        return limits
    block = native.huge_pages(2**24 if plan.options.quick else 2**30).fill_(1)
    rows: list[Row] = []
    for threads in plan.threads:
        progress(f"limits: {threads} threads")
        reads = [timed(library.bn_read, block.data_ptr(), block.numel(), threads)[0] for _ in range(5)]
        limits.bandwidth[threads] = block.numel() / min(reads) / 1e9
        for isa in native.instruction_sets():
            with native.use_instruction_set(isa):
                limits.peak[isa, threads] = integer_peak(threads, 0.001 if plan.options.quick else 0.1)
        peaks = {isa: limits.peak[isa, threads] for isa in native.instruction_sets()}
        rows.append({"threads": threads, "read_gbs": limits.bandwidth[threads], **peaks})
    columns = {"threads": "threads", "read_gbs": "read GB/s"} | {isa: f"{isa} GOPS" for isa in peaks}
    report.section("limits", "Limits of the machine", rows, columns)
    return limits


# Products alone


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's matrices, as the engine multiplies them together."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_width
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    return {"qkv": (queries + 2 * keys, C), "o": (C, queries), "gate_up": (2 * F, C), "down": (C, F)}


def ternary_weights(config: ModelConfig) -> int:
    return config.num_hidden_layers * sum(rows * columns for rows, columns in projections(config).values())


def seconds_per_product(copies: Sequence[native.Lines], tokens: int, threads: int, budget: float) -> float:
    """Seconds of one product of `tokens` activations, going round the copies of the weights for `budget` seconds."""
    rows, columns = copies[0].rows, copies[0].columns
    codes, scale, total = cpu._quantize(torch.randn(tokens, columns))
    y = torch.empty(tokens, rows)
    arguments = (
        codes.data_ptr(), codes.stride(0), scale.data_ptr(), total.data_ptr(), tokens, None, y.data_ptr(), rows, rows,
        0, threads,
    )  # fmt: skip
    matmul = native.kernels().matmul
    matmul(copies[-1].struct, *arguments)
    started = time.perf_counter()
    for calls, copy in enumerate(itertools.cycle(copies), 1):
        matmul(copy.struct, *arguments)
        if (elapsed := time.perf_counter() - started) >= budget:
            return elapsed / calls
    raise AssertionError("cycle() does not end")


def measure_kernels(plan: Plan, limits: Limits) -> list[Row]:
    """Time of one token's product and rate of many tokens', for every codec and matrix of a layer.

    The weights lie in as many copies as fill half a gigabyte, so that they come from memory as in a whole model.
    """
    quick, rows = plan.options.quick, list[Row]()
    largest = max(native.Lines.size(*shape, "two_bit") for shape in projections(plan.config).values())
    arena = native.huge_pages(max(2**20 if quick else 2**29, largest))
    tile = torch.randint(256, (2**20,), dtype=torch.uint8)
    for part in arena.split(tile.numel()):
        part.copy_(tile[: len(part)])
    for isa, threads, codec in itertools.product(plan.isas, plan.threads, ("base3", "two_bit")):
        progress(f"kernels: {isa}, {threads} threads, {codec}")
        for name, (N, K) in projections(plan.config).items():
            if codec == "base3" and K > native.BASE3_MAX_K:
                continue
            size = native.Lines.size(N, K, codec)
            starts = range(0, arena.numel() - size + 1, size)
            copies = [native.Lines(N, K, codec, arena[start : start + size]) for start in starts]
            row: Row = {"isa": isa, "threads": threads, "codec": codec, "matrix": name, "shape": f"{N}x{K}"}
            for M in (1, 8, 64, 512):
                with native.use_instruction_set(isa):
                    runs = [
                        seconds_per_product(copies, M, threads, 0.002 if quick else 0.1)
                        for _ in range(plan.options.repeat)
                    ]
                seconds = statistics.median(runs)
                if M == 1:
                    row |= {"us": seconds * 1e6, "gbs": size / seconds / 1e9}
                    row["bandwidth_share"] = share(row["gbs"], limits.bandwidth.get(threads))
                else:
                    gops = 2 * M * N * K / seconds / 1e9
                    row |= {f"gops_{M}": gops, f"{M}_share": share(gops, limits.peak.get((isa, threads)))}
            rows.append(row)
    return rows


# Models


def random_tensors(config: ModelConfig) -> Callable[[str], Tensor]:
    """Tensors of a packed ternary model by name, for `Engine`: random codes, in every layer the same ones."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_width
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    shapes = {
        "q_proj": (queries, C), "k_proj": (keys, C), "v_proj": (keys, C), "o_proj": (C, queries), "gate_proj": (F, C),
        "up_proj": (F, C), "down_proj": (C, F),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    size = max(N * packed_width(K, 2) for N, K in shapes.values())
    # A byte is four fields of 0, 1 or 2.
    bytes_of_codes = (torch.cartesian_prod(*[torch.arange(3)] * 4) @ torch.tensor([1, 4, 16, 64])).to(torch.uint8)
    codes = bytes_of_codes[torch.randint(81, (size,), generator=generator)]

    def tensor(name: str) -> Tensor:
        *_, module, kind = name.split(".")
        if module in shapes:
            N, K = shapes[module]
            if kind == "weight_scale":
                return torch.full((1, 1), 0.02)
            return codes[: N * packed_width(K, 2)].view(N, -1)
        if kind == "weight_scale":  # embedding or head; uniform bytes have a standard deviation of 74
            return torch.full((config.vocab_size, 1), LOGIT_STD / math.sqrt(C) / 74)
        if kind == "packed_weight":
            shape = (config.vocab_size, packed_width(C, 8))
            return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return torch.ones({"attn_sub_norm": queries, "ffn_sub_norm": F}.get(module, C))

    return tensor


def load(plan: Plan) -> LanguageModel:
    """The model of the plan, packed, on the backend and instruction set in force."""
    if plan.folder is not None:
        return checkpoint.load_for_inference(plan.folder, cache_dtype=plan.options.cache)
    if plan.native:
        return Engine(plan.config, random_tensors(plan.config), cache_dtype=plan.options.cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BitNetForCausalLM(plan.config).pack().eval()


def float_twin(config: ModelConfig, dtype: torch.dtype) -> BitNetForCausalLM:
    """A float torch model of this shape with random weights, filled from one tile: drawing each would take minutes."""
    with torch.device("meta"):
        model = BitNetForCausalLM(config.replace(quantizer="none")).to(dtype)
    model.to_empty(device="cpu").eval()
    model.model.cos, model.model.sin = rope_tables(config)
    # A prime length, so that no two rows are alike.
    tile = torch.empty(1048583).normal_(generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
            continue
        is_head = "embed_tokens" in name or "lm_head" in name
        scaled = (tile * (LOGIT_STD / math.sqrt(config.hidden_size) if is_head else 0.02)).to(dtype)
        for part in parameter.data.view(-1).split(len(tile)):
            part.copy_(scaled[: len(part)])
    return model


def fitting_twins(config: ModelConfig) -> tuple[str, ...]:
    """dtypes of the float twins that memory holds. Raises ValueError where it holds none."""
    with torch.device("meta"):
        parameters = BitNetForCausalLM(config.replace(quantizer="none")).num_parameters()
    available, fitting = available_memory(), list[str]()
    for name in ("float32", "bfloat16"):
        need = parameters * DTYPES[name].itemsize
        if available is None or need <= 0.8 * available:
            fitting.append(name)
            continue
        message = (
            f"the {name} twin of {parameters / 1e6:.0f} M parameters takes {need / 1e9:.1f} GB, above 80 % of the "
            f"{available / 1e9:.1f} GB that are free"
        )
        if name == "bfloat16":
            raise ValueError(f"{message}; choose a smaller --preset, or leave --twins out")
        progress(f"note: {message}: left out")
    return tuple(fitting)


# End to end


def generate_once(
    model: LanguageModel, tokenizer: Tokenizer, prompt: Sequence[int], new: int, batch: int
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


def measure(model: LanguageModel, tokenizer: Tokenizer, prompt: Sequence[int], plan: Plan, label: str) -> list[Row]:
    """Rates of prefill and decoding for every number of threads and texts."""
    rows: list[Row] = []
    for threads, batch in itertools.product(plan.threads, plan.options.batch):
        torch.set_num_threads(threads)
        progress(f"{label}: {threads} threads, batch {batch}")
        generate_once(model, tokenizer, prompt, 1, batch)
        runs = [generate_once(model, tokenizer, prompt, plan.new, batch) for _ in range(plan.options.repeat)]
        row: Row = {"threads": threads, "batch": batch}
        row["prefill"], row["decode"] = spread([r.prefill_rate for r in runs]), spread([r.decode_rate for r in runs])
        row["gbs"], row["peak_mb"] = statistics.median(r.bandwidth for r in runs), process_memory()
        single = next((r for r in rows if (r["threads"], r["batch"]) == (threads, 1)), row if batch == 1 else None)
        row["batch_ratio"] = row["decode"]["median"] / single["decode"]["median"] if single else None
        rows.append(row)
    return rows


def measure_ours(
    plan: Plan, limits: Limits, tokenizer: Tokenizer, prompt: Sequence[int]
) -> tuple[list[Row], list[Row], list[Row]]:
    """The model on every instruction set: how it was loaded, how fast it generates, and how fast beside the peers."""
    loads, rows, peers = list[Row](), list[Row](), list[Row]()
    operations = 2 * ternary_weights(plan.config)
    for isa in plan.isas:
        with native.use_instruction_set(isa) if plan.native else contextlib.nullcontext():
            reset_peak_memory()
            before, started = process_memory("VmRSS"), time.perf_counter()
            progress(f"{plan.name}, {isa}: loading")
            model = load(plan)
            loads.append({
                "isa": isa, "ternary_weights_m": operations / 2e6, "weights_mb": model.weight_bytes() / 1e6,
                "before_mb": before, "peak_mb": process_memory(), "seconds": time.perf_counter() - started,
            })  # fmt: skip
            for row in measure(model, tokenizer, prompt, plan, f"{plan.name}, {isa}"):
                row["gops"] = row["prefill"]["median"] * operations / 1e9
                row["peak_share"] = share(row["gops"], limits.peak.get((isa, row["threads"])))
                row["bandwidth_share"] = share(row["gbs"], limits.bandwidth.get(row["threads"]))
                rows.append({"isa": isa, **row})
            if not peers:  # beside the first instruction set only
                for peer, threads in itertools.product(plan.peers, plan.threads):
                    torch.set_num_threads(threads)
                    peers.append(compare(peer, threads, model, tokenizer, prompt, plan))
            del model
    return loads, rows, peers


def measure_twins(plan: Plan, ours: Sequence[Row], tokenizer: Tokenizer, prompt: Sequence[int]) -> list[Row]:
    """Float models of the same shape, and how many times faster ours is on its first instruction set."""
    rows: list[Row] = []
    for name in plan.twins:
        reset_peak_memory()
        progress(f"{name} twin: building")
        twin = float_twin(plan.config, DTYPES[name])
        for row, own in zip(measure(twin, tokenizer, prompt, plan, f"{name} twin"), ours, strict=False):
            assert (row["threads"], row["batch"]) == (own["threads"], own["batch"])
            for part in ("prefill", "decode"):
                row[f"{part}_ratio"] = own[part]["median"] / row[part]["median"]
            rows.append({"twin": name, "weights_mb": twin.weight_bytes() / 1e6, **row})
        del twin
    return rows


# Peers


def run_peer(peer: Peer, prompt: int, new: int, threads: int) -> tuple[float, float]:
    """Tokens/s of prefill and of decoding from an empty cache, from one run of llama-bench. Raises PeerError."""
    command = [peer.binary, "-m", peer.model, "-p", prompt, "-n", new, "-t", threads, "-r", 1, "-o", "json"]
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise PeerError(f"{peer.name} does not run: {error}") from None
    last = "\n".join(done.stderr.strip().splitlines()[-5:]) or "(nothing on standard error)"
    if done.returncode:
        raise PeerError(f"{peer.name} ended with exit code {done.returncode}:\n{last}")
    try:
        results = json.loads(done.stdout[done.stdout.index("[") : done.stdout.rindex("]") + 1])
        rates = {(int(r["n_prompt"]), int(r["n_gen"])): float(r["avg_ts"]) for r in results}
        return rates[prompt, 0], rates[0, new]
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"{peer.name} printed no llama-bench JSON ({error!r}):\n{last}") from None


def compare(
    peer: Peer, threads: int, model: LanguageModel, tokenizer: Tokenizer, prompt: Sequence[int], plan: Plan
) -> Row:
    """One peer and ours in turn; ours decodes behind one token then, since llama-bench starts from an empty cache."""
    pairs: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    for round_number in range(plan.options.repeat):
        progress(f"peer {peer.name}: {threads} threads, round {round_number + 1} of {plan.options.repeat}")
        try:
            theirs = run_peer(peer, len(prompt), plan.new, threads)
        except PeerError as error:
            print(f"error: {error}", file=sys.stderr)
            return {"peer": peer.name, "threads": threads, "error": str(error), "prefill_peer": "failed"}
        generate_once(model, tokenizer, prompt[:1], 1, 1)
        pairs["prefill"].append((theirs[0], generate_once(model, tokenizer, prompt, 0, 1).prefill_rate))
        pairs["decode"].append((theirs[1], generate_once(model, tokenizer, prompt[:1], plan.new, 1).decode_rate))
    row: Row = {"peer": peer.name, "threads": threads}
    for part, values in pairs.items():
        row[f"{part}_peer"], row[f"{part}_ours"] = (spread(rates) for rates in zip(*values, strict=True))
        row[f"{part}_ratio"] = row[f"{part}_ours"]["median"] / row[f"{part}_peer"]["median"]
    return row


# The command


def make_plan(options: Options) -> Plan:
    """Check the options and fill in what depends on the machine. Raises ValueError, naming what is wrong."""
    counts = {"threads": options.threads, "batch": options.batch, "repeat": (options.repeat,)}
    counts |= {"prompt": (options.prompt or 1,), "new": (options.new or 1,)}
    for name, values in counts.items():
        if any(value < 1 for value in values) or getattr(options, name) == 0:
            raise ValueError(f"--{name} is {getattr(options, name)}; give at least 1")
    if not options.batch:
        raise ValueError("--batch is empty; give at least one number of texts, e.g. 1")
    if options.model is not None and options.preset is not None:
        raise ValueError(f"{options.model} has its own shape; leave out --preset {options.preset}")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {options.json} cannot be written: its folder does not exist, or it is one")

    folder, name = None, options.preset or ("tiny" if options.quick else "2b-4t")
    if options.model is not None:
        folder, name = checkpoint.resolve(options.model, "best"), str(options.model)
        shape = checkpoint.load_json(folder / checkpoint.CONFIG).get("model")
        if not isinstance(shape, dict):
            raise ValueError(f"{folder / checkpoint.CONFIG} has no 'model' section; is it a model of this project?")
        config = ModelConfig.from_dict(shape)
        if config.quantizer == "none":
            raise ValueError(f"{options.model} is a float model; give its ternary model, and --twins to compare")
    elif name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    else:
        config = PRESETS[name]

    isas: tuple[str, ...] = ("reference",)
    if options.isa or native_wanted(torch.device("cpu")):
        isas = ()
        for isa in options.isa or (native.kernels().name.decode(),):
            with native.use_instruction_set(isa):  # raises where it isn't there
                isas = (*isas, native.kernels().name.decode())
    new = options.new or (8 if options.quick else 64)
    positions = config.max_position_embeddings
    prompt = options.prompt or min(32 if options.quick else 512, max(1, positions - new))
    if prompt + new > positions:
        raise ValueError(
            f"--prompt {prompt} and --new {new} need {prompt + new} positions and {name} has {positions}; give less"
        )
    return Plan(
        options, name, folder, config, options.threads or (torch.get_num_threads(),), isas, prompt, new,
        tuple(Peer.parse(text) for text in options.peer), fitting_twins(config) if options.twins else (),
    )  # fmt: skip


def run(options: Options) -> int:
    """Gate, measurements and tables; returns 1 where the gate is red or a peer failed."""
    plan = make_plan(options)
    torch.set_num_threads(max(plan.threads))
    report = Report(plan)
    if plan.native:
        progress("checking the kernels and the engine")
        wrong = [*check_products(plan.config), *check_engine("float32")]
        wrong += check_engine(options.cache) if options.cache != "float32" else []
        if wrong:
            print("\n".join(["gate: RED, no speed is worth printing", *(f"  {line}" for line in wrong)]))
            return 1
        report.results["gate"] = (
            "integers and logits of " + ", ".join(native.instruction_sets()) + " are the reference's"
        )
        print(f"gate: green, {report.results['gate']}")
    else:
        report.notes.append("no native kernels: packed products ran on the torch reference, without gate and limits")
    limits = measure_limits(plan, report)
    if options.kernels and plan.native:
        columns = dict.fromkeys(("isa", "threads", "codec", "matrix", "shape"))
        headings = {name: name for name in columns} | {
            "us": "1 token: us",
            "gbs": "GB/s",
            "bandwidth_share": "of limit",
        }
        headings |= {k: v for M in (8, 64, 512) for k, v in ((f"gops_{M}", f"{M}: GOPS"), (f"{M}_share", "of peak"))}
        report.section("kernels", f"Products of {plan.name}", measure_kernels(plan, limits), headings)

    text = "\n\n".join(pydoc_data.topics.topics.values())
    if plan.folder is not None:
        tokenizer = Tokenizer.load(plan.folder / checkpoint.TOKENIZER)
    else:
        tokenizer = train_tokenizer([text], min(4096, plan.config.vocab_size), max_bytes=400_000, threads=1)
        report.notes.append(
            f"random weights; ids modulo {tokenizer.vocab_size} become text by a throw-away tokenizer of so many pieces, "
            "whose cost is included"
        )
    report.notes.append(f"medians of {options.repeat}; prompt {plan.prompt}, then {plan.new} steps; {SAMPLING}")
    report.notes.append("a model that fits the caches may read more than the limit, which is that of memory")
    if options.quick:
        report.notes.append("--quick: too short to be a measurement")
    prompt = [tokenizer.bos_id, *tokenizer.encode(text[: 20 * plan.prompt])][: plan.prompt]
    assert len(prompt) == plan.prompt
    loads, rows, peers = measure_ours(plan, limits, tokenizer, prompt)
    report.section("model", f"{plan.name}, {options.cache} cache", loads, {
        "isa": "isa", "ternary_weights_m": "ternary weights M", "weights_mb": "read a step MB", "before_mb": "memory before MB",
        "peak_mb": "peak, loading MB", "seconds": "loading s",
    })  # fmt: skip
    rates = {"threads": "threads", "batch": "batch", "prefill": "prefill tok/s", "decode": "decode tok/s"}
    report.section("generation", "Generation", rows, {
        "isa": "isa", "threads": "threads", "batch": "batch", "prefill": "prefill tok/s", "gops": "GOPS",
        "peak_share": "of peak", "decode": "decode tok/s", "batch_ratio": "x batch 1", "gbs": "GB/s",
        "bandwidth_share": "of limit", "peak_mb": "peak MB",
    })  # fmt: skip
    report.section("twins", "Float twins in torch", measure_twins(plan, rows, tokenizer, prompt), {
        "twin": "twin", **rates, "prefill_ratio": "prefill ours/twin", "decode_ratio": "decode ours/twin",
        "gbs": "GB/s", "peak_mb": "peak MB",
    })  # fmt: skip
    report.section("peers", "Peers, in turn with ours; decoding from an empty cache", peers, {
        "peer": "peer", "threads": "threads", "prefill_peer": f"pp{plan.prompt} peer", "prefill_ours": "ours",
        "prefill_ratio": "ours/peer", "decode_peer": f"tg{plan.new} peer", "decode_ours": "ours",
        "decode_ratio": "ours/peer",
    })  # fmt: skip
    print("\n" + "\n".join(f"note: {note}" for note in report.notes))
    return int(any("error" in row for row in peers))


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m bitnet.bench", args=argv)
    threads = torch.get_num_threads()
    try:
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
