"""Speed of the Triton kernels, the GPU engine and training on a GPU, beside bfloat16 twins.

    python3 -m bitnet.bench.gpu --section decode --presets 2b-4t --json decode.json
    python3 -m bitnet.bench.gpu --gate engine                     a gate of gpu_gate.py: exit code 1 if red
    python3 -m bitnet.bench.gpu --warm 13 --json warm.json        compile what all of them need, in 13 processes

`benchmarks/gpu_visit.py` runs all of them in the order of their worth and measures nothing behind a red gate. Every
section writes its rows to the JSON file as they come, so one that is cut off keeps what it has.

Contenders take turns. Each is a CUDA graph of at least 20 calls, over as many copies of the weights as exceed the
second-level cache, so no time is a launch's and weights come from memory; the chip is warmed up before, and the
median and quartiles of at least 50 ms of replays count. Without a GPU, TRITON_INTERPRET=1 and `--device cpu --quick`
only show that the script runs.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bitnet import kernels
from bitnet.bench import gpu_gate, gpu_inference, gpu_products, gpu_training
from bitnet.bench.gpu_gate import GATES, QUICK_CONFIG, cache_configs, half_of
from bitnet.bench.gpu_inference import BATCHES, LONG_CACHES, long_config
from bitnet.bench.gpu_products import Tile, algorithms_for, product_shapes, tile_call, tile_candidates
from bitnet.bench.gpu_timing import Call, Options, Row, log, name_of
from bitnet.bench.gpu_training import curve_run, held_out, step_config
from bitnet.bench.random_models import random_tensors
from bitnet.files import write_atomic
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.machine import pick_device
from bitnet.model import PRESETS, ModelConfig
from bitnet.quant import packed_width

SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "machine": gpu_inference.measure_machine,
    "decode": gpu_inference.measure_decode,
    "launching": gpu_inference.measure_launching,
    "profile": gpu_inference.measure_profile,
    "prefill": gpu_inference.measure_prefill,
    "kernels": gpu_products.measure_kernels,
    "tiles": gpu_products.measure_tiles,
    "training": gpu_training.measure_training,
    "muon": gpu_training.measure_muon,
    "curve_cpu": gpu_training.measure_curve_cpu,
    "curve": gpu_training.measure_curve,
    "loss": gpu_training.measure_loss,
    "long": gpu_inference.measure_long,
}


def calls_to_warm(options: Options) -> Iterator[Call]:
    """Calls that launch, between them, the kernels of all gates and sections; run while launches are recorded."""
    from bitnet.kernels.triton import product, weights
    from bitnet.kernels.triton.activations import padded, quantize_activations
    from bitnet.kernels.triton.training import ternary_linear

    device = options.device
    for name in ("activations", "weights", "products", "projections", "groups", "sampling", "training"):
        yield functools.partial(_exhaust, GATES[name](device, options.quick))
    yield functools.partial(_exhaust, gpu_gate.check_e4m3(device))
    layer, x = gpu_gate.packed_layer(device)
    yield kernels.use_backend("triton")(functools.partial(layer, x))
    yield from calls_of_engines(options)
    for M, N, K, bits in product_shapes(options):
        for algorithm in algorithms_for(M, bits):

            def call(M: int = M, N: int = N, K: int = K, bits: int = bits, algorithm: str = algorithm) -> None:
                quantize_activations(torch.empty(M, K, dtype=options.dtype, device=device))
                product.product(
                    torch.empty(M, padded(K), dtype=torch.int8, device=device),
                    torch.empty(M, device=device),
                    torch.empty(M, dtype=torch.int32, device=device),
                    torch.empty(N, packed_width(K, bits), dtype=torch.uint8, device=device),
                    torch.empty(1, device=device),
                    bits=bits,
                    in_features=K,
                    dtype=options.dtype,
                    constant=True,
                    plan=product.choose(M, N, K, bits, device, algorithm),
                )

            yield call
    for M, N, K, bits, _, plan in tile_candidates(options) if options.tiles else ():
        yield functools.partial(_one_tile, M, N, K, bits, plan, options)
    curve, kinds = curve_run(options)[0], sorted({torch.float32, options.dtype}, key=str)
    trainings = [(step_config(options), options.dtype), *((curve, kind) for kind in kinds)]
    for config, kind in trainings:
        for N, K in sorted(set(config.projections().values())):

            def product_and_back(N: int = N, K: int = K, kind: torch.dtype = kind) -> None:
                x, w = torch.empty(16, K, device=device), torch.empty(N, K, device=device)
                _, codes, scale, w_codes, w_scale = ternary_linear(x, w, None, kind)
                weights.dequantize(w_codes, w_scale, K, kind)
                weights.dequantize(codes, scale, K, kind)

            yield product_and_back


def calls_of_engines(options: Options) -> Iterator[Call]:
    """Calls that launch the kernels of all engines in gates and sections."""
    half, own = name_of(half_of(options.device)), name_of(options.dtype)

    def engine(config: ModelConfig, dtype: str, cache: str | None = None) -> GpuEngine:
        config = config.replace(num_hidden_layers=1)  # all have one shape
        return GpuEngine(config, random_tensors(config), device=options.device, dtype=dtype, cache_dtype=cache)

    def in_graphs_and_eager(made: GpuEngine, batch_sizes: Sequence[int]) -> Iterator[Call]:
        yield from made.calls(batch_sizes)
        made.graphs = False
        for size in batch_sizes:
            yield from made.steps(size)

    small = [QUICK_CONFIG] if options.quick else gpu_gate.CONFIGS.values()
    for config, dtype in itertools.product(small, ("float32", half)):
        yield from in_graphs_and_eager(engine(config, dtype), (1, 2, 8))
    for dtype in ("float32", own):
        yield functools.partial(engine(curve_run(options)[0], dtype), held_out(options).to(options.device))
    for config, dtype, cache in itertools.product(cache_configs(options.quick), ("float32", half), gpu_gate.CACHES):
        yield from engine(config, dtype, cache).calls((2,))
    for config in options.configs.values():
        made = engine(config, own)
        yield from (functools.partial(_without_dependent_launch, step) for step in made.steps(1))
        yield from in_graphs_and_eager(made, BATCHES)
    config = long_config(options)
    for each in LONG_CACHES:
        yield from engine(config, own, each).steps(1)


def _without_dependent_launch(call: Call) -> None:
    from bitnet.kernels.triton.language import dependent_launches

    with dependent_launches(False):
        call()


def _one_tile(M: int, N: int, K: int, bits: int, plan: Tile, options: Options) -> None:
    packed = torch.empty(N, packed_width(K, bits), dtype=torch.uint8, device=options.device)
    tile_call(M, N, K, bits, plan, options)(packed)


def _exhaust(rows: Iterator[object]) -> None:
    for _ in rows:
        pass


def warm(options: Options, processes: int) -> Iterator[Row]:
    """Compile everything in a pool of processes; one row for each variant, then one with counts."""
    from bitnet.kernels.triton.warm import compile_all, variants_of

    started = time.perf_counter()
    variants = variants_of(calls_to_warm(options), "ptx" if options.device.type == "cuda" else "none")
    recorded = time.perf_counter() - started
    log(f"{len(variants)} kernel variants, found in {recorded:.1f} s")
    failed, spilled, done = [], [], 0
    if options.device.type == "cuda":
        for row in compile_all(variants, processes):
            done += 1
            if "error" in row:
                failed.append(row)
                log(f"{row['kernel']}: {row['error']}")
            elif row["spills"]:
                spilled.append(row)
            if done % 50 == 0:
                log(f"{done} of {len(variants)}, {time.perf_counter() - started:.0f} s")
    seconds = time.perf_counter() - started
    yield {
        "variants": len(variants),
        "compiled": done,
        "failed": failed,
        "spilled": spilled,
        "seconds": seconds,
        "recorded_s": recorded,
        "line": f"{done} of {len(variants)} variants in {seconds:.0f} s, {len(failed)} failed, "
        f"{len(spilled)} spill registers",
    }


class Results:
    """Rows of results, on disk after each of them."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, list[Row]()

    def add(self, row: Row, part: str | None = None) -> None:
        """Keep and print a row; `part` names the gate or section where a file holds several."""
        self.rows.append(row if part is None else {"part": part, **row})
        print(row["line"], flush=True)
        if self.path is not None:
            text = json.dumps(self.rows, default=str)
            rounded = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(rounded, indent=1) + "\n")


