"""The command line of training: help in groups, words of other projects, the table of presets, and what they give."""

import dataclasses

import pytest

from bitnet.__main__ import main
from bitnet.training import arguments, estimate, help
from bitnet.training.arguments import ELSEWHERE, parse
from bitnet.training.config import PRESETS, TrainConfig


def options_of(config: TrainConfig) -> list[str]:
    """Every option, as it is written."""
    return [name.replace("_", "-") for name in [*help.COMMAND, *dict(help._fields(config, ""))]]


def test_every_option_stands_in_the_help_once(capsys):
    text = help.help_text("bitnet train", PRESETS["demo"], 100)
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert sorted(lines) == sorted(f"--{name}" for name in options_of(PRESETS["demo"]))
    assert len(help.FIRST) == 10
    assert lines[:10] == [f"--{name.replace('_', '-')}" for name in help.FIRST]
    headings = [line for line in text.splitlines() if line in help.GROUPS]
    assert headings == ["run", "model", "data", "optimizer", "checkpoints", "hardware", "faults"]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    assert "usage: bitnet train" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 100, 200])
def test_help_fits_the_terminal_and_shows_the_values_of_the_preset(width):
    text = help.help_text("train.py", PRESETS["tiny"], width)
    wrapped = [line for line in text.splitlines() if line.startswith(" " * help.INDENT)]
    assert wrapped
    assert all(len(line) <= max(width, help.INDENT + 30) for line in wrapped)
    assert "[runs/tiny]" in text
    assert "Optimizer steps. [200]" in text


def test_every_field_of_the_help_is_an_option_that_can_be_given():
    config = PRESETS["tiny"]
    given: list[str] = []
    for name, (form, _, value) in help._fields(config, ""):
        if form == "BOOL":
            given.append(f"--{name if value == 'True' else help._negated(name)}".replace("_", "-"))
        elif value not in ("None", ""):
            given += [f"--{name.replace('_', '-')}", value]
    assert parse(["--preset", "tiny", *given]).config == config


def test_words_of_other_projects_lead_to_ours(capsys):
    ours = set(options_of(PRESETS["demo"]))
    assert not ours & set(ELSEWHERE), "an option of ours is taken for another project's"
    for word, here in ELSEWHERE.items():
        assert here.removeprefix("--").split()[0].rstrip(",;") in ours, word
    for argument in ("--learning-rate", "--learning_rate", "--Learning-Rate=3"):
        with pytest.raises(ValueError, match=r"is unknown; here it is --optim\.lr"):
            parse([argument, "1e-3"])
    assert main(["train", "--output-dir", "x"]) == 2
    assert capsys.readouterr().err == "error: --output-dir is unknown; here it is --out\n"


def test_what_a_command_line_asks_for():
    found = parse(["--preset", "tiny", "--steps", "7", "--data.corpus", "a", "b", "--estimate", "4"])
    assert found.config == dataclasses.replace(
        PRESETS["tiny"], steps=7, data=dataclasses.replace(PRESETS["tiny"].data, corpus=("a", "b"))
    )
    assert (found.resume, found.estimate, found.presets) == (False, 4, False)
    assert parse(["--estimate"]).estimate == 1
    assert parse(["--presets"]).presets
    assert parse([]) == arguments.Arguments(PRESETS["demo"])


def test_the_table_of_presets(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "seconds", lambda function, device, budget=0.1: 1e-3)
    assert main(["train", "--presets"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["preset", "parameters", "tokens", "memory", "time", "corpus"]
    assert [row.split()[0] for row in rows[: len(PRESETS)]] == list(PRESETS)
    assert rows[1].split()[:5] == ["demo", "4.46", "M", "2.05", "M"]
