"""Compile recorded launches for GPUs that are not there, and count what the machine code holds.

    from tests.triton_aot import TARGETS, record_launches, compile_launch

ptxas, cuobjdump and the AMD assembler come with Triton's wheel. Nothing here may run with TRITON_INTERPRET=1.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitnet.kernels.triton.language import Launch

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ptx"),
    "sm_89": (GPUTarget("cuda", 89, 32), "ptx"),
    "sm_90": (GPUTarget("cuda", 90, 32), "ptx"),
    "sm_120": (GPUTarget("cuda", 120, 32), "ptx"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "gcn"),
}
SHARED_MEMORY = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_120": 101_376, "gfx942": 65_536}
"""Bytes that one program may have; only a real launch would refuse more."""
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """Machine code, instructions by opcode with its modifiers, the number of spilled values, bytes of shared memory."""

    text: str
    opcodes: Counter[str]
    spills: int
    shared: int

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression."""
        return sum(number for opcode, number in self.opcodes.items() if re.search(pattern, opcode))


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile one launch, with the alignment that torch gives its tensors, for a key of TARGETS."""
    fn = launch.kernel
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(fn.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn, signature, dict(launch.constants), aligned)
    gpu, _ = TARGETS[target]
    compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    if gpu.backend == "cuda":
        return _of_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return _of_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _of_cubin(cubin: bytes, shared: int) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    # "/*0010*/  @!P0 IMAD.MOV.U32 R1, RZ, .." ; a line of control words has no opcode
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text)
    counts = Counter(opcodes)
    return Compiled(text, counts, sum(n for op, n in counts.items() if re.match(r"(LDL|STL)\b", op)), shared)


def _of_amdgcn(text: str, shared: int) -> Compiled:
    counts = Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE))
    spills = sum(int(number) for number in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    return Compiled(text, counts, spills, shared)
