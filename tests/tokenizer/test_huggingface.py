"""tokenizer.json tokenizers against transformers' own loading of the same folders."""

import json
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bitnet.tokenizer import HuggingFaceTokenizer, StreamDecoder, Tokenizer, from_gguf_metadata, load_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles
from tests.vocabularies import (
    BACKENDS,
    NASTY,
    byte_level,
    byte_level_metadata,
    foreign_model,
    random_texts,
    stdlib_text,
    stdlib_tokenizer,
)

TEXTS = [*NASTY, *random_texts(7, 100), stdlib_text()[:5000]]


@pytest.fixture(scope="module", params=BACKENDS)
def folder(request, tmp_path_factory):
    """A folder as transformers writes it, and its own tokenizer."""
    transformers = oracles.require("transformers")
    backend = BACKENDS[request.param]()
    path = tmp_path_factory.mktemp("hf")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.save_pretrained(path)
    # Not transformers' rewriting of the backend but the file as it is, which is what both now read.
    backend.save(str(path / "tokenizer.json"))
    return path, transformers.PreTrainedTokenizerFast.from_pretrained(path)


def test_ids_and_texts_are_those_of_transformers(folder):
    path, theirs = folder
    ours = load_tokenizer(path)
    assert isinstance(ours, HuggingFaceTokenizer)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)
    assert ours.adds_bos == (theirs("a").input_ids[0] == ours.bos_id)
    assert not any(ours.encode(text) != load_tokenizer(path / "tokenizer.json").encode(text) for text in TEXTS[:5])
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=True) == expected
        if not any(special in text for special in ours.specials):
            assert ours.encode(text) == expected
        decoded = theirs.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(expected) == decoded
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, expected)) + stream.flush() == decoded
    threads = ours.encode_batch(TEXTS, threads=2)
    assert threads == ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


def test_random_ids_stream_as_they_decode(folder):
    ours = load_tokenizer(folder[0])
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(20))]
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


def test_special_tokens_count_only_when_asked(folder):
    ours = load_tokenizer(folder[0])
    text = "a</s> b<s>"
    assert not {ours.bos_id, ours.eos_id} & set(ours.encode(text))
    if "metaspace" not in str(ours._backend.decoder).lower():  # which has no token for "<"
        assert ours.decode(ours.encode(text)) == text
    ids = ours.encode(text, special=True)
    assert (ids.count(ours.bos_id), ids.count(ours.eos_id)) == (1, 1)
    assert not {ours.bos_id, ours.eos_id} & set(ours.encode(text))  # asking has left nothing behind
    assert ours.encode("a", bos=True, eos=True) == [ours.bos_id, *ours.encode("a"), ours.eos_id]
    assert ours.decode([ours.bos_id, ours.eos_id]) == ""


def test_save_pickle_and_fingerprint(folder, tmp_path):
    ours = load_tokenizer(folder[0])
    again = pickle.loads(pickle.dumps(ours))
    ours.save(tmp_path / "new" / "tokenizer.json")
    saved = load_tokenizer(tmp_path / "new" / "tokenizer.json")
    text = NASTY[7]
    assert ours.encode(text) == again.encode(text) == saved.encode(text)
    assert ours.fingerprint == again.fingerprint
    assert (again.eos_ids, again.adds_bos) == (ours.eos_ids, ours.adds_bos)
    assert load_tokenizer(folder[0]).fingerprint == ours.fingerprint


def files(path, backend, **contents) -> HuggingFaceTokenizer:
    backend.save(str(path / "tokenizer.json"))
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return HuggingFaceTokenizer.load(path)


def test_where_the_special_tokens_are_named(tmp_path):
    backend = byte_level(False)
    ours = files(tmp_path, backend)
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (None, None, False)
    assert ours.eos_ids == (2,)  # <|im_end|>, by its name
    assert ours.encode("a", bos=True, eos=True) == ours.encode("a")
    ours = files(tmp_path, backend, config={"eos_token_id": 1, "bos_token_id": 0})
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (0, 1, (1, 2))
    ours = files(tmp_path, backend, generation_config={"eos_token_id": [3, 1]})
    assert (ours.eos_id, ours.eos_ids) == (3, (3, 1, 2))
    ours = files(tmp_path, backend, special_tokens_map={"eos_token": "</s>", "pad_token": {"content": "<pad>"}})
    assert (ours.eos_id, ours.pad_id, ours.eos_ids) == (1, 3, (1, 3, 2))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "add_bos_token": True}
    ours = files(tmp_path, backend, tokenizer_config=config)
    assert (ours.eos_id, ours.bos_id, ours.adds_bos) == (2, None, False)
    ours = files(tmp_path, backend, tokenizer_config={"bos_token": "<s>", "add_bos_token": True})
    assert (ours.bos_id, ours.adds_bos) == (0, True)


def test_threads_share_a_tokenizer():
    ours = HuggingFaceTokenizer(byte_level(True), eos_id=2)
    text = "a <|im_end|> b " * 20
    wanted = {special: ours.encode(text, special=special) for special in (True, False)}
    assert wanted[True] != wanted[False]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(n % 2 == 0, pool.submit(ours.encode, text, special=n % 2 == 0)) for n in range(400)]
    assert all(job.result() == wanted[special] for special, job in jobs)


def test_truncation_and_padding_of_a_file_do_not_apply(tmp_path):
    backend = byte_level(True)
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    ours = files(tmp_path, backend)
    assert ours.decode(ours.encode("more than four tokens, surely")) == "more than four tokens, surely"
    assert ours.encode("") == []


