"""Builds the native CPU kernels where there is a C++ compiler; without one the package installs all the same.

Everything else about the package is in pyproject.toml. One source file an instruction set, each with its own flags, and
the choice among them at run time: never -march=native, so a wheel built here runs elsewhere.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
# Contraction off, and fused multiply-adds written where wanted: every instruction set computes the same bits.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized", "-g0"]


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        common = [*FLAGS, *(["-fPIC"] if platform.system() != "Windows" else [])]

        def compile_one(source: str, flags: list[str]) -> list[str]:
            return self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=[*common, *flags], depends=ext.depends
            )

        openmp = ["-fopenmp"]  # torch carries the same libgomp, so both share one pool of threads
        try:
            objects = compile_one(f"{FOLDER}/isa_scalar.cpp", openmp)
        except Exception as error:
            print(f"no OpenMP ({error}): the native kernels will run on one thread")
            openmp = []
            objects = compile_one(f"{FOLDER}/isa_scalar.cpp", openmp)
        found = []
        for name, flags in INSTRUCTION_SETS.get(platform.machine(), {}).items():
            try:
                objects += compile_one(f"{FOLDER}/isa_{name}.cpp", [*openmp, *flags])
                found.append(f"-DBN_HAVE_{name.upper()}")
            except Exception as error:
                print(f"leaving out {name}: {error}")
        objects += compile_one(f"{FOLDER}/dispatch.cpp", [*openmp, *found])
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=openmp, target_lang="c++"
        )

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # a plain library, loaded by ctypes: no PyInit


HEADERS = [f"{FOLDER}/{name}.h" for name in ("simd", "layout", "matmul", "attention", "forward", "isa")]
setup(
    ext_modules=[
        Extension("bitnet.kernels.cpu._native", [f"{FOLDER}/dispatch.cpp"], depends=HEADERS, optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
)
