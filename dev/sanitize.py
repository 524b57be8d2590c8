"""The native kernels under the address and undefined-behaviour sanitizers, driven over random shapes for some time.

    python dev/sanitize.py --seconds 60            what `make sanitize` runs; --seed N begins elsewhere

Builds a library of its own in build/sanitized and starts itself again with the sanitizers' runtime loaded first. Every
round draws an instruction set, a shape and numbers, and compares with the torch reference, so that a wrong number ends
the run as a read past an end does. Prints the seed of the round that failed.
"""

import argparse
import os
import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "sanitized"
CHILD = "BITNET_SANITIZED_CHILD"
SANITIZERS = "address,undefined"
# Python and torch never free everything. Huge pages are advice on whole ranges of memory.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}


def build() -> None:
    from bitnet.kernels.cpu import native

    sets = native.instruction_sets() or ["scalar"]
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", BUILT, "--build-temp", f"{BUILT}.temp"]
    environment = os.environ | {"BITNET_SANITIZE": SANITIZERS, "BITNET_ONLY_SETS": " ".join(sets)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or not any(BUILT.rglob("_native*")):
        sys.exit(f"the kernels were not built with sanitizers:\n{done.stderr[-2000:]}")


def runtime(name: str) -> str:
    compiler = (sysconfig.get_config_var("CXX") or "g++").split()[0]
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"{compiler} has no {name}; install the sanitizers of your compiler (gcc on Linux has them)")
    return found


def products(draw: random.Random) -> None:
    """Packed products of every width of codes, with rows and columns that fill no block."""
    import torch

    from bitnet.kernels import cpu, reference
    from bitnet.quant import pack_codes, packed_width

    bits = draw.choice((2, 2, 4, 8))
    low, high = {2: (-1, 1), 4: (-8, 7), 8: (-127, 127)}[bits]
    tokens, rows, columns = draw.choice((1, 2, 5, 7, 33)), draw.randint(1, 70), draw.randint(1, 400)
    packed = pack_codes(torch.randint(low, high + 1, (rows, columns), dtype=torch.int8), bits)
    assert packed.shape[1] == packed_width(columns, bits)
    x = torch.randn(tokens, columns) * 10 ** draw.uniform(-6, 6)
    codes, _ = reference.quantize_activations(x)
    sums = cpu.packed_matmul(codes, packed, bits=bits, in_features=columns)
    assert torch.equal(sums, reference.packed_matmul(codes, packed, bits=bits, in_features=columns))
    cpu.packed_linear(x, packed, torch.rand(1 if bits == 2 else rows, 1), None, bits=bits, in_features=columns)


def models(draw: random.Random) -> None:
    """Texts of several lengths in one cache, forked and cut; the same logits as each alone."""
    import torch

    from bitnet.inference.cpu_engine import Engine
    from bitnet.inference.cpu_rows import CACHE_DTYPES
    from tests.builders import packed_model
    from tests.inference.builders import CONFIGS

    config = draw.choice(list(CONFIGS.values()))
    engine = Engine.from_model(packed_model(config), cache_dtype=draw.choice(list(CACHE_DTYPES)))
    rows = engine.rows
    cache = rows.new_cache(1024)
    texts = [torch.randint(config.vocab_size, (draw.randint(2, 100),)).tolist() for _ in range(draw.randint(1, 5))]
    running = [(cache.new_row(), text) for text in texts]
    cut = draw.randint(1, min(map(len, texts)) - 1)
    rows.step([(row, text[:cut]) for row, text in running])
    running = [(row.fork(draw.randint(0, cut)) if draw.random() < 0.5 else row, text) for row, text in running]
    together = rows.step([(row, text[row.length :]) for row, text in running])
    for logits, text in zip(together, texts, strict=True):
        assert torch.equal(rows.step([(rows.new_cache(len(text)).new_row(), text)])[0], logits)
    dense = engine.new_cache(2, 64)
    engine(torch.randint(config.vocab_size, (2, draw.randint(1, 63))), dense, last_only=draw.random() < 0.5)
    engine(torch.randint(config.vocab_size, (2, 1)), dense)


