"""Texts, tokenizers and vocabularies that tests of several packages share."""

import functools
import io
import json
import random
import sysconfig
import unicodedata
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitnet.tokenizer import HuggingFaceTokenizer, Tokenizer, train_tokenizer

CHAT_SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|assistant|>"]
CHAT_TEXT = (
    "user assistant system\n\nHello, how are you today? I am fine.\n- one\n- two\n1. first\n"
    "[INST] <<SYS>> <</SYS>> [/INST] is the answer to a question about cats and dogs\n"
)
GGUF_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "a b  c   d    e",
    "\n\n\n",
    "tab\tand\ttabs\t\t\n",
    "CRLF\r\nand CR\rand LF\n",
    "def f(x):\n    if x:\n        return  x\n\n\n",
    "emoji \U0001f600 family \U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1e9\U0001f1ea",
    "e\u0301 \u00e9 \ufb01 \u2460 \u00a0 \u3000 \u2003 x\u0300\u0301",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u0639\u0631\u0628\u064a \u05e2\u05d1\u05e8\u05d9\u05ea",
    "<s> </s> <unk> <pad> <0x41> <0xE2>",
    "nul \x00 bell \x07 escape \x1b del \x7f",
    "\ufeffbyte order mark, replacement \ufffd, last \U0010ffff",
    "a real \u2581 mark, \u2581\u2581two\u2581, \u2581",
    "\u2585 \u2047 reserved by sentencepiece",
    "word " * 3000,
    "x" * 7000,
    " " * 7000,
    "\u00e9" * 3000 + " " + "\U0001f600" * 1500,
]


def stdlib_text() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    return "".join((root / name).read_text(encoding="utf-8") for name in ("argparse.py", "textwrap.py", "heapq.py"))


@functools.cache
def stdlib_tokenizer(vocab_size: int) -> Tokenizer:
    """A sentencepiece tokenizer of so many pieces, trained on Python's standard library."""
    return train_tokenizer([stdlib_text()[:60_000]], vocab_size, threads=1)


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    ranges = [(0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x2000, 0x2600), (0x4E00, 0x4F00), (0xE000, 0x10FFFF)]
    texts = []
    for _ in range(count):
        low, high = rng.choice(ranges)
        texts.append("".join(rng.choice((" ", "\n", chr(rng.randrange(low, high)))) for _ in range(rng.randrange(60))))
    return texts


def foreign_model(**overrides) -> Tokenizer:
    """A model as somebody else trains it: by default LLaMA's settings, which add a space in front."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 3,
    }
    model = io.BytesIO()
    lines = stdlib_text()[:60_000].split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings, **overrides}
    )
    return Tokenizer.from_bytes(model.getvalue())


def byte_tokenizer(specials=CHAT_SPECIALS, **settings) -> HuggingFaceTokenizer:
    """Every byte a token, and the special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    ids = {"unk_id": "<unk>", "bos_id": "<s>", "eos_id": "</s>"}
    return HuggingFaceTokenizer(backend, **({k: backend.token_to_id(v) for k, v in ids.items()} | settings))


def byte_pair_tokenizer() -> HuggingFaceTokenizer:
    """A byte-level tokenizer.json with merges of its own, some of which reach over a newline."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(CHAT_SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([CHAT_TEXT, "assistant\n\n- ", "<|assistant|>\nis"] * 4, trainer)
    return HuggingFaceTokenizer(backend, bos_id=1, eos_id=2, unk_id=0)


MARK = "\u2581"


def trained(backend: tokenizers.Tokenizer, specials: list[str], alphabet: list[str]) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    backend.train_from_iterator(stdlib_text()[:60_000].splitlines(True), trainer)
    return backend


def byte_level(add_bos: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trained(backend, ["<s>", "</s>", "<|im_end|>", "<pad>"], pre_tokenizers.ByteLevel.alphabet())
    backend.add_tokens(["<tool>"])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def llama_like(prefix: bool) -> tokenizers.Tokenizer:
    """What transformers makes of a sentencepiece model, with or without the space in front."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    parts = [normalizers.Prepend(MARK)] if prefix else []
    backend.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", MARK)])
    backend.decoder = decoders.Sequence([
        decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else []),
    ])  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")  # for the training: pieces of words
    state = json.loads(trained(backend, ["<unk>", "<s>", "</s>", *byte_pieces], []).to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = state["added_tokens"][:3]  # the byte pieces are ordinary ones
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "first")
    backend.decoder = decoders.Metaspace(MARK, "first")
    return trained(backend, ["<unk>", "<s>", "</s>"], [])


