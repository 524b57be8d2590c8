"""The house itself: its rules hold, and each rule finds what breaks it. What the rules are stands in `house.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT, house
from tests.forked import Forked

RULES: dict[str, Callable[[Path], list[str]]] = {
    rule.__name__: rule
    for rule in (
        house.cycles, house.arrows_up, house.too_many_pairs, house.too_long, house.eager, house.tests_that_import_tests,
        house.tests_beside_no_package, house.drifted, house.mentioned,
    )
}  # fmt: skip
# What is still broken, rule by rule. A line that is no longer true fails too, so this only ever gets shorter.
STILL_BROKEN: dict[str, list[str]] = {}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_is_in_order(rule):
    assert RULES[rule](ROOT) == STILL_BROKEN.get(rule, [])


def test_only_rules_are_allowed_to_be_broken():
    assert set(STILL_BROKEN) <= set(RULES)


# Every rule on a tree of a few lines: the tree below, in which all is well, with some files changed

WELL = {
    "bitnet/__init__.py": "from bitnet.model.linear import BitLinear\n",
    "bitnet/__main__.py": 'import importlib\n\nimportlib.import_module(f"bitnet.commands.{1}")\n',
    "bitnet/files.py": "import os\n",
    "bitnet/plots.py": "def draw():\n    import matplotlib.figure\n",
    "bitnet/quant/__init__.py": "from bitnet.quant.affine import scale\n",
    "bitnet/quant/affine.py": "from bitnet import files\n\nscale = 1\n",
    "bitnet/model/linear.py": "import bitnet.quant\nfrom bitnet.quant import affine, scale\n\n\nclass BitLinear: ...\n",
    "bitnet/model/kv_cache.py": "from . import linear\nfrom .linear import BitLinear\n",
    "bitnet/commands/export.py": "from bitnet.model import kv_cache\n",
    "train.py": "import bitnet\n",
    "tests/oracles/ggml.py": "from tests import oracles\n",
    "tests/oracles/__init__.py": "",
    "tests/quant/__init__.py": "",
    "tests/quant/test_affine.py": "from tests.oracles import ggml\n",
    "README.md": "`python -m bitnet export`, bitnet.BitLinear, bitnet.quant.affine.scale, bitnet/files.py\n",
    "docs/layout.md": """# Layout

