"""The command line of training: help in groups, words of other projects, the table of presets, and what they give."""

import dataclasses
import json
import math
from functools import partial

import pytest
import torch

import train as trainer
from bitnet.__main__ import main
from bitnet.data.feed import DataConfig
from bitnet.training import arguments, estimate, help
from bitnet.training import config as config_module
from bitnet.training.arguments import ELSEWHERE, parse
from bitnet.training.config import PRESETS, TrainConfig
from bitnet.training.optimizer import OptimConfig
from tests.builders import save_run, tiny_model


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


def test_what_would_have_no_effect_is_refused(tmp_path, tokenizer, monkeypatch):
    base = str(save_run(tmp_path / "base", tiny_model(max_position_embeddings=256), tokenizer))
    for given, message in (
        (["--teacher-temperature", "2"], "--teacher-temperature 2.0 has no effect without --teacher"),
        (["--layer-rate", "0.5"], "--layer-rate 0.5 has no effect without --layer-steps"),
        (["--preset", "tiny", "--ramp-shape", "root"], "--ramp-shape root has no effect without --ramp"),
        (
            ["--preset", "tiny", "--ramp", "0.5", "--ramp-shape", "soft", "--model.quantizer", "int4"],
            "--ramp-shape soft is of ternary codes, and the quantizer is int4",
        ),
        (["--spike-factor", "3"], "has no effect without --on-spike"),
        (["--optim.second-from", "0.2"], "has no effect without --optim.lr-second"),
        (
            ["--data.chat", "c.jsonl", "--data.corpus", "x"],
            "--data.corpus x has no effect beside --data.chat; leave it",
        ),
        (["--data.chat", "c.jsonl", "--data.max-bytes", "9"], "--data.max-bytes 9 has no effect beside --data.chat"),
        (["--data.chat", "c.jsonl", "--data.document-mask"], "--data.document-mask True has no effect beside"),
        (["--init", base, "--data.tokenizer", "t.model"], "--data.tokenizer t.model has no effect beside --init"),
        (["--minutes", "2", "--steps", "5"], "--minutes 2 chooses the number of steps, and --steps 5 gives it"),
        (["--init", base, "--model.hidden-size", "128"], "--model.hidden-size 128 is not what .*base has .64."),
        (["--preset", "lora", "--init", base], "--preset lora has the rates of adapters; give --lora RANK"),
        (["--preset", "chat", "--init", base], "--preset chat trains on conversations; give --data.chat FILE"),
        (
            ["--preset", "lora", "--init", base, "--lora", "4", "--optim.weight-decay", "0.5"],
            "weight-decay 0.5 has no effect beside --lora",
        ),
        (["--preset", "chat", "--data.chat", "c.jsonl"], "--preset chat goes on with a model .*; give --init MODEL"),
        (
            ["--preset", "lora", "--init", base, "--lora", "4", "--optim.weight-decay-second", "0.5"],
            "weight-decay-second 0.5 has no effect",
        ),
        (
            ["--optim.decay", "constant", "--optim.lr-min-ratio", "0.5"],
            "0.5 has no effect without a decay of the rate",
        ),
        (["--preset", "tiny", "--sample-prompt", "The"], "--sample-prompt The has no effect without --sample-every"),
        (["--model.quantizer", "none", "--ramp", "0.5"], "--ramp 0.5 has no effect beside --model.quantizer none"),
        (
            ["--preset", "lora", "--init", base, "--lora", "4", "--model.quantizer", "int4"],
            "quantizer int4 is not what",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parse(given)
    assert parse(["--init", base, "--model.quantizer", "int4", "--model.vocab-size", "512"]).config.init == base
    # The windows are those of --init's model, whatever the preset's has.
    assert parse(["--preset", "tiny", "--init", base, "--context", "256"]).config.window == 256
    config = parse(["--preset", "tiny", "--init", base, "--context", "257", "--device", "cpu"]).config
    with pytest.raises(ValueError, match="context 257 is longer than the model's 256 positions; lower --context"):
        trainer.prepare(config)
    with pytest.raises(ValueError, match="context 257"):
        estimate.estimate_run(config, 1)
    (tmp_path / "base" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert parse(["--model.quantizer", "none", "--ramp", "0", "--float-start", "0"]).config.ramp == 0
    for given in (
        ["--init", "elsewhere"],
        ["--lora", "4"],
        ["--data.tokenizer", "/t.model"],
        ["--layer-steps", "9", "--layer-rate", "1"],
    ):
        with pytest.raises(ValueError, match=f"nothing of {' '.join(given[:2])} would be used; leave it out"):
            parse(["--resume", base, *given])
    monkeypatch.chdir(tmp_path)
    assert parse(["--resume", base, "--init", "base"]).config.init  # that of the run
    assert parse(["--resume", "auto", "--out", base, "--init", "elsewhere"]).resume
    # One command line is given again and again: its minutes are those of the start.
    assert parse(["--resume", "auto", "--out", base, "--minutes", "5"]).config.minutes is None
    assert parse(["--resume", base, "--minutes", "5"]).config.minutes == 5
    for changes, given, message in (
        ({"lora": 4, "lora_alpha": 8.0}, ["--lora-alpha", "4"], "nothing of --lora-alpha 4.0 would be used"),
        ({"minutes": 5.0}, ["--steps", "7"], "--minutes 5 chooses the number of steps, and --steps 7 gives it"),
    ):
        (tmp_path / "base" / "config.json").write_text(json.dumps(dataclasses.asdict(config) | changes))
        with pytest.raises(ValueError, match=message):
            parse(["--resume", base, *given])


def test_fine_tuning_keeps_the_quantizer(tmp_path, tokenizer):
    base = str(save_run(tmp_path / "base", tiny_model("ternary-g64"), tokenizer))
    chat = ["--preset", "chat", "--init", base, "--data.chat", "c.jsonl"]
    assert parse(chat).config.model.quantizer == "ternary-g64"
    assert parse([*chat, "--model.quantizer", "ternary"]).config.model.quantizer == "ternary"
    assert parse(["--preset", "tiny", "--init", base]).config.model.quantizer == "ternary"  # converts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_every": -1}, "sample_every is -1; give 0 for none"),
        ({"loss_chunk": -1}, "loss_chunk is -1; give 0 for none"),
        ({"eval_tokens": 0}, "eval_tokens is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be from 0"),
        ({"minutes": math.nan}, "minutes is nan; give a finite number"),
        ({"max_minutes": math.nan}, "max_minutes is nan; give a finite number"),
        ({"data": DataConfig(val_fraction=math.inf)}, r"data\.val_fraction is inf; give a finite number"),
        ({"optim": OptimConfig(weight_decay=math.nan)}, r"optim\.weight_decay is nan; give a finite number"),
        ({"optim": OptimConfig(lr=math.inf)}, r"optim\.lr is inf; give a finite number"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **changes)


@pytest.mark.parametrize("quantizer", ["ternary", "none"])
@pytest.mark.parametrize("strategy", ["none", "fsdp"])
@pytest.mark.parametrize("product", ["int8", "int8-all"])
def test_a_product_of_codes_wants_codes(monkeypatch, quantizer, strategy, product):
    monkeypatch.setattr(config_module, "cuts_off", lambda *_, **__: False)
    config = dataclasses.replace(PRESETS["tiny"], model=PRESETS["tiny"].model.replace(quantizer=quantizer))
    config = dataclasses.replace(config, product=product)
    ask = partial(config.multiplies_int8, torch.device("cpu"), torch.float32, strategy)
    if quantizer == "ternary" and strategy == "none":
        assert ask()
    else:
        with pytest.raises(ValueError, match=f"product {product} multiplies codes, and .*take auto"):
            ask()


@pytest.mark.parametrize(("start", "ramp"), [(0.8, 0.2), (0.9, 0.1), (0.34, 0.66), (0.2, 0.8)])
def test_shares_that_make_one_are_taken(start, ramp):
    dataclasses.replace(PRESETS["tiny"], float_start=start, ramp=ramp)
    with pytest.raises(ValueError, match=f"at most what float_start {start} leaves"):
        dataclasses.replace(PRESETS["tiny"], float_start=start, ramp=ramp + 0.01)
