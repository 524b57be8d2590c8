"""The command line as a whole: the table, help without torch, one rule of exit codes, pipes, and terminals."""

import dataclasses
import importlib
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from bitnet.__main__ import COMMANDS, execute, main, refuse_empty
from bitnet.training.config import TrainConfig

ROOT = Path(__file__).parents[2]


def loaded_after(arguments: list[str]) -> tuple[str, set[str]]:
    """What a fresh process prints for these arguments, and the modules that it has imported."""
    code = (
        "import sys, contextlib\nfrom bitnet.__main__ import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments!r})\n"
        "print('\\n@@' + ' '.join(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text, _, modules = out.rpartition("\n@@")
    return text, set(modules.split())


def command(run) -> types.ModuleType:
    """A command whose work is this function."""

    @dataclass(frozen=True)
    class Options:
        number: int = 0

    module = types.ModuleType("command", "A command.")
    module.Options, module.run = Options, run
    return module


def test_the_table_is_printed_without_torch():
    text, modules = loaded_after(["--help"])
    assert all(name in text for name in COMMANDS)
    assert not modules & {"torch", "numpy", "tyro"}


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["train", "--resume", ""], "behind --resume"), (["train", "--out="], "behind --out"),
        (["train", "--data.corpus", ""], "behind --data.corpus"), (["generate", ""], "among the arguments"),
        (["evaluate", "", "--device", "cpu"], "among the arguments"),
        (["train", "--data_field", ""], "behind --data-field"),
    ],
)  # fmt: skip
def test_an_empty_argument_is_not_one_that_was_left_out(tmp_path, monkeypatch, capsys, arguments, place):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert f"an empty value stands {place}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_empty_text_is_a_text():
    refuse_empty(["--prompt", "", "--sample_prompt=", "--system", "", "--stop", ".", ""])


HELPED = sorted(set(COMMANDS) - {"train"})  # whose help shows the values of a preset


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, bool]]:
    """What one fresh process prints for --help of every command, and whether it has imported torch by then."""
    code = (
        "import contextlib, io, json, sys\nfrom bitnet.__main__ import main\nfound = {}\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "    found[name] = text.getvalue(), 'torch' in sys.modules\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, *HELPED]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("name", HELPED)
def test_help_of_a_command_needs_no_torch(name, helps):
    text, torch_was_imported = helps[name]
    assert f"usage: bitnet {name}" in text
    assert f"\nbitnet {name} " in text.replace("    bitnet", "bitnet"), "no example"
    assert not torch_was_imported


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name):
    module = importlib.import_module(f"bitnet.commands.{name}")
    assert module.__doc__
    assert callable(module.run)
    assert hasattr(module, "Options") or hasattr(module, "parse")


def test_an_unknown_command_names_the_near_one(capsys):
    assert main(["trian"]) == 2
    assert "'trian' is no command of bitnet; did you mean 'train'?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "choose one of train, generate" in capsys.readouterr().err


def test_without_a_command_the_table_is_the_answer(capsys):
    assert main([]) == 2
    assert "consolidate" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bitnet 0.")


def raising(error: BaseException):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "code", "message"),
    [
        (lambda options: None, 0, ""),
        (lambda options: 1, 1, ""),
        (lambda options: 143, 143, ""),
        (raising(ValueError("size is 3; give 4")), 2, "error: size is 3; give 4\n"),
        (raising(FileNotFoundError(2, "No such file", "x")), 2, "error: [Errno 2] No such file: 'x'\n"),
        (raising(KeyboardInterrupt()), 130, ""),
    ],
)
def test_exit_codes(run, code, message, capsys):
    assert execute(command(run), "bitnet command", []) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


