"""The packed product on a GPU beside cuBLAS, and candidates for its tiles."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.bench.gpu_timing import Call, Options, Row, copy_rate, in_turn
from bitnet.quant import packed_width

Tile = Any
"""A plan of a product, the (rows, warps) of a one-token projection, or the (gate, warps) of a quantization."""
PRODUCTS = [(2560, 2560, 2), (3840, 2560, 2), (13824, 2560, 2), (2560, 6912, 2), (28672, 8192, 2), (128256, 2560, 8)]
"""Rows, columns and bits of the matrices in 2B-4T, of a 70B model's widest, and of 2B-4T's head."""
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)


def product_shapes(options: Options) -> Iterator[tuple[int, int, int, int]]:
    """Tokens, rows, columns and bits."""
    if options.quick:
        yield from ((1, 64, 256, 2), (5, 64, 256, 2))
        return
    for (N, K, bits), M in itertools.product(PRODUCTS, TOKENS):
        if not (N > 100_000 and M > 64):  # a head is asked for the last position only
            yield M, N, K, bits


def algorithms_for(M: int, bits: int) -> tuple[str, ...]:
    if M > 4:
        return ("tensor_core", "dense") if M >= 32 else ("tensor_core",)
    return ("dot4", "tensor_core", "four_lanes", "select") if M == 1 and bits == 2 else ("dot4", "tensor_core")


def measure_kernels(options: Options) -> Iterator[Row]:
    """The product alone: every algorithm beside cuBLAS in bfloat16 and torch._int_mm, cold weights."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.activations import quantize_activations

    device, cold = options.device, 1e3 if options.quick else 2.5e8
    copy = copy_rate(device, 2**20 if options.quick else 2**29)
    for M, N, K, bits in product_shapes(options):

        def copies(make: Callable[[], Tensor], limit: float = cold) -> list[Tensor]:
            first = make()
            return [first, *(first.clone() for _ in range(min(63, int(limit // first.nbytes))))]

        x = torch.randn(M, K, dtype=options.dtype, device=device)
        packed = copies(lambda: torch.randint(0, 256, (N, packed_width(K, bits)), dtype=torch.uint8, device=device))  # noqa: B023
        scale = torch.ones(1, device=device)
        codes, x_scale, total = quantize_activations(x)
        contenders: dict[str, Sequence[Call]] = {}
        for algorithm in algorithms_for(M, bits):
            plan = product.choose(M, N, K, bits, device, algorithm)
            call = functools.partial(
                product.product,
                codes,
                x_scale,
                total,
                w_scale=scale,
                plan=plan,
                bits=bits,
                in_features=K,
                dtype=x.dtype,
                constant=True,
            )
            contenders[algorithm] = [functools.partial(call, packed=p) for p in packed]
        floats = copies(lambda: torch.randn(N, K, device=device, dtype=x.dtype))  # noqa: B023
        contenders["bf16"] = [functools.partial(F.linear, x, w) for w in floats]
        if M > 16 and device.type == "cuda":  # torch._int_mm takes no fewer
            x8 = codes[:, :K].contiguous()
            int8 = copies(lambda: torch.randint(-1, 2, (N, K), dtype=torch.int8, device=device))  # noqa: B023
            contenders["int_mm"] = [functools.partial(torch._int_mm, x8, w.t()) for w in int8]
        times = in_turn(contenders, device, budget=0.02)
        chosen = product.choose(M, N, K, bits, device).algorithm
        ours = times[chosen][1]
        row: Row = {
            "rows": N,
            "columns": K,
            "bits": bits,
            "tokens": M,
            "chosen": chosen,
            "us": ours * 1e6,
            **{f"{name}_us": t[1] * 1e6 for name, t in times.items()},
            "gbs": packed[0].nbytes / ours / 1e9,
            "of_copy": packed[0].nbytes / ours / 1e9 / copy,
            "tops": 2 * M * N * K / ours / 1e12,
            "ratio": times["bf16"][1] / ours,
        }
        rest = ", ".join(f"{name} {t[1] * 1e6:.1f}" for name, t in times.items() if name != chosen)
        row["line"] = (
            f"{N} x {K}, {bits} bits, {M} tokens: {chosen} {row['us']:.1f} us, {row['of_copy']:.0%} of copy, "
            f"{row['tops']:.0f} TOPS, {row['ratio']:.2f}x bf16 ({rest})"
        )
        yield row


def tile_candidates(options: Options) -> Iterator[tuple[int, int, int, int, str, Tile]]:
    """Tokens, rows, columns, bits, a name, and a plan of a product or the (rows, warps) of a one-token projection."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.language import power_of_2
    from bitnet.kernels.triton.product import Plan

    if options.quick:
        yield 1, 64, 256, 2, "project 16 rows, 4 warps", (16, 4)
        return
    for K, gate, warps in itertools.product((2560, 6912), ("none", "relu2"), (4, 8, 16, 32)):
        yield 1, 1, K, 2, f"quantize {gate}, {warps} warps", (gate, warps)
    for N, K in ((3840, 2560), (13824, 2560), (2560, 6912), (2560, 2560)):
        for rows, warps in itertools.product((8, 16, 32, 64), (2, 4, 8, 16)):
            if 512 <= rows * power_of_2(packed_width(K, 2) // 4) // warps <= 2048:
                yield 1, N, K, 2, f"project {rows} rows, {warps} warps", (rows, warps)
    for (N, K), M in itertools.product(((13824, 2560), (2560, 6912)), (1, 2, 4)):
        base = product.choose(M, N, K, 2, options.device, "dot4")
        for rows in (2, 4, 8, 16):
            yield M, N, K, 2, f"dot4 {rows} rows", dataclasses.replace(base, rows=rows)
        yield M, N, K, 2, "tensor_core", product.choose(M, N, K, 2, options.device, "tensor_core")
    for (N, K), M in itertools.product(((13824, 2560), (2560, 6912)), (16, 64, 512)):
        base = product.choose(M, N, K, 2, options.device, "tensor_core")
        for rows, columns, stages, warps in itertools.product((64, 128), (32, 64, 128), (2, 3), (4, 8)):
            for split in sorted({1, base.split, 2 * base.split}):
                plan = dataclasses.replace(base, rows=rows, columns=columns, stages=stages, warps=warps, split=split)
                yield M, N, K, 2, f"tensor_core {rows}x{columns}, split {split}, {stages} stages, {warps} warps", plan
    for (N, K), M in itertools.product(((13824, 2560), (2560, 6912)), (512, 2048)):
        for (rows, tokens), depth, stages, warps in itertools.product(
            ((128, 128), (128, 256), (256, 128), (64, 128), (128, 64)), (64, 128), (3, 4), (4, 8)
        ):
            if (rows + tokens) * depth * stages <= 227_000:
                plan = Plan("dense", rows, tokens, depth, warps=warps, stages=stages)
                yield M, N, K, 2, f"dense {rows}x{tokens}x{depth}, {stages} stages, {warps} warps", plan


def tile_call(M: int, N: int, K: int, bits: int, plan: Tile, options: Options) -> Callable[[Tensor], object]:
    """What takes packed weights to the result of a candidate, on random activations."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.activations import quantize_activations
    from bitnet.kernels.triton.project import project

    device, dtype = options.device, options.dtype
    x, norm, scale = (
        torch.randn(M, K, dtype=dtype, device=device),
        torch.ones(K, device=device),
        torch.ones(N, device=device),
    )
    if isinstance(plan, tuple) and isinstance(plan[0], str):
        gate, warps = plan
        x = torch.randn(1, K if gate == "none" else 2 * K, dtype=dtype, device=device)
        return lambda p: quantize_activations(x, norm, 1e-5, gate, constant=True, warps=warps)
    if isinstance(plan, tuple):
        return lambda p: project(
            x, norm, p, scale, bits=bits, in_features=K, eps=1e-5, dtype=dtype, rows_and_warps=plan
        )
    codes = quantize_activations(x)
    return lambda p: product.product(*codes, p, scale, bits=bits, in_features=K, dtype=dtype, plan=plan, constant=True)


def measure_tiles(options: Options) -> Iterator[Row]:
    """Candidates for the tiles of `product.choose` and `project.tile`, fastest first."""
    device = options.device
    groups = itertools.groupby(tile_candidates(options), key=lambda c: (*c[:4], c[4].split()[0]))
    for (M, N, K, bits, _), candidates in groups:
        packed = [
            torch.randint(0, 256, (N, packed_width(K, bits)), dtype=torch.uint8, device=device)
            for _ in range(1 if options.quick else max(1, min(24, int(1.5e8 // (N * packed_width(K, bits))))))
        ]
        contenders: dict[str, Sequence[Call]] = {}
        refused = []
        for *_, name, plan in candidates:
            call = tile_call(M, N, K, bits, plan, options)
            try:
                call(packed[0])
            except Exception as error:  # what the device cannot hold
                refused.append(f"{name}: {type(error).__name__}")
                continue
            contenders[name] = [functools.partial(call, p) for p in packed]
        times = in_turn(contenders, device, budget=0.004)
        ranked = sorted((t[1] * 1e6, name) for name, t in times.items())
        best = "; ".join(f"{us:.1f} {name}" for us, name in ranked[:6])
        yield {
            "tokens": M,
            "rows": N,
            "columns": K,
            "bits": bits,
            "ranked": ranked,
            "refused": refused,
            "line": f"{M} tokens, {N} x {K}: {best}; slowest {ranked[-1][0]:.1f}",
        }
