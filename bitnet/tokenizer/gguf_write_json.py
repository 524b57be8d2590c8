"""A tokenizer.json as GGUF metadata, such that llama.cpp gives the same ids: `metadata_of(tokenizer)`.

    tokenizer.json                          tokenizer.ggml.model
    byte-pair, ByteLevel                    gpt2     pieces, merges and the name of a rule that cuts texts into words
    byte-pair, byte_fallback, U+2581        llama    pieces and scores, as of a sentencepiece model

A rule has a name where its regular expressions are those of `bitnet/tokenizer/gguf_read.py`. In the second family
llama.cpp joins the two neighbours whose piece has the highest score, and a tokenizer.json the pair that comes first
among its merges. That is the same order if the merges that make one piece stand together and none is missing; the
scores are then their places. Whatever is not the same there is refused with the reason, and in the end the ids of both
are compared.

Two things that llama.cpp does differently with the best of models are only warned of: it does not bring texts into NFC,
and it puts a space in front of a text that begins with one, as sentencepiece does and the library's Metaspace doesn't.
"""

import json
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence

from bitnet.files import JsonObject
from bitnet.tokenizer import HuggingFaceTokenizer, from_gguf_metadata
from bitnet.tokenizer.base import END_OF_TEXT, BaseTokenizer
from bitnet.tokenizer.huggingface import SPACE_MARK
from bitnet.tokenizer.json_write import probing_texts
from bitnet.tokenizer.proto import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from bitnet.tokenizer.word_rules import GPT2_RULE, rule_names

_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def metadata_of(tokenizer: HuggingFaceTokenizer) -> JsonObject:
    """The `tokenizer.*` metadata. Raises ValueError, with the reason, for a tokenizer that llama.cpp would run
    differently."""
    state = json.loads(tokenizer.files()[tokenizer.file_name])
    model = state["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is of the kind {model['type']}, and byte-pair models can be written")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refused(f"it marks pieces with a {name}, which llama.cpp does not know")
    for token in state["added_tokens"]:
        for name in ("single_word", "lstrip", "rstrip"):
            if token[name]:
                raise _refused(f"its token {token['content']!r} has {name}, which llama.cpp does not know")
    parts = [*_steps(state["normalizer"], "normalizers"), *_steps(state["pre_tokenizer"], "pretokenizers")]
    pieces = [tokenizer.id_to_piece(i) or f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [NORMAL if tokenizer.id_to_piece(i) else UNUSED for i in range(tokenizer.vocab_size)]
    for token in state["added_tokens"]:
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    family = _sentencepiece_like if model["byte_fallback"] else _byte_level
    metadata = family(tokenizer, parts, pieces, kinds, merges, bool(model.get("ignore_merges")))
    metadata |= _special_ids(tokenizer)
    _compare(tokenizer, metadata, parts)
    return metadata


def _refused(reason: str) -> ValueError:
    return ValueError(
        f"this tokenizer.json cannot be written into a GGUF file: {reason}; export without a tokenizer, or to a "
        "Hugging Face folder"
    )


def _steps(state: JsonObject | None, inside: str) -> list[JsonObject]:
    """The parts of a normalizer or pre-tokenizer, those of a sequence one by one."""
    return [] if state is None else list(state.get(inside, [state]))


def _byte_level(
    tokenizer: HuggingFaceTokenizer,
    parts: Sequence[JsonObject],
    pieces: list[str],
    kinds: list[int],
    merges: list[tuple[str, ...]],
    whole_words: bool,
) -> JsonObject:
    if parts and parts[0]["type"] == "NFC":
        parts = parts[1:]
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise _refused(f"it ends with {parts[-1]['type'] if parts else 'nothing'}, not with ByteLevel")
    expressions = tuple(expression for part in parts for expression in _expressions(part, len(parts)))
    names = rule_names(expressions, whole_words)
    if not names:
        raise _refused(f"it cuts texts into words by {' then '.join(expressions) or 'no rule'}, a rule without a name")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.add_space_prefix": False,
    }


