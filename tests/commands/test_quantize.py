"""`bitnet quantize`: what an option changes, and options that would change nothing."""

from pathlib import Path

import pytest
import torch

from bitnet.__main__ import main
from bitnet.commands.quantize import Options, check
from bitnet.ptq.methods import METHODS
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer
from tests.builders import fox_corpus, save_run, tiny_model


def test_a_text_weighs_the_errors_of_blocks_that_need_none(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the corpus is tokenized to
    base = str(save_run(tmp_path / "base", tiny_model("none"), tokenizer))
    (tmp_path / "text").mkdir()
    text = ["--text", str(fox_corpus(tmp_path / "text")), "--context", "64", "--calibration-tokens", "256"]
    for name, more in (("plain", []), ("weighed", text)):
        assert main(["quantize", base, str(tmp_path / name), "--method", "gguf-q4_0", *more]) == 0
    plain, weighed = (open_source(tmp_path / name).model().state_dict() for name in ("plain", "weighed"))
    name = "model.layers.0.mlp.up_proj.data"
    assert not torch.equal(plain[name], weighed[name])
    assert main(["quantize", base, str(tmp_path / "none"), "--method", "mixed-4", *text, "--target-bits", "0"]) == 2


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="--group-size 64 has no effect on nf4; leave it out"):
        check(Options("a", Path("b"), "nf4", group_size=64))
    given = {
        "group_size": 64, "symmetric": True, "algorithm": "original", "calibration": "minmax", "tuning_steps": 5,
        "target_bits": 3.5, "outlier_threshold": 3.0, "compatible": True, "context": 64, "calibration_tokens": 512,
    }  # fmt: skip
    refused = {
        method: {
            name for name, value in given.items() if not accepted(Options("a", Path("b"), method, **{name: value}))
        }
        for method in METHODS
    }
    text = {"context", "calibration_tokens"}
    assert given.keys() - refused["rtn-int4"] == {"group_size", "symmetric"}
    assert given.keys() - refused["gptq-4"] == {"group_size", "symmetric", "algorithm", *text}
    assert given.keys() - refused["mixed-4"] == {"group_size", "symmetric", "algorithm", "target_bits", *text}
    assert given.keys() - refused["autoround-4"] == {"group_size", "symmetric", "tuning_steps", *text}
    assert given.keys() - refused["w8a8-static"] == {"calibration", *text}
    assert given.keys() - refused["llm-int8"] == {"outlier_threshold", *text}
    assert given.keys() - refused["gguf-q4_0"] == {"compatible"}
    assert given.keys() - refused["gguf-iq2_xs"] == {"compatible", *text}
    assert given.keys() - refused["gptq-mxfp4"] == text
    assert refused["nf4"] == refused["w8a8-dynamic"] == refused["fp16"] == given.keys()


def accepted(options: Options) -> bool:
    try:
        check(options)
    except ValueError:
        return False
    return True
