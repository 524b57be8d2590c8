"""A tokenizer.json whose expressions take any time: encoding ends, and harmless texts get the library's ids."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from bitnet.tokenizer import HuggingFaceTokenizer, encode_limited, load_tokenizer
from bitnet.tokenizer.word_rules import PRE_TOKENIZERS, is_linear
from tests.timing import within
from tests.vocabularies import byte_tokenizer

TEXT = "Hello, world! 123\n\n  <s> \u00e9\U0001f600 aaaa"
HOSTILE = {  # an expression, and a text with which it takes minutes or gives up
    "nested": (r"(a+)+$", "a" * 40 + "!"),
    "of deepseek-llm": (r"\s+$", " " * 60_000 + "x"),
    "look ahead": (r"a+(?=b)", "a" * 60_000),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in byte_tokenizer().files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def little_time(monkeypatch) -> None:
    monkeypatch.setattr(encode_limited, "SECONDS", 0.1)
    monkeypatch.setattr(encode_limited, "SECONDS_PER_MEGABYTE", 1.0)


def change(folder: Path, **parts: object) -> str:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return path.read_text()


def split(regex: str) -> dict[str, object]:
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [cut, bytes_]}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_expressions_end(folder, little_time, name):
    regex, text = HOSTILE[name]
    change(folder, pre_tokenizer=split(regex))
    tokenizer = load_tokenizer(folder)

    def refused() -> None:
        with pytest.raises(ValueError, match=r"which may take any time, and a text|fails on a text: Onig"):
            tokenizer.encode(text)

    within(0.5, refused)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_files_that_take_any_time_to_open_are_refused(folder, little_time):
    slow = {"type": "Replace", "pattern": {"Regex": r"(?:[\s\S]?[\s\S]?){9}\Z"}, "content": "x"}
    tokens = [
        {"id": 300 + i, "content": f"{i} " * 500, "special": False, "normalized": True, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for i in range(100)
    ]
    known = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder, normalizer=slow, added_tokens=known + tokens)
    with pytest.raises(ValueError, match=r"which may take any time, and the file itself"):
        load_tokenizer(folder)
    change(folder, added_tokens=known)
    load_tokenizer(folder)
    (folder / "added_tokens.json").write_text(json.dumps({t["content"]: 256 + i for i, t in enumerate(tokens)}))
    with pytest.raises(ValueError, match=r"which may take any time, and the file itself"):
        load_tokenizer(folder)


def test_words_of_any_length_are_not_cut_here(folder):
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    pieces = {"[UNK]": 0, "a": 1, "##a": 2, "<s>": 3, "</s>": 4}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": pieces}
    for most, limited in ((100, False), (10**9, True)):
        change(folder, model=model | {"max_input_chars_per_word": most}, pre_tokenizer=None, added_tokens=[])
        assert (load_tokenizer(folder)._limited is not None) == limited


def test_ids_are_the_librarys(folder):
    regex = r"\p{L}+(?=\s)"
    assert not is_linear(regex)
    text = change(folder, pre_tokenizer=split(regex))
    tokenizer, library = load_tokenizer(folder), tokenizers.Tokenizer.from_str(text)
    assert tokenizer._limited
    for special in (False, True):
        library.encode_special_tokens = not special
        assert tokenizer.encode(TEXT, special=special) == library.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode_batch([TEXT, "", "a b"], threads=2) == [tokenizer.encode(t) for t in (TEXT, "", "a b")]
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode_batch(["x", "\ud800"])
    others = [HuggingFaceTokenizer.from_json(change(folder, pre_tokenizer=split(rf"x{i}(?=\s)"))) for i in range(6)]
    for _ in range(2):  # more than the process keeps
        assert all(other.decode(other.encode(TEXT)) == TEXT for other in others)
    encode_limited.PROCESS._process.kill()
    encode_limited.PROCESS._process.wait()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_process_of_its_own(folder):
    change(folder, pre_tokenizer=split(r"\p{L}+(?=\s)"))
    code = f"""
import os
from bitnet.tokenizer import load_tokenizer
tokenizer = load_tokenizer({str(folder)!r})
tokenizer.encode("a")
child = os.fork()
for i in range(30):
    text = f"{{child}} {{i}}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


RUNS = [" ", "\n", "a", " \n", "a'"]
RUNS += [
    "A",
    "1",
    "'",
    "!",
    "\u0301",
    "\u4e2d",
    "aA",
    "Aa1",
    " a",
    "\t",
    "'s",
    "\u00a0",
    "\r",
    "!a",
    "\u02b0",
    "/",
    " !",
]


@pytest.mark.parametrize("rule", PRE_TOKENIZERS)
def test_known_rules_take_linear_time(rule):
    slow = [regex for regex in PRE_TOKENIZERS[rule] if not is_linear(regex)]
    assert slow == ([r"\s+$"] if rule == "deepseek-llm" else [])
    runs = RUNS if os.environ.get("BITNET_LONG") == "1" else RUNS[:5]
    for regex in set(PRE_TOKENIZERS[rule]) - set(slow):
        pre = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
        for run in runs:
            text = (run * 20_000)[:20_000] + "x;"
            within(0.5, partial(pre.pre_tokenize_str, text), (regex, run))  # a hundredth; as the square, some seconds


@pytest.mark.parametrize(
    ("regex", "linear"),
    [
        (r"\n", True), (" {2,}", True), (r"\p{N}", True), (r"\d{1,3}", True), (" ?[^(\\s|.,)]+|\\s+", True), ("", True),
        (r"[\[\]|]+", True), (r"a|b+|[c|d]", True), ("[0-9][0-9][0-9]", True),
        ("a{10,}", False), ("a+b", False), (".*x", False), ("a++", False), (r"(a)\1", False), ("[^a&&[b]]+", False),
        ("(?=a)", False), ("[", False), ("[[:alpha:]]+", False), ("a" * 3000, False), ("^a", False),
    ],
)  # fmt: skip
def test_what_is_known_to_be_linear(regex, linear):
    assert is_linear(regex) == linear
