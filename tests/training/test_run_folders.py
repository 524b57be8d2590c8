"""Run folders in hard places: locked, damaged, hostile, shared with a user's own files."""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

import train as trainer
from bitnet.files import new_folder, replacing, working_in, write_atomic
from bitnet.inference.loading import open_model
from bitnet.model import BitNetForCausalLM
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.checksums import CHECKSUMS, verify
from bitnet.storage.contents import open_contents, report
from bitnet.storage.folders import MODEL, STATE, read_index, resolve, save_packed, save_quantized, warn_once
from bitnet.storage.json_files import CheckpointError, Index, load_record
from bitnet.storage.source import open_source
from bitnet.training.checkpoint import alone_in, clean_up, has_checkpoint, newest_good, save_checkpoint
from bitnet.training.processes import World
from tests.builders import configuration, tiny_model


@pytest.fixture(autouse=True)
def say_everything():
    warn_once.cache_clear()


def flip(path: Path) -> None:
    """One bit in the middle of a file, in a file of its own: what was mapped from it before stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    write_atomic(path, bytes(content))


def inspect(folder: Path) -> None:
    with open_contents(folder) as contents:
        report(contents)


def steps(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())


def save(run: Path, step: int, best: bool = False, **state: object) -> Path:
    model = tiny_model()
    return save_checkpoint(
        run,
        model=model,
        optimizer_state={},
        state={"step": step, **state},
        config={"model": dataclasses.asdict(model.config)},
        tokenizer=b"tokenizer",
        best=best,
        keep=2,
    )


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 2 to 4, of which 2 is the best."""
    for step in (1, 2, 3, 4):
        save(tmp_path / "run", step, best=step == 2, best_loss=3.0 - min(step, 2))
    assert steps(tmp_path / "run") == [f"step-0000000{n}" for n in (2, 3, 4)]
    return tmp_path / "run"


# What is deleted


def test_only_what_the_run_wrote_and_named_is_deleted(run):
    mine = run / "checkpoints" / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    copy = run / "checkpoints" / "step-00000099"
    shutil.copytree(run / "checkpoints" / "step-00000004", copy)
    save(run, 5)
    save(run, 6)
    assert steps(run) == ["mine", "step-00000002", "step-00000005", "step-00000006", "step-00000099"]
    with pytest.raises(OSError, match="is there already and this run has not written it; move it away"):
        save(run, 99)
    assert verify(copy) is None


def test_checkpoints_without_an_index_are_neither_deleted_nor_trained_over(run):
    (run / "checkpoints" / "index.json").unlink()
    before = steps(run)
    for check in (lambda: has_checkpoint(run), lambda: trainer.parse(["--resume", "auto", "--out", str(run)])):
        with pytest.raises(ValueError, match=rf"holds step-00000002 and no index.json.*--resume {run}"):
            check()
    assert newest_good(run)[0].name == "step-00000004"
    assert steps(run) == before
    (run / "elsewhere" / "checkpoints" / "notes").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds notes and no index\.json"):
        has_checkpoint(run / "elsewhere")


@pytest.mark.parametrize("name", ["../../../home", "/etc", "step-00000001/../..", ".", "", 5, ["x"], "step-1"])
@pytest.mark.parametrize("place", ["last", "kept", "removable"])
def test_an_index_names_checkpoints_of_its_run_only(run, name, place):
    value = {"last": "step-00000004", "best": "step-00000002", "kept": ["step-00000004"], "removable": []}
    value[place] = name if place == "last" else [name]
    (run / "checkpoints" / "index.json").write_text(json.dumps(value))
    before = sorted(run.rglob("*"))
    clean_up(run)
    assert sorted(run.rglob("*")) == before
    assert read_index(run).last == "step-00000004"  # by the folders


def test_what_a_killed_save_left_is_removed_whenever_it_was_killed(run):
    checkpoints = run / "checkpoints"
    index = load_record(checkpoints / "index.json", Index)
    # Between the index that announces a checkpoint and the one that names it; and before an old one was removed.
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000005")
    index.removable = ["step-00000005", "step-00000001"]
    write_atomic(checkpoints / "index.json", json.dumps(dataclasses.asdict(index)))
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".step-00000006.tmp-0123456789")
    (checkpoints / ".step-notes").mkdir()
    clean_up(run)
    assert steps(run) == [".step-notes", "step-00000002", "step-00000003", "step-00000004"]
    assert load_record(checkpoints / "index.json", Index).removable == []


# The lock


def test_one_program_at_a_time_works_in_a_folder(tmp_path):
    with working_in(tmp_path / "run", "run"):
        message = rf"at work in .*run \(process {os.getpid()}: run\).*another folder"
        with pytest.raises(ValueError, match=message), working_in(tmp_path / "run", "run"):
            pass
        with working_in(tmp_path / "other", "run"):
            (tmp_path / "other" / "x").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["other", "x"]  # no lock, and no folder that nothing is in
    (tmp_path / "other" / ".lock").write_text("process 1: one that was killed")
    with working_in(tmp_path / "other", "run"):
        pass