def run_gate(name: str, options: Options) -> Iterator[Row]:
    """Each thing that is wrong, and a last row "green" or "RED"."""
    wrong = 0
    for text in GATES[name](options.device, options.quick):
        wrong += 1
        yield {"wrong": text, "line": text}
    yield {"green": not wrong, "line": f"{name}: {f'RED, {wrong} wrong' if wrong else 'green'}"}


ALL = ("machine", "decode", "prefill", "kernels", "training", "curve_cpu", "curve", "loss")


def run(options: Options, path: Path | None) -> int:
    """All gates and then the sections of ALL in this process, on disk as they come; 1 where a gate is red."""
    results = Results(path)
    red = []
    for name in GATES:
        for row in run_gate(name, options):
            results.add(row, name)
        red += [] if row["green"] else [name]
    if red:
        print(f"red gates, so no speed is measured: {', '.join(red)}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for name in ALL:
            for row in SECTIONS[name](dataclasses.replace(options, work=Path(folder))):
                results.add(row, name)
    return 0


def device_of(name: str) -> torch.device:
    """The device of this name, with its number. Raises ValueError for one that isn't there."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bitnet.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gate", choices=GATES)
    what.add_argument("--section", choices=SECTIONS)
    what.add_argument("--warm", type=int, metavar="PROCESSES", help="compile all kernels beforehand")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["2b-4t", "700m"], help="shapes of models")
    parser.add_argument("--json", type=Path, help="where the rows go, as they are ready")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("build") / "visit", help="where steps leave what others need")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: see that it runs")
    parser.add_argument("--tiles", action="store_true", help="with --warm: the candidates of the tiles section too")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        options = Options(device_of(given.device), tuple(given.presets), given.quick, given.work, given.tiles)
        if given.section != "curve_cpu":
            kernels.triton.require(options.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = Results(given.json)
    if given.gate:
        rows = run_gate(given.gate, options)
    elif given.section:
        rows = SECTIONS[given.section](options)
    else:
        rows = warm(options, given.warm)
    for row in rows:
        results.add(row)
    return int(not results.rows[-1].get("green", True) or bool(results.rows[-1].get("failed")))


if __name__ == "__main__":
    sys.exit(main())
