"""The choice of backend and instruction set, and the build of the native kernels."""

import ctypes
import importlib.machinery
import platform
import re
import runpy
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
import torch

from bitnet import kernels
from bitnet.kernels import cpu, reference
from bitnet.kernels.cpu import native
from tests import ROOT
from tests.kernels.builders import needs_library, operands

pytestmark = pytest.mark.usefixtures("poisoned_memory")
COMPILERS = ["c++", "g++", "clang++"]


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the library were not there."""
    remembered = (native._tables, kernels.native_available)
    monkeypatch.setattr(native, "library", lambda: None)
    for function in remembered:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


# The choice of backend and instruction set


@needs_library
def test_backends_by_name() -> None:
    x = torch.randn(2, 8)
    assert kernels.BACKENDS["native"] is cpu
    with kernels.use_backend("auto"):
        assert kernels.select_backend(x) is cpu
        assert kernels.native_wanted(torch.device("cpu"))
        assert not kernels.native_wanted(torch.device("meta"))
        assert kernels.select_backend(x.to("meta")) is reference
    with kernels.use_backend("native"):
        assert kernels.select_backend(x) is cpu
        with pytest.raises(ValueError, match="runs on the CPU and the activations are on meta"):
            kernels.select_backend(x.to("meta"))
    with kernels.use_backend("reference"):
        assert kernels.select_backend(x) is reference
        assert not kernels.native_wanted(torch.device("cpu"))
    with kernels.use_backend("cuda9"), pytest.raises(ValueError, match=r"'cuda9'.*auto or one of reference, native"):
        kernels.select_backend(x)


def test_both_backends_have_the_references_functions() -> None:
    for name in ("quantize_activations", "quantize_weight", "packed_linear", "fake_quant_linear"):
        assert all(callable(getattr(backend, name)) for backend in kernels.BACKENDS.values()), name


@needs_library
def test_what_dynamo_traces_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    with kernels.use_backend("auto"):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert kernels.select_backend(x) is reference
        monkeypatch.undo()
        assert kernels.select_backend(x) is cpu


@needs_library
def test_unknown_instruction_sets_are_refused_with_the_list() -> None:
    before = native.kernels().name
    listed = ", ".join(native.instruction_sets())
    with (
        pytest.raises(ValueError, match=rf"'pentium' is not here; choose auto or one of {listed}"),
        native.use_instruction_set("pentium"),
    ):
        pass
    assert native.kernels().name == before
    for name in native.instruction_sets():
        with native.use_instruction_set(name):
            assert native.kernels().name.decode() == name
            with native.use_instruction_set("auto"):
                assert native.kernels().name.decode() == native.instruction_sets()[0]
            assert native.kernels().name.decode() == name


@needs_library
def test_environment_variables_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_CPU_ISA", "pentium")
    monkeypatch.setenv("BITNET_BACKEND", "cuda9")
    fresh = runpy.run_path(native.__file__)  # the modules as a new process would see them
    with pytest.raises(ValueError, match=r"'pentium' is not here; choose auto or one of .*scalar"):
        fresh["kernels"]()
    with pytest.raises(ValueError, match="backend 'cuda9' is not available"):
        runpy.run_path(kernels.__file__)["select_backend"](torch.ones(1))
    monkeypatch.setenv("BITNET_CPU_ISA", "scalar")
    monkeypatch.setenv("BITNET_BACKEND", "native")
    assert runpy.run_path(native.__file__)["kernels"]().name == b"scalar"
    assert runpy.run_path(kernels.__file__)["select_backend"](torch.ones(1)) is cpu


def test_without_the_library_a_note_says_so_once(not_built: None, capsys: pytest.CaptureFixture[str]) -> None:
    x, packed, scale, bias = operands((3,), 6, 40, "ternary")
    expected = reference.packed_linear(x, packed, scale, bias, bits=2, in_features=40)
    with kernels.use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.fake_quant_linear(x, torch.randn(6, 40), bias, "ternary")  # training has no use for it
        assert capsys.readouterr().err == ""
        assert torch.equal(kernels.packed_linear(x, packed, scale, bias, bits=2, in_features=40), expected)
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("note: the native CPU kernels were not built")
        assert said.endswith("install a C++ compiler and run: pip install -e .")
        assert torch.equal(kernels.packed_linear(x, packed, scale, bias, bits=2, in_features=40), expected)
        assert not kernels.native_wanted(torch.device("cpu"))
        assert capsys.readouterr().err == ""


def test_without_the_library_an_explicit_request_raises(not_built: None) -> None:
    x, packed, scale, bias = operands((3,), 6, 40, "ternary")
    assert native.instruction_sets() == []
    assert not cpu.available()
    with kernels.use_backend("native"):
        with pytest.raises(ValueError, match="were not built; install with a C\\+\\+ compiler, or use the reference"):
            kernels.packed_linear(x, packed, scale, bias, bits=2, in_features=40)
        with pytest.raises(ValueError, match="were not built"):
            kernels.native_wanted(torch.device("cpu"))


def test_a_file_that_is_no_library_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITNET_NATIVE_FOLDER", raising=False)  # dev/emulate.py runs this test too
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.library.__wrapped__() is None
    (tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"nonsense")
    assert native.library.__wrapped__() is None


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("Cache", (ctypes.Structure,), {"_fields_": [("keys", ctypes.c_void_p)]})
    monkeypatch.setattr(native, "Cache", other)
    with pytest.raises(RuntimeError, match=r"other sources.*Cache differs.*pip install -e"):
        native.library.__wrapped__()


@needs_library
def test_a_library_that_is_older_than_the_sources_beside_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its structs may be the same while a function takes other arguments, which ended Python without a word."""
    monkeypatch.setenv("BITNET_NATIVE_FOLDER", str(Path(native.__file__).parent))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.library.__wrapped__() is not None  # a wheel has no sources
    (tmp_path / "pool.h").write_text("// another one\n")
    with pytest.raises(RuntimeError, match=r"other sources.*pip install -e"):
        native.library.__wrapped__()


