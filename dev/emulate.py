"""The native kernels of instruction sets that this processor lacks, run with their intrinsics in C++ (emulated.h).

    python dev/emulate.py                     AVX-VNNI, AVX512-VNNI and AMX against the scalar kernels: the same bits
    python dev/emulate.py --sets amx --tests  and the tests of kernels and engine, which find a processor with AMX

Builds a library of its own in build/emulated, for any x86-64 processor with AVX2; the installed one stays as it is.
Three steps, each of which first shows that it can fail: the emulated instructions against those of AVX2; the kernels
with every instruction made wrong in turn, which the comparison must notice; the comparison itself, of every format,
kind of activations and number of tokens, attention, sampling and GGUF quantizers.

It is evidence of what the sources say, not of the code that a compiler makes of them for these processors, nor of the
processors: Intel's own code generation, alignment and the operating system's part in AMX run only there.
"""

import argparse
import ctypes
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "emulated"
SETS = ("avx_vnni", "avx512_vnni", "amx")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c"]
COUNTS = (*range(1, 18), 33, 101)
"""Tokens: around the borders of tiles of 2, 4, 6, 12, 16 and 32, and of 96 that are worked on together."""
TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in ("native", "native_choice", "native_layout", "ops", "tiles")),
    *(f"tests/inference/test_{name}.py" for name in ("weights", "cpu_engine", "cpu_rows", "cpu_text", "sampling")),
    *("tests/model/test_lora.py", "tests/storage/test_groups.py"),
]
# What asks the processor itself.
REAL = ("test_every_instruction_set_of_the_processor_is_used", "test_the_configuration_of_tiles_is_left_as_it_was")


class Case(NamedTuple):
    """Something to compute on an instruction set, and the scalar kernels' answer."""

    label: str
    run: Callable[[], "Tensor"]
    expected: "Tensor"


def compiler() -> str:
    return (sysconfig.get_config_var("CXX") or "g++").split()[0]


def check_instructions() -> None:
    """The emulated instructions against those that AVX2 has."""
    BUILT.mkdir(parents=True, exist_ok=True)
    program = BUILT / "check"
    done = subprocess.run(
        [compiler(), *FLAGS, ROOT / "dev" / "emulated_check.cpp", "-o", program], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"dev/emulated_check.cpp does not compile:\n{done.stderr[-2000:]}")
    if subprocess.run([program]).returncode:
        sys.exit("an emulated instruction is wrong, so the kernels were not looked at")


