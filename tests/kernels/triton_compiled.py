"""Every kernel compiled ahead of time for GPUs that are not there. Run by `test_triton.py`, once for each target.

What is compiled is what a call would launch, recorded. The code may spill no register and must hold the instructions
that the kernel was written for.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import cache

import pytest
import torch

from bitnet.kernels import ops
from bitnet.kernels import triton as backend
from bitnet.kernels.triton import activations, attention, groups, language, product, sampling, weights
from bitnet.kernels.triton import project as one_token
from bitnet.kernels.triton.language import Launch, record
from bitnet.quant import packed_width
from tests.kernels.triton_aot import SHARED_MEMORY, TARGETS, Compiled, compile_launch

assert not language.INTERPRETED, "run by test_triton.py, without the interpreter"
CPU = torch.device("cpu")
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


# What the code must hold: integer dot products of four, and int8 matrix instructions.
NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_120")
DOT4 = dict.fromkeys(NVIDIA, r"^IDP\.4A") | {"gfx942": r"^v_dot4_i32_i8"}
MATRIX = dict.fromkeys(NVIDIA, r"^IMMA\.16832\.S8\.S8") | {
    "sm_90": r"^IGMMA", "gfx942": r"^v_mfma_i32_\d+x\d+x\d+_i8"
}  # fmt: skip
FLOAT_MATRIX = dict.fromkeys(NVIDIA, r"^HGMMA|^HMMA.*BF16") | {"gfx942": r"^v_mfma_f32_\d+x\d+x\d+.*bf16"}
MULTIPLY = dict.fromkeys(NVIDIA, r"^(IDP|IMMA|IGMMA)") | {"gfx942": r"^v_(dot|mfma)"}
# Values that may spill: where that was faster than more warps and none (H200, 55.0 against 71.8 us), and in the widest
# heads in float32, which are for comparing numbers.
SPILLS = {"tensor core, 512 tokens": 64, "attend, heads of 256, float32": 600}


def multiply(M: int, N: int, K: int, bits: int, algorithm: str, **changes: int) -> Callable[[], object]:
    """A product with everything that an epilogue may have."""

    def call() -> object:
        width = activations.padded(K)
        plan = dataclasses.replace(product.choose(M, N, K, bits, CPU, algorithm), **changes)
        return product.product(
            torch.empty(M, width, dtype=torch.int8), torch.empty(M), torch.empty(M, dtype=torch.int32),
            torch.empty(N, packed_width(K, bits), dtype=torch.uint8), torch.empty(N), torch.empty(N, dtype=BF16),
            torch.empty(M, N, dtype=BF16), bits=bits, in_features=K, dtype=BF16, plan=plan,
            constant=True,
        )  # fmt: skip

    return call


def quantize(M: int, K: int, norm: bool, gate: str = "none") -> Callable[[], object]:
    def call() -> object:
        x = torch.empty(M, K if gate == "none" else 2 * K, dtype=BF16)
        return activations.quantize_activations(x, torch.empty(K) if norm else None, 1e-5, gate)

    return call


def attend(
    H: int = 20, G: int = 5, D: int = 128, dtype: torch.dtype = BF16, held: torch.dtype | None = None
) -> Callable[[], object]:
    def call() -> object:
        qkv = torch.empty(1, 1, (H + 2 * G) * D, dtype=dtype)
        cache = torch.empty(1, G, 4096, D, dtype=held or dtype)
        scales = (torch.empty(1, G, 4096), torch.empty(1, G, 4096)) if held == torch.int8 else None
        table, start = torch.empty(4096, D), torch.empty(1, dtype=torch.int32)
        parts = attention.AttentionParts(1, H, G, D, 4096, CPU)
        return attention.attend(qkv, table, table, start, cache, cache, H, parts, scales)

    return call


def project(N: int, K: int, gate: str = "none", norm: bool = True, bits: int = 2) -> Callable[[], object]:
    def call() -> object:
        return one_token.project(
            torch.empty(1, K if gate == "none" else 2 * K, dtype=BF16), torch.empty(K) if norm else None,
            torch.empty(N, packed_width(K, bits), dtype=torch.uint8), torch.empty(N), torch.empty(1, N, dtype=BF16),
            bits=bits, in_features=K, eps=1e-5, gate=gate, dtype=BF16,
        )  # fmt: skip

    return call


def grouped(M: int, size: int) -> Callable[[], object]:
    def call() -> object:
        K = 2560
        return groups.group_product(
            torch.empty(M, activations.padded(K), dtype=torch.int8), torch.empty(M),
            torch.empty(2560, packed_width(K, 2), dtype=torch.uint8), torch.empty(2560, K // size, dtype=torch.float16),
            torch.empty(2560), in_features=K, group_size=size, dtype=BF16,
        )  # fmt: skip

    return call


def rotate(held: torch.dtype = BF16) -> object:
    qkv, cache = torch.empty(1, 9, 30 * 128, dtype=BF16), torch.empty(1, 5, 4096, 128, dtype=held)
    table = torch.empty(4096, 128)
    return attention.rotate(qkv, table, table, torch.empty(1, dtype=torch.int32), cache, cache, 20)


def embed() -> object:
    packed, scale = torch.empty(1000, 2560, dtype=torch.uint8), torch.empty(1000, 1)
    return attention.embed(torch.empty(1, dtype=torch.int64), packed, scale, 2560, BF16)


def draw() -> object:
    uniform = torch.empty(2, dtype=torch.float64)
    return sampling.draw(torch.empty(2, 128256), uniform, temperature=0.8, top_p=0.95, min_p=0.05, not_finite=-2)


def operator(M: int, N: int, K: int) -> Callable[[], object]:
    """The operator that vLLM's layers call, with a scale a row."""

    def call() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "_backend", lambda x: backend)
            packed = torch.empty(N, packed_width(K, 2), dtype=torch.uint8)
            return ops.packed_linear(torch.empty(M, K, dtype=BF16), packed, torch.empty(N, 1), None, 2, K)

    return call


