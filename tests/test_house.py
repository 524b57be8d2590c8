"""The house itself: dependencies point one way, imports are light, and the README's file tree is the real one."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

SOURCES = [*sorted((ROOT / "bitnet").rglob("*.py")), ROOT / "train.py", ROOT / "generate.py"]

# A layer may import itself and the layers above it in this list, nothing below.
LAYERS = [
    {"quant", "files", "machine", "console", "plots"},
    {"kernels"},
    {"model", "tokenizer"},
    {"data", "storage"},
    {"inference", "ptq"},
    {"evaluation"},
    {"training"},
    {"bench"},
    {"commands"},
    {"__main__", "train", "generate"},
]
# These know nothing of the package: they could be libraries of their own.
LEAVES = {"quant", "files", "machine", "console", "plots"}
# Heavy or optional packages, and the one file that may import each, inside a function.
LAZY = {
    "wandb": "bitnet/training/reporter.py", "matplotlib": "bitnet/plots.py", "datasets": "bitnet/data/corpus.py",
    "pyarrow": "bitnet/data/corpus.py", "triton": "bitnet/kernels/",
}  # fmt: skip


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if len(parts) == 1 else parts[1]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported modules of a file, and whether the import stands at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(tree.body)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "bitnet" else [node.module]
            found += [(name, node in top) for name in names]
    return found


def level(part: str) -> int:
    matches = [i for i, layer in enumerate(LAYERS) if part in layer]
    assert matches, f"{part} is in no layer: add it to LAYERS in {Path(__file__).name}"
    return matches[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    here = part_of(path)
    for module, _ in imports(path):
        if module.split(".")[0] != "bitnet" or here == "__init__" or module == "bitnet":
            continue
        there = module.split(".")[1]
        if there in {"BitLinear", "PackedLinear", "pack", "replace_linear"}:
            there = "model"
        assert here == there or here not in LEAVES, f"{path.name} imports {module}"
        assert level(there) <= level(here), f"{here} must not import {there}: {path.name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_lazily_in_one_place(path):
    for module, at_top in imports(path):
        package = module.split(".")[0]
        if package in LAZY:
            assert path.relative_to(ROOT).as_posix().startswith(LAZY[package]), f"{path.name} imports {package}"
            assert not at_top, f"{path.name} imports {package} at its top level"


def test_quant_holds_no_modules():
    for path in (ROOT / "bitnet" / "quant").rglob("*.py"):
        assert not re.search(r"nn\.Module\)", path.read_text(encoding="utf-8")), path


def test_importing_the_package_has_no_side_effects():
    code = (
        "import sys, torch; threads = torch.get_num_threads(); dtype = torch.get_default_dtype();"
        "import bitnet; assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype);"
        f"loaded = set(sys.modules) & {set(LAZY) | {'sentencepiece', 'tyro'}!r}; assert not loaded, loaded"
    )
    # torch itself may import triton on a machine that has it; that is not ours to forbid.
    code = code.replace("'triton', ", "").replace(", 'triton'", "")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_readme_tree_is_the_real_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree -->\s*```\w*\n(.*?)```", readme, re.DOTALL)
    assert tree, "README.md has no file tree behind <!-- tree -->"
    named: set[str] = set()
    folders: list[str] = []
    for line in tree[1].splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        folders = [*folders[:depth], entry] if entry.endswith("/") else folders[:depth]
        named.add("".join(folders) + ("" if entry.endswith("/") else entry))
    for name in named:
        assert (ROOT / name).exists(), f"README.md names {name}, which doesn't exist"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    modules = {f for f in tracked if f.endswith(".py") and not f.startswith("tests/") and not f.endswith("__init__.py")}
    assert modules <= named, f"README.md's tree lacks {sorted(modules - named)}"
