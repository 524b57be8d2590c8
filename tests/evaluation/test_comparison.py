"""The comparison: its measures by their definitions, twins, going on after an interruption, and a whole small run."""

import csv
import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import train as trainer
from bitnet import plots
from bitnet.__main__ import main
from bitnet.evaluation import comparison
from bitnet.evaluation.agreement import Reference
from bitnet.evaluation.comparison import Comparison, layer_outputs, measure, measure_in_child
from bitnet.evaluation.options import Options
from bitnet.evaluation.table import Row, Table
from bitnet.evaluation.twins import find_twins
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.storage.checksums import write_sums
from bitnet.storage.folders import resolve
from bitnet.storage.json_files import load_record
from bitnet.storage.safetensors import MODEL, load_tensors, save_tensors
from bitnet.training import config as recipes

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, quantizer="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary run and its float twin, trained for a few steps, and a run that is no twin."""
    root = tmp_path_factory.mktemp("compare")
    text = root / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i:02}.txt").write_text(f"Number {i} is followed by {i + 1}; twice {i} is {2 * i}.\n" * 12)
    config = recipes.TrainConfig(
        model=CONFIG.replace(quantizer="ternary"), data=recipes.DataConfig(str(text), cache=str(root / "data")),
        out=str(root / "runs" / "a"), steps=12, batch_size=4, eval_every=12, sample_every=0, compile="off", wandb="off",
        dtype="float32", device="cpu",
    )  # fmt: skip
    for name, changes in {
        "a": {},
        "b-float": {"model": config.model.replace(quantizer="none")},
        "c-longer": {"steps": 13, "model": config.model.replace(quantizer="binary")},
    }.items():
        trainer.train(dataclasses.replace(config, out=str(root / "runs" / name), **changes))
    return root / "runs"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables alone: the pictures and the page are those of the whole comparison below."""
    monkeypatch.setattr("bitnet.evaluation.pictures.draw_table", lambda rows, folder: None)
    monkeypatch.setattr("bitnet.evaluation.pictures.draw_distributions", lambda model, ids, folder: [])
    monkeypatch.setattr("bitnet.pages.report.write_report", lambda path, found: None)


def test_caches_of_fewer_bits_are_counted_and_timed(runs: Path) -> None:
    """Eight decoding steps read 24 to 31 positions of 2 layers, keys and values of one head of 128."""
    counted = {bits: measure(str(runs / "b-float"), None, bits) for bits in (32, 8, 4)}
    numbers = 2 * 2 * 128 * (24 + 31) / 2
    assert counted[32]["cache_mb"] == pytest.approx(numbers * 4 / 1e6)
    assert numbers < counted[8]["cache_mb"] * 1e6 < numbers * 1.05
    assert counted[4]["cache_mb"] < counted[32]["cache_mb"]
    assert all(found["far_decode"] > 0 for found in counted.values())


def test_several_runs_with_one_quantizer_have_rows_of_their_own(runs: Path, tmp_path: Path) -> None:
    ternary, binary, copy = runs / "a", runs / "c-longer", tmp_path / "d-again"
    shutil.copytree(binary, copy)

    def named(*models: Path) -> dict[str, Path]:
        return Comparison(Options(tuple(map(str, models)), out=tmp_path / "out", tokens=64, tasks=0)).runs

    assert named(ternary) == named(runs / "b-float", ternary) == {"b1.58": ternary}
    assert named(ternary, binary, copy) == {"b1.58": ternary, "1-bit BitNet": binary, "1-bit BitNet, d-again": copy}
    for twice in (ternary, copy):
        with pytest.raises(ValueError, match="give each run once"):
            named(ternary, binary, copy, twice)


def test_twins_are_the_runs_that_differ_in_the_quantizer_only(runs: Path) -> None:
    assert find_twins(runs / "a") == {"ternary": runs / "a", "none": runs.resolve() / "b-float"}
    assert find_twins(runs / "c-longer") == {"binary": runs / "c-longer"}


def test_a_run_that_a_teacher_taught_is_no_twin(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    shutil.copytree(runs / "b-float", tmp_path / "b-taught")
    path = tmp_path / "b-taught" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": "/some/model"}))
    assert find_twins(tmp_path / "a") == {"ternary": tmp_path / "a"}
    assert find_twins(tmp_path / "b-taught") == {"none": tmp_path / "b-taught"}


def test_rows_are_of_the_weights_that_the_runs_have(runs: Path, tmp_path: Path, capsys, undrawn: None) -> None:
    for name in ("a", "b-float"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
    command = ["compare", str(tmp_path / "runs" / "a"), "--methods", "none", "--tokens", "64", "--tasks", "0",
               "--no-speed", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    before = read_rows(tmp_path / "out")
    capsys.readouterr()
    assert main(command) == 0
    assert read_rows(tmp_path / "out") == before
    assert "is measured again" not in capsys.readouterr().err
    change_weights(tmp_path / "runs" / "a")
    assert main(command) == 0
    assert "has other weights than the row b1.58" in capsys.readouterr().err
    after = read_rows(tmp_path / "out")
    assert after["float32"] == before["float32"]
    assert after["b1.58"]["perplexity"] != before["b1.58"]["perplexity"]
    change_weights(tmp_path / "runs" / "b-float")
    assert main(command) == 2
    assert "with other settings or other float weights" in capsys.readouterr().err


def test_the_tokens_of_a_table_are_those_that_were_read(runs: Path, tmp_path: Path, capsys) -> None:
    def compared(tokens: int, calibration: int) -> Comparison:
        sizes = {"tokens": tokens, "calibration_tokens": calibration, "tasks": 0}
        return Comparison(Options((str(runs / "a"),), out=tmp_path / str(tokens), **sizes))

    few = compared(64, 64)
    assert few.so_far().tokens == 64
    assert capsys.readouterr().err == ""
    all_there_are = compared(10**9, 10**9)
    counted = sum(int((labels != -100).sum()) for _, labels in all_there_are.windows)
    assert all_there_are.so_far().tokens == counted < 10**6
    told = capsys.readouterr().err
    assert f"the held-out text has {counted:,} tokens, and --tokens is 1,000,000,000" in told
    assert f"calibrated on the {all_there_are.calibration.numel():,} tokens that there are" in told


def test_a_task_that_can_be_asked_now_is_asked_of_every_row(runs: Path, tmp_path: Path, monkeypatch, undrawn) -> None:
    monkeypatch.setattr("bitnet.evaluation.definitions.DEBIAN", tmp_path / "nowhere")
    nouns = enumerate(("dog", "cat", "oak", "hill"))
    lines = [f"{i:08} 05 n 01 {noun} 0 000 | a thing of kind {noun[0]} {i}" for i, noun in nouns]
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "data.noun").write_text("  1 This software.\n" + "\n".join(lines))
    command = ["compare", str(runs / "a"), "--methods", "none", "--tokens", "64", "--tasks", "4", "--no-speed",
               "--calibration-tokens", "64", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    before = read_rows(tmp_path / "out")
    assert [row["definitions"] for row in before.values()] == [None, None]
    assert main([*command, "--wordnet", str(tmp_path / "dict")]) == 0
    after = read_rows(tmp_path / "out")
    assert all(0 <= row["definitions"] <= 1 for row in after.values())
    assert [row["perplexity"] for row in after.values()] == [row["perplexity"] for row in before.values()]


def change_weights(run: Path) -> None:
    """As if it had been trained on."""
    folder = resolve(run)
    weights = {name: value.clone() for name, value in load_tensors(folder / MODEL).items()}  # the file is mapped
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_tensors(folder / MODEL, weights)
    write_sums(folder)


def read_rows(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((out / "table.json").read_text())["rows"]}


def test_scores_are_what_their_definitions_say() -> None:
    torch.manual_seed(1)
    model, other = BitNetForCausalLM(CONFIG).eval(), BitNetForCausalLM(CONFIG).eval()
    for network in (model, other):
        network.model.embed_tokens.weight.data.mul_(8)
    labels = torch.randint(300, (3, 1, 16))
    labels[2, 0, 9:] = -100
    windows = [(torch.randint(300, (1, 16)), labels[i]) for i in range(3)]
    score = Reference(model, windows, 300).score(other)

    p, q = ([network(ids)[0].double().log_softmax(-1) for ids, _ in windows] for network in (model, other))
    keep = [window[1][0] != -100 for window in windows]
    losses = [F.nll_loss(q[i], windows[i][1][0], ignore_index=-100, reduction="none")[keep[i]] for i in range(3)]
    flat_p, flat_q = (torch.cat([x[i][keep[i]] for i in range(3)]) for x in (p, q))
    assert score.loss == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-5)
    assert score.kl == pytest.approx(
        float(F.kl_div(flat_q, flat_p, log_target=True, reduction="batchmean").detach()), rel=1e-4
    )
    assert score.top1 == pytest.approx(float((flat_p.argmax(1) == flat_q.argmax(1)).double().mean()))
    floats = [F.nll_loss(p[i], windows[i][1][0], ignore_index=-100, reduction="none")[keep[i]] for i in range(3)]
    gaps = [a - b for a, b in zip(losses, floats, strict=True)]
    assert score.gap == pytest.approx(float(torch.cat(gaps).mean().detach()), rel=1e-4)
    for parts, mean, error in ((losses, score.loss, score.error), (gaps, score.gap, score.gap_error)):
        residuals = torch.stack([(part - mean).sum() for part in parts])
        assert error == pytest.approx(math.sqrt(float(residuals.square().sum().detach()) * 3 / 2) / 41, rel=1e-4)
    same = Reference(model, windows, 300).score(model)
    assert (same.gap, same.kl, same.top1) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9), 1.0)
    other.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"its predictions are no finite numbers \(loss nan"):
        Reference(model, windows, 300).score(other)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system gives files no room beforehand")
def test_a_disk_without_room_for_the_predictions_is_told_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [(torch.arange(16)[None], torch.arange(1, 17)[None])]
    calls = []

    def model(ids: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.zeros(*ids.shape, 300)

    reference = Reference(model, windows, 300)
    assert os.fstat(reference._file.fileno()).st_blocks * 512 >= 16 * 300 * 4
    assert len(calls) == 1

    def fails(number: int):
        def fallocate(*arguments: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fallocate)

    fails(errno.ENOSPC)
    with pytest.raises(OSError, match=r"predictions take 0\.0 GB in .*, which has no room; give fewer --tokens"):
        Reference(model, windows, 300)
    assert len(calls) == 1
    fails(errno.EOPNOTSUPP)
    assert Reference(model, windows, 300).score(model).kl == 0


def test_layer_errors_compare_the_residual_stream_behind_each_layer() -> None:
    model = BitNetForCausalLM(CONFIG).eval()
    outputs = layer_outputs(model, torch.arange(8)[None])
    assert [list(o.shape) for o in outputs] == [[8, 256]] * 2
    with torch.no_grad():
        torch.testing.assert_close(model.model.norm(outputs[-1]), model.model(torch.arange(8)[None])[0])


METHODS = ("bf16", "rtn-int8", "w8a8-dynamic", "gptq-4", "gguf-q4_0")
CACHES = ("kv-int8", "kv-int4")


def test_a_whole_comparison_and_going_on_with_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [
        str(runs / "a"), "--methods", *METHODS, *CACHES, "--tokens", "512", "--calibration-tokens", "512",
        "--out", str(out), "--no-speed",
    ]  # fmt: skip
    original, calls = comparison.quantize_model, []

    def interrupted(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(comparison, "quantize_model", interrupted)
    assert main(["compare", *command]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main(["compare", *command]) == 0
    assert calls == [*METHODS[:3], *METHODS[2:]]  # the two finished ones were not done again

    rows = {row["name"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert list(rows) == ["float32", "b1.58", *METHODS, *CACHES]
    assert 0 < rows["kv-int8"]["kl"] < rows["kv-int4"]["kl"]
    assert 4 < rows["kv-int4"]["cache_bits"] < rows["kv-int8"]["cache_bits"] < 9
    assert rows["kv-int8"]["family"] == "cache"
    text = capsys.readouterr().out
    assert all(name in text for name in rows)
    assert rows["float32"]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows["float32"]["top1"] == 1
    assert 0 < rows["rtn-int8"]["kl"] < rows["gguf-q4_0"]["kl"]
    assert rows["b1.58"]["kernel"] == rows["w8a8-dynamic"]["kernel"] == "native int8"
    assert rows["gptq-4"]["kernel"] == "native int16"
    assert rows["b1.58"]["effective_bits"] == pytest.approx(2, abs=0.01)
    assert rows["gguf-q4_0"]["effective_bits"] == pytest.approx(4.5)
    assert rows["float32"]["whole_bits"] == 32
    assert rows["gguf-q4_0"]["effective_bits"] < rows["gguf-q4_0"]["whole_bits"] < 16  # embedding and head in float16
    assert all(0 <= row["grammar"] <= 1 and row["grammar_error"] < 0.1 for row in rows.values())
    assert rows["float32"]["grammar"] == pytest.approx(rows["bf16"]["grammar"], abs=0.05)
    assert rows["b1.58"]["file_mb"] < rows["bf16"]["file_mb"] < rows["float32"]["file_mb"]
    assert len(rows["gptq-4"]["layer_errors"]) == 2
    assert rows["gptq-4"]["layer_errors"][-1] < 0.5
    with open(out / "table.csv", newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == list(rows)
    assert (out / "table.md").read_text().count("\n") == len(rows) + 2
    for picture in ("size", "layers", "weights", "activations"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert not list((out / "models").iterdir())

    assert main(["compare", *command[:-1], "--tokens", "256"]) == 2
    assert "comparison with other settings" in capsys.readouterr().err


def test_speed_is_measured_in_a_process_that_loads_the_file(runs: Path) -> None:
    measured = measure_in_child(runs / "a", 1)
    assert measured["prefill"] > 0
    assert measured["decode"] > 0
    assert "far_decode" not in measured
    with pytest.raises(ValueError, match="could not be measured"):
        measure_in_child(runs / "nothing", 1)


def test_speeds_are_measured_later_of_the_models_that_were_kept(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    def run(*arguments: str) -> list[Row]:
        sizes = ["--tokens", "64", "--calibration-tokens", "64", "--tasks", "0"]
        command = ["compare", str(runs / "a"), "--methods", "bf16", "kv-int8", "--out", str(tmp_path / "out"), *sizes]
        assert main([*command, *arguments]) == 0
        return list(load_record(tmp_path / "out" / "table.json", Table).rows)

    before = run("--no-speed", "--keep-models")
    assert [row.decode for row in before] == [None] * 4
    shutil.rmtree(tmp_path / "out" / "models" / "bf16")
    opened, caches, scored = [], [], comparison.Reference.score
    monkeypatch.setattr(
        comparison,
        "measure_in_child",
        lambda path, threads, cache: opened.append(path.name) or caches.append(cache) or {"decode": 1.0},
    )
    counted = []
    monkeypatch.setattr(comparison.Reference, "score", lambda *given: counted.append(1) or scored(*given))
    after = run()
    assert opened == ["float32", "b1.58", "kv-int8", "bf16"]
    assert caches == [32, None, 8, None]
    assert len(counted) == 1  # bf16 was not kept
    assert [row.decode for row in after] == [1.0] * 4
    assert [(row.name, row.perplexity) for row in after] == [(row.name, row.perplexity) for row in before]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model was given"),
        (["{runs}/c-longer"], "is no float model"),
        (["{runs}/a", "--methods", "gptq-5"], "method 'gptq-5' is unknown"),
        (["{runs}/nothing"], "does not exist"),
        (["{runs}/a", "--group-size", "0"], "--group-size is 0"),
        (["{runs}/a", "--threads", "-1"], "--threads is -1"),
        (["{runs}/a", "--tasks", "-1"], "--tasks is -1"),
        (["{runs}/a", "--context", "33"], "has 32 positions; give at most that"),
    ],
)
def test_bad_input(runs: Path, tmp_path: Path, arguments: list[str], message: str, capsys) -> None:
    arguments = [a.replace("{runs}", str(runs)) for a in arguments]
    assert main(["compare", *arguments, "--out", str(tmp_path / "out"), "--no-speed", "--tokens", "64"]) == 2
    assert message in capsys.readouterr().err


def test_labels_of_a_scatter_do_not_cover_each_other(tmp_path: Path) -> None:
    points = [plots.Point(f"method {i}", "gguf", 1 + i / 100, 10 + i / 50, 0.1) for i in range(12)]
    points.append(plots.Point("broken", "native", 1, math.inf))
    plots.draw_scatter(points, tmp_path / "p.png", xlabel="MB", title="t")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_comes_before_the_pictures_and_whatever_they_do(monkeypatch, capsys):
    drawn: list[str] = []

    class Compared:
        rows: ClassVar[dict] = {"m": Row("m", "float", 32, 32, 1.0, 2.0, 0.1, 0, 0, 0, 1, "float")}

        def __init__(self, options, train):
            pass

        def run(self):
            pass

        draw = Comparison.draw
        out, model, windows = Path("nowhere"), None, [(None,)]

    def fails(*arguments, **options):
        if not drawn:
            drawn.append(capsys.readouterr().out)
        raise ValueError("rows of 576 weights are no multiple of 256")

    monkeypatch.setattr("bitnet.evaluation.comparison.Comparison", Compared)
    monkeypatch.setattr("bitnet.evaluation.pictures.draw_table", fails)
    monkeypatch.setattr("bitnet.evaluation.pictures.draw_distributions", fails)
    assert main(["compare", "model"]) == 0
    assert drawn[0].startswith("model   bits  stored")
    err = capsys.readouterr().err
    assert err.count("warning: the pictures of") == 2
    assert "576 weights" in err
