"""A tokenizer.json written into a GGUF file: the same pieces, and the same ids in the real llama.cpp."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from bitnet.__main__ import main
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.hf import write as hf_write
from bitnet.storage.source import open_source
from bitnet.tokenizer import HuggingFaceTokenizer, Tokenizer, from_gguf_metadata
from bitnet.tokenizer.gguf_write import vocabulary as vocabulary_of
from bitnet.tokenizer.gguf_write_json import metadata_of
from bitnet.tokenizer.json_write import sentencepiece_files
from bitnet.tokenizer.word_rules import PRE_TOKENIZERS, RULE_OF
from tests import oracles
from tests.oracles.llama import Vocabulary, differences, vocabulary
from tests.vocabularies import (
    BACKENDS,
    GGUF_SPECIALS,
    GGUF_TEXTS,
    REGEX_OF_LLAMA_3,
    REGEX_OF_TEKKEN,
    byte_level_metadata,
    foreign_model,
    has_case_or_marks,
    split,
    stdlib_tokenizer,
)

KEYS = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token")
NFC = normalizers.NFC()


def saved(folder: Path, tokenizer: HuggingFaceTokenizer) -> HuggingFaceTokenizer:
    """The tokenizer through the files of a folder."""
    folder.mkdir(parents=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return HuggingFaceTokenizer.load(folder)


def ids_differ(metadata: dict, path: Path, ours: HuggingFaceTokenizer, texts: list[str]) -> list[str]:
    with vocabulary(path, metadata) as theirs:
        return differences(ours, theirs, texts)


def test_smollm2_there_and_back(tmp_path):
    source = oracles.smollm2()
    original = GGUFFile(source).metadata
    ours = saved(tmp_path / "hf", from_gguf_metadata(original))
    written = metadata_of(ours)
    for key in (*KEYS, "unknown_token_id", "padding_token_id", "add_space_prefix"):
        assert written[f"tokenizer.ggml.{key}"] == original[f"tokenizer.ggml.{key}"], key
    texts = [*GGUF_TEXTS, "<|im_start|>user\nHello, it's 2024!<|im_end|>\n"]
    with Vocabulary(source) as before, vocabulary(tmp_path / "x.gguf", written) as after:
        for text in texts:
            assert after.tokenize(text) == before.tokenize(text) == ours.encode(text)
            assert after.tokenize(text, parse_special=True) == before.tokenize(text, parse_special=True)
        assert after.eog_ids() == before.eog_ids()


def test_a_folder_with_a_tokenizer_json_is_exported(tmp_path, capsys):
    """The whole way: Hugging Face folder, command line, GGUF file, llama.cpp."""
    ours = from_gguf_metadata(byte_level_metadata() | {"tokenizer.ggml.pre": "smollm"})
    config = PRESETS["tiny"].replace(vocab_size=ours.vocab_size + 3, quantizer="none", sub_norm=False)
    hf_write.write(BitNetForCausalLM(config), tmp_path / "hf", "master", tokenizer_files=ours.files())
    assert main(["export", str(tmp_path / "hf"), str(tmp_path / "x.gguf"), "--to", "gguf", "--type", "F16"]) == 0
    metadata = GGUFFile(tmp_path / "x.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][-4:] == [
        GGUF_SPECIALS[-1],
        *(f"[PAD{ours.vocab_size + i}]" for i in range(3)),
    ]
    with Vocabulary(tmp_path / "x.gguf") as theirs:
        assert differences(ours, theirs, GGUF_TEXTS) == []
    back = open_source(tmp_path / "x.gguf").tokenizer
    assert [back.encode(text) for text in GGUF_TEXTS] == [ours.encode(text) for text in GGUF_TEXTS]


def byte_level(steps: list, *, last: ByteLevel | None = None, **options) -> HuggingFaceTokenizer:
    """The vocabulary of the tests under another pre-tokenizer, as the models' own files have them."""
    metadata = byte_level_metadata()
    pieces, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [tuple(merge.split(" ")) for merge in merges],
            **{name: value for name, value in options.items() if name != "normalizer"},
        )
    )  # fmt: skip
    last = last or ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    backend.decoder = tokenizers.decoders.ByteLevel()
    if "normalizer" in options:
        backend.normalizer = options["normalizer"]
    backend.add_special_tokens(GGUF_SPECIALS[:3])
    backend.add_tokens([AddedToken(GGUF_SPECIALS[3], normalized=False)])
    first = len(pieces) - len(GGUF_SPECIALS)
    return HuggingFaceTokenizer(backend, bos_id=first, eos_id=first + 2)


