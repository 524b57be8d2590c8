"""The command that trains a twin: given by the caller, with the arguments that make it one."""

import json
import sys
from pathlib import Path

import pytest

from bitnet.evaluation.twins import train_twin


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"optim": {"lr": 0.01}}))
    return folder


def recorder(folder: Path, code: int = 0) -> list[str]:
    """A command that writes down its arguments."""
    return [
        sys.executable,
        "-c",
        f"import sys; open({str(folder / 'log')!r}, 'w').write(repr(sys.argv[1:])); exit({code})",
    ]


def test_a_twin_is_trained_like_the_run_by_the_command_given(run: Path, tmp_path: Path, capsys) -> None:
    train_twin(run, "binary", recorder(tmp_path))
    arguments = ["--like", str(run), "--model.quantizer", "binary", "--out", str(tmp_path / "demo-binary")]
    assert (tmp_path / "log").read_text() == repr(arguments)
    assert capsys.readouterr().out == f"training  the binary twin of {run} in {tmp_path / 'demo-binary'}\n"


def test_a_float_twin_gets_half_the_learning_rate(run: Path, tmp_path: Path) -> None:
    train_twin(run, "none", recorder(tmp_path))
    wanted = [
        "--model.quantizer",
        "none",
        "--optim.lr",
        "0.005",
        "--product",
        "auto",
        "--out",
        str(tmp_path / "demo-float"),
    ]
    assert (tmp_path / "log").read_text() == repr(["--like", str(run), *wanted])


def test_a_twin_that_was_begun_goes_on(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo-int4" / "checkpoints"
    out.mkdir(parents=True)
    (out / "index.json").write_text("{}")
    train_twin(run, "int4", recorder(tmp_path))
    assert (tmp_path / "log").read_text() == repr(["--resume", str(out.parent)])


@pytest.mark.parametrize("fails", [True, False])
def test_a_twin_that_cannot_be_trained_names_the_command(run: Path, tmp_path: Path, fails: bool) -> None:
    with pytest.raises(
        ValueError, match=r"train it with: bitnet train --like \S+ --model.quantizer int8 --out \S+-int8$"
    ):
        train_twin(run, "int8", recorder(tmp_path, 3) if fails else ())
