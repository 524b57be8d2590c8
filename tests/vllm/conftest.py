"""A trained model for the tests in vLLM's own environment."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: that of `make demo` where there is one, else one of two minutes."""
    run = ROOT / "runs" / "demo"
    if not (run / "checkpoints" / "index.json").exists():
        run = tmp_path_factory.mktemp("trained") / "demo"
        command = [sys.executable, "train.py", "--preset", "demo", "--minutes", "2", "--wandb", "off"]
        subprocess.run([*command, "--out", str(run)], cwd=ROOT, check=True)
    return run