def _expressions(part: JsonObject, parts: int) -> Iterator[str]:
    """What one part of a pre-tokenizer cuts out, as regular expressions."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses}:
            yield from [GPT2_RULE] if uses else []
        case {"type": "Digits", "individual_digits": single}:
            yield r"\p{N}" if single else r"\p{N}+"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            yield regex
        # What an expression matches, and it matches everything: by itself the same as cutting at it.
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True} if parts == 2:
            yield regex
        case _:
            raise _refused(f"it has the part {json.dumps(part)[:200]}, for which llama.cpp has no rule")


def _sentencepiece_like(
    tokenizer: HuggingFaceTokenizer,
    parts: Sequence[JsonObject],
    pieces: list[str],
    kinds: list[int],
    merges: list[tuple[str, ...]],
    whole_words: bool,
) -> JsonObject:
    marks, prefix = False, False
    for part in parts:
        match part:
            case {"type": "Prepend", "prepend": mark} if mark == SPACE_MARK:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": mark} if mark == SPACE_MARK:
                marks = True
            case {"type": "Metaspace", "replacement": mark, "split": False} if mark == SPACE_MARK:
                marks, prefix = True, part["prepend_scheme"] != "never"
            case {"type": "Split", "pattern": {"String": " "}} if marks:
                pass  # Gemma's: there are no spaces left
            case _:
                raise _refused(f"it has the part {json.dumps(part)[:200]}, which llama.cpp does not know")
    if not marks:
        raise _refused("it does not write spaces as U+2581")
    if prefix != tokenizer.adds_space_prefix:
        raise _refused("it puts a space in front of a text and leaves it there in decoding, or the other way round")
    places = {piece: i for i, piece in enumerate(pieces)}
    missing = [piece for piece in _BYTE_PIECES if piece not in places]
    if missing:
        raise _refused(f"it has no piece {missing[0]} for a byte, so that llama.cpp could not encode every text")
    for piece in _BYTE_PIECES:
        kinds[places[piece]] = BYTE
    if tokenizer.unk_id is not None:
        kinds[tokenizer.unk_id] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": _scores(pieces, kinds, merges),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }


def _scores(pieces: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """The score of each piece, by which sentencepiece makes the merges in their order."""
    order: dict[str, int] = {}
    previous = ""
    for rank, (left, right) in enumerate(merges):
        made = left + right
        if made != previous and made in order:
            raise _refused(
                f"the merges that make {made!r} do not stand together, and llama.cpp knows one score a piece"
            )
        order.setdefault(made, rank)
        previous = made
    normal = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == NORMAL}
    known = set(merges)
    for piece in normal:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in normal and pair[1] in normal and pair not in known:
                raise _refused(f"it does not merge {pair[0]!r} and {pair[1]!r}, and llama.cpp would, to {piece!r}")
    return [
        0.0 if kind != NORMAL else -float(order.get(piece, len(merges) + i))
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
    ]


def _special_ids(tokenizer: HuggingFaceTokenizer) -> JsonObject:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    metadata: JsonObject = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    metadata |= other_ends(tokenizer)
    return metadata | {"tokenizer.ggml.add_bos_token": tokenizer.adds_bos, "tokenizer.ggml.add_eos_token": False}


def other_ends(tokenizer: BaseTokenizer) -> JsonObject:
    """The ends of a text or a turn beside `eos_id`: llama.cpp knows the common ones by their texts, and two more by
    these names."""
    ends = [i for i in tokenizer.eos_ids if i != tokenizer.eos_id and tokenizer.id_to_piece(i) not in END_OF_TEXT]
    if ends[2:]:
        _warn(f"has {len(ends) + 1} tokens that end a text, of which {ends[2:]} find no place in the file")
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(("eot", "eom"), ends, strict=False)}


def _compare(tokenizer: HuggingFaceTokenizer, metadata: JsonObject, parts: Sequence[JsonObject]) -> None:
    """Raise ValueError unless the tokenizer that is read from the metadata gives the same ids, of every piece too; warn
    of the texts that are known to differ."""
    written, texts = from_gguf_metadata(metadata), probing_texts(tokenizer)
    kinds = {part["type"] for part in parts}
    if "NFC" in kinds:
        _warn("brings texts into NFC, so others get other ids there: llama.cpp does not do that")
        texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    if "Metaspace" in kinds and tokenizer.adds_space_prefix:
        _warn(
            "puts a space in front of a text only if it has none, so texts that begin with one get other ids there: "
            "llama.cpp does not do that"
        )
        texts = [text for text in texts if not text.startswith(" ")]
    if metadata["tokenizer.ggml.model"] == "llama":
        # Behind user-defined pieces llama.cpp puts the prefix again, as the library does, and sentencepiece, which
        # reads the metadata here, does not.
        types = metadata["tokenizer.ggml.token_type"]
        apart = [p for p, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=True) if kind == USER_DEFINED]
        pattern = re.compile("|".join(map(re.escape, apart)) or "(?!)")
        texts = [text for text in texts if not pattern.search(text)]
    for text, ids, theirs in zip(texts, tokenizer.encode_batch(texts), written.encode_batch(texts), strict=True):
        if ids != theirs:
            raise _refused(f"{text!r} is {ids[:20]} here and would be {theirs[:20]} there")


def _warn(what: str) -> None:
    warnings.warn(f"the tokenizer {what}", RuntimeWarning, stacklevel=4)
