"""train.py as a user runs it: resuming, stopping, diverging, and every bad input."""

import dataclasses
import json
import math
import os
import shutil
import signal
import time

import pytest
import torch

import train as trainer
from bitnet.evaluation.loss import Evaluation, evaluate
from bitnet.kernels import FadingProduct, float_linear
from bitnet.model import PRESETS, bit_linears
from bitnet.plots import draw_loss
from bitnet.storage.folders import MODEL, STATE, resolve
from bitnet.storage.safetensors import CheckpointError, load_json, load_tensors
from bitnet.training import config as recipes
from bitnet.training.arguments import Arguments
from bitnet.training.compiling import compile_failure
from bitnet.training.reporter import Reporter, read_metrics
from bitnet.training.step import Trainer
from tests import oracles
from tests.builders import SMALL, configuration, tensors
from tests.faults import fill_disk_at, stop_after, stop_in_last_validation
from tests.forked import Forked


@pytest.mark.parametrize(("optimizer", "compiled"), [("adamw", "off"), ("muon", "off"), ("muon", "on")])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, corpus, monkeypatch, optimizer, compiled):
    if compiled == "on" and (reason := compile_failure(torch.device("cpu"))):
        pytest.skip(reason)
    optim = recipes.OptimConfig(optimizer=optimizer, lr=5e-3, lr_second=2e-3, warmup_steps=2)
    start = 0.0 if compiled == "on" and not os.environ.get("BITNET_LONG") else 0.25  # which is a graph of its own
    config = configuration(tmp_path, corpus, optim=optim, micro_batches=2, float_start=start, compile=compiled)
    if compiled == "on":
        config = dataclasses.replace(config, model=config.model.replace(num_hidden_layers=1))
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "straight")))

    stop_after(monkeypatch, 3)
    stopped = trainer.train(dataclasses.replace(config, out=str(tmp_path / "broken")))
    monkeypatch.undo()
    assert stopped.progress.step == 3
    assert stopped.stop_signal == signal.SIGINT
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "broken")), resume=True)

    straight, broken = tensors(tmp_path / "straight"), tensors(tmp_path / "broken")
    assert straight.keys() == broken.keys()
    for name, value in straight.items():
        assert torch.equal(value, broken[name]), name
    metrics = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "broken")]
    for left, right in zip(*metrics, strict=True):
        clock = {"seconds", "tokens_per_second"}
        assert {k: v for k, v in left.items() if k not in clock} == {k: v for k, v in right.items() if k not in clock}


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path, corpus):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer.train(configuration(tmp_path, corpus, steps=3, seed=seed, out=str(tmp_path / name)))
    a, b, c = (tensors(tmp_path / name)["model.norm.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_micro_batches_accumulate_the_same_gradient(tmp_path, corpus):
    gradients = []
    for parts in (1, 2, 4):
        run = trainer.prepare(configuration(tmp_path, corpus, micro_batches=parts, out=str(tmp_path / str(parts))))
        loss = float(run.forward_backward(0))
        gradients.append((loss, torch.cat([p.grad.flatten() for p in run.model.parameters()])))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-3, atol=1e-6)


def test_it_learns_and_writes_everything(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("bitnet.training.reporter.draw_loss", draw_loss)
    config = configuration(tmp_path, corpus, steps=60, eval_every=30, optim=recipes.OptimConfig(lr=1e-2))
    run = trainer.train(config)
    rows = read_metrics(run.folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert [row["step"] for row in rows if "val_loss" in row] == [30, 60]
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run.folder / "config.json").read_text())["steps"] == 60
    (data,) = run.feed.mixture.corpora.values()
    val = data.split("val")
    result = evaluate(run.model, val, context=32, bytes_per_token=data.bytes_per_token("val"))
    assert result.tokens == len(val) - 1
    assert result.loss == pytest.approx(rows[-1]["whole_val_loss"], rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    # Bits per byte by its definition: all bits over all bytes of the held-out text.
    data_bytes = data.meta["splits"]["val"]["bytes"]
    assert result.bits_per_byte == pytest.approx(result.loss * len(val) / math.log(2) / data_bytes, rel=1e-6)


def test_a_float_start_trains_without_quantization_first(tmp_path, corpus):
    run = trainer.prepare(configuration(tmp_path, corpus, float_start=0.5))
    run.step()
    assert all(layer.product is float_linear for _, layer in bit_linears(run.model))
    run.progress.step = 4
    run.step()
    assert not any(layer.product is float_linear for _, layer in bit_linears(run.model))


@pytest.mark.parametrize("shape", ["linear", "soft"])
def test_a_ramp_fades_the_quantizers_in(tmp_path, corpus, shape):
    run = trainer.prepare(configuration(tmp_path, corpus, steps=8, float_start=0.25, ramp=0.5, ramp_shape=shape))
    strengths, soft = [], set()
    for run.progress.step in range(8):
        run.set_products()
        _, layer = next(bit_linears(run.model))
        strengths.append(
            (
                layer.product is not float_linear,
                float(layer.product.strength) if isinstance(layer.product, FadingProduct) else None,
            )
        )
        if isinstance(layer.product, FadingProduct):
            soft.add(layer.product.soft)
    assert soft == {shape == "soft"}
    fading = [(True, pytest.approx(s)) for s in (0.2, 0.4, 0.6, 0.8)]
    assert strengths == [(False, None), (False, None), *fading, (True, None), (True, None)]
    with pytest.raises(ValueError, match=r"ramp is 0\.6"):
        configuration(tmp_path, corpus, float_start=0.5, ramp=0.6)


def test_init_starts_from_the_weights_shape_and_tokenizer_of_another_run(tmp_path, corpus):
    configuration_of = configuration(tmp_path, corpus, steps=4, eval_every=4)
    twin = dataclasses.replace(
        configuration_of, model=configuration_of.model.replace(quantizer="none"), out=str(tmp_path / "float")
    )
    source = trainer.train(twin)
    wanted = dataclasses.replace(
        configuration_of,
        model=configuration_of.model.replace(hidden_size=32, num_attention_heads=2, num_key_value_heads=2),
        init=twin.out,
        out=str(tmp_path / "converted"),
    )
    run = trainer.prepare(wanted)
    assert run.config.model == source.config.model.replace(quantizer="ternary")
    assert run.feed.tokenizer.fingerprint == source.feed.tokenizer.fingerprint
    for name, value in source.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


def test_best_is_ranked_on_one_part_of_the_split_and_never_in_the_warm_start(tmp_path, corpus, monkeypatch):
    losses = {(2, False): 1.0, (4, False): 3.0, (6, False): 2.0, (8, False): 2.5, (8, True): 0.5}
    losses |= {(10, False): 4.0, (12, False): 4.5, (12, True): 0.5}

    def evaluations(self, *limits):
        for limit in limits:
            yield Evaluation(losses[self.progress.step, limit is None], 0.0, 1.0, tokens=limit or 10_000)

    monkeypatch.setattr(Trainer, "evaluations", evaluations)
    run = trainer.train(configuration(tmp_path, corpus, eval_every=2, float_start=0.5))
    # Step 2 belongs to the warm start, and the whole split's 0.5 at the end is no match for the parts before.
    assert resolve(run.folder, "best").name == "step-00000006"
    assert resolve(run.folder, "last").name == "step-00000008"
    assert run.progress.best_loss == 2.0
    # Fewer tokens are another text, on which 2.0 may be out of reach.
    run = trainer.train(dataclasses.replace(run.config, steps=12, eval_tokens=64), resume=True)
    assert resolve(run.folder, "best").name == "step-00000010"
    assert (run.progress.best_loss, run.progress.best_tokens) == (4.0, 64)


def test_until_one_is_ranked_the_newest_is_best(tmp_path, corpus, monkeypatch):
    """Nothing in the ramp is, and the first checkpoint, of the warm start, is worse than all behind it."""
    evaluations, seen = Trainer.evaluations, {}

    def looking(self, *limits):
        seen[self.progress.step] = resolve(self.folder, "best").name if seen else ""
        return evaluations(self, *limits)

    monkeypatch.setattr(Trainer, "evaluations", looking)
    run = trainer.train(configuration(tmp_path, corpus, eval_every=2, float_start=0.25, ramp=0.75))
    assert seen == {2: "", 4: "step-00000002", 6: "step-00000004", 8: "step-00000006"}
    assert resolve(run.folder, "best").name == "step-00000008"


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path, corpus):
    run = trainer.prepare(configuration(tmp_path, corpus))
    for loss, tokens, best in ((3.0, 64, True), (math.nan, 64, False), (math.nan, 128, False), (4.0, 128, True)):
        assert run.is_best(Evaluation(loss, 0.0, 1.0, tokens=tokens)) == best, (loss, tokens)


def test_an_end_in_the_last_validation_loses_nothing_else(tmp_path, corpus, monkeypatch):
    original = Trainer.evaluations

    def killed(self, *limits):
        for limit in limits:
            if limit is None:
                raise SystemExit("killed")
            yield from original(self, limit)

    config = configuration(tmp_path, corpus, eval_every=4, eval_tokens=1)
    monkeypatch.setattr(Trainer, "evaluations", killed)
    with pytest.raises(SystemExit, match="killed"):
        trainer.train(config)
    monkeypatch.undo()
    assert resolve(tmp_path / "run", "last").name == resolve(tmp_path / "run", "best").name == "step-00000008"
    assert trainer.prepare(config, resume=True).progress.step == 8
    straight = trainer.train(dataclasses.replace(config, out=str(tmp_path / "straight")))
    assert "whole_val_loss" in read_metrics(straight.folder / "metrics.jsonl")[-1]
    for name, value in tensors(straight.folder).items():
        assert torch.equal(value, tensors(tmp_path / "run")[name]), name


def test_a_nan_stops_before_the_weights_and_names_the_remedy(tmp_path, corpus, monkeypatch, capsys):
    config = configuration(tmp_path, corpus)
    original = Trainer.forward_backward

    def poisoned(self, step):
        loss = original(self, step)
        if step == 5:
            self.model.model.norm.weight.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
    monkeypatch.setattr(trainer, "parse", lambda arguments, prog: Arguments(config))
    assert trainer.main([]) == 1
    message = capsys.readouterr().err
    assert "step 5" in message
    assert "--optim.lr" in message
    saved = resolve(tmp_path / "run")
    assert saved.name == "step-00000004"
    assert all(bool(v.isfinite().all()) for v in load_tensors(saved / MODEL).values())


def test_a_full_disk_in_mid_run_warns_and_goes_on(tmp_path, corpus, monkeypatch, capsys):
    fill_disk_at(monkeypatch, 4)
    run = trainer.train(configuration(tmp_path, corpus))
    assert "No space left" in capsys.readouterr().err
    assert resolve(run.folder).name == "step-00000008"


def test_a_full_disk_at_the_end_is_an_error_and_the_earlier_checkpoint_stays(tmp_path, corpus, monkeypatch):
    fill_disk_at(monkeypatch, 8)
    with pytest.raises(OSError, match="No space left"):
        trainer.train(configuration(tmp_path, corpus))
    assert resolve(tmp_path / "run").name == "step-00000004"


def test_metrics_on_a_full_disk_warn_once(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    tracker = Reporter(recipes.TrainConfig(out=str(tmp_path), wandb="off"))
    tracker.path = tmp_path / "nowhere" / "metrics.jsonl"  # cannot be opened
    monkeypatch.setattr("bitnet.training.reporter.draw_loss", full)
    for step in range(3):
        tracker.log(step, loss=1.0)
        tracker.draw()
    assert capsys.readouterr().err.count("metrics are not being written") == 1


def test_metrics_are_whole_again_when_there_is_room(tmp_path, monkeypatch):
    """What a full disk left of a line would be the end of the file to whoever reads it, as a resumed run does."""
    tracker, missing = Reporter(recipes.TrainConfig(out=str(tmp_path), wandb="off")), tmp_path / "nowhere" / "x"
    tracker.log(1, loss=1.0, grad_norm=math.nan)
    path, tracker.path = tracker.path, missing
    tracker.log(2, loss=2.0)
    path.write_text(path.read_text() + '{"step": 2, "lo')
    tracker.path = path
    tracker.log(3, loss=3.0)
    tracker.log(4, loss=4.0)
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 2.0, 3.0, 4.0]
    assert "NaN" not in path.read_text()


def test_a_run_whose_first_save_failed_can_start_again(tmp_path, corpus):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert trainer.train(configuration(tmp_path, corpus, steps=2)).progress.step == 2


def test_resuming_a_finished_run_changes_nothing(tmp_path, corpus, capsys):
    run = trainer.train(configuration(tmp_path, corpus, steps=4))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert trainer.train(run.config, resume=True).progress.step == 4
    assert "is finished: 4 of 4 steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_resume_refuses_what_would_mix_two_runs(tmp_path, corpus):
    run = trainer.train(configuration(tmp_path, corpus, steps=4))
    with pytest.raises(ValueError, match="is a checkpoint; --resume takes its run folder"):
        trainer.parse(["--resume", str(resolve(run.folder))])
    for override in (["--out", "elsewhere"], ["--model.quantizer", "none"], ["--model.hidden-size", "128"]):
        with pytest.raises(ValueError, match="use --like"):
            trainer.parse(["--resume", str(run.folder), *override])
    with pytest.raises(ValueError, match="at step 4 already"):
        trainer.train(dataclasses.replace(run.config, steps=3), resume=True)
    muon = dataclasses.replace(run.config, steps=6, optim=dataclasses.replace(run.config.optim, optimizer="muon"))
    with pytest.raises(ValueError, match="was not left by"):
        trainer.train(muon, resume=True)


def test_minutes_on_resume_are_added(tmp_path, corpus):
    run = trainer.train(configuration(tmp_path, corpus, steps=4))
    before = tensors(run.folder)
    more = trainer.prepare(dataclasses.replace(run.config, steps=100), resume=True)
    planned = more.plan(0.1)
    assert planned.steps >= 4 + 10
    assert planned.minutes is None
    # Timing steps leave no trace in weights and moments.
    assert more.progress.step == 4
    for name, value in more.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in more.optimizer.state().items():
        assert torch.equal(value, before[f"optimizer.{name}"]), name


def test_resume_refuses_a_changed_corpus(tmp_path, corpus):
    text = tmp_path / "text.txt"
    lines = "".join(p.read_text() for p in sorted(corpus.iterdir()))
    text.write_text(lines)
    config = configuration(tmp_path, text, steps=2)
    trainer.train(config)
    text.write_text(lines.replace("cat", "cow"))
    with pytest.raises(CheckpointError, match="corpus has changed, or what is read of it"):
        trainer.train(dataclasses.replace(config, steps=4), resume=True)


def test_a_run_goes_on_from_another_folder(tmp_path, corpus, monkeypatch):
    """Paths were relative to where it began."""
    (tmp_path / "there").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(corpus, tmp_path / "there" / "texts")
    monkeypatch.chdir(tmp_path / "there")
    data = recipes.DataConfig(corpus=("texts=0.5", "stdlib=0.5"), cache=str(tmp_path / "data"), max_bytes=50_000)
    assert data.absolute().corpus == (f"{tmp_path / 'there' / 'texts'}=0.5", "stdlib=0.5")
    assert data.absolute().absolute() == data.absolute()
    (tmp_path / "there" / "base").mkdir()
    for name in ("init", "teacher"):
        for path, kept in (("base", str(tmp_path / "there" / "base")), ("of-the-hub/model", "of-the-hub/model")):
            assert getattr(configuration(tmp_path, corpus, **{name: path}).absolute(), name) == kept
    data = recipes.DataConfig(corpus="texts", cache=str(tmp_path / "data"))
    trainer.train(configuration(tmp_path, corpus, data=data, steps=2))
    monkeypatch.chdir(tmp_path / "elsewhere")
    config, resume, *_ = trainer.parse(["--resume", str(tmp_path / "run"), "--steps", "3"])
    assert trainer.train(config, resume).progress.step == 3
    with pytest.raises(ValueError, match=f"'texts' in '{tmp_path / 'elsewhere'}', the current folder"):
        trainer.train(configuration(tmp_path, corpus, data=data, out=str(tmp_path / "new")))
    with pytest.raises(ValueError, match=f"'texts' in '{tmp_path / 'elsewhere'}', the current folder"):
        trainer.train(configuration(tmp_path, corpus, data=recipes.DataConfig(chat="texts"), out=str(tmp_path / "new")))


def test_minutes_become_steps(tmp_path, corpus):
    run = trainer.train(configuration(tmp_path, corpus, minutes=0.05, eval_every=10_000))
    assert run.config.minutes is None
    assert run.progress.step == run.config.steps >= 10
    assert json.loads((run.folder / "config.json").read_text())["steps"] == run.config.steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.corpus", "missing.txt"], "missing.txt"),
        (["--data.corpus", "empty.txt"], "empty"),
        (["--data.corpus", "latin1.txt"], "UTF-8"),
        (["--data.corpus", "short.txt"], "vocab"),
        (
            ["--data.corpus", "few.txt", "--model.vocab-size", "280", "--model.max-position-embeddings", "512"],
            "context",
        ),
        (["--data.corpus", "text.txt", "--model.vocab-size", "30000"], "30000"),
        (["--data.corpus", "text.txt", "--context", "1000"], "1000"),
        (["--model.num-attention-heads", "7"], "7"),
        (["--model.num-key-value-heads", "3"], "3"),
        (["--batch-size", "8", "--micro-batches", "3"], "3"),
        (["--resume", "nowhere"], "nowhere"),
        (["--device", "cuda:77", "--data.corpus", "text.txt"], "cuda:77"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_an_error_without_a_traceback(tmp_path, corpus, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    text = "".join(p.read_text() for p in sorted(corpus.iterdir()))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "few.txt").write_text("the cat sees the dog. " * 4)
    (tmp_path / "latin1.txt").write_bytes(text.encode() + b"caf\xe9 au lait\n")
    preset = SMALL[2:] if "--resume" in arguments else SMALL
    try:
        code = trainer.main([*preset, *arguments])
    except SystemExit as end:  # what tyro finds wrong
        code = end.code
    out, err = capfd.readouterr()
    assert code
    assert "Traceback" not in err
    assert message in err + out
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_overwritten(tmp_path, corpus):
    config = configuration(tmp_path, corpus, steps=2)
    trainer.train(config)
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume"):
        trainer.train(config)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json that no run has written .*; choose another --out"):
        trainer.train(dataclasses.replace(config, out=str(tmp_path / "model")))
    assert (tmp_path / "model" / "config.json").read_text() == '{"model_type": "llama"}'


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_sigterm_saves_and_the_command_line_resumes(tmp_path, corpus, monkeypatch):
    command = ["train", *SMALL, "--data.corpus", str(corpus), "--out", "run", "--steps", "100000"]
    process = Forked(tmp_path, command=[*command, "--eval-every", "100000"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and not process.ended():
        time.sleep(0.01)
    os.kill(process.children[0], signal.SIGTERM)
    done = process.wait()
    output = done.stdout
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    step = load_json(resolve(tmp_path / "run") / STATE)["step"]
    assert f"stopped at step {step}" in output

    monkeypatch.chdir(tmp_path)
    assert trainer.main(["--resume", "run", "--steps", str(step + 2)]) == 0
    assert resolve(tmp_path / "run").name == f"step-{step + 2:08d}"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_last_validation_behind_what_is_written(tmp_path, corpus, monkeypatch, capsys, signum):
    config = configuration(tmp_path, corpus, steps=4, eval_every=2, eval_tokens=1)
    monkeypatch.setattr(trainer, "parse", lambda arguments, prog: Arguments(config))
    behind = stop_in_last_validation(monkeypatch, signum)
    assert trainer.main([]) == 128 + signum
    assert behind == []
    assert "stopped in the validation on everything" in capsys.readouterr().out
    assert resolve(tmp_path / "run").name == "step-00000004"
    (last,) = (
        row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["step"] == 4 and "val_loss" in row
    )
    assert "whole_val_loss" not in last
    monkeypatch.undo()
    assert trainer.train(config, resume=True).progress.step == 4
    assert "is finished: 4 of 4 steps" in capsys.readouterr().out


def test_like_takes_the_configuration_but_not_the_weights(tmp_path, corpus):
    trainer.train(configuration(tmp_path, corpus, steps=2))
    config, resume, *_ = trainer.parse(["--like", str(tmp_path / "run"), "--model.quantizer", "none", "--out", "twin"])
    assert not resume
    assert config.model == PRESETS["tiny"].replace(
        vocab_size=300, max_position_embeddings=32, num_hidden_layers=1, quantizer="none"
    )
    assert (config.steps, config.out) == (2, "twin")


def test_configuration_survives_its_json(tmp_path, corpus):
    for config in (*recipes.PRESETS.values(), configuration(tmp_path, corpus)):
        assert recipes.TrainConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_wandb_offline_writes_a_run(tmp_path, corpus, monkeypatch):
    oracles.require("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trainer.train(configuration(tmp_path, corpus, steps=2, wandb="offline"))
    assert list((run.folder / "wandb").glob("offline-run-*"))