def blocks(draw: random.Random) -> None:
    """Every block type there and back, as the reference."""
    import torch

    from bitnet.kernels.cpu import blocks as native_blocks
    from bitnet.quant.blocks import TYPES, block_type, dequantize_blocks

    kind = draw.choice(list(TYPES))
    found = block_type(kind)
    x = torch.randn(draw.randint(1, 5), found.block_size * draw.randint(1, 3)) * 10 ** draw.uniform(-8, 4)
    x[draw.randrange(len(x))] *= draw.choice((0.0, 1.0))
    importance = torch.rand(x.shape[1]) if draw.random() < 0.5 else None
    data = native_blocks.quantize(x, kind, importance, compatible=draw.random() < 0.5)
    torch.testing.assert_close(native_blocks.dequantize(data, kind), dequantize_blocks(data, kind), rtol=0, atol=0)
    garbage = torch.randint(256, data.shape, dtype=torch.uint8)
    native_blocks.dequantize(garbage, kind)


def sampling(draw: random.Random) -> None:
    """Tokens of several texts at once, with options of all kinds."""
    import torch

    from bitnet.inference.options import SamplingConfig
    from bitnet.inference.sampling import RowSampler, draw_rows

    size = draw.randint(1, 3000)

    def sampler(seed: int) -> RowSampler:
        config = SamplingConfig(
            temperature=draw.choice((0.0, 0.3, 1.0)),
            top_k=draw.choice((0, 1, 7, 5000)),
            top_p=draw.choice((0.01, 0.9, 1.0)),
            min_p=draw.choice((0.0, 0.05)),
            repetition_penalty=draw.choice((1.0, 1.3)),
        )
        return RowSampler(
            config, seed, range(draw.randint(0, size)), vocab_size=size, logprobs=min(size, draw.choice((0, 5)))
        )

    samplers = [sampler(seed) for seed in range(draw.randint(1, 5))]
    for _ in range(3):
        for drawn in draw_rows(samplers, torch.randn(len(samplers), size) * 5):
            assert 0 <= drawn.token < size
            assert drawn.finite


def planted() -> None:
    """A read past an end, which the sanitizers must find."""
    import torch

    from bitnet.kernels.cpu import native

    lib = native.library()
    assert lib is not None
    memory = torch.zeros(256, dtype=torch.uint8)
    lib.bn_read(memory.data_ptr(), 8192, 1)


PARTS = (products, models, blocks, sampling)


def drive(seconds: float, seed: int) -> None:
    import torch

    from bitnet.kernels.cpu import native

    sets = native.instruction_sets()
    assert sets, "the library with sanitizers does not load"
    counts = dict.fromkeys((part.__name__ for part in PARTS), 0)
    until = time.monotonic() + seconds
    torch.set_num_threads(2)
    while time.monotonic() < until or not all(counts.values()):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        part = PARTS[seed % len(PARTS)]
        print(f"seed {seed}: {part.__name__}", file=sys.stderr, flush=True)  # what is on the screen when it ends
        with native.use_instruction_set(draw.choice(sets)):
            part(draw)
        counts[part.__name__] += 1
        seed += 1
    print(f"clean: {', '.join(f'{count} {name}' for name, count in counts.items())} on {', '.join(sets)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if os.environ.get(CHILD):
        planted() if os.environ[CHILD] == "planted" else drive(given.seconds, given.seed)
        return 0
    build()
    preload = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    environment = os.environ | OPTIONS | {"LD_PRELOAD": preload}
    environment["BITNET_NATIVE_FOLDER"] = str(BUILT / "bitnet" / "kernels" / "cpu")
    command = [sys.executable, __file__, "--seconds", str(given.seconds), "--seed", str(given.seed)]
    found = subprocess.run(command, env=environment | {CHILD: "planted"}, capture_output=True, text=True)
    if "ERROR: AddressSanitizer: heap-" not in found.stderr:
        sys.exit(f"the sanitizers do not find a planted read past an end:\n{found.stderr[-2000:]}")
    done = subprocess.run(command, env=environment | {CHILD: "drive"}, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-6000:], file=sys.stderr)
    print(done.stdout, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
