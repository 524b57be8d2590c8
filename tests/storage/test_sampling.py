"""How a model's makers want its tokens drawn: read from folders and GGUF files, carried by exports, used by default."""

import json
from pathlib import Path
from typing import Any

import pytest

import bitnet
from bitnet.inference.options import DEFAULTS, SamplingConfig, TextOptions
from bitnet.storage.folders import save_packed
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.json_files import CheckpointError
from bitnet.storage.sampling import sampling_of_folder, sampling_of_gguf
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer
from tests.builders import tiny_model
from tests.vocabularies import stdlib_tokenizer

pytestmark = pytest.mark.usefixtures("reference_backend")
OURS = {"temperature": 0.2, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
GGUF = {"temp": 0.2, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "penalty_repeat": 1.1, "penalty_last_n": -1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return stdlib_tokenizer(512)


def settings_of(folder: Path, **values: Any) -> dict[str, float]:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return sampling_of_folder(folder)


def test_generation_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling_of_folder(tmp_path) == {}
    assert settings_of(tmp_path, eos_token_id=2, temperature=None, transformers_version="4") == {}
    assert settings_of(tmp_path, do_sample=True, **OURS) == OURS
    assert settings_of(tmp_path, top_k=10**12) == {"top_k": 2**31 - 1}  # a number that GGUF and the kernels hold
    assert settings_of(tmp_path, do_sample=False, temperature=0.6, top_p=0.9) == {"temperature": 0.0, "top_p": 0.9}
    assert settings_of(tmp_path, top_k=-1) == {"top_k": 0}
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "max_length": 99}
    assert settings_of(tmp_path, **neutral) == {}
    assert capsys.readouterr().err == ""
    settings_of(tmp_path, num_beams=4, no_repeat_ngram_size=3)
    assert "generation_config.json also asks for num_beams 4, no_repeat_ngram_size 3, which is not done here" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("value", ["hot", [0.2], True, {}, float("inf"), 10**400, 1e39])
def test_settings_that_are_no_numbers_are_refused(tmp_path: Path, value: object) -> None:
    for name in ("temperature", "top_k"):
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            settings_of(tmp_path, **{name: value})
    with pytest.raises(CheckpointError, match=r"top_p is .*; it must be a number"):
        sampling_of_gguf({"general.sampling.top_p": value}, Path("a.gguf"))


def test_gguf_keys(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("a.gguf")
    assert sampling_of_gguf({"general.name": "x", "general.sampling.penalty_last_n": 64}, path) == {}
    assert sampling_of_gguf({f"general.sampling.{name}": value for name, value in GGUF.items()}, path) == OURS
    assert capsys.readouterr().err == ""
    sampling_of_gguf({"general.sampling.mirostat": 2, "general.sampling.sequence": "temperature;top_k"}, path)
    assert "asks for sequence temperature;top_k, mirostat 2, which is not done" in capsys.readouterr().err


def test_what_is_given_comes_before_the_model_and_that_before_the_defaults() -> None:
    assert SamplingConfig(temperature=0.8, top_p=0.95, min_p=0.05) == DEFAULTS
    assert TextOptions().sampling({}) == DEFAULTS
    own = {"temperature": 0.2, "top_p": 0.9}
    assert TextOptions().sampling(own) == SamplingConfig(0.2, top_p=0.9, min_p=0.05)
    assert TextOptions(top_p=1.0, min_p=0.0).sampling(own) == SamplingConfig(0.2)
    assert TextOptions(temperature=0).sampling(own).greedy


def test_every_form_of_a_model_is_read_and_carries_the_settings_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A packed folder, the GGUF file made of it, and the packed folder made of that."""
    model = tiny_model(hidden_act="silu")
    wanted = {"temperature": 0.25, "top_k": 20, "min_p": 0.125}
    files = tokenizer.files() | {"generation_config.json": json.dumps(wanted).encode()}
    save_packed(tmp_path / "packed", model.pack(), files)
    source = open_source(tmp_path / "packed")
    assert source.sampling == wanted
    file = tmp_path / "model.gguf"
    gguf_write.write(source.model(), file, "F16", tokenizer=tokenizer, embedding_type="F16", sampling=source.sampling)
    metadata = GGUFFile(file).metadata
    assert (metadata["general.sampling.temp"], metadata["general.sampling.top_k"]) == (0.25, 20)
    assert open_source(file).sampling == wanted
    again = tmp_path / "again"
    again.mkdir()
    for name, content in open_source(file).tokenizer_files().items():
        (again / name).write_bytes(content)
    assert sampling_of_folder(again) == wanted


def test_a_text_is_drawn_as_the_folder_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def texts(settings: dict[str, Any]) -> tuple[str, str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        files = tokenizer.files() | {"generation_config.json": json.dumps(settings).encode()}
        save_packed(folder, tiny_model().pack(), files)
        model = bitnet.load(folder, device="cpu")
        return str(model.generate("The", max_new_tokens=12, seed=1)), str(
            model.generate("The", max_new_tokens=12, seed=1, temperature=0.8, top_p=0.95, min_p=0.05)
        )

    plain, given = texts({})
    assert plain == given
    greedy, given = texts({"do_sample": False})
    assert greedy != plain
    assert given == plain
    with pytest.raises(ValueError, match="top_p is 7"):
        texts({"top_p": 7})
