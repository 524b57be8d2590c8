"""Checkpoints: atomic, never lost, and clear about what is wrong with a bad one."""

import json
import os

import pytest
import torch

from bitnet.files import write_atomic
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.storage import folders as folders_module
from bitnet.storage import safetensors as safetensors_files
from bitnet.storage.checksums import CHECKSUMS
from bitnet.storage.folders import MODEL, OPTIMIZER, STATE, resolve
from bitnet.storage.safetensors import CheckpointError, load_json, load_tensors, save_tensors
from bitnet.storage.source import open_source
from bitnet.training import checkpoint
from bitnet.training.checkpoint import save_checkpoint
from tests.timing import within

CONFIG = PRESETS["tiny"]


@pytest.fixture
def model():
    return BitNetForCausalLM(CONFIG)


def save(run, model, step, best=False, **state):
    import dataclasses

    return save_checkpoint(
        run,
        model=model,
        optimizer_state={"model.norm.weight.exp_avg": torch.full((CONFIG.hidden_size,), float(step))},
        state={"step": step, **state},
        config={"model": dataclasses.asdict(model.config)},
        tokenizer=b"tokenizer",
        best=best,
    )


def folders(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())


def test_round_trip(tmp_path, model):
    folder = save(tmp_path, model, 5)
    loaded = open_source(folder).model()
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert load_json(folder / STATE) == {"step": 5}
    assert float(load_tensors(folder / OPTIMIZER)["model.norm.weight.exp_avg"][0]) == 5


def test_last_and_best_are_kept_and_nothing_else(tmp_path, model):
    save(tmp_path, model, 1)
    save(tmp_path, model, 2, best=True)
    save(tmp_path, model, 3)
    save(tmp_path, model, 4)
    assert folders(tmp_path) == ["step-00000002", "step-00000004"]
    assert resolve(tmp_path, "best").name == "step-00000002"
    assert resolve(tmp_path, "last").name == "step-00000004"
    assert resolve(tmp_path / "checkpoints" / "step-00000002").name == "step-00000002"


def test_saving_the_same_step_again_only_changes_its_rank(tmp_path, model):
    folder = save(tmp_path, model, 1)
    save(tmp_path, model, 2)
    before = (tmp_path / "checkpoints" / "step-00000002" / MODEL).stat().st_mtime_ns
    save(tmp_path, model, 2, best=True)
    assert (tmp_path / "checkpoints" / "step-00000002" / MODEL).stat().st_mtime_ns == before
    assert resolve(tmp_path, "best").name == "step-00000002"
    assert not folder.exists()