# 2B-4T's shapes: calls, and the pattern that the first launch must hold.
CASES: dict[str, tuple[Callable[[], object], dict[str, str] | None]] = {
    "norm and quantize": (quantize(1, 2560, True), None),
    "gate, norm, quantize": (quantize(9, 6912, True, "relu2"), None),
    "silu, quantize": (quantize(9, 6912, False, "silu"), None),
    "ternary, packed": (lambda: weights.quantize_ternary(torch.empty(2560, 6912)), None),
    "ternary, codes": (lambda: weights.quantize_ternary(torch.empty(2560, 6912, dtype=BF16), packed=False), None),
    "unpack": (lambda: weights.unpack(torch.empty(9, 640, dtype=torch.uint8), 2, 2560), None),
    "dequantize": (lambda: weights.dequantize(torch.empty(9, 2560, dtype=torch.int8), torch.ones(9), 2560, BF16), None),
    "select": (multiply(1, 2560, 2560, 2, "select"), None),
    "four lanes": (multiply(1, 2560, 2560, 2, "four_lanes"), None),
    "dot4, 1 token": (multiply(1, 2560, 2560, 2, "dot4"), DOT4),
    "dot4, 4 tokens": (multiply(4, 2560, 2560, 2, "dot4"), DOT4),
    "dot4, 4 bits": (multiply(1, 2560, 2560, 4, "dot4"), DOT4),
    "dot4, head": (multiply(1, 128256, 2560, 8, "dot4"), DOT4),
    "tensor core, 8 tokens": (multiply(8, 2560, 2560, 2, "tensor_core"), MATRIX),
    "tensor core, 64 tokens, whole": (multiply(64, 2560, 2560, 2, "tensor_core", split=1), MATRIX),
    "tensor core, 512 tokens": (multiply(512, 13824, 2560, 2, "tensor_core"), MATRIX),
    "tensor core, head": (multiply(8, 128256, 2560, 8, "tensor_core"), MATRIX),
    "groups of 64, 1 token": (grouped(1, 64), None),
    "groups of 128, 64 tokens": (grouped(64, 128), None),
    "vLLM, half of down, 8 tokens": (operator(8, 2560, 3456), None),
    "dense, training": (multiply(2048, 2560, 2560, 2, "dense"), None),
    "attend": (attend(), FLOAT_MATRIX),
    "attend, heads of 64, float32": (attend(12, 12, 64, torch.float32), None),
    "attend, heads of 96": (attend(16, 8, 96), FLOAT_MATRIX),
    "attend, a query a head": (attend(16, 16, 96), None),
    "attend, int8 cache": (attend(held=torch.int8), FLOAT_MATRIX),
    "attend, a query a head, int8 cache": (attend(16, 16, 96, held=torch.int8), None),
    "attend, fp8 cache": (attend(held=E4M3), FLOAT_MATRIX),
    "attend, a query a head, fp8 cache": (attend(16, 16, 96, held=E4M3), None),
    "attend, heads of 256": (attend(8, 2, 256), FLOAT_MATRIX),
    "attend, heads of 256, float32": (attend(8, 2, 256, torch.float32), None),
    "attend, 128 queries a key head": (attend(128, 1), FLOAT_MATRIX),
    "one token, qkv": (project(3840, 2560), DOT4),
    "one token, gate and up": (project(13824, 2560), DOT4),
    "one token, down": (project(2560, 6912, "relu2"), DOT4),
    "one token, down, silu": (project(1536, 4096, "silu"), DOT4),
    "one token, 4 bits": (project(2560, 2560, "none", False, 4), DOT4),
    "rotate": (rotate, None),
    "rotate, fp8 cache": (lambda: rotate(E4M3), None),
    "embed": (embed, None),
    "draw": (draw, None),
}  # fmt: skip