# The build


def test_the_extension_is_built_where_there_is_a_compiler() -> None:
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler here, and the package does without")
    assert native.library() is not None, "the native kernels were not built; run: pip install -e ."
    assert cpu.available()
    assert native.instruction_sets()[-1] == "scalar"
    assert len(set(native.instruction_sets())) == len(native.instruction_sets())


@needs_library
def test_every_instruction_set_of_the_processor_is_used() -> None:
    if platform.machine() in ("aarch64", "arm64"):
        assert native.instruction_sets() == ["neon", "scalar"]
        return
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        pytest.skip(f"cannot tell what a {platform.machine()} under {platform.system()} has")
    flags = set(re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE)[1].split())
    asks = {
        "amx": {"amx_tile", "amx_int8", "avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_vnni": {"avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx_vnni": {"avx_vnni", "avx2", "fma", "f16c"},
        "avx2": {"avx2", "fma", "f16c"},
        "scalar": set(),
    }
    assert native.instruction_sets() == [name for name, needed in asks.items() if needed <= flags]


def test_what_other_processors_have_is_emulated() -> None:
    # dev/emulate.py runs their kernels on any processor, for which it must know every intrinsic.
    used, folder = set(), ROOT / "bitnet" / "kernels" / "cpu"
    for source in (*folder.glob("*.h"), *folder.glob("*.cpp")):
        used |= set(re.findall(r"\b(?:_mm512_|_tile_|_mm\d*_dpb)\w+", source.read_text()))
    emulated = set(re.findall(r"^#define (_\w+) emulated::", (ROOT / "dev" / "emulated.h").read_text(), re.MULTILINE))
    assert used == emulated


def test_the_neon_source_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    flags = [*build["FLAGS"], *build["INSTRUCTION_SETS"]["aarch64"]["neon"], "-fsyntax-only"]
    probe = tmp_path / "probe.cpp"
    probe.write_text(
        "#include <arm_neon.h>\n#include <atomic>\n#include <math.h>\n#include <stdlib.h>\nint main() {}\n"
    )
    for command in (["aarch64-linux-gnu-g++"], ["clang++", "--target=aarch64-linux-gnu"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, *flags, str(probe)], capture_output=True).returncode == 0:
            done = subprocess.run(
                [*command, *flags, f"{build['FOLDER']}/isa_neon.cpp"], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            return
    pytest.skip("isa_neon.cpp was not checked: no aarch64-linux-gnu-g++, and no clang++ with headers for aarch64")