def test_folders_and_files_are_told_apart(tmp_path):
    model = stdlib_tokenizer(400)
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    model.save(tmp_path / "tokenizer.model")
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert isinstance(load_tokenizer(path), Tokenizer)
    byte_level(False).save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)
    with pytest.raises(ValueError, match=r"no tokenizer file .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_sentencepiece_model_parses_special_tokens_when_asked():
    for model in (foreign_model(), stdlib_tokenizer(400)):
        assert model.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}
        hello, more = model.encode("hello"), model.encode(" more")
        assert model.encode("<s>hello</s> more", special=True) == [1, *hello, 2, *more]
        assert model.encode("<s>", special=True) == [1]
        assert model.encode("", special=True) == []
        assert not {1, 2} & set(model.encode("<s>hello</s>"))
        ended = Tokenizer(model.model_proto, adds_bos=False, ends=(7,))
        again = pickle.loads(pickle.dumps(ended))
        assert (again.eos_ids, again.adds_bos) == ((2, 7), False)


def test_errors_name_the_file_and_the_remedy(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"[1]", b"\xff", b'{"model": {"type": "BPE"}}', b"null", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    wordpiece = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"decodes with WordPiece; byte-level"):
        files(tmp_path, wordpiece)
    with pytest.raises(ValueError, match="decodes with None"):
        files(tmp_path, tokenizers.Tokenizer(models.BPE({"a": 0}, [])))
    far = tokenizers.Tokenizer(models.BPE({"a": 4_000_000_000, "b": 1}, []))
    far.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="2 tokens and ids up to 4000000000"):
        HuggingFaceTokenizer(far)
    with pytest.raises(ValueError, match="bos_id is 100000"):
        files(tmp_path, byte_level(False), config={"bos_token_id": 100_000})
    ours = byte_level(False)
    ours = HuggingFaceTokenizer(ours)
    with pytest.raises(ValueError, match="surrogate"):
        ours.encode("bad \ud800 text")
    with pytest.raises(TypeError, match="encode_batch takes a list"):
        ours.encode_batch("abc")
    for bad in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            ours.id_to_piece(bad)


def test_mutated_files_give_our_errors_only(tmp_path):
    text = byte_level(True).to_str().encode()
    rng = random.Random(0)
    path = tmp_path / "tokenizer.json"
    head = text[: text.index(b'"vocab"')]
    for _ in range(150):
        data = bytearray(text)
        for _ in range(rng.choice((1, 3, 10))):
            place = rng.randrange(rng.choice((len(head), len(text))))
            if rng.random() < 0.5:
                data[place] = rng.randrange(256)
            else:
                del data[place : place + rng.choice((1, 2, 40))]
        path.write_bytes(data)
        try:
            ours = load_tokenizer(path)
            ours.decode(ours.encode("some text <s> \u00e9", special=True))
        except ValueError:
            pass


@pytest.mark.parametrize("family", ["ByteLevel", "Metaspace", "Prepend"])
@pytest.mark.parametrize("puts", [False, True])
def test_a_prefix_that_two_files_contradict_each_other_on(tmp_path, family, puts):
    backend = byte_level(False)
    if family == "ByteLevel":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=puts)])
    else:
        marks = [normalizers.Prepend("\u2581")] * puts + [normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(marks) if family == "Prepend" else None
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="first" if puts else "never", split=False)
        backend.pre_tokenizer = metaspace if family == "Metaspace" else None
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in ({}, {"add_prefix_space": puts}, {"add_prefix_space": None}):
            files(tmp_path, backend, tokenizer_config={"tokenizer_class": "LlamaTokenizer", **config})
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": not puts}
        files(tmp_path, backend, tokenizer_config=config)
    said = f"puts {'a' if puts else 'no'} space in front .* is {str(not puts).lower()}: some readers go by that"
    with pytest.warns(RuntimeWarning, match=said):
        files(tmp_path, backend, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": not puts})


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", ["sentencepiece", "GGUF"])
def test_transformers_begins_a_text_as_we_do(transformers, tmp_path, kind, adds_bos):
    """By the files that are written of a tokenizer without a tokenizer.json."""
    if kind == "GGUF":
        ours = from_gguf_metadata(
            byte_level_metadata() | {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": adds_bos}
        )
        written = ours.files()
    else:
        ours = Tokenizer(stdlib_tokenizer(512).model_proto, adds_bos=adds_bos)
        written = sentencepiece_files(ours)
    folder = tmp_path / "written"
    folder.mkdir()
    for name, content in written.items():
        (folder / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("", "hello world", "<s>"):
        assert theirs(text).input_ids == ours.encode(text, bos=adds_bos, special=theirs.split_special_tokens is False)
    assert load_tokenizer(folder).adds_bos == adds_bos


def test_added_tokens_without_a_row_are_left_out(tmp_path):
    """As in a first release of Llama 2, whose <pad> no model has a row for."""
    backend = byte_level(False)
    size = backend.get_vocab_size()
    backend.add_special_tokens(["<pad2>", "<pad3>"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = files(tmp_path, backend)
    assert whole.vocab_size == size + 2
    with pytest.warns(RuntimeWarning, match="adds <pad3>, for which the model has no rows: left out"):
        ours = files(tmp_path, backend, config={"vocab_size": size + 1})
    assert ours.vocab_size == size + 1
    assert ours.encode("a<tool>b<pad2>", special=True) == whole.encode("a<tool>b<pad2>", special=True)
    assert ours.encode("<pad3>", special=True) == whole.encode("<pad3>")
    with pytest.warns(RuntimeWarning, match="adds <tool>, <pad2>, <pad3>"):  # of another model, which is said later
        ours = files(tmp_path, backend, config={"vocab_size": 5})
    assert ours.vocab_size == backend.get_vocab_size(with_added_tokens=False)
