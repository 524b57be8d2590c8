"""bitnet.tokenizer: exact round trips, streaming, training limits, foreign files."""

from __future__ import annotations

import pickle
import random
from itertools import pairwise

import pytest

from bitnet.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from bitnet.tokenizer.sentencepiece import _blocks, _sample_blocks
from tests.vocabularies import NASTY, foreign_model, random_texts, stdlib_text

PROSE = "The quick brown fox, aged 12, jumped.\n\n\tIt said: “naïve café”.\r\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([PROSE * 20, stdlib_text()], 600)


def test_special_ids_and_size(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, None)
    assert tokenizer.vocab_size == 600
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_round_trip_of_nasty_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert ids == tokenizer._sp.encode(text)
    assert not {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)  # text never makes special tokens


def test_round_trip_of_random_unicode(tokenizer):
    texts = random_texts(seed=0, count=500)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts, threads=2)] == [
        text.replace("\u2581", " ") for text in texts
    ]


def test_no_space_is_invented(tokenizer):
    assert tokenizer.adds_space_prefix is False
    assert tokenizer.encode("a") != tokenizer.encode(" a")
    first, second = "some words", " and more words"
    assert tokenizer.encode(first) + tokenizer.encode(second) == tokenizer.encode(first + second)


def test_encode_adds_bos_and_eos_on_request(tokenizer):
    plain = tokenizer.encode("hello")
    assert tokenizer.encode("hello", bos=True) == [1, *plain]
    assert tokenizer.encode("hello", eos=True) == [*plain, 2]
    assert tokenizer.encode("", bos=True, eos=True) == [1, 2]
    assert tokenizer.decode([1, *plain, 2]) == "hello"


def test_cutting_long_texts_does_not_change_the_ids(tokenizer):
    text = stdlib_text()
    assert len(text) > 20_000
    assert tokenizer.encode(text) == tokenizer._sp.encode(text)
    assert tokenizer.encode_batch([text, "", "x"], threads=4) == [tokenizer._sp.encode(text), [], tokenizer.encode("x")]
    assert tokenizer.encode_batch([]) == []


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    for bad in (-1, 600, 10**6):
        with pytest.raises(ValueError, match=rf"token id {bad} .*0 to 599"):
            tokenizer.decode([5, bad])


def test_lone_surrogate_is_a_clear_error(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("bad \ud800 text")
    with pytest.raises(ValueError, match="surrogate"):
        train_tokenizer(["bad \ud800 text"], 300)


def test_one_text_where_a_list_is_due_is_refused(tokenizer):
    with pytest.raises(TypeError, match="encode_batch takes a list"):
        tokenizer.encode_batch("abc")
    with pytest.raises(TypeError, match="iterable of texts"):
        train_tokenizer("abc", 300)


@pytest.mark.parametrize("text", NASTY[:16], ids=range(16))
def test_stream_equals_decode_for_text(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in tokenizer.encode(text, bos=True)) + stream.flush() == text.replace(
        "\u2581", " "
    )


def test_stream_holds_back_unfinished_characters(tokenizer):
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4  # byte fallback
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "", "\U0001f600"]
    assert stream.flush() == ""
    assert [stream.push(i) for i in ids[:2]] == ["", ""]
    assert stream.flush() == tokenizer.decode(ids[:2]) == "\ufffd"
    assert stream.push(tokenizer.encode("a")[0]) == "a"  # flush left nothing behind


