"""The product of INT8 activations and packed weights: the one place that chooses a kernel, and launches it.

    tokens      algorithm          kernel
    1, 2        dot4               integer dot instructions, weights read once          dot4.py
    to 1023     tensor_core        matrix instructions, unpacked in registers, split K   tensor_core.py
    1024 on     dense              matrix instructions, unpacked once beforehand         tensor_core.py
    by name     four_lanes, select additions and subtractions only (2 bits)              add_subtract.py

All give the same int32 sums. Bounds and tiles were measured on an H200; elsewhere `tune()` measures the candidates for
a shape on the device at hand, and with BITNET_TRITON_TUNE=1 a shape is tuned when it first occurs; the winners are kept
in a file in Triton's cache folder.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitnet.files import read_json, write_atomic
from bitnet.kernels.triton import weights
from bitnet.kernels.triton.activations import padded
from bitnet.kernels.triton.add_subtract import four_lanes_kernel, select_kernel
from bitnet.kernels.triton.dot4 import dot4_kernel
from bitnet.kernels.triton.language import (
    INTERPRETED,
    assembly,
    cache_folder,
    cdiv,
    check,
    dependent_launch,
    device_name,
    launch,
    power_of_2,
    recording,
    shared_memory,
    triton,
)
from bitnet.kernels.triton.limits import MAX_PROGRAMS
from bitnet.kernels.triton.tensor_core import dense_kernel, packed_kernel, sum_parts_kernel
from bitnet.quant.packing import OFFSET, packed_width

ALGORITHMS = ("dot4", "tensor_core", "dense", "four_lanes", "select")
DOT4_MAX_TOKENS = 4
"""What the kernel takes."""
DOT4_TOKENS = 2
"""What it is chosen for: from 3 on matrix instructions were faster (H200, 4 x 13824 x 2560: 10.0 against 13.7 us)."""
DENSE_FROM = 1024
LENGTHS = (*range(1, 17), *range(17, DENSE_FROM, 16), DENSE_FROM)
"""Numbers of tokens that have, between them, every plan of `choose`: for matrix instructions it depends on the number
of tiles, of 16 tokens or more."""


@dataclass(frozen=True)
class Plan:
    """An algorithm and its tile: `rows` of weights, `tokens`, and `columns`, the 32-bit words (dot4, four_lanes), bytes
    (select, tensor_core) or codes (dense) of a row that a program reads in one step."""

    algorithm: str
    rows: int
    tokens: int
    columns: int
    split: int = 1
    warps: int = 4
    stages: int = 3


def choose(M: int, N: int, K: int, bits: int, device: torch.device, algorithm: str | None = None) -> Plan:
    """The plan for M tokens, N rows of K codes; with `algorithm` the tile for that one. Raises ValueError for an
    algorithm that does not exist or cannot do this product."""
    if algorithm is None:
        tuned = _tuned_plans(device_name(device)).get(_key(M, N, K, bits))
        if tuned is not None:
            return tuned
        algorithm = "dot4" if M <= DOT4_TOKENS else "tensor_core" if M < DENSE_FROM else "dense"
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is unknown; choose one of {', '.join(ALGORITHMS)}")
    if algorithm in ("four_lanes", "select") and bits != 2:
        raise ValueError(f"{algorithm} adds and subtracts ternary weights and these have {bits} bits; choose another")
    if algorithm in ("four_lanes", "select") and M > MAX_PROGRAMS:  # one for each token
        raise ValueError(f"{algorithm} takes at most {MAX_PROGRAMS} tokens and there are {M}; choose dense")
    if algorithm == "dot4" and M > DOT4_MAX_TOKENS:
        raise ValueError(f"dot4 takes at most {DOT4_MAX_TOKENS} tokens and there are {M}; choose tensor_core")
    width = packed_width(K, bits)
    if algorithm == "dense":
        plan = Plan(algorithm, 128, 64, 128)
        return dataclasses.replace(plan, stages=_stages((plan.rows + plan.tokens) * plan.columns, device))
    if algorithm == "tensor_core":
        tokens = min(128, max(16, power_of_2(M)))
        parts = 1  # that K can be split into
        while parts < 8 and width >= 4 * 128 * parts:
            parts *= 2
        rows = 128 if tokens == 128 or N >= 8192 or (tokens == 64 and cdiv(N, 128) * parts >= 40) else 64
        plan = Plan(algorithm, rows, tokens, min(64, width) if tokens == 128 else min(128, power_of_2(width)))
        step = rows + tokens * 8 // bits  # bytes a column; two steps must fit
        while plan.columns > 32 and 2 * step * plan.columns > shared_memory(device):
            plan = dataclasses.replace(plan, columns=plan.columns // 2)
        # Programs for all processors: twice for few tokens, which wait for memory; fewer where the parts of a split
        # cost more to add than they bring.
        tiles, split = cdiv(N, rows) * cdiv(M, tokens), 1
        wanted = _processors(device) * (2 if tokens < 64 else 0.6 if tokens == 64 else 1)
        while split < 8 and tiles * split < wanted and width >= 4 * plan.columns * split:
            split *= 2
        stages = _stages(step * plan.columns, device)
        # On an H200 4 warps were faster for 128 tokens, although they spill some registers; nothing else was measured.
        many = tokens == 64 or (tokens == 128 and not dependent_launch(device))
        return dataclasses.replace(plan, split=split, warps=8 if many else 4, stages=stages)
    if algorithm == "select":
        return Plan(algorithm, 4, 1, min(256, power_of_2(width)))
    words = width // 4
    if algorithm == "dot4" and bits < 8 and words >= 64:
        # A thread reads its part of x once for all rows of the program, and everything at once: no load waits for
        # another one's arithmetic.
        columns = min(1024, power_of_2(words))
        return Plan(algorithm, 8 if M == 1 else 4, M, columns, warps=columns // 128 or 1)
    # One warp a program: a thread reads 16 bytes of a row and the same of x; nothing passes through shared memory.
    columns = next((c for c in (128, 64) if cdiv(words, c) * c <= 1.05 * words), 32)
    rows = 128 // columns if columns < 128 else 4
    return Plan(algorithm, rows, M if algorithm == "dot4" else 1, columns, warps=1)


def product(
    codes: Tensor, x_scale: Tensor, total: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, *, bits: int, in_features: int, dtype: torch.dtype = torch.float32,
    plan: Plan | None = None, constant: bool = False,
) -> Tensor:  # fmt: skip
    """`(sum of codes * weights) * x_scale * w_scale + bias`, then `+ residual`, `[M, N]` in `dtype`.

    codes int8 `[M, padded(K)]`, x_scale float32 `[M]` and total int32 `[M]` are what `quantize_activations` returns;
    packed uint8 `[N, packed_width(K, bits)]` (`bitnet/quant/packing.py`); w_scale float32 of 1 or N values; bias float
    `[N]`; residual float `[M, N]`. dtype int32 returns the sums themselves. `constant` promises that no kernel still
    running writes `packed`, which may then be read before those have ended. Raises ValueError for tensors that do not
    fit together, before anything is launched.
    """
    M, N, width = codes.shape[0], packed.shape[0], padded(in_features)
    device = packed.device
    if bits not in OFFSET:
        raise ValueError(f"bits is {bits}; packed codes have {', '.join(map(str, OFFSET))} bits")
    check("packed", packed, torch.uint8, device, None, packed_width(in_features, bits))
    check("codes", codes, torch.int8, device, None, width)
    check("x_scale", x_scale, torch.float32, device, M)
    check("total", total, torch.int32, device, M)
    w_scale = w_scale.reshape(-1)
    check("w_scale", w_scale, torch.float32, device, 1 if w_scale.numel() == 1 else N)
    if bias is not None:
        check("bias", bias, None, device, N)
    if residual is not None:
        check("residual", residual, None, device, M, N)
    y = torch.empty(M, N, dtype=dtype, device=device)
    if not M or not N:
        return y
    if plan is None:
        plan = choose(M, N, in_features, bits, device)
        if os.environ.get("BITNET_TRITON_TUNE") == "1" and not INTERPRETED and not recording():
            plan = tune(M, N, in_features, bits, device)
    shared = {"N": N, "PER_ROW": w_scale.numel() > 1, "BIAS": bias is not None, "RESIDUAL": residual is not None}
    # A kernel that has no bias or residual gets some pointer, which it does not read.
    epilogue = (x_scale, w_scale, w_scale if bias is None else bias, w_scale if residual is None else residual)
    _launch(plan, codes, total, packed, epilogue, y, bits, in_features, shared, constant)
    return y


def _launch(
    plan: Plan, codes: Tensor, total: Tensor, packed: Tensor, epilogue: tuple[Tensor, ...], y: Tensor, bits: int,
    in_features: int, shared: dict[str, int], constant: bool,
) -> None:  # fmt: skip
    M, N = y.shape
    words, stride = packed.shape[1] // 4, codes.shape[1] // 4
    tile = {"ROWS": plan.rows, "COLUMNS": plan.columns}
    options = {"warps": plan.warps, "stages": plan.stages}
    # In 8 bits the kernels turn codes into signed ones, with one xor for four of them.
    code = {"BITS": bits, "OFFSET": 0 if bits == 8 else OFFSET[bits]}
    if plan.algorithm == "dot4":
        registers = plan.rows * plan.columns // (32 * plan.warps)  # of a thread, for one step's weights
        ahead = min(cdiv(words, plan.columns), 64 // registers) if constant and dependent_launch(y.device) else 0
        launch(
            dot4_kernel, (cdiv(N, plan.rows),), packed, codes, total, *epilogue, y, WORDS=words, X_STRIDE=stride,
            TOKENS=M, ASM=assembly(), AHEAD=ahead, **code, **tile, **shared, **options,
        )  # fmt: skip
    elif plan.algorithm == "four_lanes":
        asm = "none" if assembly() == "gcn" else assembly()
        launch(
            four_lanes_kernel, (cdiv(N, plan.rows), M), packed, codes, total, *epilogue, y, WORDS=words,
            X_STRIDE=stride, ASM=asm, **tile, **shared, **options,
        )  # fmt: skip
    elif plan.algorithm == "select":
        launch(
            select_kernel, (cdiv(N, plan.rows), M), packed, codes, total, *epilogue, y, BYTES=packed.shape[1],
            X_STRIDE=codes.shape[1], **tile, **shared, **options,
        )  # fmt: skip
    elif plan.algorithm == "dense":
        dense(weights.unpack(packed, bits, in_features), codes, epilogue, y, shared, plan)
    else:
        grid = (cdiv(M, plan.tokens), cdiv(N, plan.rows), plan.split)
        whole = plan.split == 1
        target = y if whole else torch.empty(plan.split, M, N, dtype=torch.int32, device=y.device)
        launch(
            packed_kernel, grid, packed, codes, total, *epilogue, target, M, BYTES=packed.shape[1],
            X_STRIDE=codes.shape[1], SPLIT=plan.split, TOKENS=plan.tokens, ASM=assembly(), **code, **tile, **shared,
            **options,
        )  # fmt: skip
        if not whole:
            launch(sum_parts_kernel, (M, cdiv(N, 1024)), target, *epilogue, y, M, SPLIT=plan.split, TILE=1024, **shared)


def dense(
    w_codes: Tensor, codes: Tensor, epilogue: tuple[Tensor, ...], y: Tensor, shared: dict[str, int], plan: Plan
) -> None:
    """Launch the product of int8 `[N, padded(K)]` and int8 `[M, padded(K)]` into y."""
    M, N = y.shape
    launch(
        dense_kernel, (cdiv(M, plan.tokens) * cdiv(N, plan.rows),), w_codes, codes, *epilogue, y, M,
        WIDTH=codes.shape[1], ROWS=plan.rows, TOKENS=plan.tokens, DEPTH=plan.columns, GROUP=8, warps=plan.warps,
        stages=plan.stages, **shared,
    )  # fmt: skip


def candidates(M: int, N: int, K: int, bits: int, device: torch.device) -> Iterator[Plan]:
    """The plans that `tune` compares."""
    if M <= DOT4_MAX_TOKENS:
        base = choose(M, N, K, bits, device, "dot4")
        for rows, warps in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (16, 4)):
            yield dataclasses.replace(base, rows=rows, warps=warps)
        return
    base = choose(M, N, K, bits, device, "tensor_core")
    for rows in (64, 128):
        for columns in (32, 64, 128):
            for split in sorted({1, base.split, 2 * base.split}):
                for stages in (3, 4):
                    if columns <= packed_width(K, bits):
                        yield dataclasses.replace(base, rows=rows, columns=columns, split=split, stages=stages)
    if M > 64:
        for rows, tokens, warps in ((128, 64, 4), (128, 128, 4), (128, 128, 8), (256, 128, 8)):
            yield Plan("dense", rows, tokens, 128, warps=warps)


def tune(M: int, N: int, K: int, bits: int, device: torch.device) -> Plan:
    """The fastest plan for a product on this device, measured once and kept in a file."""
    name = device_name(device)
    known, key = _tuned_plans(name), _key(M, N, K, bits)
    if key in known:
        return known[key]
    packed = torch.randint(0, 256, (N, packed_width(K, bits)), dtype=torch.uint8, device=device)
    codes = torch.randint(-127, 128, (M, padded(K)), dtype=torch.int8, device=device)
    scale, total = torch.ones(M, device=device), torch.zeros(M, dtype=torch.int32, device=device)
    timings = []
    for plan in candidates(M, N, K, bits, device):

        def call(plan: Plan = plan) -> Tensor:
            return product(codes, scale, total, packed, scale[:1], bits=bits, in_features=K, plan=plan)

        try:
            timings.append((triton.testing.do_bench(call, warmup=5, rep=20), plan))
        except triton.runtime.errors.OutOfResources:
            continue  # a tile too large for this GPU's shared memory
    known[key] = min(timings, key=lambda pair: pair[0])[1]
    text = json.dumps({k: dataclasses.asdict(v) for k, v in known.items()}, indent=1)
    _tune_file(name).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_tune_file(name), text + "\n")
    return known[key]


def _key(M: int, N: int, K: int, bits: int) -> str:
    return f"{M if M <= DOT4_MAX_TOKENS else power_of_2(M)} {N} {K} {bits}"


@functools.cache
def _tuned_plans(device_name: str) -> dict[str, Plan]:
    try:
        return {key: Plan(**fields) for key, fields in read_json(_tune_file(device_name)).items()}
    except (OSError, ValueError, TypeError):
        return {}


def _tune_file(name: str) -> Path:
    return cache_folder() / f"{name} triton {triton.__version__}.json"


def _stages(size: int, device: torch.device) -> int:
    """2 or 3 steps in flight, as many as shared memory has room for when one takes `size` bytes."""
    return 3 if 3 * size <= shared_memory(device) else 2


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 108
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
