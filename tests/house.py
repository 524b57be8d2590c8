"""The rules of the house: what may import what, how long a file may be, and what docs/layout.md must name.

Every rule is a function of the root of a tree and returns its violations as sorted lines of text, so that
`test_house.py` can put it to a small tree in which the rule is broken, and then to this one.

An import counts wherever it stands: inside a function it only runs later, and what a file must know does not change.
For the same reason an import for the type checker alone (`if TYPE_CHECKING:`) counts as well: it cannot fail at run
time, but a reader of the one file still has to know the other.
"""

import ast
import os
import re
from functools import cache
from pathlib import Path

PACKAGE = "bitnet"
LEAVES = ("files", "records", "machine", "console", "plots")
# A room is a package or a file beside them. It may import itself, the leaves, what is named here, and what those may.
BELOW: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LEAVES, ()),
    "quant": LEAVES,
    "kernels": ("quant",),
    "model": ("kernels",),
    "tokenizer": LEAVES,
    "data": ("tokenizer",),
    "storage": ("model", "tokenizer"),
    "inference": ("storage",),
    "ptq": ("storage",),
    "vllm": ("storage",),
    "evaluation": ("serving", "ptq", "data"),
    "training": ("evaluation",),
    "bench": ("training",),
    "pages": ("training",),
    "serving": ("inference",),
    "commands": ("bench", "pages"),
    "bitnet": ("inference",),  # bitnet/__init__.py: the public names
    "__main__": ("commands", "bitnet"),
    "train": ("__main__",),
    "generate": ("__main__",),
}
MAX_LINES = 500
MAX_PAIRS = 115
# Heavy or optional packages: the one room that may import each, inside a function.
LAZY = {"wandb": "training", "matplotlib": "plots", "datasets": "data", "pyarrow": "data", "triton": "kernels"}
SOURCES = {".py", ".cpp", ".h"}
# Files that docs/layout.md names; folders that hold what was made, not written.
NAMED = SOURCES | {".md", ".toml", ".cff", ".typed", ".in"}
MADE = {"__pycache__", "build", "dist", "runs", "wandb", "results"}