BACKENDS = {
    "byte-level": lambda: byte_level(False), "byte-level, bos": lambda: byte_level(True),
    "llama, prefix": lambda: llama_like(True), "llama": lambda: llama_like(False), "metaspace": metaspace,
}  # fmt: skip
FRAGMENTS = [
    "'S", "'ll", "'RE", " ", "  ", "\n", "\r\n", "\t", "a", "B", "Zz", "\u00e9", "\u00c9", "\u00df", "\u0416", "\u0436",
    "\u4e2d", "\u3042", "\u30a2", "\ud55c", "1", "23", "4567", "\u0663", "\u00bd", "!", "?!", "...", "$", "+", "<=>",
    "`", "~", "_", "/", "\u0294", "\u0301", "\U0001f600", "\u201c", "\u2014", "\uff0c", "\u3002", "\u01c5",
    "\U0001d400", "\u0130", "\0", "z", "the", "word", "\u00aa", "\u00b2", "\u2167", "\u0928", "\u093f", "\u200d",
]  # fmt: skip


def fragments(seed: int, count: int) -> list[str]:
    """Texts that meet the borders between letters, digits, marks, symbols and spaces."""
    rng = random.Random(seed)
    return ["".join(rng.choices(FRAGMENTS, k=rng.randrange(30))) for _ in range(count)]


@functools.cache
def byte_level_metadata() -> dict:
    """A byte-level vocabulary trained without any rule, so that every rule changes the ids."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=6,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*stdlib_text()[:60_000].splitlines(True), *fragments(5, 1000)], trainer)
    model = json.loads(backend.model.__getstate__())
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*pieces, *GGUF_SPECIALS],
        "tokenizer.ggml.token_type": [1] * len(pieces) + [3, 3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(pieces),
        "tokenizer.ggml.eos_token_id": len(pieces) + 2,
    }


# As these models' own tokenizer.json writes them.
REGEX_OF_LLAMA_3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
REGEX_OF_TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|[^\\r\\n\\p{L}\\p{N}]?"
    "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def split(regex: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")]


def has_case_or_marks(text: str) -> bool:
    return any(
        unicodedata.category(c)[0] == "M" or (ord(c) > 127 and unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lm"))
        for c in text
    )


GGUF_TEXTS = [*NASTY, *fragments(0, 250), *random_texts(3, 60), stdlib_text()[:4000]]


def spaced_tokenizer(front: str, flags: dict[str, bool], limited: bool) -> HuggingFaceTokenizer:
    """One of single letters. U+2581 is a space, and stands in front of the first text ("first") or of each between
    special tokens; `flags` are those of the chat's tokens; `limited`: with an expression that may take any time."""
    letters = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "\u2581", "\n", *map(chr, range(33, 127))]
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    rules = [normalizers.Replace(tokenizers.Regex("(?:x+x+)+y$"), "")] if limited else []
    if front == "prepend":
        rules += [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(parts)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=front, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=front)
    backend.normalizer = normalizers.Sequence(rules) if rules else None
    backend.add_special_tokens([
        tokenizers.AddedToken(text, normalized=False, special=True, **(flags if text.startswith("<|") else {}))
        for text in letters[:5]
    ])  # fmt: skip
    return HuggingFaceTokenizer(backend, bos_id=1, eos_id=2)
