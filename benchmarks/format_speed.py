"""Decode speed against bits per weight: every weight format of the native engine on one shape, with INT8 activations
and with what it takes by itself.

    python3 benchmarks/format_speed.py --out benchmarks/results/format_speed.json --picture docs/format_speed.png
    python3 benchmarks/format_speed.py --formats Q4_K Q8_0 --out speeds.json          some more, into the same file

A format's matrices repeat one tile of 64 rows, quantized from random numbers as the package quantizes; embedding and
head are INT8 in all of them. First comes the gate: the kernels give the reference's integers, and each tile its
layer's product in torch, on every instruction set; a format for which they do not is not measured. Then a format and
b1.58 decode in turn in one process, `--steps` tokens from an empty cache in each of `--rounds`: tokens/s are those of
the fastest round, which other work on the machine disturbs least. `bits` are all bytes that a step reads, scales
included, over the weights; `limit`: what reading those bytes allows at the bandwidth measured. The file holds what was
measured before too, of this machine and shape.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from bitnet.bench.cpu_gate import check_products
from bitnet.bench.limits import read_bandwidth
from bitnet.bench.report import describe_machine, same_machine
from bitnet.files import write_atomic
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.weights import Stored, matrix_of, of_packed, stored
from bitnet.kernels import quantize_weight, use_backend
from bitnet.kernels.cpu import native
from bitnet.kernels.cpu.matrices import Piece, linear
from bitnet.model import PRESETS, ModelConfig, PackedLinear
from bitnet.model.compound import AffineLinear, ScaledBlockLinear, TritPlanesLinear
from bitnet.model.quantized import StaticInt8Linear
from bitnet.model.weight_only import BlockLinear, FloatLinear, GroupLinear, NF4Linear
from bitnet.plots import Point, draw_speed
from bitnet.quant.blocks import TYPES
from bitnet.quant.float4 import quantize_float4
from bitnet.quant.grouped import Grid, round_to_nearest
from bitnet.quant.hqq import hqq_quantize
from bitnet.quant.packing import pack_codes
from bitnet.quant.trit_planes import quantize_planes

TILE = 64
"""Rows of a tile, a multiple of 32."""
SHAPE = PRESETS["700m"].replace(quantizer="none", sub_norm=False, vocab_size=4096)
"""With a small head, which is INT8 beside every format."""
BASE = "b1.58"
"""Beside which every format is measured."""


def float4(kind: str, layer: nn.Linear) -> nn.Module:
    rows, columns = layer.weight.shape
    made = ScaledBlockLinear(columns, rows, block_type=kind)
    made.data, scale = quantize_float4(layer.weight.detach(), kind)
    made.tensor_scale = torch.tensor([scale])
    return made


def blocks(kind: str, layer: nn.Linear) -> nn.Module:
    return BlockLinear.from_linear(layer, kind, torch.ones(layer.in_features))


def rounded(bits: int, layer: nn.Linear) -> nn.Module:
    return GroupLinear.from_quantized(round_to_nearest(layer.weight.detach(), Grid(bits), 128), None)


def hqq(bits: int, layer: nn.Linear) -> nn.Module:
    return AffineLinear.from_quantized(hqq_quantize(layer.weight.detach(), bits, 64))


def planes(layer: nn.Linear) -> nn.Module:
    return TritPlanesLinear.from_quantized(quantize_planes(layer.weight.detach(), 128))


def static(layer: nn.Linear) -> nn.Module:
    return StaticInt8Linear.from_linear(layer, torch.tensor([0.03]), torch.tensor([0]))


# Family of bitnet/plots.py, and how a float layer becomes one of the format.
FORMATS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    BASE: ("native", partial(PackedLinear.from_linear, quantizer="ternary")),
    "b1.58 g64": ("native", partial(PackedLinear.from_linear, quantizer="ternary-g64")),
    "W4A8": ("native", partial(PackedLinear.from_linear, quantizer="int4")),
    "W8A8": ("native", partial(PackedLinear.from_linear, quantizer="int8")),
    "W8A8 static": ("weights and activations", static),
    **{kind: ("gguf", partial(blocks, kind)) for kind in TYPES},
    **{kind: ("gguf", partial(float4, kind)) for kind in ("MXFP4", "NVFP4")},
    **{f"GPTQ {bits}": ("weight-only", partial(rounded, bits)) for bits in (2, 3, 4, 8)},
    "HQQ 4": ("weight-only", partial(hqq, 4)),
    "PTQTP": ("weight-only", planes),
    "NF4": ("weight-only", NF4Linear.from_linear),
    "FP8": ("float", partial(FloatLinear.from_linear, dtype="float8")),
    "FP16": ("float", partial(FloatLinear.from_linear, dtype="float16")),
    "BF16": ("float", partial(FloatLinear.from_linear, dtype="bfloat16")),
    "FP32": ("float", partial(FloatLinear.from_linear, dtype="float32")),
}
TREATED = ("gguf", "weight-only")
"""Families whose formats take activations as INT8, or finer: each by itself as INT16 or as floats."""


def tile(name: str, columns: int) -> nn.Module:
    """A layer `[TILE, columns]` of a format."""
    layer = nn.Linear(columns, TILE, bias=False)
    layer.weight.data = torch.randn(TILE, columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    return FORMATS[name][1](layer)


def treatments(name: str) -> tuple[str, ...]:
    if FORMATS[name][0] not in TREATED or name == "NF4":
        return ("",)
    return "int8", stored(tile(name, 512), "auto").form.activations


@dataclass
class Tiles:
    """Weights of a model whose matrices repeat a tile for every number of columns."""

    config: ModelConfig
    tiles: dict[int, Stored]

    def matrix(self, name: str, rows: int, columns: int) -> Stored:
        if "proj" not in name:
            codes, scale = quantize_weight(torch.randn(TILE, columns) / columns**0.5, "int8")
            of = of_packed(pack_codes(codes, 8), scale, 8, columns)
        else:
            of = self.tiles[columns]
        whole = of.read(0, TILE)

        def read(first: int, last: int) -> Piece:
            times = -(-(last - first) // TILE)

            def some(part: Tensor) -> Tensor:
                return part.repeat(times, *[1] * (part.dim() - 1))[: last - first]

            scale = whole.scale
            many = scale is not None and len(scale) == TILE
            return replace(
                whole,
                codes=some(whole.codes),
                groups=[some(part) for part in whole.groups],
                supers=[some(part) for part in whole.supers],
                scale=some(scale) if many and scale is not None else scale,
            )

        return replace(of, rows=rows, read=read)

    def vector(self, name: str, size: int) -> Tensor:
        return torch.ones(size)


def wrong(name: str, treatment: str) -> list[str]:
    """What is wrong with the products of a format: nothing, or it is not measured."""
    layer, found, bits = tile(name, 512), list[str](), None
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    with use_backend("reference"), torch.inference_mode():
        expected = layer(x)
    matrix = matrix_of(stored(layer, treatment or "int8"))
    for isa in native.instruction_sets():
        with native.use_instruction_set(isa):
            y = linear(matrix, x)
        error = float((y - expected).norm() / expected.norm())
        limit = {"int8": 0.02, "int16": 2e-4}.get(treatment, 1e-4)
        if not error < limit:
            found.append(f"{name} {treatment}, {isa}: off by {error:.1e}, limit {limit:.0e}")
        if bits is not None and not torch.equal(y, bits):
            found.append(f"{name} {treatment}, {isa}: other bits")
        bits = y
    return found


def engine_of(name: str, treatment: str, config: ModelConfig) -> Engine:
    columns = {shape[1] for shape in config.projections().values()}
    tiles = {count: stored(tile(name, count), treatment or "int8") for count in columns}
    return Engine(config, Tiles(config, tiles), cache_dtype="float16")


def decode(engine: Engine, steps: int) -> float:
    """Tokens/s of so many steps."""
    row = engine.rows.new_cache(steps + 1).new_row()
    engine.rows.step([(row, [1])])
    started = time.perf_counter()
    for step in range(steps):
        engine.rows.step([(row, [step + 1])])
    return steps / (time.perf_counter() - started)


def measure(given: argparse.Namespace, config: ModelConfig, results: dict[str, Any]) -> None:
    base, weights = engine_of(BASE, "", config), sum(N * K for N, K in config.projections().values())
    weights = weights * config.num_hidden_layers + config.vocab_size * config.hidden_size
    for name in given.formats:
        for treatment in treatments(name):
            label = f"{name} {treatment}".strip()
            if faults := wrong(name, treatment):
                results["failed"] += faults
                print(*faults, sep="\n", flush=True)
                continue
            engine, own, theirs = engine_of(name, treatment, config), list[float](), list[float]()
            decode(engine, 2)
            for _ in range(given.rounds):
                own.append(decode(engine, given.steps))
                theirs.append(decode(base, given.steps))
            bits, rate = 8 * engine.weight_bytes() / weights, max(own)
            limit = results["read_gbs"] * 1e9 / engine.weight_bytes()
            row = {"format": name, "treatment": treatment, "family": FORMATS[name][0], "bits": bits, "tokens_s": rate}
            row |= {"of_base": rate / max(theirs), "limit": limit, "rounds": own, "base_rounds": theirs}
            others = [one for one in results["rows"] if (one["format"], one["treatment"]) != (name, treatment)]
            results["rows"] = [*others, row]
            write_atomic(given.out, json.dumps(results, indent=1) + "\n")
            of = f"{row['of_base']:5.2f} of {BASE}  {rate / limit:4.0%} of what reading allows"
            print(f"{label:16} {bits:5.2f} bits {rate:7.1f} tok/s  {of}", flush=True)


def draw(results: dict[str, Any], path: Path) -> None:
    points = [
        Point(row["format"], row["family"], row["bits"], row["tokens_s"], hollow=row["treatment"] in ("int16", "float"))
        for row in results["rows"]
    ]
    machine = results["machine"]
    isa = machine["instruction_sets"][0]
    draw_speed(
        points,
        path,
        title=f"Decode speed on {machine['cpu']}, {isa}, {machine['threads']} threads: {results['shape']}",
        bits_per_second=8 * results["read_gbs"] * 1e9 / results["weights"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON of all results")
    parser.add_argument("--picture", type=Path, help="PNG of all results in --out")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS), help="what to measure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="of the 24")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if not native.instruction_sets():
        raise SystemExit("the native kernels are not built: python3 setup.py build_ext --inplace")
    torch.set_num_threads(given.threads)
    config = SHAPE.replace(num_hidden_layers=given.layers)
    machine = describe_machine()
    shape = f"0.7B shape, {given.layers} of {SHAPE.num_hidden_layers} layers, 4,096 tokens"
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"rows": [], "failed": []}
    if results["rows"] and not (same_machine(results["machine"], machine) and results["shape"] == shape):
        raise SystemExit(f"{given.out} is of another machine or shape; give another --out")
    weights = (
        sum(N * K for N, K in config.projections().values()) * given.layers + config.vocab_size * config.hidden_size
    )
    results |= {"machine": machine, "shape": shape, "weights": weights, "failed": []}
    if given.formats:
        results["failed"] += check_products(config)
        results["read_gbs"] = read_bandwidth(given.threads)
        print(f"gate {'RED' if results['failed'] else 'green'}, reading {results['read_gbs']:.1f} GB/s", flush=True)
        if not results["failed"]:
            measure(given, config, results)
        write_atomic(given.out, json.dumps(results, indent=1) + "\n")
    if given.picture and results["rows"]:
        draw(results, given.picture)
    print(*results["failed"], sep="\n")
    return int(bool(results["failed"]))


if __name__ == "__main__":
    sys.exit(main())
