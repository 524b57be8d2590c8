"""The Triton kernels without a GPU: their interpreter, the ahead-of-time compiler, and the choice of the backend.

TRITON_INTERPRET counts when Triton is imported, and another test of this process may have imported it, so the tests in
`triton_kernels.py`, `triton_model.py` (interpreted) and `triton_compiled.py` run in processes of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitnet import kernels
from bitnet.kernels import reference, triton
from tests import ROOT, oracles
from tests.forked import Forked

HERE = Path(__file__).parent


def run_apart(*files: str, only: str = "", interpret: bool) -> str:
    """Run test files in a process of their own and return what pytest printed; fails with it where a test failed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "BITNET_"))}
    environment = kept | {"OMP_NUM_THREADS": "1", "BITNET_LONG": os.environ.get("BITNET_LONG", "")}
    environment |= {"TRITON_INTERPRET": "1" if interpret else "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", *(str(HERE / file) for file in files), "-o", "addopts=", "-q", "-rs"]
    command += ["--strict-markers", "--import-mode=importlib", "-p", "no:cacheprovider", "-k", only]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def passed(output: str) -> int:
    found = re.search(r"(\d+) passed", output)
    assert found, output
    assert "skipped" not in output, output
    return int(found[1])


def test_interpreted() -> None:
    oracles.folder_of("triton")
    output = run_apart("triton_kernels.py", "triton_products.py", "triton_model.py", interpret=True)
    assert passed(output) >= 260


LONG = pytest.mark.skipif(os.environ.get("BITNET_LONG") != "1", reason="BITNET_LONG=1 compiles for more GPUs")


@pytest.mark.parametrize(
    ("targets", "at_least"),
    [("sm_80 or sm_90 or gfx942", 80), pytest.param("sm_89 or sm_120", 70, marks=LONG)],
)
def test_compiled_ahead_of_time(targets: str, at_least: int) -> None:
    oracles.folder_of("triton")
    assert passed(run_apart("triton_compiled.py", only=targets, interpret=False)) >= at_least


# The choice of the backend, on a machine without a GPU


def test_cpu_tensors_never_go_to_triton_by_themselves() -> None:
    with kernels.use_backend("auto"):
        assert kernels.select_backend(torch.ones(2, 8)) is not triton


@pytest.mark.skipif(triton.interpreted(), reason="the interpreter takes CPU tensors")
def test_an_explicit_request_for_cpu_tensors_raises() -> None:
    match = r"cuda tensors.*on cpu" if triton.available() else "not installed"
    with kernels.use_backend("triton"), pytest.raises(ValueError, match=match):
        kernels.fake_quant_linear(torch.ones(2, 8), torch.ones(3, 8), None, "ternary")


def test_without_triton_a_request_raises_and_the_automatic_choice_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton, "available", lambda: False)
    x = torch.ones(2, 8)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="Triton is not installed"):
        kernels.select_backend(x)
    kernels._warn_without_triton.cache_clear()
    try:

        class OnGpu:
            device = torch.device("cuda")

        with kernels.use_backend("auto"):
            assert kernels.select_backend(OnGpu()) is reference  # type: ignore[arg-type]
            assert "pip install triton" in capsys.readouterr().err
            assert kernels.select_backend(OnGpu()) is reference  # type: ignore[arg-type]
            assert capsys.readouterr().err == ""
    finally:
        kernels._warn_without_triton.cache_clear()


def test_importing_the_package_does_not_import_the_kernels(tmp_path: Path) -> None:
    code = "import sys, bitnet.kernels.triton; assert 'bitnet.kernels.triton.language' not in sys.modules"
    done = Forked(tmp_path, bare=True, code=code).wait()
    assert done.returncode == 0, done.stderr