<!-- tree -->
```
train.py       the story
README.md      what it is
docs/
  layout.md    this tree
bitnet/
  __init__.py  public names
  __main__.py  the command
  files.py     files
  plots.py     pictures
  quant/
    __init__.py  names
    affine.py    scales
  model/
    linear.py    layers
    kv_cache.py  the cache
  commands/
    export.py    export
tests/
  oracles/
    ggml.py      an oracle
  quant/
    test_affine.py  scales
```
""",
}
LAYOUT = WELL["docs/layout.md"]
BROKEN: dict[str, tuple[str, dict[str, str | None], list[str]]] = {
    "two files that import each other": (
        "cycles",
        {"bitnet/model/linear.py": "from bitnet.model import kv_cache\n"},
        ["bitnet/model/kv_cache.py <-> bitnet/model/linear.py"],
    ),
    "a cycle over three files and lazy imports": (
        "cycles",
        {
            "bitnet/quant/affine.py": "def f():\n    def g():\n        from bitnet.quant.grouped import x\n",
            "bitnet/quant/grouped.py": "if TYPE_CHECKING:\n    from .gptq import x\n",
            "bitnet/quant/gptq.py": "import bitnet.quant.affine as other\n",
        },
        ["bitnet/quant/affine.py <-> bitnet/quant/gptq.py <-> bitnet/quant/grouped.py"],
    ),
    "a file and the __init__ of its package": (
        "cycles",
        {"bitnet/quant/affine.py": "def f():\n    from bitnet.quant import scale\n"},
        ["bitnet/quant/__init__.py <-> bitnet/quant/affine.py"],
    ),
    "two cycles": (
        "cycles",
        {
            "bitnet/quant/affine.py": "from bitnet.quant import scale\n",
            "bitnet/model/linear.py": "from .kv_cache import x\n",
        },
        [
            "bitnet/model/kv_cache.py <-> bitnet/model/linear.py",
            "bitnet/quant/__init__.py <-> bitnet/quant/affine.py",
        ],
    ),
    "an arrow up": (
        "arrows_up",
        {"bitnet/quant/affine.py": "def f():\n    from ..model.linear import BitLinear\n"},
        ["bitnet/quant/affine.py imports bitnet/model/linear.py"],
    ),
    "an arrow up over the public names": (
        "arrows_up",
        {"bitnet/quant/affine.py": "from bitnet import BitLinear\n"},
        ["bitnet/quant/affine.py imports bitnet/__init__.py"],
    ),
    "an arrow up for the type checker": (
        "arrows_up",
        {"bitnet/quant/affine.py": "if TYPE_CHECKING:\n    from bitnet.model.linear import BitLinear\n"},
        ["bitnet/quant/affine.py imports bitnet/model/linear.py"],
    ),
    "an arrow up by name": (
        "arrows_up",
        {"bitnet/quant/affine.py": 'importlib.import_module("bitnet.model.linear")\n'},
        ["bitnet/quant/affine.py imports bitnet/model/linear.py"],
    ),
    "a leaf that knows the package": (
        "arrows_up",
        {"bitnet/plots.py": "from bitnet.files import write\n"},
        ["bitnet/plots.py imports bitnet/files.py"],
    ),
    "rooms beside each other": (
        "arrows_up",
        {
            "bitnet/ptq/walk.py": "from bitnet.inference.engine import Engine\n",
            "bitnet/inference/engine.py": "from bitnet.model.linear import x\n",
        },
        ["bitnet/ptq/walk.py imports bitnet/inference/engine.py"],
    ),
    "a script that is imported": (
        "arrows_up",
        {"bitnet/commands/export.py": "import train\n"},
        ["bitnet/commands/export.py imports train.py"],
    ),
    "a room without a place": (
        "arrows_up",
        {"bitnet/misc.py": ""},
        ["bitnet/misc.py is in no room: give misc its place in BELOW"],
    ),
    "a heavy package elsewhere": (
        "eager",
        {"bitnet/files.py": "def f():\n    from matplotlib import pyplot\n"},
        ["bitnet/files.py imports matplotlib, which is for plots alone"],
    ),
    "a heavy package at the top level": (
        "eager",
        {"bitnet/plots.py": "import matplotlib.figure\n"},
        ["bitnet/plots.py imports matplotlib at its top level"],
    ),
    "a long module": ("too_long", {"bitnet/files.py": "\n" * 501}, ["bitnet/files.py has more than 500 lines"]),
    "a long header": ("too_long", {"bitnet/kernels/x.h": "\n" * 700}, ["bitnet/kernels/x.h has more than 500 lines"]),
    "a long test": ("too_long", {"tests/test_x.py": "\n" * 501}, ["tests/test_x.py has more than 500 lines"]),
    "a test that imports a test": (
        "tests_that_import_tests",
        {"tests/test_train.py": "def f():\n    from tests.quant import test_affine\n"},
        ["tests/test_train.py imports tests.quant.test_affine"],
    ),
    "a helper that imports from a test": (
        "tests_that_import_tests",
        {"tests/builders.py": "from tests.quant.test_affine import x\n"},
        ["tests/builders.py imports tests.quant.test_affine.x"],
    ),
    "a test that imports its neighbour": (
        "tests_that_import_tests",
        {"tests/quant/test_gptq.py": "from .test_affine import x\nfrom test_affine import y\n"},
        [
            "tests/quant/test_gptq.py imports test_affine.y",
            "tests/quant/test_gptq.py imports tests.quant.test_affine.x",
        ],
    ),
    "tests of no package": (
        "tests_beside_no_package",
        {"tests/misc/test_x.py": ""},
        ["tests/misc mirrors no package"],
    ),
    "a file without a line": ("drifted", {"bitnet/nf4.py": "x = 1\n"}, ["docs/layout.md lacks bitnet/nf4.py"]),
    "a line without a file": (
        "drifted",
        {"bitnet/files.py": None},
        ["docs/layout.md names bitnet/files.py, which does not exist"],
    ),
    "a line that says nothing": (
        "drifted",
        {"docs/layout.md": LAYOUT.replace("files.py     files", "files.py")},
        ["docs/layout.md does not say what bitnet/files.py is"],
    ),
    "a file named twice": (
        "drifted",
        {"docs/layout.md": LAYOUT.replace("train.py       the story", "train.py  the story\ntrain.py  again")},
        ["docs/layout.md names train.py twice"],
    ),
    "a line that is nowhere": (
        "drifted",
        {"docs/layout.md": LAYOUT.replace("train.py       the story", "train.py  the story\n    lost.py  below what?")},
        ["docs/layout.md: cannot place 'lost.py  below what?'"],
    ),
    "no tree": (
        "drifted",
        {"docs/layout.md": "# Layout\n"},
        sorted(
            [f"docs/layout.md lacks {name}" for name, text in WELL.items() if text]
            + ["docs/layout.md has no tree behind <!-- tree -->"]
        ),
    ),
    "a document about a file that is gone": (
        "mentioned",
        {"README.md": "see `bitnet/engine.py`\n"},
        ["README.md names bitnet/engine.py"],
    ),
    "a document about a module that is gone": (
        "mentioned",
        {"README.md": "see bitnet.engine and bitnet.quant.affine.gone.x\n"},
        ["README.md names bitnet.engine", "README.md names bitnet.quant.affine.gone.x"],
    ),
    "a command that is gone": (
        "mentioned",
        {"README.md": "python -m bitnet serve\n"},
        ["README.md names the command serve"],
    ),
    "a comment about a file that is gone": (
        "mentioned",
        {"bitnet/files.py": "# see tests/quant/test_nf4.py\n"},
        ["bitnet/files.py names tests/quant/test_nf4.py"],
    ),
}  # fmt: skip


def plant(root: Path, changes: dict[str, str | None]) -> Path:
    """The tree in which all is well, with some files changed; None takes a file away."""
    for name, text in (WELL | changes).items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_complains_where_all_is_well(tmp_path, rule):
    assert RULES[rule](plant(tmp_path, {})) == []


@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_finds_what_breaks_it(tmp_path, case):
    rule, changes, expected = BROKEN[case]
    assert RULES[rule](plant(tmp_path, changes)) == expected


def test_every_rule_is_seen_to_fail():
    assert {rule for rule, _, _ in BROKEN.values()} | {"too_many_pairs"} == set(RULES)


def test_pairs_of_rooms_are_counted_once(tmp_path):
    plant(tmp_path, {"bitnet/model/other.py": "from bitnet.quant import scale\nimport bitnet.files\n"})
    assert house.pairs(tmp_path) == {
        ("bitnet", "model"), ("__main__", "commands"), ("quant", "files"), ("model", "quant"), ("model", "files"),
        ("commands", "model"), ("train", "bitnet"),
    }  # fmt: skip
    assert house.too_many_pairs(tmp_path, 7) == []
    assert house.too_many_pairs(tmp_path, 6) == ["7 pairs of rooms, 6 are allowed"]


def test_the_order_of_the_rooms_has_no_cycle():
    assert house.below("quant") == set(house.LEAVES)
    assert {"quant", "tokenizer", "storage", "training"} <= house.below("commands")
    assert not any(room in house.below(room) for room in house.BELOW)
    assert not {"train", "generate"} & {room for other in house.BELOW for room in house.below(other)}


# What reading cannot show


def test_quant_holds_no_modules():
    for path in (ROOT / "bitnet" / "quant").rglob("*.py"):
        assert "nn.Module)" not in path.read_text(encoding="utf-8"), path


def test_importing_the_package_has_no_side_effects(tmp_path):
    # torch itself may import triton on a machine that has it; that is not ours to forbid.
    heavy = (set(house.LAZY) | {"sentencepiece", "tyro"}) - {"triton"}
    code = (
        "import sys, torch; threads = torch.get_num_threads(); dtype = torch.get_default_dtype();"
        "import bitnet; assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype);"
        f"loaded = set(sys.modules) & {heavy!r}; assert not loaded, loaded"
    )
    done = Forked(tmp_path, bare=True, code=code).wait()
    assert done.returncode == 0, done.stderr