with_regex = ByteLevel(add_prefix_space=False, use_regex=True)
PUBLISHED = {
    "gpt-2": lambda: byte_level([], last=with_regex),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)], last=with_regex),
    "llama-bpe": lambda: byte_level(split(REGEX_OF_LLAMA_3), ignore_merges=True),
    "dbrx": lambda: byte_level(split(REGEX_OF_LLAMA_3)),
    "qwen2": lambda: byte_level(split(REGEX_OF_LLAMA_3.replace("{1,3}", ""))),
    "tekken": lambda: byte_level(split(REGEX_OF_TEKKEN), ignore_merges=True),
    "deepseek-v3": lambda: byte_level([
        *split(r"\p{N}{1,3}"), *split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),  # with the characters themselves
        *split(PRE_TOKENIZERS["deepseek-v3"][2]),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("rule", PUBLISHED)
def test_the_rule_of_a_byte_level_tokenizer_is_found(tmp_path, rule):
    ours = PUBLISHED[rule]()
    metadata = metadata_of(ours)
    assert metadata["tokenizer.ggml.pre"] == rule
    texts = [text for text in GGUF_TEXTS if "\u017f" not in text and not (rule == "tekken" and has_case_or_marks(text))]
    assert ids_differ(metadata, tmp_path / "x.gguf", ours, texts) == []


@pytest.mark.parametrize("name", sorted(RULE_OF))
def test_every_rule_comes_back_under_a_name_of_its_own(name):
    original = byte_level_metadata() | {"tokenizer.ggml.pre": name}
    ours = from_gguf_metadata(original)
    written = metadata_of(ours)
    assert RULE_OF[written["tokenizer.ggml.pre"]] == RULE_OF[name]
    for key in KEYS[2:7]:
        assert written[f"tokenizer.ggml.{key}"] == original[f"tokenizer.ggml.{key}"], key
    again = from_gguf_metadata(written)
    assert again.encode_batch(GGUF_TEXTS) == ours.encode_batch(GGUF_TEXTS)
    assert (again.adds_bos, again.eos_ids) == (ours.adds_bos, ours.eos_ids)


def test_a_normalizer_that_llama_cpp_leaves_out_is_told():
    with pytest.warns(RuntimeWarning, match="NFC"):
        metadata = metadata_of(byte_level(split(REGEX_OF_LLAMA_3), normalizer=NFC))
    assert metadata["tokenizer.ggml.pre"] == "dbrx"


# Tokenizers like sentencepiece's


def sentencepiece_like(prefix: bool) -> tuple[Tokenizer, dict]:
    """A sentencepiece model, and the tokenizer.json of it as JSON."""
    original = foreign_model() if prefix else stdlib_tokenizer(600)
    return original, json.loads(sentencepiece_files(original.model_proto)["tokenizer.json"])


def loaded(state: dict, **settings) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.from_json(json.dumps(state), **{"bos_id": 1, "eos_id": 2, "unk_id": 0, **settings})


@pytest.mark.parametrize("spaces", ["normalizer", "pre-tokenizer"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_like_sentencepiece_s(tmp_path, prefix, spaces):
    original, state = sentencepiece_like(prefix)
    if spaces == "pre-tokenizer":  # as transformers writes those that are not "legacy"
        scheme = "first" if prefix else "never"
        state["normalizer"] = None
        state["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme,
            "split": False,
        }
    ours = loaded(state)
    texts = GGUF_TEXTS
    if prefix and spaces == "pre-tokenizer":
        texts = [text for text in texts if not text.startswith(" ")]
        with pytest.warns(RuntimeWarning, match="begin with one get other ids"):
            written = vocabulary_of(ours, ours.vocab_size + 1)
    else:
        written = vocabulary_of(ours, ours.vocab_size + 1)
    direct = vocabulary_of(original, ours.vocab_size + 1)
    for key in (
        "model",
        "tokens",
        "token_type",
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "add_space_prefix",
    ):
        assert written[f"tokenizer.ggml.{key}"] == direct[f"tokenizer.ggml.{key}"], key
    assert len(texts) > 300
    with vocabulary(tmp_path / "x.gguf", written) as theirs:
        assert [text for text in texts if theirs.tokenize(text) != ours.encode(text)] == []
        assert [text for text in texts if theirs.tokenize(text) != original.encode(text)] == []


def test_pieces_that_a_user_added(tmp_path):
    _, state = sentencepiece_like(True)
    size = len(state["model"]["vocab"])
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    state["added_tokens"] += [
        {"id": size, "content": "<tool>", "special": False, **token},
        {"id": size + 1, "content": "<|im_end|>", "special": True, **token},
    ]
    state["model"]["vocab"]["qqqqq"] = size + 3  # and nothing has the id between
    ours = loaded(state)
    metadata = metadata_of(ours)
    assert sorted(metadata["tokenizer.ggml.token_type"][size:]) == [1, 3, 4, 5]
    with vocabulary(tmp_path / "x.gguf", metadata) as theirs:
        for text in ("a <tool> b", "<tool>", "x<tool>y", "no tool"):
            assert theirs.tokenize(text) == ours.encode(text), text
        assert theirs.tokenize("a<|im_end|>", parse_special=True) == ours.encode("a<|im_end|>", special=True)


# What is refused


def changed(change, prefix: bool = True) -> HuggingFaceTokenizer:
    _, state = sentencepiece_like(prefix)
    change(state)
    return loaded(state)


def added(**flags) -> HuggingFaceTokenizer:
    backend = tokenizers.Tokenizer.from_str(byte_level([], last=with_regex).files()["tokenizer.json"].decode())
    backend.add_special_tokens([AddedToken("<mask>", **flags)])
    return HuggingFaceTokenizer(backend)


def merge_apart(state: dict) -> None:
    merges = state["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    double = next(i for i in range(len(made) - 2) if made[i] == made[i + 1] != made[i + 2])
    merges.insert(double + 2, merges.pop(double + 1))
    merges.insert(double + 3, merges.pop(double + 1))


def unigram() -> HuggingFaceTokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0), ("\u2581", -2.0)], 0, False))
    backend.decoder = tokenizers.decoders.Metaspace("\u2581", "first")
    return HuggingFaceTokenizer(backend)


