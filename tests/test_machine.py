"""What is asked of the machine: device, type of the products, compiler, memory."""

import mmap
from pathlib import Path

import pytest
import torch

from bitnet import machine
from bitnet.model import PRESETS, BitNetForCausalLM


def test_auto_is_what_the_machine_has():
    device = machine.pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert machine.pick_dtype("auto", device) in (torch.float32, torch.bfloat16)
    assert machine.pick_dtype("float16", device) is torch.float16


@pytest.mark.parametrize("name", ["abacus", "cuda:77", "cpu:x"])
def test_unknown_devices_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        machine.pick_device(name)


def test_unknown_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match="float8"):
        machine.pick_dtype("float8", torch.device("cpu"))


def test_without_a_compiler_auto_falls_back_with_a_note_and_on_raises(monkeypatch, capsys):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    model = BitNetForCausalLM(PRESETS["tiny"]).cpu()
    assert machine.compile_model(model, "auto") is False
    assert "no C++ compiler" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        machine.compile_model(model, "on")
    assert machine.compile_model(model, "off") is False


def test_a_broken_toolchain_is_a_note_too(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("fatal error: Python.h: No such file\nmore")

    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch, "compile", broken)
    assert machine.compile_model(BitNetForCausalLM(PRESETS["tiny"]), "auto") is False
    assert "Python.h" in capsys.readouterr().err


def test_compiled_training_agrees_with_eager():
    if machine.compile_failure(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(quantizer="none", num_hidden_layers=1)  # without roundings that could flip
    model = BitNetForCausalLM(config)
    ids = torch.randint(config.vocab_size, (2, 17))
    machine.compile_model(model, "on")
    losses = []
    for context in (machine.eager(), torch.enable_grad()):
        with context:
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            losses.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
            model.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


def test_memory_of_this_process_is_read_in_megabytes():
    machine.reset_peak_memory()
    held, most = machine.process_memory("VmRSS"), machine.process_memory()
    if held is None or most is None:
        pytest.skip("this system does not tell")
    assert 10 < held < 1.1 * most < 1e5
    with mmap.mmap(-1, 120_000_000) as block:  # from the system: the heap may have as much to give again
        block.write(b"1" * len(block))
        grown = machine.process_memory("VmRSS")
    assert grown is not None
    assert grown - held > 50
    assert machine.available_memory() > 1e6


def test_freed_blocks_are_returned_without_an_error(monkeypatch):
    machine.return_freed_blocks()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda *_: pytest.fail("the environment's choice counts"))
    machine.return_freed_blocks()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "800000 100000"}, 3),
        ("0::/../outside\n", {"cpu.max": "20000 100000"}, 1),  # a group that is not below what is mounted here
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {f"cpu,cpuacct/x/cpu.cfs_{k}_us": v for k, v in (("quota", "400000"), ("period", "100000"))},
            4,
        ),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("5:cpuset:/x\n", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_quota_of_a_control_group(tmp_path: Path, groups: str, files: dict[str, str], expected: int | None) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert machine.cpu_quota(tmp_path / "groups", tmp_path / "mount") == expected
    assert machine.cpu_quota(tmp_path / "none") is None