@pytest.mark.parametrize("failing", ["model", "optimizer", "state", "rename", "index"])
def test_a_full_disk_loses_nothing(tmp_path, model, monkeypatch, failing):
    save(tmp_path, model, 1, best=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    full = OSError(28, "No space left on device")
    save_file, write_file, replace = safetensors_files.save_file, checkpoint.write_atomic, os.replace

    def fail_tensors(tensors, path, **options):
        if failing in str(path):
            path.write_bytes(b"half a fi")
            raise full
        save_file(tensors, path, **options)

    def fail_text(path, content):
        if path.name == f"{failing}.json":
            raise full
        write_file(path, content)

    def fail_rename(source, target):
        if failing == "rename" and "step-" in str(target) and os.path.isdir(source):
            raise full
        replace(source, target)

    monkeypatch.setattr(safetensors_files, "save_file", fail_tensors)
    monkeypatch.setattr(checkpoint, "write_atomic", fail_text)
    monkeypatch.setattr(checkpoint.os, "replace", fail_rename)
    with pytest.raises(OSError, match=r"step 2 .*No space left"):
        save(tmp_path, model, 2)
    monkeypatch.undo()

    for path, content in before.items():
        assert path.read_bytes() == content, path
    assert resolve(tmp_path, "last").name == "step-00000001"
    open_source(resolve(tmp_path, "best")).model()
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
    # Once there is room again, the same step is written whole.
    save(tmp_path, model, 2)
    assert resolve(tmp_path, "last").name == "step-00000002"
    open_source(resolve(tmp_path, "last")).model()


def test_a_truncated_model_is_an_error_that_names_the_file(tmp_path, model):
    folder = save(tmp_path, model, 1)
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        open_source(folder).model()


@pytest.mark.parametrize("content", [b"", b"\x80\x04not safetensors", b"PK\x03\x04" + bytes(100), b"\xff" * 64])
def test_a_foreign_model_file_is_refused(tmp_path, model, content):
    folder = save(tmp_path, model, 1)
    (folder / MODEL).write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or is of another format"):
        open_source(folder).model()


def test_tensors_of_another_shape_are_refused_by_name(tmp_path, model):
    folder = save(tmp_path, model, 1)
    config = json.loads((folder / folders_module.CONFIG).read_text())
    config["model"]["intermediate_size"] = 256
    (folder / folders_module.CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight: expected \[64, 256\], found \[64, 128\]"):
        open_source(folder).model()


HUGE = {
    "one matrix": {"vocab_size": 2**24},  # 4 GB
    "wide": {"hidden_size": 2**14},
    "many layers": {"num_hidden_layers": 2**31 - 1},
    "one layer more": {"num_hidden_layers": 3},
    "everything": {"vocab_size": 2**20, "intermediate_size": 2**20, "hidden_size": 2**20, "num_hidden_layers": 2**20},
    "bytes beyond 64 bits": {"vocab_size": 2**31 - 1, "hidden_size": 2**30},
}


@pytest.mark.parametrize("sizes", HUGE)
def test_a_configuration_of_another_size_is_refused_before_anything_is_made(tmp_path, model, sizes):
    folder = save(tmp_path, model, 1)
    config = json.loads((folder / folders_module.CONFIG).read_text())
    config["model"] |= HUGE[sizes]
    (folder / folders_module.CONFIG).write_text(json.dumps(config))
    before = resident()

    def refused() -> None:
        with pytest.raises(CheckpointError, match=r"does not fit the model's configuration|a matrix would be"):
            open_source(folder).model()

    within(1, refused)
    assert resident() - before < 2**25


def resident() -> int:
    """The most bytes of memory that this process has had."""
    import resource  # POSIX only, as is the measure

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_weights_in_another_float_are_loaded_in_float32_and_integers_refused(tmp_path, model):
    folder = save(tmp_path, model, 1)
    (folder / CHECKSUMS).unlink()  # the weights are changed on purpose
    for dtype in (torch.bfloat16, torch.float64):
        save_tensors(folder / MODEL, {k: v.to(dtype) for k, v in model.state_dict().items()})
        for name, value in open_source(folder).model().state_dict().items():
            assert torch.equal(value, model.state_dict()[name].to(dtype).float()), name
            assert value.dtype == torch.float32
    save_tensors(folder / MODEL, {k: v.int() for k, v in model.state_dict().items()})
    with pytest.raises(CheckpointError, match="is I32, not a float"):
        open_source(folder).model()


def test_a_loaded_model_trains_and_shares_nothing_with_its_file(tmp_path, model):
    folder = save(tmp_path, model, 1)
    loaded = open_source(folder).model()
    (folder / MODEL).write_bytes(b"")
    ids = torch.arange(16)[None]
    torch.testing.assert_close(loaded(ids), model.eval()(ids))
    loaded.train().loss(ids, ids).backward()
    assert all(parameter.grad is not None and parameter.is_leaf for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ("{}", "no 'model'"),
        ('{"model": {"hidden_layers": 3}}', "unknown model fields hidden_layers"),
        ('{"model": {"quantizer": "int3"}}', "int3"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path, model, content, message):
    folder = save(tmp_path, model, 1)
    (folder / folders_module.CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder).model()


def test_remains_of_a_killed_save_are_removed(tmp_path, model):
    save(tmp_path, model, 1)
    remains = tmp_path / "checkpoints" / ".step-00000002.tmp-12345"
    remains.mkdir()
    (remains / MODEL).write_bytes(b"half")
    assert resolve(tmp_path).name == "step-00000001"
    save(tmp_path, model, 2)
    assert not remains.exists()


def test_missing_runs_are_explained(tmp_path, model):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve(tmp_path)
    folder = save(tmp_path, model, 1)
    (folder / MODEL).unlink()
    with pytest.raises(CheckpointError, match="is missing there"):
        resolve(tmp_path)


def test_atomic_text_leaves_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