def build(sets: list[str]) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", BUILT, "--build-temp", f"{BUILT}.temp"]
    environment = os.environ | {"BITNET_EMULATE": "1", "BITNET_ONLY_SETS": " ".join(sets)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or not any(BUILT.rglob("_native*")):
        sys.exit(f"the kernels were not built:\n{done.stderr[-2000:]}")


def products() -> Iterator[Case]:
    """Every format that an engine runs, with every kind of activations."""
    import torch

    from bitnet.inference.weights import ACTIVATIONS, Stored, matrix_of, of_blocks, of_packed, stored
    from bitnet.kernels import GROUP_SIZES, PACKED_BITS
    from bitnet.kernels.cpu.matrices import linear
    from bitnet.model.quantized import StaticInt8Linear
    from bitnet.quant.blocks import READ_ONLY
    from tests.inference.test_weights import LAYERS
    from tests.kernels.builders import operands

    def weights() -> Iterator[tuple[str, Stored]]:
        for name, make in LAYERS.items():
            layer = make()  # type: ignore[operator]
            for activations in ACTIVATIONS:
                yield f"{name}, {activations}", stored(layer, activations)
        for kind, each in READ_ONLY.items():
            data = torch.randint(256, (40, 256 // each.block_size, each.bytes), dtype=torch.uint8)
            data[..., :1] = torch.randint(118, 128, data[..., :1].shape, dtype=torch.uint8)
            for activations in ACTIVATIONS:
                yield f"{kind}, {activations}", of_blocks(data.view(40, -1), kind, 256, activations)
        for quantizer, bits in PACKED_BITS.items():
            _, packed, scale, bias = operands((1,), 75, 333, quantizer)
            yield quantizer, of_packed(packed, scale, bits, 333, bias, GROUP_SIZES.get(quantizer))
        layer = StaticInt8Linear.from_linear(torch.nn.Linear(100, 40), torch.tensor([0.02]), torch.tensor([-7]))
        yield "w8a8", stored(layer)

    torch.manual_seed(0)
    for name, weight in weights():
        matrix = matrix_of(weight)
        x = torch.randn(max(COUNTS), matrix.form.inputs)
        expected = linear(matrix, x)
        for count in COUNTS:
            yield Case(f"{name}, {count} tokens", partial(linear, matrix, x[:count]), expected[:count])


def integers() -> Iterator[Case]:
    """The int32 sums of codes without groups in every layout, with the largest codes too."""
    import torch

    from bitnet.kernels import cpu
    from bitnet.kernels.cpu.native import CODECS, Lines
    from tests.kernels.builders import BITS, LIMITS, lines_of, random_codes

    def sums(lines: Lines, x: "Tensor") -> "Tensor":
        return cpu.integer_matmul(x, lines)

    for codec in CODECS:
        low, high = LIMITS[BITS[codec]]
        for rows, columns in ((1, 1), (16, 4), (33, 20), (40, 63), (70, 200), (32, 333), (48, 1030)):
            torch.manual_seed(columns)
            drawn = random_codes(rows, columns, BITS[codec])
            for name, codes in (("", drawn), (", largest", torch.where(drawn > 0, high, low).to(torch.int8))):
                lines, x = lines_of(codes, codec), torch.randn(max(COUNTS), columns)
                x = x.sign() if name else x
                expected = sums(lines, x)
                for count in COUNTS:
                    label = f"{codec} {rows} x {columns}{name}, {count} tokens"
                    yield Case(label, partial(sums, lines, x[:count]), expected[:count])


def activations() -> Iterator[Case]:
    """INT8 codes and scales of rows of all sizes, with what is not finite in some."""
    import torch

    from bitnet.kernels import cpu

    def quantized(x: "Tensor") -> "Tensor":
        codes, scale = cpu.quantize_activations(x)
        return torch.cat([codes.float(), scale], 1)

    for width in (1, 2, 15, 16, 17, 63, 64, 100, 257, 1000):
        torch.manual_seed(width)
        x = torch.randn(12, width) * 10.0 ** torch.arange(-8, 4).view(-1, 1)
        x[1], x[2], x[3] = 0.0, 127.0, torch.arange(width).float().remainder(255) / 2 - 63.5
        x[4, width // 2], x[5, -1], x[6, 0] = torch.nan, torch.inf, -torch.inf
        yield Case(f"activations of {width}", partial(quantized, x), quantized(x))


def engines() -> Iterator[Case]:
    """Logits of whole models: norms, rotation, attention over caches of every type, gates; texts in pieces too."""
    import torch

    from bitnet.inference.cpu_engine import Engine
    from bitnet.inference.cpu_rows import CACHE_DTYPES
    from bitnet.model import BitNetForCausalLM
    from tests.builders import packed_model, random_ids
    from tests.inference.builders import CONFIGS

    def logits(model: BitNetForCausalLM, cache_dtype: str, ids: "Tensor", sizes: list[int]) -> "Tensor":
        engine = Engine.from_model(model, cache_dtype=cache_dtype)
        cache = engine.new_cache(*ids.shape)
        return torch.cat([engine(piece, cache) for piece in ids.split(sizes, 1)], 1)

    for name, config in CONFIGS.items():
        model = packed_model(config)
        for cache_dtype in CACHE_DTYPES:
            for batch, sizes in ((1, [21]), (3, [21]), (2, [3, 12, 1, 5]), (1, [1] * 4), (1, [80, 20])):
                ids = random_ids(config, batch, sum(sizes))
                run = partial(logits, model, cache_dtype, ids, sizes)
                yield Case(f"model {name!r}, cache {cache_dtype}, {batch} x {sizes}", run, run())


def sampling() -> Iterator[Case]:
    """Tokens and log-probabilities of draws with all options."""
    import torch

    from bitnet import kernels
    from bitnet.inference.sampling import RowSampler, draw_rows
    from tests.inference.test_sampling import SAMPLINGS

    def drawn(logits: "Tensor") -> "Tensor":
        size = logits.shape[-1]
        samplers = [
            RowSampler(config, seed, [3, 1, 3, 9], vocab_size=size, logprobs=4) for seed, config in enumerate(SAMPLINGS)
        ]
        with kernels.use_backend("native"):
            found = [row for step in logits for row in draw_rows(samplers, step)]
        return torch.tensor([[row.token, row.logprob, *chain(*row.top)] for row in found], dtype=torch.float64)

    for size in (10, 16, 17, 64, 1000, 5003):
        torch.manual_seed(size)
        for spread in (0.1, 3.0):
            logits = spread * torch.randn(3, len(SAMPLINGS), size)
            yield Case(f"draws of {size}", partial(drawn, logits), drawn(logits))


def blocks() -> Iterator[Case]:
    """Every GGUF type there and back."""
    import torch

    from bitnet.kernels.cpu import blocks as native_blocks
    from bitnet.quant.blocks import TYPES, block_type

    def there(x: "Tensor", kind: str, importance: "Tensor | None", compatible: bool) -> "Tensor":
        return native_blocks.quantize(x, kind, importance, compatible=compatible)

    for kind in TYPES:
        torch.manual_seed(0)
        x = torch.randn(5, 3 * block_type(kind).block_size) * 10.0 ** torch.tensor(
            [[-8.0], [-3.0], [0.0], [1.0], [4.0]]
        )
        x[4, : x.shape[1] // 3] = 0.0
        for importance in (None, torch.rand(x.shape[1])):
            for compatible in (False, True):
                run = partial(there, x, kind, importance, compatible)
                data = run()
                label = f"{kind}{'' if importance is None else ', importance'}{', compatible' if compatible else ''}"
                yield Case(label, run, data)
        back = partial(native_blocks.dequantize, data, kind)
        yield Case(f"{kind} back", back, back())


def the_rest() -> Iterator[Case]:
    """The measure of a machine's peak, and the tiles of a thread, which are left as another library configured them."""
    import torch

    from bitnet.kernels.cpu import native

    lib = native.library()
    assert lib is not None

    def peak() -> "Tensor":
        return torch.tensor([native.kernels().peak(3, 1) > 0])

    def tiles(before: bytes) -> "Tensor":
        after = ctypes.create_string_buffer(64)
        lib.bn_emulated_load_tiles(before)
        try:
            for case in TILED:
                case.run()
            lib.bn_emulated_store_tiles(after)
        finally:
            lib.bn_emulated_load_tiles(bytes(64))
        return torch.tensor(list(after.raw))

    yield Case("peak", peak, torch.tensor([True]))
    theirs = bytearray(64)  # palette 1, tile 3 of 5 rows of 24 bytes: not what the kernels want
    theirs[0], theirs[22], theirs[51] = 1, 24, 5
    for before in (bytes(theirs), bytes(64)):
        yield Case("tiles are put back", partial(tiles, before), torch.tensor(list(before)))


TILED: list[Case] = []
"""Some cases whose tokens are enough for tiles."""
PARTS = (products, integers, activations, engines, sampling, blocks, the_rest)


def every_case() -> list[Case]:
    """All cases, mixed and the parts in turn, with the answers of the scalar kernels."""
    from bitnet.kernels.cpu import native

    parts = []
    for part in PARTS:
        began = time.monotonic()
        with native.use_instruction_set("scalar"):
            parts.append(list(part()))
        print(f"  scalar: {len(parts[-1])} {part.__name__} in {time.monotonic() - began:.0f} s", flush=True)
    TILED[:] = [next(case for case in part if case.label.endswith(f" {COUNTS[-1]} tokens")) for part in parts[:2]]
    parts = [random.Random(0).sample(part, len(part)) for part in parts]
    return [case for row in zip_longest(*parts) for case in row if case is not None]


def same_bits(a: "Tensor", b: "Tensor") -> bool:
    """Any NaN is as good as another: which one an addition gives depends on the order of its operands."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {4: torch.int32, 8: torch.int64}.get(a.element_size(), a.dtype)
    return bool(((a.view(bits) == b.view(bits)) | ((a != a) & (b != b))).all())


def compare(name: str, cases: list[Case]) -> list[str]:
    """The cases that differ on instruction set `name`."""
    from bitnet.console import progress_bar
    from bitnet.kernels.cpu import native

    with native.use_instruction_set(name):
        bar = progress_bar(cases, name, unit="cases")
        return [case.label for case in bar if not same_bits(case.run(), case.expected)]


def plant(name: str, cases: list[Case]) -> list[str]:
    """Make every instruction that only `name` has wrong, one at a time: those that no case notices."""
    from bitnet.kernels.cpu import native

    lib = native.library()
    assert lib is not None
    lib.bn_emulated_names.restype = ctypes.c_char_p
    wrong = ctypes.c_int.in_dll(lib, "bn_emulated_wrong")
    own = {"avx_vnni": "_mm256_", "avx512_vnni": "_mm512_", "amx": ("_mm512_", "_tile_")}[name]
    missed = []
    with native.use_instruction_set(name):
        for number, instruction in enumerate(lib.bn_emulated_names().decode().split()):
            if not instruction.startswith(own):
                continue
            wrong.value = number
            try:
                found = next((case for case in cases if not same_bits(case.run(), case.expected)), None)
            finally:
                wrong.value = 0
            print(f"  {instruction} made wrong: {found.label if found else 'NOT NOTICED'}", flush=True)
            missed += [] if found else [instruction]
    return missed


def check(names: list[str]) -> int:
    """In a process of its own, with the emulated library."""
    from bitnet.kernels.cpu import native

    assert set(names) <= set(native.instruction_sets()), native.instruction_sets()
    cases, failed = every_case(), False
    for name in names:
        print(f"{name}, planted faults:", flush=True)
        if missed := plant(name, cases):
            print(f"{name}: nobody notices {', '.join(missed)}", file=sys.stderr)
            return 1
        different = compare(name, cases)
        print(f"{name}: {len(cases) - len(different)} of {len(cases)} results have the bits of scalar", flush=True)
        for label in different[:20]:
            print(f"  {label}")
        failed |= bool(different)
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--tests", action="store_true", help="run pytest with the emulated kernels afterwards")
    parser.add_argument("--built", action="store_true", help="use what the last call built")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.child:
        return check(given.sets)
    check_instructions()
    if not given.built:
        print(f"building {', '.join(given.sets)} with emulated instructions, some minutes", flush=True)
        build(given.sets)
    environment = os.environ | {"BITNET_NATIVE_FOLDER": str(BUILT / "bitnet" / "kernels" / "cpu")}
    command = [sys.executable, __file__, "--child", "--sets", *given.sets]
    failed = subprocess.run(command, env=environment).returncode
    if given.tests and not failed:
        deselected = " and ".join(f"not {name}" for name in REAL)
        tests = [sys.executable, "-m", "pytest", *TESTS, "-k", deselected]
        failed = subprocess.run(tests, cwd=ROOT, env=environment).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
