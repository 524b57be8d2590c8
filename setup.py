"""Builds the native CPU kernels where there is a C++ compiler; without one the package installs all the same.

One source file an instruction set, each with its own flags, and the choice among them at run time: never -march=native,
so a wheel built here runs elsewhere. train.py and generate.py, at the top of the repository for people, become commands
of the package. Everything else about it is in pyproject.toml.
"""

import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SCRIPTS = ("train", "generate")
FOLDER = "bitnet/kernels/cpu"
X86 = ["-mavx2", "-mfma", "-mf16c"]
X86_512 = [*X86, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
# What to try, by machine: source suffix and flags. A set that the compiler does not know is left out.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx2": X86,
        "avx_vnni": [*X86, "-mavxvnni"],
        "avx512_vnni": X86_512,
        "amx": [*X86_512, "-mamx-tile", "-mamx-int8"],
    },
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod"]},
    "arm64": {"neon": []},  # Apple's compiler targets chips that all have it
}
INSTRUCTION_SETS["AMD64"] = INSTRUCTION_SETS["x86_64"]
# blocks.cpp and blocks_iq.cpp need less: vectors of 16 bytes, which every target has, and on x86 of 32 and 64.
BLOCKS_512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
BLOCKS = {"x86_64": {"avx2": [*X86, "-DBN_AVX2"], "avx512": [*X86, *BLOCKS_512, "-DBN_AVX512"]}}
BLOCKS["AMD64"] = BLOCKS["x86_64"]
# Contraction off, and fused multiply-adds written where wanted: every instruction set computes the same bits.
FLAGS = [
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    "-fPIC", "-g0", "-Wno-psabi", "-Wno-unused-function", "-Wno-maybe-uninitialized",
]  # fmt: skip


# For dev/sanitize.py: the sanitizers to build with, and for which instruction sets alone.
SANITIZE, ONLY = os.environ.get("BITNET_SANITIZE"), os.environ.get("BITNET_ONLY_SETS", "").split()
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
# For dev/emulate.py: what this processor may lack in C++, for the instructions of AVX2.
EMULATE = bool(os.environ.get("BITNET_EMULATE"))
if EMULATE:
    FLAGS += ["-O1"]
    EMULATED = [*X86, "-include", "dev/emulated.h"]
    INSTRUCTION_SETS["x86_64"].update(dict.fromkeys(("avx_vnni", "avx512_vnni", "amx"), EMULATED))
    BLOCKS["x86_64"]["avx512"] = [*EMULATED, "-DBN_AVX512"]


def sum_of_sources() -> str:
    """SHA-256 of the C++ files, as bitnet/kernels/cpu/native.py forms it."""
    sums = hashlib.sha256()
    for path in sorted((*Path(FOLDER).glob("*.cpp"), *Path(FOLDER).glob("*.h"))):
        sums.update(path.read_bytes())
    return sums.hexdigest()


class BuildModules(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Modules of a package, as (package, module, file)."""
        scripts = [(package, name, f"{name}.py") for name in SCRIPTS] if package == "bitnet.commands" else []
        return [*super().find_package_modules(package, package_dir), *scripts]


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        def compile_one(name: str, flags: list[str], folder: str = "") -> list[str] | None:
            try:
                return self.compiler.compile(
                    [f"{FOLDER}/{name}.cpp"], output_dir=os.path.join(self.build_temp, folder),
                    extra_postargs=[*FLAGS, *flags], depends=ext.depends,
                )  # fmt: skip
            except CompileError:
                return None

        sets = INSTRUCTION_SETS.get(platform.machine(), {})
        sets = {name: flags for name, flags in sets.items() if not ONLY or name in ONLY}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            builds = {"scalar": [], **BLOCKS.get(platform.machine(), {})}
            blocks = [
                pool.submit(compile_one, source, [*flags, f"-DBN_BUILD={name}"], name)
                for source in ("blocks", "blocks_iq")
                for name, flags in builds.items()
            ]
            needed = [pool.submit(compile_one, name, []) for name in ("isa_scalar", "pool", "repack")]
            compiled = list(pool.map(lambda name: compile_one(f"isa_{name}", sets[name]), sets))
        found = [f"-DBN_HAVE_{name.upper()}" for name, made in zip(sets, compiled, strict=True) if made]
        found += [f'-DBN_SOURCES="{sum_of_sources()}"', *(["-DBN_EMULATED"] if EMULATE else [])]
        print(f"native kernels: scalar {' '.join(n for n, made in zip(sets, compiled, strict=True) if made)}")
        parts = [compile_one("dispatch", found), *(part.result() for part in needed)]
        if None in parts:
            raise CompileError("the native CPU kernels do not compile; bitnet will run on its torch reference")
        objects = [path for part in (*parts, *compiled, *(b.result() for b in blocks)) for path in part or []]
        options = [] if platform.system() == "Darwin" else ["-pthread"]
        options += [f"-fsanitize={SANITIZE}"] if SANITIZE else []
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=options, target_lang="c++"
        )

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # a plain library, loaded by ctypes: no PyInit


_NAMES = (
    "simd layout outputs activations lines matmul groups floats product attention forward isa pool sampling blocks "
    "blocks_layout blocks_iq_search"
)
HEADERS = [f"{FOLDER}/{name}.h" for name in _NAMES.split()]
setup(
    ext_modules=[Extension("bitnet.kernels.cpu._native", [f"{FOLDER}/dispatch.cpp"], depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildModules},
)
