"""The model card of an exported folder: what the source knows, "unknown" for the rest, no file of a user's replaced."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.storage.hf import write as hf_write
from bitnet.storage.hf.card import CARD, UNKNOWN, Origin, model_card, origin_of
from bitnet.storage.source import open_source
from tests.builders import save_run, tiny_model

RECORD = {
    "model": dataclasses.asdict(PRESETS["tiny"]),
    "data": {"corpus": ["web.jsonl=0.7", "/home/somebody/books/=0.3"], "chat": None, "max_bytes": None},
    "optim": {"optimizer": "muon", "lr": 0.01, "lr_rest": 0.03, "lr_second": None},
    "steps": 40, "batch_size": 4, "context": 64, "float_start": 0.5, "ramp": 0.0, "init": None, "seed": 3,
}  # fmt: skip


def known(checkpoint: Path) -> Origin:
    return origin_of(checkpoint, json.loads((checkpoint / "config.json").read_text()))


def save_record(run: Path, record: object, step: object, metrics: str) -> Path:
    """The part of a run folder that a card is made of; returns the checkpoint."""
    checkpoint = run / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(record))
    (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    (run / "metrics.jsonl").write_text(metrics)
    return checkpoint


def front_matter(text: str) -> dict:
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def test_what_a_run_knows(tmp_path):
    rows = [{"step": 20, "val_loss": 9.0}, {"step": 40, "loss": 3.5, "val_loss": 3.25, "val_bits_per_byte": 1.5}]
    checkpoint = save_record(tmp_path, RECORD, 40, "".join(json.dumps(row) + "\n" for row in rows))
    text = model_card(PRESETS["tiny"], "packed codes", known(checkpoint))
    assert "`web.jsonl` (0.7 of the sequences) and `books` (0.3 of the sequences)" in text
    assert "/home" not in text  # where somebody's files lie is nobody's business
    assert "40 steps of 4 sequences of 64 tokens (10,240 tokens)" in text
    assert "optimizer muon, learning rate 0.01, of embedding, head and norms 0.03, the first 50% of the steps" in text
    assert "3.2500 nats a token (perplexity 25.79, 1.5000 bits a byte) on held-out text" in text
    assert UNKNOWN not in text
    assert front_matter(text) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "unknown",
        "tags": ["bitnet", "1.58-bit"],
    }  # fmt: skip


def test_the_whole_split_counts_more_than_a_part(tmp_path):
    checkpoint = save_record(tmp_path, RECORD, 40, '{"step": 40, "val_loss": 3.0, "whole_val_loss": 4.0}\n')
    assert known(checkpoint).loss == "4.0000 nats a token (perplexity 54.60) on all of the held-out text, in training"


def test_a_checkpoint_in_mid_run_and_a_fine_tuned_one(tmp_path):
    record = RECORD | {"steps": 100, "ramp": 0.25, "init": "runs/demo-float"}
    record["data"] = RECORD["data"] | {"chat": "chats/my.jsonl"}
    origin = known(save_record(tmp_path, record, 40, ""))
    assert origin.data == "conversations, of which the answers count: `my.jsonl`"
    assert "stopped before its 100 steps" in origin.recipe
    assert "quantizers faded in over 25%, started from `demo-float`, seed 3" in origin.recipe
    assert origin.loss is None  # no metrics of this step


@pytest.mark.parametrize(
    ("record", "step", "metrics"),
    [
        ({"model": {}, "packed": True}, 40, ""),
        ({}, 40, ""),
        (RECORD, "forty", ""),
        (RECORD | {"data": None, "optim": {"optimizer": "muon", "lr": "high"}}, 40, "no JSON\n"),
        (RECORD | {"data": {}, "model": []}, 40, "[]\n"),
    ],
)
def test_what_is_unknown_or_damaged_is_said_to_be_unknown(tmp_path, record, step, metrics):
    origin = known(save_record(tmp_path, record, step, metrics))
    assert origin == Origin()
    text = model_card(PRESETS["tiny"].replace(quantizer="none"), "floats", origin)
    assert text.count(UNKNOWN) == 3
    assert "tags" not in front_matter(text)


def test_a_loss_that_is_no_number_is_none(tmp_path):
    checkpoint = save_record(tmp_path, RECORD, 40, '{"step": 40, "val_loss": NaN, "whole_val_loss": "low"}\n')
    assert known(checkpoint).loss is None


def test_names_cannot_break_out_of_the_card(tmp_path):
    record = RECORD | {"init": "a`|b\n---\n<script>"}
    origin = known(save_record(tmp_path, record, 40, ""))
    assert "started from `ab---script`" in origin.recipe


def test_every_exported_folder_has_one_and_no_other_is_touched(tmp_path):
    run = save_run(tmp_path / "run", tiny_model())
    checkpoint = run / "checkpoints" / "step-00000001"
    hf_write.write(tiny_model(), tmp_path / "out", "master", origin=known(checkpoint))
    text = (tmp_path / "out" / CARD).read_text()
    assert "latent floats, quantized while the model runs" in text
    assert text.count(UNKNOWN) == 3  # this run kept no record
    assert isinstance(open_source(tmp_path / "out").model(), BitNetForCausalLM)

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / CARD).write_text("my own words")
    with pytest.raises(OSError, match="already exists"):
        hf_write.write(tiny_model(), mine, "master")
    assert [path.name for path in mine.iterdir()] == [CARD]
    assert (mine / CARD).read_text() == "my own words"


def test_a_layout_that_is_not_read_back_says_so():
    text = model_card(PRESETS["tiny"], "INT4 codes", package="the packages optimum and gptqmodel", readable=False)
    assert "the packages optimum and gptqmodel" in text
    assert "does not read its layout" in text
    assert "bitnet.load" not in text
    assert "bitnet.load" in model_card(PRESETS["tiny"], "packed codes")
