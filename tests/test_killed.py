"""kill -9 at any moment: the same command goes on to the same result, and nothing is left behind.

One or two kills of each command; BITNET_KILLS=20 for as many of each.
"""

import hashlib
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.builders import SMALL, save_run, tiny_model
from tests.forked import Forked
from tests.vocabularies import stdlib_text, stdlib_tokenizer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
KILLS = int(os.environ.get("BITNET_KILLS", "1"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A text, a tokenizer, a ternary and a float run."""
    place = tmp_path_factory.mktemp("killed")
    (place / "text.txt").write_text(stdlib_text()[:400_000])
    tokenizer = stdlib_tokenizer(512)
    tokenizer.save(place / "tokenizer.model")
    for name, quantizer in (("ternary", "ternary"), ("float", "none")):
        save_run(place / name, tiny_model(quantizer=quantizer, hidden_size=256, intermediate_size=256), tokenizer)
    return place


def run(place: Path, command: list[str], kill: float | None) -> tuple[int, float]:
    """Runs a command, and kills it behind some seconds unless these are None; returns its exit code and its seconds."""
    running = Forked(place, kill, command=command)
    done = running.wait()
    assert done.returncode == (-9 if kill is not None and done.returncode else 0), done.stderr[-2000:]
    return done.returncode, running.seconds


def commands(place: Path, out: Path) -> dict[str, list[str]]:
    text, tokenizer = str(place / "text.txt"), str(place / "tokenizer.model")
    data = ["--data.corpus", text, "--data.tokenizer", tokenizer, "--data.cache", str(out / "data")]
    tiny = ["--steps", "6", "--eval-every", "2", "--eval-tokens", "64", "--batch-size", "2", "--dtype", "float32"]
    compare = ["--no-speed", "--tokens", "256", "--calibration-tokens", "256", "--context", "32", "--text", text]
    compare += ["--tasks", "8"]
    return {
        "tokenize": ["tokenize", text, tokenizer, str(out / "data")],
        "train": ["train", *SMALL, *tiny, *data, "--resume", "auto", "--out", str(out / "run")],
        "export": ["export", str(place / "ternary"), str(out / "packed")],
        "export gguf": ["export", str(place / "ternary"), str(out / "x.gguf"), "--to", "gguf"],
        "export hf": ["export", str(place / "ternary"), str(out / "hf"), "--to", "hf"],
        "quantize": ["quantize", str(place / "float"), str(out / "nf4"), "--method", "nf4"],
        "compare": ["compare", str(place / "float"), "--methods", "nf4", *compare, "--out", str(out)],
    }


def contents(folder: Path) -> dict[str, str]:
    """Every file and empty folder, with the sum of what must be the same in a run that was killed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() or not any(path.iterdir()):
            same = path.suffix in (".bin", ".gguf", ".safetensors", ".model") or path.name == "index.json"
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if same else ""
    return found


@pytest.mark.parametrize("name", commands(Path(), Path()))
def test_a_killed_command_goes_on_and_leaves_nothing(place, name, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    command = commands(place, tmp_path / "whole")[name]
    _, seconds = run(place, command, None)
    expected = contents(tmp_path / "whole")
    rng, killed = random.Random(name), 0
    command = commands(place, tmp_path / "killed")[name]
    while killed < KILLS:
        code, _ = run(place, command, rng.random() * seconds)
        killed += code != 0
        if code == 0:  # it was faster this time: from the beginning
            shutil.rmtree(tmp_path / "killed")
            (tmp_path / "killed").mkdir()
    run(place, command, None)
    found = contents(tmp_path / "killed")
    remains = [path for path in found if re.search(r"\.tmp|\.lock", path)]
    assert not remains
    assert found == expected
