"""generate.py as a user runs it."""

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import generate as cli
from bitnet.inference.options import DEFAULTS, SamplingConfig
from bitnet.kernels.cpu import native
from tests import ROOT
from tests.builders import expected_text, generate_ids, save_run, tiny_model
from tests.vocabularies import stdlib_tokenizer

GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """A run folder whose model has random weights."""
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_model(), tokenizer)


class TextIn(io.TextIOWrapper):
    def __init__(self, data: bytes, tty: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.fixture
def call(capsys, monkeypatch, checkpoint):
    """Run main() with some arguments: (exit status, standard output, standard error)."""

    def run_main(*arguments: str, stdin: bytes = b"", model: Path = checkpoint, tty: bool = False):
        monkeypatch.setattr(sys, "stdin", TextIn(stdin, tty))
        status = cli.main([str(model), "--device", "cpu", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_main


STATS = (
    r"prefill \d+ tokens(?: \(\d+ known\))? \d+ tok/s \| decode \d+ tokens \d+ tok/s \d+\.\d\d GB/s \| "
    r"(?:native int8|torch) \| seed (\d+) \| stop reason (?:stop|length|context|interrupted)\n"
)


def test_the_same_seed_gives_the_same_text(call):
    options = ("--prompt", "def wrap(", "--max-new-tokens", "12", "--temperature", "1.2")
    status, out, err = call(*options, "--seed", "7")
    assert status == 0
    assert out.startswith("def wrap(")
    assert out.endswith("\n")
    assert len(out) > len("def wrap(\n")
    assert re.fullmatch(STATS, err)
    assert call(*options, "--seed", "7")[:2] == (0, out)
    assert call(*options, "--seed", "8")[1] != out
    # The seed that was chosen is printed, and gives the text again.
    _, out, err = call(*options)
    assert call(*options, "--seed", re.fullmatch(STATS, err)[1])[1] == out


def test_generate_prints_what_the_model_says(call, checkpoint, tokenizer):
    _, out, _ = call("--prompt", "text", "--max-new-tokens", "10", "--seed", "3", "--no-echo")
    ids = torch.tensor([tokenizer.encode("text", bos=True)])
    new = generate_ids(tiny_model().pack(), ids, 10, DEFAULTS, seed=3, eos_id=tokenizer.eos_id)[0].tolist()
    assert out.removesuffix("\n") == tokenizer.decode(new).removesuffix("\n")


@pytest.mark.parametrize("stdin", [b"the text\n", b"the text\r\n", b"the text"])
def test_prompt_from_standard_input(call, stdin):
    options = ("--max-new-tokens", "6", "--seed", "1")
    expected = call(*options, "--prompt", "the text")
    assert call(*options, stdin=stdin)[:2] == expected[:2]
    assert call(*options, "--prompt", "-", stdin=stdin)[:2] == expected[:2]


def test_samples_come_under_headers(call, checkpoint):
    status, out, err = call("--prompt", "self.", "--samples", "3", "--max-new-tokens", "8", "--seed", "1")
    assert status == 0
    texts = re.split(r"^--- sample \d ---\n", out, flags=re.MULTILINE)[1:]
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith("self.") for text in texts)
    assert call("--prompt", "self.", "--samples", "3", "--max-new-tokens", "8", "--seed", "1")[1] == out
    if native.instruction_sets():
        drafted = call("--prompt", "self.", "--samples", "3", "--max-new-tokens", "8", "--seed", "1",
                       "--prompt-lookup-num-tokens", "4")  # fmt: skip
        assert drafted[1] == out
        assert "note: --prompt-lookup-num-tokens is of single texts" in drafted[2]
    assert re.search(r"prefill \d+ tokens .* decode (1\d|2[0-4]) tokens", err)
    assert "will be the same" in call(
        "--prompt", "a", "--samples", "2", "--temperature", "0", "--max-new-tokens", "2")[2]  # fmt: skip


def test_the_first_sample_streams_and_the_others_follow(capsys):
    printer = cli.Printer("P", 3)
    printer.add(["a", "b", "c"])
    printer.show([False, False, False])
    assert capsys.readouterr().out == "--- sample 1 ---\nPa"
    printer.add(["d", "e\n", "f"])
    printer.show([True, True, False])
    assert capsys.readouterr().out == "d\n--- sample 2 ---\nPbe\n--- sample 3 ---\nPcf"


def test_stop_string_of_the_command_line(call):
    options = ("--prompt", "x", "--max-new-tokens", "40", "--seed", "5", "--temperature", "2", "--no-echo")
    whole = call(*options)[1]
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    status, out, _ = call(*options, "--stop", "never to be seen", "--stop", middle)
    assert status == 0
    assert out.rstrip("\n") == expected_text(whole, [middle]).rstrip("\n")
    assert cli.unescape(r"\n\n|\t|\\n") == "\n\n|\t|\\n"


def test_interactive_session(call):
    options = ("--interactive", "--max-new-tokens", "5", "--seed", "1")
    status, out, err = call(*options, stdin=b"\nfirst line\n\nsecond\n")
    assert status == 0
    assert out
    assert "first line" not in out  # the terminal shows it already
    assert re.findall(r"seed (\d+)", err) == ["1", "2", "3"]  # the empty line before any text is no prompt
    prefills = [int(n) for n in re.findall(r"prefill (\d+)", err)]
    assert prefills[1] >= prefills[0] + 4  # continues the first text
    if "native" in err:  # and reads what is new: the token that was drawn last
        assert f"prefill {prefills[1]} tokens ({prefills[1] - 1} known)" in err
    assert call(*options, stdin=b"first line\n")[1] == call("--prompt", "first line", "--no-echo", *options[1:])[1]
    # An error ends the text, not the session; a text that fills the model can still be continued.
    long = ("--interactive", "--max-new-tokens", "30", "--temperature", "0")
    status, out, err = call(*long, stdin=b"word " * 300 + b"\nshort\n" + b"\n" * 6)
    assert status == 0
    assert err.count("error: a prompt of ") == 1
    assert len(re.findall("seed", err)) == 7
    # So it is where a line is no text; an empty one goes on with the text before.
    status, _, err = call(*options, stdin=b"first line\n\xff\xfe\n\nsecond\n")
    assert status == 0
    assert "half of a surrogate pair" in err
    again = [int(n) for n in re.findall(r"prefill (\d+)", err)]
    assert (len(again), again[:2]) == (3, prefills[:2])


def test_ctrl_c_ends_the_text_and_shows_what_it_took(call, monkeypatch):
    add, calls = cli.Printer.add, itertools.count()

    def interrupted(self, pieces):
        if next(calls) == 3:
            raise KeyboardInterrupt
        add(self, pieces)

    monkeypatch.setattr(cli.Printer, "add", interrupted)
    status, out, err = call("--prompt", "some text", "--max-new-tokens", "10")
    assert status == 130
    assert out.startswith("some text")
    assert re.fullmatch(STATS, err)
    assert "decode 4 tokens" in err
    calls = itertools.count()
    status, _, err = call("--interactive", "--max-new-tokens", "10", "--seed", "4", stdin=b"one\ntwo\n")
    assert (status, re.findall(r"seed (\d+)", err)) == (0, ["4", "5"])
    calls = itertools.count()  # an empty line goes on from what was written
    status, _, err = call("--interactive", "--max-new-tokens", "10", "--temperature", "0", stdin=b"one\n\n")
    first, second = (int(n) for n in re.findall(r"prefill (\d+)", err))
    assert (status, second) == (0, first + 4)


def test_a_terminal_is_told_what_is_awaited(call):
    status, out, err = call("--max-new-tokens", "2", stdin=b"typed", tty=True)
    assert (status, out[:5]) == (0, "typed")
    assert err.startswith("note: type the prompt and end it with Ctrl-D, or give --prompt")


def test_note_where_less_fits_than_was_asked_for(call, tokenizer):
    status, _, err = call("--prompt", "x", "--max-new-tokens", "1000", "--temperature", "0")
    tokens = len(tokenizer.encode("x", bos=True))
    assert status == 0
    assert f"note: generating at most {128 - tokens} tokens, not 1000" in err


def test_options_that_change_nothing_are_told(call, checkpoint, tmp_path):
    *_, err = call("--prompt", "x", "--max-new-tokens", "1", "--temperature", "0", "--top-p", "0.9", "--min-p", "0.1")
    assert "note: temperature 0 is greedy: --top-p and --min-p change nothing" in err
    status, _, err = call("--prompt", "x", "--max-new-tokens", "1", "--dtype", "bfloat16")
    assert status == 0
    assert "runs packed, in types of its own: dtype bfloat16 changes nothing" in err
    shutil.copytree(checkpoint, tmp_path / "greedy")
    for folder in (tmp_path / "greedy" / "checkpoints").glob("step-*"):
        (folder / "generation_config.json").write_text('{"do_sample": false}')
    *_, err = call("--prompt", "x", "--max-new-tokens", "1", "--top-k", "3", model=tmp_path / "greedy")
    assert "note: temperature 0, as the model's own settings say, is greedy: --top-k change" in err
    *_, err = call("--prompt", "x", "--max-new-tokens", "1", "--temperature", "0.5", model=tmp_path / "greedy")
    assert "note" not in err


@pytest.mark.parametrize(
    "options", [("--no-pack",), ("--no-pack", "--dtype", "bfloat16"), ("--checkpoint", "last"), ("--top-k", "3")]
)
def test_options_run(call, options):
    status, out, err = call("--prompt", "x", "--max-new-tokens", "3", *options)
    assert (status, out[:1]) == (0, "x")
    assert re.fullmatch(STATS, err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        ((), "the prompt is empty"),
        (("--prompt", "word " * 200), r"a prompt of \d+ tokens leaves no room in a model of 128 positions"),
        (("--prompt", "x", "--temperature", "-1"), "temperature is -1.0"),
        (("--prompt", "x", "--top-p", "0"), "top_p is 0.0"),
        (("--prompt", "x", "--samples", "0"), "--samples is 0"),
        (("--prompt", "x", "--threads", "0"), "--threads is 0"),
        (("--prompt", "x", "--threads", "100000"), "--threads is 100000; give 1 to 1024"),
        (("--prompt", "x", "--seed", str(2**63)), f"seed is {2**63}; give a whole number"),
        (("--prompt", "x", "--max-new-tokens", "-3"), "max_new_tokens is -3"),
        (("--prompt", "x", "--seed", "-1"), "seed is -1"),
        (("--prompt", "x", "--stop", ""), "stop string is empty"),
        (("--prompt", "x", "--device", "nonsense"), "device 'nonsense'"),
        (("--prompt", "x", "--interactive"), "exclude each other"),
        (("--samples", "2", "--interactive"), "--samples 2 does not go with --interactive"),
    ],
)
def test_bad_arguments_end_with_an_error_line(call, arguments, message):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert re.search(r"^error: .*" + message, err, re.MULTILINE)
    assert "Traceback" not in err


def test_standard_input_that_is_not_text(call):
    status, _, err = call(stdin=b"\xff\xfe\x00")
    assert status == 2
    assert "not UTF-8" in err


def test_damaged_checkpoints_are_named(call, checkpoint, tmp_path):
    def damaged(name: str, data: bytes | None) -> Path:
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "step"
        shutil.copytree(next((checkpoint / "checkpoints").glob("step-*")), folder)
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        return folder

    whole = next((checkpoint / "checkpoints").glob("step-*"))
    config = json.loads((whole / "config.json").read_text())
    config["model"]["vocab_size"] = 1024
    cases = [
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path, "holds no checkpoint"),
        (damaged("model.safetensors", (whole / "model.safetensors").read_bytes()[:5000]), "truncated"),
        (damaged("tokenizer.model", None), "tokenizer.model"),
        (damaged("tokenizer.model", b"nonsense"), "not a sentencepiece model"),
        (damaged("config.json", json.dumps(config).encode()), "does not fit"),
    ]
    for folder, message in cases:
        status, out, err = call("--prompt", "x", model=folder)
        assert (status, out) == (2, ""), folder
        assert err.startswith("error: ")
        assert message in err
    larger = stdlib_tokenizer(600).model_proto
    status, _, err = call("--prompt", "x", model=damaged("tokenizer.model", larger))
    assert status == 2
    assert "has 600 tokens and the model only 512" in err


def test_as_a_process_with_a_reader_that_leaves(checkpoint):
    """The script itself, piped into a reader that closes at once: it ends quietly."""
    command = [sys.executable, "generate.py", str(checkpoint), "--device", "cpu", "--threads", "1", "--seed", "1"]
    command += ["--backend", "reference"]  # which has nothing to warn of, with a compiler or without
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "100"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"some text")
    process.stdin.close()
    error = process.stderr.read().decode()
    assert (process.wait(), error) == (0, "")
    process.stderr.close()