REFUSED = {
    "of the kind Unigram": unigram,
    "'<mask>' has lstrip": lambda: added(lstrip=True),
    "'<mask>' has single_word": lambda: added(single_word=True),
    r"cuts texts into words by \p{L}+, a rule without a name": lambda: byte_level(split(r"\p{L}+")),
    "for which llama.cpp has no rule": lambda: byte_level([pre_tokenizers.Whitespace()]),
    '"add_prefix_space": true': lambda: byte_level([], last=ByteLevel(add_prefix_space=True)),
    '"Lowercase"': lambda: byte_level([], last=with_regex, normalizer=normalizers.Lowercase()),
    "'Ġunreachable'": lambda: changed_byte_level(),
    "does not merge": BACKENDS["llama"],
    "has the part": lambda: changed(lambda state: state["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})),
    "spaces as U+2581": lambda: changed(lambda state: state["normalizer"].update(normalizers=[])),
    "leaves it there": lambda: changed(lambda state: state["normalizer"]["normalizers"].pop(0)),
    "no piece <0x41> for a byte": lambda: changed(lambda state: rename(state, "<0x41>", "other")),
    "do not stand together": lambda: changed(merge_apart),
}


def changed_byte_level() -> HuggingFaceTokenizer:
    """A word that is a piece and that no merges make, where words that are pieces stay whole and no rule says so."""
    ours = byte_level([], last=with_regex, ignore_merges=True)
    state = json.loads(ours.files()["tokenizer.json"])
    state["model"]["vocab"]["\u0120unreachable"] = ours.vocab_size
    return HuggingFaceTokenizer.from_json(json.dumps(state))


def rename(state: dict, old: str, new: str) -> None:
    state["model"]["vocab"][new] = state["model"]["vocab"].pop(old)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llama_cpp_would_run_differently_is_refused(reason):
    ours = REFUSED[reason]()
    if not isinstance(ours, HuggingFaceTokenizer):
        ours = HuggingFaceTokenizer(ours, unk_id=0)
    message = "' unreachable'" if "unreachable" in reason else reason
    with pytest.raises(
        ValueError, match=f"cannot be written into a GGUF file: .*{re.escape(message)}.*; export without"
    ):
        metadata_of(ours)
