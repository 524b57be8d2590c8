"""Another Python with an older torch, as GPU machines have them: commands and tests that run there."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT

_HAS_ALL = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ('torch', 'triton', 'pytest'))))"


@dataclass(frozen=True)
class Python:
    path: str

    def run(self, *arguments: str, cwd: Path = ROOT, interpret: bool = True) -> str:
        """What a command of that Python prints; the test fails with it where the command does."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
        environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "01"[interpret]}
        command = [self.path, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
        return done.stdout

    def test(self, *arguments: str, interpret: bool = True) -> str:
        """What pytest prints there of these files and options."""
        options = ("-o", "addopts=", "-q", "--import-mode=importlib", "-p", "no:cacheprovider")
        return self.run("-m", "pytest", *arguments, *options, interpret=interpret)


def find() -> Python:
    """The one of BITNET_PYTHON312, or python3.12 on the path. Skips the test where there is none with torch, Triton and
    pytest, and fails it where the one that was named has not all of them."""
    named = os.environ.get("BITNET_PYTHON312")
    path = named or shutil.which("python3.12")
    if path and subprocess.run([path, "-c", _HAS_ALL], check=False).returncode == 0:
        return Python(path)
    if named:
        pytest.fail(f"BITNET_PYTHON312 is {named}, which has no torch, no Triton or no pytest")
    pytest.skip("no python3.12 with torch, Triton and pytest; BITNET_PYTHON312 names one")
