"""--size: every size is built and estimated, and its numbers follow the rules."""

import math

import pytest

import train as trainer
from bitnet.training.arguments import parse
from bitnet.training.config import PRESETS
from bitnet.training.memory import meta_model
from bitnet.training.sizes import SHAPES, SIZES, batch_tokens, parameters, rate


@pytest.mark.parametrize(("name", "wanted"), [("5m", 5e6), ("30m", 30e6), ("125m", 125e6), ("350m", 350e6)])
def test_every_size_is_built_and_is_what_it_is_called(name, wanted):
    config = parse(["--size", name, "--out", "x"]).config
    model = meta_model(config.model)
    assert model.num_parameters() == parameters(config.model) == pytest.approx(wanted, rel=0.15)
    assert config.steps * config.tokens_per_step == pytest.approx(20 * model.num_parameters(), rel=0.01)
    assert (config.out, config.model.quantizer, config.float_start, config.ramp) == ("x", "ternary", 0.2, 0.6)
    config.check_processes(1)


@pytest.mark.parametrize("name", ["5m", "350m"])
def test_every_size_prints_its_estimate(name, capsys, monkeypatch):
    monkeypatch.setattr("bitnet.training.estimate.seconds", lambda *_, **__: 0.01)  # of the products that are timed
    assert trainer.main(["--size", name, "--estimate"]) == 0
    out = capsys.readouterr().out
    assert f"parameters  {parameters(SHAPES[name]):,}," in out
    assert f"tokens      {SIZES[name].steps:,} steps of {SIZES[name].tokens_per_step:,}" in out


def test_rates_and_batches_follow_the_rules():
    assert [rate(SHAPES[name]) for name in SHAPES] == [0.008, 0.0057, 0.0046, 0.004]
    for config in SIZES.values():
        assert config.optim.lr == rate(config.model)
        assert config.optim.lr_rest == pytest.approx(3 * config.optim.lr, rel=0.02)
    assert [SIZES[name].batch_size for name in ("5m", "30m")] == [PRESETS[n].batch_size for n in ("demo", "small")]
    for name in ("125m", "350m"):
        count = parameters(SHAPES[name])
        rule = 0.292 * (6 * count * 20 * count) ** 0.3271
        assert SIZES[name].tokens_per_step == batch_tokens(count, 20 * count)
        assert abs(math.log2(SIZES[name].tokens_per_step / rule)) <= 0.5


def test_a_field_may_be_given_beside_a_size_and_another_start_may_not(tmp_path, capsys):
    config = parse(["--size", "30m", "--minutes", "60", "--optim.lr", "1e-3", "--data.corpus", "a.txt"]).config
    assert (config.minutes, config.optim.lr, config.data.corpus) == (60, 1e-3, "a.txt")
    for other in (["--preset", "demo"], ["--like", "runs/a"], ["--resume", "runs/a"]):
        with pytest.raises(SystemExit):
            parse(["--size", "5m", *other])
        assert f"argument {other[0]}: not allowed with argument --size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--size", "7m"])
    assert "invalid choice: '7m'" in capsys.readouterr().err
    assert parse(["--resume", "auto", "--size", "30m", "--out", str(tmp_path)]).config.model == SHAPES["30m"]
