"""Tokens that other files of a folder add to a tokenizer: transformers' ids, from whichever of the files they come."""

import io
import json
import pickle

import pytest
import sentencepiece

from bitnet.tokenizer import HuggingFaceTokenizer, Tokenizer, find_chat_template, from_gguf_metadata, load_tokenizer
from bitnet.tokenizer.gguf_write import vocabulary
from bitnet.tokenizer.json_write import sentencepiece_files
from bitnet.tokenizer.proto import USER_DEFINED
from tests import oracles
from tests.conversations import CHATML, chat
from tests.vocabularies import CHAT_TEXT

SIZE, ROWS = 320, 330
END, START, PLAIN = "<|im_end|>", "<|im_start|>", "<tool>"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TEXTS = [
    f"{START}user\nhello world{END}\n{START}assistant\n", f"hello {PLAIN} world{PLAIN}it", f"{PLAIN}hello{END}",
    "plain words, no tokens", f"  two {END}  spaces", f"{END}{END} x",
]  # fmt: skip
FILES = {
    "added_tokens.json": {
        "added_tokens.json": {END: 320, START: 321, PLAIN: 322}, "tokenizer_config.json": {"eos_token": END},
    },
    "added_tokens_decoder": {"tokenizer_config.json": {"eos_token": END, "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True, **FLAGS}, "1": {"content": "<s>", "special": True, **FLAGS},
        "2": {"content": "</s>", "special": True, **FLAGS}, "322": {"content": PLAIN, "special": False, **FLAGS},
        "320": {"content": END, "special": True, **FLAGS}, "321": {"content": START, "special": True, **FLAGS},
    }}},
    "special_tokens_map.json": {
        "special_tokens_map.json": {"eos_token": {"content": END, **FLAGS}, "additional_special_tokens": [START]},
        "added_tokens.json": {END: 320, START: 321, PLAIN: 322}, "tokenizer_config.json": {},
    },
    "names only": {"tokenizer_config.json": {
        "eos_token": END, "pad_token": "<pad>", "additional_special_tokens": [START, PLAIN],
    }},
    "extra": {"tokenizer_config.json": {"eos_token": END, "extra_special_tokens": [START, PLAIN]}},
    "a named one": {"tokenizer_config.json": {"eos_token": END, "image_token": START}},
    "objects": {"tokenizer_config.json": {
        "eos_token": {"__type": "AddedToken", "content": END, "special": True, **FLAGS},
    }},
    "a piece that is there": {"tokenizer_config.json": {"eos_token": "</s>"}},
}  # fmt: skip


def model(prefix: bool) -> bytes:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CHAT_TEXT] * 20), model_writer=stream, model_type="bpe", vocab_size=SIZE,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        add_dummy_prefix=prefix, minloglevel=3,
    )  # fmt: skip
    return stream.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[bool, bytes]:
    return {prefix: model(prefix) for prefix in (False, True)}


def folder_of(path, proto: bytes, files: dict, **settings):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(proto)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": ROWS}))
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).vocab_size()
    for name, content in files.items():
        shifted = {k: v - SIZE + size if v >= SIZE else v for k, v in content.items()} if name[0] == "a" else content
        if "added_tokens_decoder" in content:
            decoder = content["added_tokens_decoder"].items()
            moved = {str(int(i) - SIZE + size if int(i) >= SIZE else i): token for i, token in decoder}
            shifted = content | {"added_tokens_decoder": moved}
        extra = {"tokenizer_class": "LlamaTokenizer", **settings} if name == "tokenizer_config.json" else {}
        (path / name).write_text(json.dumps(shifted | extra))
    return path


def theirs(path):
    return oracles.require("transformers").AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("legacy", [False, True])
def test_ids_are_those_of_transformers(tmp_path, models, name, legacy):
    files = FILES[name]
    if name == "a piece that is there":
        plain = Tokenizer(models[True])
        piece = next(i for i in range(259, plain.vocab_size) if "\u2581" not in plain.id_to_piece(i))
        files = files | {"added_tokens.json": {plain.id_to_piece(piece): piece}}
    path = folder_of(tmp_path / "m", models[True], files, legacy=legacy)
    ours, other = load_tokenizer(path), theirs(path)
    assert ours.vocab_size == len(other)
    assert ours.eos_id == other.eos_token_id
    assert ours.pad_id == other.pad_token_id
    special = {token.content for token in other.added_tokens_decoder.values() if token.special}
    assert set(ours.specials) >= special
    # Control pieces, what ends a turn, and what a list calls special are so here, whatever other lists say.
    assert set(ours.specials) - special <= {"</s>", "<s>", "<unk>", END, START}
    for text in TEXTS:
        spaced = any(f"{one} " in text for one in ours.specials) or any(one in text for one in ours._apart)
        if text.startswith(" ") or (legacy and spaced):
            continue  # there sentencepiece and Metaspace place the space otherwise
        assert ours.encode(text, special=True) == other(text, add_special_tokens=False).input_ids, text
    again = pickle.loads(pickle.dumps(ours))
    assert [again.encode(t, special=True) for t in TEXTS] == [ours.encode(t, special=True) for t in TEXTS]