def test_locks_go_to_one_of_many(tmp_path):
    held, most, turns = [], [], []

    def work() -> None:
        while len(turns) < 40:
            try:
                with working_in(tmp_path / "run", "run"):
                    held.append(1)
                    most.append(len(held))
                    turns.append(1)
                    held.pop()
            except ValueError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(most) == 1


def test_a_second_training_is_refused(tmp_path):
    config = configuration(tmp_path, tmp_path / "nothing")
    with alone_in(tmp_path / "run", World()), pytest.raises(ValueError, match="another program is at work in"):
        trainer.train(config)
    with pytest.raises(ValueError, match="nothing"):  # which is not there: nothing of the attempt is either
        trainer.train(config)
    assert not (tmp_path / "run").exists()


# Sums


@pytest.mark.parametrize("kind", ["run", "packed", "quantized"])
def test_a_flipped_bit_is_found_wherever_weights_are_opened(tmp_path, run, kind):
    folder = resolve(run) if kind == "run" else tmp_path / kind
    if kind == "packed":
        save_packed(folder, tiny_model().pack(), b"")
    if kind == "quantized":
        model = tiny_model().config.replace(quantizer="none")
        quantized = quantize_model(BitNetForCausalLM(model), "nf4", options=Options(group_size=32, progress=False))
        save_quantized(quantized, folder, "nf4", {})
    open_model(folder)
    flip(folder / MODEL)
    openings = [lambda: open_model(folder), lambda: open_source(folder).model()]
    openings += [lambda: open_source(folder).latent(), lambda: inspect(folder)] * (kind != "quantized")
    for opening in openings:
        with pytest.raises(CheckpointError, match=r"model.safetensors is not what was written: its SHA-256 is another"):
            opening()


def test_where_there_are_no_sums_it_is_said(run, capsys):
    open_model(resolve(run))
    assert capsys.readouterr().err == ""
    (resolve(run) / CHECKSUMS).unlink()
    open_model(resolve(run))
    assert "has no checksums.json: whether its weights are what was written cannot be told" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/dev/zero", "../index.json", "pipe", "link", "..", "a/b/c", "", "folder", "gone"])
def test_sums_are_of_plain_files_inside_the_folder(run, name):
    folder = resolve(run)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    (folder / CHECKSUMS).write_text(json.dumps({name: "0" * 64}))
    assert verify(folder)
    assert newest_good(run)[0].name == "step-00000003"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [MODEL, STATE, CHECKSUMS, "config.json", "tokenizer.model", "chat_template.jinja"])
def test_pipes_are_not_waited_for(run, name):
    folder = resolve(run)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for action in (lambda: open_model(folder), lambda: open_source(folder).tokenizer_files(), lambda: newest_good(run)):
        with contextlib.suppress(ValueError):
            action()


# An index that is damaged


@pytest.mark.parametrize("content", ["", '{"last": "step-0', "[]", "5", '{"last": 5}', '{"kept": "x"}', '{"a": 1}'])
def test_a_damaged_index_falls_back_to_the_checkpoints_that_are_whole(run, content, capsys):
    (run / "checkpoints" / "index.json").write_text(content)
    flip(run / "checkpoints" / "step-00000004" / MODEL)
    assert (resolve(run).name, resolve(run, "best").name) == ("step-00000003", "step-00000002")
    assert newest_good(run)[0].name == "step-00000003"
    assert has_checkpoint(run)
    err = capsys.readouterr().err
    assert err.count("going by the folders beside it that are whole: step-00000003, step-00000002") == 1
    save(run, 5)
    assert load_record(run / "checkpoints" / "index.json", Index).kept == ["step-00000005", "step-00000003"]
    assert steps(run) == [f"step-0000000{n}" for n in (2, 3, 4, 5)]


# Remains of killed writers


def test_remains_are_removed_by_the_next_writer_and_others_left(tmp_path):
    for name in ("x", "y"):
        (tmp_path / f".{name}.tmp-4711").mkdir()
        (tmp_path / f".{name}.tmp-4711" / "model.safetensors").write_bytes(bytes(100))
        (tmp_path / f".{name}.gguf.tmp-4711").write_bytes(bytes(100))
    (tmp_path / ".x.tmp-notes").write_text("mine")
    both = contextlib.ExitStack()
    folders = [both.enter_context(new_folder(tmp_path / "x", "model")) for _ in range(2)]
    assert not (tmp_path / ".x.tmp-4711").exists()
    for folder in folders:  # at once: neither takes the other's for remains
        (folder / "file").touch()
    with pytest.raises(OSError, match=r"the model was not written to .*x: "):
        both.close()
    with replacing(tmp_path / "x.gguf") as file:
        write_atomic(tmp_path / "x.gguf", "other")
        file.write(b"mine")
    assert (tmp_path / "x.gguf").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".x.tmp-notes", ".y.gguf.tmp-4711", ".y.tmp-4711", "x", "x.gguf"
    ]  # fmt: skip


# Modes


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_modes_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(tmp_path / "run", 1)
        save_packed(tmp_path / "packed", tiny_model().pack(), b"")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
