"""Whether torch.compile works, and what follows where it does not."""

import re

import pytest
import torch

from bitnet import machine
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.training.compiling import compile_failure, compile_model


def test_without_a_compiler_auto_falls_back_with_a_note_and_on_raises(monkeypatch, capsys):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    model = BitNetForCausalLM(PRESETS["tiny"]).cpu()
    assert compile_model(model, "auto") is False
    assert "no C++ compiler" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        compile_model(model, "on")
    assert compile_model(model, "off") is False


def test_a_broken_toolchain_is_a_note_too(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("fatal error: Python.h: No such file\nmore")

    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch, "compile", broken)
    assert compile_model(BitNetForCausalLM(PRESETS["tiny"]), "auto") is False
    assert "Python.h" in capsys.readouterr().err


def test_compiled_training_agrees_with_eager():
    if compile_failure(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(quantizer="none", num_hidden_layers=1)  # without roundings that could flip
    model = BitNetForCausalLM(config)
    ids = torch.randint(config.vocab_size, (2, 17))
    compile_model(model, "on")
    losses = []
    for context in (machine.eager(), torch.enable_grad()):
        with context:
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            losses.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
            model.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


def wrong(function, lost):
    """A compiled form whose result is right, and whose gradient does not reach the operands of these places."""

    def compiled(*args):
        return function(*(arg.detach() if place in lost else arg for place, arg in enumerate(args)))

    return compiled


def scaled(function):
    """A compiled form whose result is right, and whose gradients are 1 % too large."""

    def compiled(*args):
        y = function(*args)
        return y + 0.01 * (y - y.detach())

    return compiled


@pytest.mark.parametrize("quantizer", ["ternary", "int4", "none"])
@pytest.mark.parametrize(
    "compiled", [lambda f, **_: wrong(f, (0, 1)), lambda f, **_: wrong(f, (0,)), lambda f, **_: wrong(f, (1,)),
                 lambda f, **_: scaled(f)], ids=["both", "input", "weight", "scaled"],
)  # fmt: skip
def test_a_torch_that_compiles_wrong_gradients_is_refused(tmp_path, monkeypatch, capsys, compiled, quantizer):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch, "compile", compiled)
    model = BitNetForCausalLM(PRESETS["tiny"].replace(num_hidden_layers=1, quantizer=quantizer)).cpu()
    assert compile_model(model, "auto") is False
    said = f"torch {torch.__version__} gives a compiled quantized product other gradients"
    assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape(said)):
        compile_model(model, "on")


def test_right_gradients_are_compared_once(tmp_path, monkeypatch):
    captured, wrongly = [], []

    def compiled(function, **options):
        captured.append(options)
        return wrong(function, wrongly)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch, "compile", compiled)
    cpu, gradients = torch.device("cpu"), {"backend": "aot_eager"}
    wrongly.append(1)
    assert compile_failure(cpu)
    assert not list(tmp_path.iterdir())  # what was wrong is tried again
    wrongly.clear()
    assert compile_failure(cpu) is None
    assert captured == [{}, gradients] * 2
    assert compile_failure(cpu) is None
    assert captured == [{}, gradients] * 2 + [{}]
    for change in (lambda: compile_failure(cpu, "int4"), lambda: monkeypatch.setattr(torch, "__version__", "9.9")):
        change()
        assert compile_failure(cpu) is None
    assert captured[5:] == [{}, gradients, {}, {}, gradients]
