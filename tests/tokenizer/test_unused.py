"""Which ids a model may write, told from every form of a tokenizer, and carried from one form to the next."""

import json
import pickle
from pathlib import Path

import pytest
import tokenizers

from bitnet.tokenizer import HuggingFaceTokenizer, Tokenizer, from_gguf_metadata, load_tokenizer
from bitnet.tokenizer.gguf_write import vocabulary
from bitnet.tokenizer.json_write import sentencepiece_files
from bitnet.tokenizer.proto import CONTROL, NORMAL, UNUSED, USER_DEFINED, with_pieces
from tests.vocabularies import byte_level_metadata, byte_tokenizer, stdlib_tokenizer

TYPES = "tokenizer.ggml.token_type"


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def padded(request: pytest.FixtureRequest) -> tuple[dict, set[int], int]:
    """GGUF metadata, the ids in it that are not to be drawn, and below which all others are."""
    original = (
        stdlib_tokenizer(500)
        if request.param == "sentencepiece"
        else from_gguf_metadata(byte_level_metadata() | {"tokenizer.ggml.pre": "smollm"})
    )
    size = original.vocab_size
    metadata = vocabulary(original, size + 8)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata[TYPES]
    types[400] = UNUSED  # a piece that texts have
    types[size] = USER_DEFINED  # as older converters have it
    types[size + 2], tokens[size + 2] = NORMAL, ""
    types[size + 3], tokens[size + 3] = NORMAL, "[PAD7]"  # of another id: a text
    types[size + 4], tokens[size + 4] = UNUSED, "<|eom_id|>"  # texts must be able to end
    types[size + 5], tokens[size + 5] = CONTROL, "<|reserved_5|>"
    return metadata, {400, size, size + 1, size + 2, size + 6, size + 7}, size + 6


def in_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_gguf_types_and_padding(padded, tmp_path):
    metadata, unused, size = padded
    ours = from_gguf_metadata(metadata)
    assert ours.unused == unused
    assert ours.drawable == (size, tuple(i for i in sorted(unused) if i < size))
    assert ours.drawable.number == ours.vocab_size - len(unused)
    assert size - 2 in ours.eos_ids
    assert pickle.loads(pickle.dumps(ours)).drawable == ours.drawable
    assert load_tokenizer(in_folder(tmp_path / "folder", ours.files())).drawable == ours.drawable
    if isinstance(ours, Tokenizer):
        folder = in_folder(tmp_path / "hf", sentencepiece_files(ours))
        assert isinstance(load_tokenizer(folder), HuggingFaceTokenizer)
        assert load_tokenizer(folder).drawable == ours.drawable
    with pytest.warns(RuntimeWarning, match="1 tokens that are never drawn and are no plain text, '\\[PAD"):
        again = vocabulary(ours, ours.vocab_size)  # a GGUF file again: the older converter's token is matched in texts
    assert [i for i, kind in enumerate(again[TYPES]) if kind == UNUSED] == sorted(unused - {size - 6})
    assert from_gguf_metadata(again).drawable == ours.drawable


def test_nothing_is_unused_where_all_is_used():
    for ours in (stdlib_tokenizer(500), byte_tokenizer()):
        assert ours.drawable == (ours.vocab_size, ())
        assert "suppress_tokens" not in json.loads(ours.files().get("generation_config.json", b"{}"))


def test_gaps_between_ids(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 3, "c": 4}, []))
    library.decoder = tokenizers.decoders.ByteLevel()
    ours = HuggingFaceTokenizer(library, unused=[4, 99])
    assert ours.unused == {1, 2, 4}
    assert ours.drawable == (4, (1, 2))
    files = ours.files()
    assert json.loads(files["generation_config.json"])["suppress_tokens"] == [4]
    assert load_tokenizer(in_folder(tmp_path / "folder", files)).drawable == ours.drawable
    with pytest.raises(ValueError, match="all of the 5 tokens are unused"):
        HuggingFaceTokenizer(library, unused=range(5))


def test_pieces_that_sentencepiece_calls_unused(tmp_path):
    original = stdlib_tokenizer(500)
    ours = Tokenizer(with_pieces(original.model_proto, [("<spare>", UNUSED)], {}, {}))
    assert ours.drawable == (500, ())
    assert ours.unused == {500}
    assert vocabulary(ours, 501)[TYPES][-1] == UNUSED
    assert load_tokenizer(in_folder(tmp_path / "folder", sentencepiece_files(ours))).drawable == (500, ())


def test_suppressed_tokens_of_a_folder(tmp_path):
    tokenizer = byte_tokenizer()
    folder = in_folder(tmp_path / "folder", tokenizer.files())
    settings = json.loads((folder / "generation_config.json").read_text())
    for given, unused in (([7, 9, tokenizer.eos_id, 10**6, "x"], {7, 9}), (None, set()), (7, set()), ([], set())):
        (folder / "generation_config.json").write_text(json.dumps(settings | {"suppress_tokens": given}))
        assert load_tokenizer(folder).unused == unused
