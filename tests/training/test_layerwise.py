"""The layer-wise start of a conversion: latents of given codes, errors that fall, a start that is stopped."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import train as trainer
from bitnet.model import bit_linears
from bitnet.quant.ternary import quantize_ternary, quantize_ternary_groups
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.training import config as recipes
from bitnet.training import layerwise
from bitnet.training.arguments import parse
from bitnet.training.layerwise import LayerwiseStart, float_copy, least_squares_codes, nearby_latent, relative_error
from bitnet.training.memory import estimate
from tests.builders import FOXES, configuration, fox_corpus, save_run, tensors, tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([FOXES * 4], 300, threads=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return fox_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer) -> Path:
    model = tiny_model("none", vocab_size=300, sub_norm=False, num_hidden_layers=2, max_position_embeddings=256,
                       intermediate_size=64)  # fmt: skip
    return save_run(tmp_path_factory.mktemp("source") / "run", model, tokenizer)


def conversion(tmp_path: Path, corpus: Path, source: Path, **changes) -> recipes.TrainConfig:
    return configuration(
        tmp_path, corpus,
        **{"init": str(source), "teacher": str(source), "context": 32, "layer_steps": 20, "layer_tokens": 640,
           "layer_rate": 0.1,
           "model": recipes.ModelConfig(quantizer="ternary-g64"), "steps": 2, "eval_every": 2, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("columns", [128, 100, 7])
@pytest.mark.parametrize("group_size", [64, 0])
def test_latents_have_the_codes_and_scales_that_were_asked_for(group_size, columns):
    torch.manual_seed(0)
    weight = torch.randn(6, columns) * torch.logspace(-3, 0, 6)[:, None]
    weight[2] = 0
    codes, scale = least_squares_codes(weight, torch.rand(columns), group_size)
    codes[3, ::2] = -codes[3, ::2]  # GPTQ gives some weights another sign
    codes[4] = torch.randint(-1, 2, (columns,))
    latent = nearby_latent(weight, codes, scale, group_size)
    found, found_scale = quantize_ternary_groups(latent, group_size) if group_size else quantize_ternary(latent)
    assert torch.equal(found.float(), codes)
    if not group_size:
        torch.testing.assert_close(found_scale.view(1, 1), scale, rtol=1e-5, atol=0)
    else:
        alive = torch.nn.functional.pad(codes.abs(), (0, -columns % 64)).view(6, -1, 64).any(-1)
        torch.testing.assert_close(found_scale[alive], scale[alive], rtol=1e-6, atol=0)


def test_least_squares_beats_absmean_and_every_scale_of_a_fine_search():
    torch.manual_seed(1)
    weight, importance = torch.randn(4, 96), torch.rand(96) + 0.1

    def loss(codes, scale):
        return float((importance * (weight - codes * scale).square()).sum())

    codes, scale = least_squares_codes(weight, importance, 0)
    absmean_codes, absmean = quantize_ternary(weight)
    assert loss(codes, scale) < 0.8 * loss(absmean_codes, absmean)
    tried = [weight.abs().mean() * factor for factor in torch.linspace(0.5, 3, 400)]
    assert loss(codes, scale) <= 1.01 * min(loss((weight / each).round().clamp(-1, 1), each) for each in tried)


@pytest.mark.parametrize("quantizer", ["ternary", "ternary-g64", "int4"])
def test_every_layer_comes_nearer_to_what_it_said_in_float(tmp_path, corpus, source, quantizer, capsys):
    config = conversion(tmp_path, corpus, source, model=recipes.ModelConfig(quantizer=quantizer), layer_steps=10)
    done = trainer.train(config)
    out = capsys.readouterr().out
    assert out.count("learned") == 3  # two layers, and their mean
    assert "validation loss" in out
    assert not (tmp_path / "run" / "layers").exists()
    assert len(json.loads((tmp_path / "run" / "layers.json").read_text())["errors"]) == 2
    assert done.model.config.quantizer == quantizer
    start = tensors_of_step(tmp_path / "run", 0)
    changed = open_source(source).latent().state_dict()
    assert all(not torch.equal(start[name], value) for name, value in changed.items() if "_proj" in name)
    assert all(torch.equal(start[name], value) for name, value in changed.items() if "layers" not in name)


def test_errors_are_what_they_are_called(tmp_path, corpus, source):
    """Rounded and learned errors of the first layer, computed again from the weights before and behind."""
    run = trainer.prepare(conversion(tmp_path, corpus, source))
    (run.folder / "layers").mkdir(parents=True)
    (run.folder / "layers" / "mine.txt").touch()
    with pytest.raises(ValueError, match="layers is there already and this run has not written it"):
        LayerwiseStart(run)
    (run.folder / "layers" / "mine.txt").unlink()
    start = LayerwiseStart(run)
    before = float_copy(run.model.model.layers[0])
    assert start.run(lambda _: None, lambda _: False)
    (rounded, fitted, learned), *_ = start.found.errors
    assert learned <= fitted
    assert learned < rounded
    hidden = run.model.model.embed_tokens(start._sequences()[0][16:])
    cos, sin = run.model.model.cos[:32], run.model.model.sin[:32]
    with torch.no_grad():
        wanted = before(hidden, cos, sin, None)
        now = run.model.model.layers[0](hidden, cos, sin, None)
        assert float(relative_error(now, wanted)) == pytest.approx(learned, rel=1e-4)
        float_again = float_copy(before)
        for (_, layer), (_, other) in zip(bit_linears(before), bit_linears(float_again), strict=True):
            del layer.product  # the class's own: quantized
            assert torch.equal(layer.weight, other.weight)
        assert float(relative_error(before(hidden, cos, sin, None), wanted)) == pytest.approx(rounded, rel=1e-4)
    run.batches.close()


def test_a_layer_whose_steps_end_in_nan_keeps_its_best_form(tmp_path, corpus, source, monkeypatch):
    def diverging(layer, rate):
        return torch.optim.SGD([{"params": list(layer.parameters()), "lr": rate, "peak_lr": torch.inf}])

    monkeypatch.setattr(layerwise, "layer_optimizer", diverging)
    run = trainer.prepare(conversion(tmp_path, corpus, source, layer_steps=2))
    start = LayerwiseStart(run)
    assert start.run(lambda _: None, lambda _: False)
    run.batches.close()
    assert all(learned == min(rounded, fitted) for rounded, fitted, learned in start.found.errors)
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


@pytest.mark.parametrize("shape", [{"qk_norm": True, "head_dim": 32}, {"qkv_bias": True}], ids=["Qwen3", "Qwen2"])
def test_layers_of_other_architectures_learn_too(tmp_path, corpus, tokenizer, shape):
    model = tiny_model("none", vocab_size=300, sub_norm=False, num_hidden_layers=1, **shape)
    given = save_run(tmp_path / "given", model, tokenizer)
    run = trainer.prepare(conversion(tmp_path, corpus, given, model=recipes.ModelConfig(quantizer="int4")))
    start = LayerwiseStart(run)
    assert start.run(lambda _: None, lambda _: False)
    assert all(learned < rounded for rounded, _, learned in start.found.errors)
    changed = run.model.state_dict()
    kept = [name for name, value in model.state_dict().items() if torch.equal(changed[name], value)]
    assert kept == ["model.embed_tokens.weight", "model.norm.weight"]
    run.batches.close()


def tensors_of_step(run: Path, step: int) -> dict[str, torch.Tensor]:
    from bitnet.storage.safetensors import MODEL, load_tensors

    return load_tensors(run / "checkpoints" / f"step-{step:08}" / MODEL)


def test_a_start_that_is_stopped_goes_on_to_the_bit(tmp_path, corpus, source, monkeypatch, capsys):
    data = recipes.DataConfig(corpus=str(corpus), cache=str(tmp_path / "data"), document_mask=True)
    ternary = recipes.ModelConfig(quantizer="ternary")
    config = conversion(
        tmp_path, corpus, source, data=data, keep_last=3, layer_steps=5, layer_tokens=320, model=ternary
    )
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "straight")))
    learn, calls = LayerwiseStart._learn, []

    def stopped(self, index, *rest):
        calls.append(index)
        if len(calls) == 2:
            self.trainer.stop_signal = 15
        return learn(self, index, *rest)

    monkeypatch.setattr(LayerwiseStart, "_learn", stopped)
    run = trainer.train(config)
    assert run.stop_signal == 15
    assert "behind layer 1 of 2; go on with: python train.py --resume" in capsys.readouterr().out
    arguments = parse(["--resume", config.out])  # as the command reads it
    assert arguments.resume
    trainer.train(arguments.config, resume=True)
    assert calls == [0, 1, 1]
    for step in (0, 2):
        straight, broken = tensors_of_step(tmp_path / "straight", step), tensors_of_step(tmp_path / "run", step)
        assert all(torch.equal(value, broken[name]) for name, value in straight.items())
    assert tensors(tmp_path / "run").keys() == tensors(tmp_path / "straight").keys()


def test_layers_of_another_start_are_not_taken(tmp_path, corpus, source, tokenizer):
    config = conversion(tmp_path, corpus, source)
    run = trainer.prepare(config)
    first = LayerwiseStart(run)
    assert not first.run(lambda _: None, lambda longest: longest > 0)
    assert len(first.found.errors) == 1
    run.batches.close()
    for changes in ({"layer_steps": 7}, {"seed": 1}):
        other = trainer.prepare(dataclasses.replace(config, **changes))
        assert not LayerwiseStart(other).found.errors
        other.batches.close()
    assert not first.folder.exists()
    run = trainer.prepare(config)
    assert not LayerwiseStart(run).found.errors  # a list of errors without the layers
    run.batches.close()


def test_minutes_and_time_that_is_up(tmp_path, corpus, source):
    config = conversion(tmp_path, corpus, source, max_minutes=1e-6)
    run = trainer.train(config)
    assert run.stop_signal is not None
    assert run.progress.step == 0


def test_minutes_that_the_layers_took_are_counted_in_what_is_asked_for(tmp_path, corpus, source):
    with pytest.raises(
        ValueError, match=r"0.0001 minutes, .* of which the layer-wise start took, are time for 0 steps"
    ) as found:
        trainer.train(conversion(tmp_path, corpus, source, minutes=1e-4, layer_steps=1))
    wanted = float(str(found.value).partition("give --minutes ")[2].split()[0])
    assert wanted * 60 > json.loads((tmp_path / "run" / "layers.json").read_text())["seconds"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ramp": 0.5}, "wants --float-start 0 and --ramp 0"),
        ({"model": recipes.ModelConfig(quantizer="none")}, "another quantizer than none"),
        ({"layer_steps": -1}, "layer_steps is -1"),
        ({"layer_rate": 0.0}, "layer_rate is 0"),
        ({"layer_tokens": 0}, "layer_tokens is 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, corpus, source, changes, message):
    with pytest.raises(ValueError, match=message):
        conversion(tmp_path, corpus, source, **changes)


def test_steps_are_compiled_and_everything_else_is_not(tmp_path, corpus, source):
    """One graph for the steps of all layers."""
    torch.compiler.reset()  # what other tests have captured of a layer's code
    captured, ran = list[int](), list[int]()

    def backend(graph, inputs):
        captured.append(1)
        return lambda *arguments: (ran.append(1), graph(*arguments))[1]

    errors = []
    for compiled in (False, True):
        run = trainer.prepare(conversion(tmp_path / str(compiled), corpus, source, layer_steps=6))
        if compiled:
            for layer in run.model.model.layers:
                layer.compile(backend=backend)
        start = LayerwiseStart(run)
        assert start.run(lambda _: None, lambda _: False)
        errors.append(start.found.errors)
        run.batches.close()
    assert len(captured) == 1
    assert len(ran) == 2 * 6
    torch.testing.assert_close(torch.tensor(errors[1]), torch.tensor(errors[0]))


def test_a_start_wants_a_float_model(tmp_path, corpus, tokenizer):
    with pytest.raises(ValueError, match="begins with --init"):
        trainer.prepare(conversion(tmp_path, corpus, tmp_path, init=None, teacher=None))
    ternary = save_run(tmp_path / "ternary", tiny_model(vocab_size=300), tokenizer)
    with pytest.raises(ValueError, match="is ternary already"):
        trainer.prepare(conversion(tmp_path, corpus, ternary, teacher=None))


def test_the_estimate_is_of_the_model_that_is_given(source, capsys, monkeypatch):
    """Its shape, not the preset's; and of very many tokens the start is the peak."""
    monkeypatch.setattr("bitnet.training.estimate.seconds", lambda *_, **__: 0.01)  # of the products that are timed
    assert trainer.main(["--preset", "convert", "--init", str(source), "--teacher", str(source), "--estimate"]) == 0
    parameters = open_source(source).latent().num_parameters()
    out = capsys.readouterr().out
    assert f"parameters  {parameters:,}," in out
    assert "layers      about " in out
    config = recipes.PRESETS["convert"]
    work = config.workload(torch.device("cpu"), torch.float32, recipes.World(), compiled=False)
    assert estimate(work).moment != "the layer-wise start"
    many = estimate(dataclasses.replace(work, layer_tokens=2**22))
    assert many.moment == "the layer-wise start"
    assert many.parts["hidden states of the tokens"] == 16 * 2**22 * config.model.hidden_size


def test_codes_suit_all_tokens_and_not_the_few_with_huge_states(tmp_path, corpus, tokenizer):
    """A token that a layer makes thousands of times larger, as the first one is in pretrained models."""
    model = tiny_model("none", vocab_size=300, sub_norm=False, num_hidden_layers=1, intermediate_size=64)
    rare = max(range(300), key=lambda i: FOXES.count(tokenizer.decode([i]).strip() or "\0"))
    layer, direction = model.model.layers[0], model.model.embed_tokens.weight[rare]
    with torch.no_grad():
        direction.copy_(torch.randn(64).sign() * 5)
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[0] += direction
    given = save_run(tmp_path / "given", model, tokenizer)
    run = trainer.prepare(conversion(tmp_path, corpus, given, layer_steps=1))
    start = LayerwiseStart(run)
    assert start.run(lambda _: None, lambda _: False)
    (rounded, fitted, _), *_ = start.found.errors
    assert fitted < rounded / 2
    run.batches.close()
