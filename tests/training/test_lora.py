"""--lora: adapters on a frozen, packed model, from the command line to the engine."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import generate
import train as trainer
from bitnet.__main__ import main
from bitnet.inference import text_model
from bitnet.inference.adapters import put_on
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.text_model import TextModel, load
from bitnet.model.lora import fingerprint, make_trainable
from bitnet.ptq.methods import quantize_model
from bitnet.storage.adapters import ADAPTER_BASE, load_adapter
from bitnet.storage.folders import resolve, save_quantized
from bitnet.storage.safetensors import MODEL, CheckpointError, load_tensors, save_tensors
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.training import memory
from bitnet.training.optimizer import OptimConfig
from bitnet.training.saved import storages_saved
from tests.builders import configuration, save_run, tensors, tiny_model
from tests.faults import stop_after

TEXT = "The quick brown fox jumps over the lazy dog. " * 40 + "one two three\n"
SCORED = {"max_new_tokens": 4, "temperature": 0.0, "logprobs": 0}
OPTIM = OptimConfig(lr=2e-2, warmup_steps=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 4], 300, threads=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for part in range(20):
        (folder / f"{part:02}.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """`ternary`, a run; `other`, another one; `packed`, the first one packed; `nf4`, a quantized folder."""
    root = tmp_path_factory.mktemp("bases")
    size = {"vocab_size": 300, "max_position_embeddings": 32}
    save_run(root / "ternary", tiny_model("ternary", **size), tokenizer)
    save_run(root / "other", tiny_model("ternary", seed=5, **size), tokenizer)
    assert main(["export", str(root / "ternary"), str(root / "packed")]) == 0
    model = quantize_model(tiny_model("none", **size), "nf4")
    save_quantized(model, root / "nf4", "nf4", tokenizer.files())
    return root


def run(tmp_path: Path, corpus: Path, base: Path, **changes: object) -> trainer.TrainConfig:
    return configuration(
        tmp_path, corpus, init=str(base), context=32, **{"lora": 4, "optim": OPTIM, "steps": 12, **changes}
    )


@pytest.mark.parametrize("base", ["ternary", "packed", "nf4"])
def test_adapters_learn_are_saved_apart_and_run(tmp_path: Path, corpus: Path, bases: Path, base: str, capsys) -> None:
    config = run(tmp_path, corpus, bases / base)
    trained = trainer.train(config)
    text = capsys.readouterr().out
    assert "parameters of adapters (rank 4)" in text
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0]
    assert set(load_tensors(resolve(tmp_path / "run") / MODEL)) == set(trained.model.state_dict())

    # A small folder, which PEFT's names and its base's weights are in.
    folder = tmp_path / "run" / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "adapter_base.json", "checksums.json"
    }  # fmt: skip
    assert all(
        name.startswith("base_model.model.model.layers.") for name in load_tensors(folder / "adapter_model.safetensors")
    )
    adapter = load_adapter(folder)
    again = load_adapter(tmp_path / "run")
    assert adapter.fingerprint == again.fingerprint == fingerprint(open_source(bases / base).frozen())
    for name, pair in adapter.matrices.items():
        assert all(torch.equal(*each) for each in zip(pair, again.matrices[name], strict=True))

    # An end between the last checkpoint and the folder is made up for.
    shutil.rmtree(folder)
    trainer.train(config, resume=True)
    assert load_adapter(folder).fingerprint == adapter.fingerprint

    # Every way of running it: the engine, torch, on and off.
    model, plain = load(bases / base, lora=tmp_path / "run"), load(bases / base)
    assert isinstance(model.model, Engine)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = trained.model.eval()(ids)
        assert (model.model(ids) - expected).norm() < 0.05 * expected.norm()
        assert (plain.model(ids) - expected).norm() > 0.05 * expected.norm()
        model.unload_lora()
        assert torch.equal(model.model(ids), plain.model(ids))
        plain.load_lora(folder)
        assert (plain.model(ids) - expected).norm() < 0.05 * expected.norm()
    arguments = [str(bases / base), "--prompt", "The quick", "--max-new-tokens", "4", "--temperature", "0"]
    for backend in ("native", "reference"):
        assert generate.main([*arguments, "--lora", str(folder), "--backend", backend]) == 0
    assert generate.main([*arguments, "--lora", str(folder), "--dtype", "bfloat16"]) == 0

    # What the base has read is not taken for what the adapter reads: not by a text that was asked for before, nor from
    # one of another thread that ended just before the adapter was on.
    def scores(model: TextModel) -> list[float]:
        return [drawn.logprob for drawn in model.generate("The quick brown fox", **SCORED).drawn]

    wanted, base_scores = scores(load(bases / base, lora=folder)), scores(load(bases / base))
    assert wanted != base_scores
    model = load(bases / base)
    assert scores(model) == base_scores
    stream = model.stream("The quick brown fox", **SCORED)

    def late(engine: object, adapter: object) -> None:
        assert scores(model) == base_scores
        put_on(engine, adapter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_model, "put_on", late)
        model.load_lora(folder)
    assert "".join(stream)
    assert [drawn.logprob for drawn in stream.completion.drawn] == wanted
    assert scores(model) == scores(model) == wanted
    model.unload_lora()
    assert scores(model) == base_scores


def test_the_same_codes_are_the_same_base_and_others_are_refused(
    tmp_path: Path, corpus: Path, bases: Path, capsys
) -> None:
    trainer.train(run(tmp_path, corpus, bases / "ternary", steps=4, eval_every=4))
    capsys.readouterr()
    options = ["--lora", str(tmp_path / "run"), "--text", str(corpus), "--device", "cpu"]
    assert main(["evaluate", str(bases / "packed"), *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert [row[0] for row in rows] == [str(bases / "packed")] * 2
    with_adapter, without = (float(row[row.index("±") - 1]) for row in rows)
    assert with_adapter < without
    for other in ("other", "nf4"):
        with pytest.raises(ValueError, match=r"is an adapter of .*ternary \(weights .* has other weights"):
            load(bases / other, lora=tmp_path / "run")
    for wrong in (tmp_path / "run", tmp_path / "run" / "adapter"):
        with pytest.raises(
            CheckpointError, match=r"holds a LoRA adapter of .*, a difference and not a model; open that"
        ):
            open_source(wrong)
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json"):
        load_adapter(bases / "ternary")


def test_a_stopped_run_goes_on_to_the_bit_on_the_same_base_alone(
    tmp_path: Path, corpus: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "a", corpus, bases / "ternary", steps=6, eval_every=3)
    trainer.train(whole)
    cut = run(tmp_path / "b", corpus, bases / "ternary", steps=6, eval_every=3)
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        trainer.train(cut)
    trainer.train(cut, resume=True)
    first, second = tensors(tmp_path / "a" / "run"), tensors(tmp_path / "b" / "run")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    moved = run(tmp_path / "b", corpus, bases / "other", steps=8, eval_every=3)
    with pytest.raises(CheckpointError, match=r"holds other weights .* than those that the adapters were trained on"):
        trainer.train(moved, resume=True)


def test_what_adapters_do_not_go_with_is_named(tmp_path: Path, corpus: Path, bases: Path) -> None:
    for changes, message in (
        ({"optim": OptimConfig(optimizer="muon")}, "want --optim.optimizer adamw"), ({"init": None}, "want --init"),
        ({"ramp": 0.5}, "want --float-start 0 and --ramp 0"), ({"compile": "on"}, "want --compile auto or off"),
        ({"lora": 0}, "lora is 0"), ({"lora_alpha": -1.0}, "lora_alpha is -1.0"),
        ({"lora": None, "lora_alpha": 2.0}, "there are no adapters; give --lora RANK"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            configuration(tmp_path, corpus, **{"init": "x", "lora": 4, "optim": OPTIM, **changes})


def test_adapters_of_others_are_read_and_what_is_not_plain_lora_is_refused(tmp_path: Path, bases: Path, capsys) -> None:
    model = open_source(bases / "ternary").frozen()
    make_trainable(model, 2, 4.0)
    folder = tmp_path / "peft"
    folder.mkdir()
    names = {f"base_model.model.{name}.weight": torch.randn_like(value) for name, value in model.state_dict().items()}
    save_tensors(folder / "adapter_model.safetensors", names)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "someone/model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load(bases / "ternary", lora=folder)
    assert "says nothing of the weights of its base, someone/model" in capsys.readouterr().err
    adapter = load_adapter(folder)
    name = "model.layers.0.mlp.up_proj"
    down, up = (names[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(adapter.matrices[name][1] @ adapter.matrices[name][0], 3 * up @ down)
    for changes, message in (
        ({"use_dora": True}, "use_dora is True"), ({"lora_alpha": None}, "lora_alpha is None"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"rank_pattern": {"q": 1}}, "rank_pattern"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"init_lora_weights": "pissa"}, "weights is 'pissa'"),
        ({"use_qalora": True}, "use_qalora"), ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"made_later": 2}, "made_later is 2"), ({"r": 4}, "r is 4 and lora_A of .* has 2 rows"),
    ):  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            load_adapter(folder)
    harmless = {"init_lora_weights": "gaussian", "loftq_config": {}, "megatron_core": "megatron.core", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | harmless))
    load_adapter(folder)
    for shape in ((), (0, 64)):
        save_tensors(
            folder / "adapter_model.safetensors", names | {f"base_model.model.{name}.lora_A.weight": torch.zeros(shape)}
        )
        with pytest.raises(CheckpointError, match=r"lora_A of .* it must be \[rank, columns"):
            load_adapter(folder)
    save_tensors(folder / "adapter_model.safetensors", {"base_model.model.lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is no matrix of a LoRA adapter"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("base", "said"), [("nf4", "exactly but for float32"), ("ternary", "which were quantized again")]
)
def test_export_merges_an_adapter_and_says_what_it_loses(
    tmp_path: Path, corpus: Path, bases: Path, base: str, said: str, capsys
) -> None:
    trainer.train(run(tmp_path, corpus, bases / base, steps=2, eval_every=2))
    out = tmp_path / "merged"
    arguments = ["export", str(bases / base), str(out), "--to", "hf", "--merge-lora", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert said in capsys.readouterr().out
    merged = open_source(out).model()
    ids = torch.arange(5, 25)[None]
    if base == "nf4":
        expected = load(bases / base, lora=tmp_path / "run")
        with torch.no_grad():
            assert (merged(ids) - expected.model(ids)).norm() < 5e-3 * merged(ids).norm()
    assert (tmp_path / "run" / "adapter" / ADAPTER_BASE).is_file()


@pytest.mark.parametrize("base", ["ternary", "nf4"])
def test_the_estimate_counts_the_frozen_model_and_the_adapters(
    tmp_path: Path, corpus: Path, bases: Path, base: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("bitnet.training.estimate.seconds", lambda *_, **__: 0.01)  # of the products that are timed
    config = run(tmp_path, corpus, bases / base)
    prepared = trainer.prepare(config)
    with contextlib.closing(prepared.batches):
        work = prepared.workload
        found = memory.estimate(work)
        model, adapters = prepared.model, sum(p.numel() for p in prepared.optimizer.names)
        assert work.lora == 4
        assert memory.adapter_parameters(model.config, 4) == adapters
        assert found.parts["adapters"] == found.parts["gradients"] == 4 * adapters
        assert found.parts["optimizer moments"] == 8 * adapters
        ids = torch.randint(300, (4, 32))
        with storages_saved(model, ids) as kept:
            model.loss(ids, ids)
        predicted = found.parts["activations kept by layers"] + found.parts.get("final norm and loss", 0)
        assert 0.7 * predicted < sum(kept.values()) < 1.1 * predicted
    arguments = ["--preset", "lora", "--init", str(bases / base), "--lora", "4", "--estimate", "--context", "32"]
    assert trainer.main([*arguments, "--out", str(tmp_path / "x"), "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{adapters:,} of adapters" in text
    assert "frozen model" in text