@cache
def below(room: str) -> frozenset[str]:
    """All rooms that a room may import."""
    return frozenset(BELOW[room]).union(*(below(other) for other in BELOW[room]))


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module of the package and of the scripts on top, with its file relative to the root."""
    found = {}
    for path in [*sorted((root / PACKAGE).rglob("*.py")), *(root / f"{name}.py" for name in ("train", "generate"))]:
        if path.exists():
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.relative_to(root)
    return found


def room_of(path: Path) -> str:
    """The room of a file, relative to the root."""
    parts = path.with_suffix("").parts
    return parts[0] if parts[1:] in ((), ("__init__",)) else parts[1]


@cache
def imported(path: Path, name: str) -> list[tuple[list[str], bool]]:
    """Imports of a file whose module has this name: the dotted names each may mean, the longest first, and whether it
    stands at the top level. `importlib.import_module` counts; a name that is put together there ends in a dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: list[tuple[list[str], bool]] = []
    body = set(tree.body)
    for node in ast.walk(tree):
        top = node in body
        if isinstance(node, ast.Import):
            found += [([alias.name], top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found += [([f"{module}.{alias.name}", module], top) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            argument = node.args[0]
            first = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.append(([first.value], top))
    return found


@cache
def graph(root: Path) -> dict[Path, set[Path]]:
    """For every file the files of the package that it imports."""
    known = modules(root)
    edges: dict[Path, set[Path]] = {}
    for name, path in known.items():
        targets: set[Path] = set()
        for names, _ in imported(root / path, name):
            if names[0].endswith("."):
                targets |= {file for module, file in known.items() if module.startswith(names[0])}
            targets |= {known[next(n for n in names if n in known)]} if any(n in known for n in names) else set()
        edges[path] = targets - {path}
    return edges


def components(edges: dict[Path, set[Path]]) -> list[list[Path]]:
    """Strongly connected components (Tarjan 1972) of more than one file, sorted."""
    index: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[Path]] = []

    def visit(node: Path) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)


def cycles(root: Path) -> list[str]:
    """Files that import each other, directly or over others."""
    return [" <-> ".join(map(str, component)) for component in components(graph(root))]


def arrows_up(root: Path) -> list[str]:
    """Imports against the order of the rooms."""
    found = []
    for path, targets in graph(root).items():
        here = room_of(path)
        if here not in BELOW:
            found.append(f"{path} is in no room: give {here} its place in BELOW")
            continue
        for target in targets:
            there = room_of(target)
            if there != here and there not in below(here):
                found.append(f"{path} imports {target}")
    return sorted(found)


def pairs(root: Path) -> set[tuple[str, str]]:
    """Rooms of which the first imports the second."""
    return {
        (room_of(path), room_of(target))
        for path, targets in graph(root).items()
        for target in targets
        if room_of(path) != room_of(target)
    }


def too_many_pairs(root: Path, most: int = MAX_PAIRS) -> list[str]:
    """One line where more pairs of rooms import each other than there may."""
    count = len(pairs(root))
    return [f"{count} pairs of rooms, {most} are allowed"] if count > most else []


def eager(root: Path) -> list[str]:
    """Heavy packages that are imported elsewhere than in their room, or at the top level of a file."""
    found = set()
    for name, path in modules(root).items():
        for names, top in imported(root / path, name):
            package = names[0].split(".")[0]
            if package in LAZY and room_of(path) != LAZY[package]:
                found.add(f"{path} imports {package}, which is for {LAZY[package]} alone")
            elif package in LAZY and top:
                found.add(f"{path} imports {package} at its top level")
    return sorted(found)


def written(root: Path) -> list[Path]:
    """Every file that somebody wrote and may look for, relative to the root."""
    found = []
    for folder, below, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        below[:] = [d for d in below if not (d.startswith(".") or d in MADE or "egg-info" in d)]  # not walked at all
        if not inside.parts:
            below[:] = [d for d in below if d not in ("data", "dev")]
        names = [name for name in names if not name.startswith(".")]
        found += [inside / name for name in names if Path(name).suffix in NAMED or name in ("LICENSE", "Makefile")]
    return sorted(found)


def too_long(root: Path, most: int = MAX_LINES) -> list[str]:
    """Source files, tests too, with more lines than a file may have."""
    counts = {p: len((root / p).read_text(encoding="utf-8").splitlines()) for p in written(root) if p.suffix in SOURCES}
    return [f"{path} has more than {most} lines" for path, count in counts.items() if count > most]


def tests_that_import_tests(root: Path) -> list[str]:
    """Files below tests/ that import a test file, under whatever name."""
    found = set()
    for path in sorted((root / "tests").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        for names, _ in imported(path, name):
            if any(part.startswith("test_") for part in names[-1].split(".")) or any(
                (root / Path(*n.split("."))).with_suffix(".py").exists() and n.split(".")[-1].startswith("test_")
                for n in names
            ):
                found.add(f"{path.relative_to(root)} imports {names[0]}")
    return sorted(found)


def tests_beside_no_package(root: Path) -> list[str]:
    """Folders of tests that mirror no package."""
    folders = {path.parent.relative_to(root / "tests") for path in (root / "tests").rglob("test_*.py")}
    return sorted(f"tests/{f} mirrors no package" for f in folders if not (root / PACKAGE / f).is_dir())


def tree(root: Path) -> tuple[dict[str, str], list[str]]:
    """The files that the block behind `<!-- tree -->` in docs/layout.md names, with what it says; lines it cannot mean.

    Two spaces a level; a folder ends in a slash; behind a name stands, after two spaces or more, what the file is.
    """
    block = re.search(r"<!-- tree -->\s*```\w*\n(.*?)```", (root / "docs/layout.md").read_text(encoding="utf-8"), re.S)
    if not block:
        return {}, ["docs/layout.md has no tree behind <!-- tree -->"]
    named, bad, folders = {}, [], [""]
    for line in block[1].splitlines():
        entry, _, text = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2
        if not entry:
            continue
        if depth >= len(folders) or " " in entry:
            bad.append(f"docs/layout.md: cannot place {line.strip()!r}")
            continue
        folders = folders[: depth + 1]
        path = folders[-1] + entry
        if entry.endswith("/"):
            folders.append(path)
        elif path in named:
            bad.append(f"docs/layout.md names {path} twice")
        else:
            named[path] = text.strip()
    return named, bad


def drifted(root: Path) -> list[str]:
    """What docs/layout.md says and the tree is not: files missing, files extra, files without a word on what they are.

    Empty files, such as the __init__.py of a folder of tests, need no line.
    """
    named, found = tree(root)
    real = {str(path) for path in written(root) if (root / path).stat().st_size}
    found += [f"docs/layout.md names {name}, which does not exist" for name in named if not (root / name).is_file()]
    found += [f"docs/layout.md does not say what {name} is" for name, text in named.items() if not text]
    found += [f"docs/layout.md lacks {name}" for name in real - set(named)]
    return sorted(found)


def mentioned(root: Path) -> list[str]:
    """Modules, files and commands of this project that a document or a source file names and that do not exist."""
    known, found = modules(root), set()
    commands = {path.stem for path in (root / PACKAGE / "commands").glob("*.py")} | {"train", "generate"}
    for path in written(root):
        # The one tells of what was, the other plants what is not.
        if path.name in {"CHANGELOG.md", "test_house.py"} or path.suffix not in {".md", ".toml", *SOURCES}:
            continue
        text, kinds = (
            (root / path).read_text(encoding="utf-8"),
            "py|h|cpp|md|png|json" if path.suffix == ".md" else "py|h|cpp|md",
        )
        files = re.findall(rf"(?<![\w./])(?:bitnet|tests|benchmarks|docs)(?:/\w+)+\.(?:{kinds})\b", text)
        found |= {f"{path} names {name}" for name in files if not (root / name).exists()}
        run = re.findall(r"-m bitnet ([a-z]\w*)", text)
        if path.suffix == ".md":
            found |= {f"{path} names {name}" for name in _dotted(text) if not _exists(root, known, name)}
            run += re.findall(r"(?m)(?:^ *|`)bitnet ([a-z]\w*) (?!a |is )", text)
        found |= {f"{path} names the command {name}" for name in run if name not in commands}
    return sorted(found)


def _dotted(text: str) -> list[str]:
    """bitnet.x.y in a document, not the name of a file such as bitnet.cpp or of a domain."""
    return [n for n in re.findall(r"(?<![\w./@-])bitnet(?:\.[A-Za-z_]\w*)+", text) if n != "bitnet.cpp"]


def _exists(root: Path, known: dict[str, Path], name: str) -> bool:
    """A module, or a name that a module defines or imports; what is behind such a name is not looked at."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if module in known:
            return count == len(parts) or parts[count] in _names(root / known[module])
    return False


def _names(path: Path) -> set[str]:
    """Names at the top level of a file."""
    found: set[str] = set()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    while body:
        node = body.pop()
        if isinstance(node, ast.If):  # TYPE_CHECKING, of what is imported when it is used
            body += node.body
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found