def test_a_chat_prompt_of_a_model_without_a_prefix(tmp_path, models):
    path = folder_of(tmp_path / "m", models[False], FILES["added_tokens.json"], chat_template=CHATML)
    ours, other = load_tokenizer(path), theirs(path)
    template = find_chat_template(path, ours)
    messages = chat("hello world", "hi", "and?")
    text = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.encode(messages) == [ours.bos_id, *other(text, add_special_tokens=False).input_ids]
    assert ours.eos_ids[0] == ours.specials[END]
    assert ours.decode(ours.encode(TEXTS[0], special=True)) == f"{START}user\nhello world\n{START}assistant\n"


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", ["added_tokens.json", "added_tokens_decoder", "names only"])
def test_exports_carry_them(tmp_path, models, name, prefix):
    ours = load_tokenizer(folder_of(tmp_path / "m", models[prefix], FILES[name]))
    texts = [t for t in TEXTS if not t.startswith(" ")]
    wanted = [ours.encode(text, special=True) for text in texts]
    # A Hugging Face folder, read by us and by transformers.
    for file, content in sentencepiece_files(ours, chat=True).items():
        (tmp_path / file).write_bytes(content)
    written, other = load_tokenizer(tmp_path), theirs(tmp_path)
    assert isinstance(written, HuggingFaceTokenizer)
    assert [written.encode(text, special=True) for text in texts] == wanted
    assert [other(text, add_special_tokens=False).input_ids for text in texts] == wanted
    assert written.eos_id == other.eos_token_id == ours.eos_id
    assert written.specials == ours.specials
    # A run's folder.
    (tmp_path / "run").mkdir()
    for file, content in ours.files().items():
        (tmp_path / "run" / file).write_bytes(content)
    assert [load_tokenizer(tmp_path / "run", own=True).encode(text, special=True) for text in texts] == wanted
    # A GGUF file, in which every special token has a space behind it if any text has one.
    metadata = vocabulary(ours, ROWS)
    read = from_gguf_metadata(metadata)
    assert set(read.eos_ids) == set(ours.eos_ids)
    assert {text: i for text, i in read.specials.items() if not text.startswith("[PAD")} == ours.specials
    assert read.eos_id == ours.eos_id
    if not prefix:
        assert [read.encode(text, special=True) for text in texts] == wanted
    kinds = metadata["tokenizer.ggml.token_type"]
    assert [metadata["tokenizer.ggml.tokens"][i] for i, kind in enumerate(kinds) if kind == USER_DEFINED] == [
        piece for piece in (START, PLAIN) if piece not in ours.specials
    ]


def test_what_does_not_fit_together(tmp_path, models):
    def opened(files, **settings):
        return load_tokenizer(folder_of(tmp_path / "m", models[False], files, **settings))

    config = {"tokenizer_config.json": {}}
    with pytest.raises(ValueError, match=r"'<x>' has the id 32\d there, and 32\d by the pieces"):
        opened({"added_tokens.json": {"<x>": SIZE + 5}, **config})
    with pytest.raises(ValueError, match="'<x>' has the id 5 there"):
        opened({"added_tokens.json": {"<x>": 5}, **config})
    strips = {"content": "<x>", "special": True, **FLAGS, "rstrip": True}
    with pytest.raises(ValueError, match=r"'<x>' takes the spaces around it"):
        opened({"tokenizer_config.json": {"added_tokens_decoder": {str(SIZE): strips}}})
    for damaged in ({"<x>": "5"}, {"<x>": -1}, {"<x>": True}, {"<x>": None}):
        (tmp_path / "m" / "added_tokens.json").write_text(json.dumps(damaged))
        (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"added_tokens\.json gives the token '<x>'"):
            load_tokenizer(tmp_path / "m")
    (tmp_path / "m" / "added_tokens.json").unlink()
    for damaged in (
        [],
        {"x": {}},
        {"5": 7},
        {"5": {"content": 1}},
        {"5": {"content": "a", "special": "yes"}},
        {"5": "\ud800"},
    ):
        (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": damaged}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            load_tokenizer(tmp_path / "m")


def test_tokens_that_the_model_has_no_rows_for_are_left_out(tmp_path, models):
    path = folder_of(tmp_path / "m", models[False], FILES["names only"])
    size = Tokenizer(models[False]).vocab_size
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size + 1}))
    assert load_tokenizer(path).vocab_size == size + 1
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size}))
    plain = load_tokenizer(path)
    assert plain.vocab_size == size
    assert plain.model_proto == models[False]
    assert plain.eos_id == 2


def test_a_tokenizer_json_with_tokens_in_other_files(tmp_path, models):
    for file, content in sentencepiece_files(Tokenizer(models[True])).items():
        if file != "tokenizer.model":
            (tmp_path / file).write_bytes(content)
    size = Tokenizer(models[True]).vocab_size
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": ROWS}))
    base = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"split_special_tokens": False}
    cases = {
        "decoder": base | {"eos_token": END, "added_tokens_decoder": {
            str(size): {"content": END, "special": True, **FLAGS},
            str(size + 1): {"content": PLAIN, "special": False, **FLAGS},
        }},
        "names": base | {"eos_token": END, "pad_token": "<pad>", "additional_special_tokens": [START]},
        "of a piece": base | {"eos_token": "he"},
    }  # fmt: skip
    for name, config in cases.items():
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours, other = load_tokenizer(tmp_path), theirs(tmp_path)
        assert ours.vocab_size == len(other), name
        assert (ours.eos_id, ours.pad_id) == (other.eos_token_id, other.pad_token_id)
        for text in TEXTS:
            assert ours.encode(text, special=True) == other(text, add_special_tokens=False).input_ids, (name, text)
    wrong = {str(size + 7): {"content": END, "special": True, **FLAGS}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(base | {"added_tokens_decoder": wrong}))
    with pytest.raises(ValueError, match=rf"give the token '<\|im_end\|>' the id {size + 7}"):
        load_tokenizer(tmp_path)