def test_an_option_that_is_none_ends_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        execute(command(raising(AssertionError)), "bitnet command", ["--nubmer", "1"])
    assert ended.value.code == 2
    assert "--number" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="ours"):
        execute(command(raising(RuntimeError("ours"))), "bitnet command", [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "nowhere", "--prompt", "x"],
        ["evaluate", "nowhere"],
        ["evaluate"],
        ["quantize", "nowhere"],
        ["quantize", "nowhere", "out", "--method", "nonsense"],
        ["quantize", "nowhere", "out", "--method", "nf4", "--group-size", "64"],
        ["quantize", "nowhere", "/dev/null/out", "--method", "nf4"],
        ["serve", "nowhere", "--port", "99999"],
        ["quantize", "nowhere", "out", "--method", "hqq-4", "--text", "sotu"],
        ["evaluate", "nowhere", "--tasks", "arc_easy", "--text", "sotu"],
        ["evaluate", "nowhere", "--limit", "5"],
        ["evaluate", "nowhere", "--tasks", "arc_easy", "--limit", "0"],
        ["evaluate", "nowhere", "--tasks", "arc_easy", "--shots", "-1"],
        ["compare", "nowhere"],
        ["export", "nowhere", "out"],
        ["export", "nowhere", "out", "--type", "F16"],
        ["inspect", "nowhere"],
        ["bench", "nowhere"],
        ["bench", "--preset", "nonsense"],
        ["bench", "nowhere", "--device", "cuda"],
        ["bench", "--device", "cuda", "--twins"],
        ["formats", "1", "--params", "-1"],
        ["formats", "a"],
        ["consolidate", "nowhere"],
        ["consolidate"],
        ["train", "--resume", "nowhere"],
        ["train", "--preset", "tiny", "--data.corpus", "nowhere.txt"],
        ["train", "--learning-rate", "1e-3"],
        ["train", "--estimate", "0"],
        ["train", "--preset", "lora", "--init", "nowhere"],
        ["train", "--teacher-weight", "0.3"],
        ["train", "--minutes", "3", "--steps", "7"],
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_2_and_one_line(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in captured.err
    assert not list(tmp_path.glob("out*"))


def numbers(options: type, prefix: str = "--") -> list[str]:
    """The options that take a number with a fraction, by their names on the command line."""
    found, hints = [], get_type_hints(options, include_extras=True)
    for each in dataclasses.fields(options):
        kind = hints[each.name]
        if get_origin(kind) is Annotated:
            if "Positional" in str(kind):
                continue
            kind = get_args(kind)[0]
        name = prefix + each.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            found += numbers(kind, prefix if "OmitArgPrefixes" in str(hints[each.name]) else f"{name}.")
        elif float in (kind, *get_args(kind)):
            found.append(name)
    return found


TAKERS = [
    (name, option)
    for name, module in ((name, importlib.import_module(f"bitnet.commands.{name}")) for name in COMMANDS)
    for option in numbers(TrainConfig if name == "train" else module.Options)
]


def test_there_are_such_options():
    assert len(TAKERS) > 30
    assert {("quantize", "--target-bits"), ("serve", "--io-seconds"), ("train", "--optim.lr")} <= {*TAKERS}
    assert {("generate", "--temperature"), ("formats", "--range")} <= {*TAKERS}


def ended(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_no_option_takes_what_is_no_finite_number(number, capsys, monkeypatch, tmp_path):
    """Before any work: the model is not there."""
    monkeypatch.chdir(tmp_path)
    front = {"train": ["--preset", "tiny"], "formats": ["1"], "quantize": ["nowhere", "out"], "bench": []}
    for name, option in TAKERS:
        code = ended([name, *front.get(name, ["nowhere"]), f"{option}={number}"])
        err = " ".join(capsys.readouterr().err.split())
        word = option.removeprefix("--").replace("-", "_")
        if name == "train":  # a part of the configuration may know better what it takes
            assert f"{word.rpartition('.')[2]} is {float(number)};" in err or "rope_factors has" in err
            assert code == 2
        else:
            assert (code, err.replace("text.", "")) == (2, f"error: {option} is {float(number)}; give a finite number")
    assert main(["formats", "--", number]) == 0  # what it prints is its bits


@pytest.mark.parametrize("place", ["text.txt/out", "closed/out"])
def test_a_place_that_takes_nothing_is_told_before_the_work(place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "closed").mkdir(mode=0o500)
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("closed"))  # root may write anywhere
    for arguments in (["quantize", "text.txt", place, "--method", "nf4"], ["guide", "text.txt", "--out", place]):
        assert main(arguments) == 2
        assert f"error: {place} cannot be written: " in capsys.readouterr().err


def test_a_reader_that_leaves_ends_the_command_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet", "quantize", "--list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


def test_a_terminal_that_lacks_a_character_sees_a_question_mark():
    result = subprocess.run(
        [sys.executable, "-m", "bitnet", "formats", "3.1416"],
        cwd=ROOT,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"INT8 ?4" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["formats", "--help"], ["--version"], ["formats", "3.1416"]])
def test_a_reader_that_is_not_there_is_no_error(arguments):
    """| true, which has closed the pipe before anything is written; nothing fails when the interpreter ends either."""
    code = f"import sys; from bitnet.__main__ import main; sys.stdin.read(); sys.exit(main({arguments}))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    _, err = child.communicate(b"")
    assert (child.returncode, err) == (0, b"")