def launches(call: Callable[[], object], target: str, assembly: str | None = None) -> list[Launch]:
    """What a call would launch on a target, or with another assembly than its own."""
    ahead = target in ("sm_90", "sm_120")
    with record(assembly or TARGETS[target][1], dependent=ahead, shared=SHARED_MEMORY[target]) as recorded:
        call()
    return recorded


@cache
def compiled(target: str, case: str) -> list[Compiled]:
    return [compile_launch(launch, target) for launch in launches(CASES[case][0], target)]


def problems(code: Compiled, target: str, expected: str | None = None, spills: int = 0) -> list[str]:
    """What is wrong with a kernel's machine code."""
    found = [f"{code.spills} spilled registers"] if code.spills > spills else []
    if code.shared > SHARED_MEMORY[target]:
        found.append(f"{code.shared} bytes of shared memory")
    if code.count(r"^VIADD\.16x2"):  # of two such additions ptxas may lose a constant (triton issue 11581)
        found.append("packed additions of 16 bits")
    if expected and not code.count(expected):
        found.append(f"no instruction matches {expected}")
    return found


# What is plain Triton compiles for one generation as for the next; it is what is looked for that differs.
LOOKED_FOR = [
    case for case, (_, expected) in CASES.items() if expected or case in ("select", "four lanes", "dense, training")
]
PLAIN = [case for case in CASES if case not in LOOKED_FOR]
LARGEST = "attend, 128 queries a key head"
ONE_OF_EACH_KERNEL = (
    "select", "four lanes", "dot4, 4 tokens", "tensor core, 512 tokens", "dense, training", "attend", "one token, down"
)  # fmt: skip


def is_due(target: str, case: str) -> bool:
    """With BITNET_LONG=1 every case; else a plain one for one of two targets, and few for the oldest GPU."""
    if os.environ.get("BITNET_LONG") == "1":
        return True
    if target == "sm_80":
        return case in ONE_OF_EACH_KERNEL
    return case != LARGEST if case in LOOKED_FOR else PLAIN.index(case) % 2 == (target == "gfx942")


PAIRS = [(target, case) for target in TARGETS for case in CASES if is_due(target, case)]


@pytest.mark.parametrize(("target", "case"), PAIRS)
def test_compiles_without_spills_to_the_expected_instructions(target: str, case: str) -> None:
    first, *others = compiled(target, case)
    expected = CASES[case][1]
    assert problems(first, target, expected[target] if expected else None, SPILLS.get(case, 0)) == []
    assert [problem for code in others for problem in problems(code, target)] == []
    if case.startswith(("dense", "vLLM")):  # the second launch is the product
        assert problems(others[0], target, MATRIX[target]) == []
    if case in ("select", "four lanes"):  # additions and subtractions only
        assert first.count(MULTIPLY[target]) == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("case", "limit"), [("dot4, 1 token", 1.15), ("four lanes", 3.5)])
def test_instructions_per_weight(target: str, case: str, limit: float) -> None:
    """All instructions of the program, beginning and end included, over the weights that a thread takes."""
    (launch,) = launches(CASES[case][0], target)
    weights_a_thread = launch.constants["ROWS"] * 2560 / 32
    (code,) = compiled(target, case)
    assert sum(code.opcodes.values()) / weights_a_thread < limit


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", ["tensor core, 8 tokens", "four lanes"])
def test_the_portable_branches_compile_too(target: str, case: str) -> None:
    """That of dot4 is compiled below."""
    code = compile_launch(launches(CASES[case][0], target, "none")[0], target)
    assert problems(code, target) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_instruction_is_found(target: str) -> None:
    code = compile_launch(launches(CASES["dot4, 4 bits"][0], target, "none")[0], target)  # without inline assembly
    assert problems(code, target, DOT4[target]) == [f"no instruction matches {DOT4[target]}"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_spill_is_found(target: str) -> None:
    amd = target == "gfx942"
    case, few_registers = (
        ("tensor core, 64 tokens, whole", {"waves_per_eu": 8}) if amd else ("dot4, 4 tokens", {"maxnreg": 32})
    )
    (launch,) = launches(CASES[case][0], target)
    code = compile_launch(dataclasses.replace(launch, options={**launch.options, **few_registers}), target)
    assert [problem for problem in problems(code, target) if "spilled" in problem]