def test_stream_equals_decode_for_random_ids(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        few = rng.choice((tokenizer.vocab_size, 259))  # special tokens and bytes only: mostly invalid UTF-8
        ids = [rng.randrange(few) for _ in range(rng.randrange(20))]
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_model_with_space_prefix_round_trips_and_streams():
    llama_like = foreign_model()
    assert llama_like.adds_space_prefix
    long_text = stdlib_text()[:30_000]
    for text in [*NASTY[:14], " two  spaces", long_text]:
        ids = llama_like.encode(text)
        assert ids == llama_like._sp.encode(text)
        assert llama_like.decode(ids) == text == llama_like._sp.decode(ids)
        stream = StreamDecoder(llama_like)
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_model_with_normalization_encodes_as_sentencepiece_does():
    nfkc = foreign_model(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    for text in ("  a  \ufb01 b ", "word " * 3000, "\u2581 x"):
        assert nfkc.encode(text) == nfkc._sp.encode(text)


def test_unsplit_whitespace_pieces_are_not_cut():
    crossing = foreign_model(split_by_whitespace=False, add_dummy_prefix=False)
    assert any("\u2581" in crossing.id_to_piece(i)[1:] for i in range(crossing.vocab_size))
    text = stdlib_text()[:20_000]
    assert crossing.encode(text) == crossing._sp.encode(text)


def test_model_without_bos_is_refused():
    with pytest.raises(ValueError, match=r"bos_id -1.*train_tokenizer"):
        foreign_model(bos_id=-1)


def test_save_load_pickle(tokenizer, tmp_path):
    path = tmp_path / "new" / "folder" / "tok.model"
    tokenizer.save(path)
    tokenizer.save(path)  # over an existing file
    assert [p.name for p in path.parent.iterdir()] == ["tok.model"]
    text = NASTY[7]
    for again in (
        Tokenizer.load(path),
        Tokenizer.load(str(path)),
        Tokenizer.from_bytes(tokenizer.model_proto),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(text) == tokenizer.encode(text)


def test_failed_save_keeps_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tok.model"
    path.write_bytes(b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("bitnet.files.os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["tok.model"]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 300, b"PK\x03\x04" * 50, b"\x08\x01"])
def test_corrupt_model_names_path_and_remedy(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model' is not a sentencepiece model.*train_tokenizer"):
        Tokenizer.load(path)


def test_truncated_model_is_refused(tokenizer, tmp_path):
    path = tmp_path / "cut.model"
    path.write_bytes(tokenizer.model_proto[: len(tokenizer.model_proto) // 2])
    with pytest.raises(ValueError, match=r"cut\.model"):
        Tokenizer.load(path)


def test_missing_model_and_folder(tmp_path):
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(ValueError, match="there is no tokenizer file"):
            Tokenizer.load(path)


def test_training_is_deterministic_and_silent(capfd):
    texts = [PROSE * 50, stdlib_text()[:50_000]]
    one, two = (train_tokenizer(iter(texts), 400) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != train_tokenizer(texts, 401).fingerprint
    pieces = [one.id_to_piece(i) for i in range(400)]
    single = train_tokenizer(texts, 400, threads=1)
    assert [single.id_to_piece(i) for i in range(400)] == pieces
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_training_learns_newlines_and_indentation():
    tokenizer = train_tokenizer([stdlib_text()], 1000)
    pieces = {tokenizer.id_to_piece(i) for i in range(1000)}
    assert "\u2581" * 4 in pieces
    assert "\u2581" * 8 in pieces
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) and "0x" not in piece for piece in pieces)


def test_vocabulary_too_large_names_a_size_that_works():
    texts = [PROSE * 20]
    with pytest.raises(
        ValueError, match=r"vocab_size 50000 is too large.*largest that works is \d+.*more text"
    ) as error:
        train_tokenizer(texts, 50_000)
    largest = int(str(error.value).split("largest that works is ")[1].split(";")[0])
    assert train_tokenizer(texts, largest).vocab_size == largest
    with pytest.raises(ValueError, match="too large"):
        train_tokenizer(texts, largest + 1)


def test_vocabulary_too_small_names_a_size_that_works():
    texts = [stdlib_text()]
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small.*need \d+") as error:
        train_tokenizer(texts, 100)
    needed = int(str(error.value).split("need ")[1].split(";")[0])
    assert train_tokenizer(texts, needed).vocab_size == needed
    with pytest.raises(ValueError, match="vocab_size is 0"):
        train_tokenizer(texts, 0)


@pytest.mark.parametrize("texts", [[], [""], ["  \n\t ", "\n"]])
def test_training_on_nothing(texts):
    with pytest.raises(ValueError, match="holds no text"):
        train_tokenizer(texts, 300)


def test_training_survives_reserved_characters():
    texts = ["a \x00 b \u2581 c \u2585 d\n" * 200 + stdlib_text()[:20_000]]
    tokenizer = train_tokenizer(texts, 400)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0].replace("\u2581", " ")


def test_blocks_join_to_the_text():
    for text in (stdlib_text(), "x" * 10_000, "word " * 5000, ""):
        blocks = list(_blocks(text))
        assert "".join(blocks) == text
        assert all(0 < len(block) <= 4000 for block in blocks)


def test_sample_is_bounded_even_and_deterministic():
    consumed = 0

    def texts():
        nonlocal consumed
        for i in range(2000):
            consumed += 1
            yield f"{i:06d}" * 100

    sample = _sample_blocks(texts(), 60_000)
    assert consumed == 2000
    assert 30_000 <= sum(map(len, sample)) <= 60_000
    numbers = [int(block[:6]) for block in sample]
    steps = {b - a for a, b in pairwise(numbers)}
    assert numbers[0] < 50
    assert numbers[-1] > 1900
    assert max(steps) <= 2 * min(steps)
    assert sample == _sample_blocks(texts(), 60_000)
    assert len(_sample_blocks(["abc"], 1)) == 1
    with pytest.raises(ValueError, match="max_bytes is 0"):
        _sample_blocks(["abc"], 0)
