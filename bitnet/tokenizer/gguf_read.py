"""The tokenizer inside a GGUF file, from its metadata: `from_gguf_metadata({"tokenizer.ggml.model": "llama", ...})`.

    tokenizer.ggml.model "llama"   sentencepiece, as pieces, scores and types. A .model file with the same pieces is
                                   written in memory, so that sentencepiece itself does the merging.
    tokenizer.ggml.model "gpt2"    byte-level byte-pair encoding, as pieces, types and merges, and the name of the rule
                                   that cuts a text into words ("pre-tokenizer"). Run by the `tokenizers` library.

The rules are those of bitnet/tokenizer/word_rules.py.

A byte-level file that names no rule is cut by `default`, as llama.cpp does, with a warning; but that of Llama 3, which
some converters forget (that of BitNet b1.58 2B-4T among them), is known by its vocabulary.

Token types (ggml's numbers, sentencepiece's too): 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

from bitnet.tokenizer.base import END_OF_TEXT, BaseTokenizer
from bitnet.tokenizer.huggingface import HuggingFaceTokenizer, import_tokenizers
from bitnet.tokenizer.proto import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, new_model
from bitnet.tokenizer.sentencepiece import Tokenizer
from bitnet.tokenizer.word_rules import PRE_TOKENIZERS, RULE_OF, WHOLE_WORDS

T = TypeVar("T")

_LLAMA3_PIECES = 128_000  # behind which its special tokens begin


def from_gguf_metadata(metadata: Mapping[str, object], source: str = "GGUF file") -> BaseTokenizer:
    """The tokenizer that a GGUF file's metadata describes: keys to values, arrays as lists.

    Raises ValueError naming `source` where there is none, or one of a kind that is not supported.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model == "llama":
        return _sentencepiece(metadata, source)
    if model == "gpt2":
        return _byte_level(metadata, source)
    if model is None:
        raise ValueError(f"{source} holds no tokenizer; give the folder of the original model, which has its files")
    raise ValueError(
        f"{source} has a tokenizer of the kind {model!r}; the supported ones are 'llama' (sentencepiece) and 'gpt2' "
        "(byte-level). A tokenizer.json of the same model can be used instead"
    )


def _pieces(metadata: Mapping[str, object], source: str) -> tuple[list[str], list[int], list[int]]:
    """Pieces and types, checked, and the ids that are not to be drawn. An empty piece gets a name that no text has, as
    llama.cpp gives it one."""
    pieces, types = _array(metadata, "tokens", str, source), _array(metadata, "token_type", int, source)
    types = types or [NORMAL] * len(pieces)
    if not pieces or len(types) != len(pieces):
        raise ValueError(f"{source} has {len(pieces)} tokens and {len(types)} types of tokens; it is damaged")
    pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(pieces)]
    if len(set(pieces)) != len(pieces):
        seen: set[str] = set()
        twice = next(piece for piece in pieces if piece in seen or seen.add(piece))  # type: ignore[func-returns-value]
        raise ValueError(f"{source} has the token {twice!r} twice; it is damaged")
    # Some converters forget that these are no text.
    plain = {NORMAL, USER_DEFINED, UNUSED}
    types = [CONTROL if k in plain and p in END_OF_TEXT else k for p, k in zip(pieces, types, strict=True)]
    # Older converters give padding another type.
    kinds = enumerate(zip(pieces, types, strict=True))
    unused = [i for i, (p, k) in kinds if k == UNUSED or (k in plain and p in (f"[PAD{i}]", f"[EMPTY_{i}]"))]
    return pieces, types, unused


def _array(metadata: Mapping[str, object], name: str, kind: type[T], source: str) -> list[T]:
    value = metadata.get(f"tokenizer.ggml.{name}", [])
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"{source}: tokenizer.ggml.{name} is not an array; it is damaged")
    if not all(isinstance(item, kind) for item in value):
        raise ValueError(f"{source}: tokenizer.ggml.{name} holds something else than {kind.__name__}; it is damaged")
    return list(value)


def _special_ids(metadata: Mapping[str, object], size: int) -> dict[str, int | None]:
    """Ids of the special tokens by ggml's names; None for one that is absent or outside the vocabulary."""
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        ids[name] = value if isinstance(value, int) and 0 <= value < size else None
    return ids


def _ends(ids: Mapping[str, int | None]) -> tuple[int, ...]:
    return tuple(i for i in (ids["eot"], ids["eom"]) if i is not None)


def _byte_level(metadata: Mapping[str, object], source: str) -> HuggingFaceTokenizer:
    library = import_tokenizers()
    pieces, types, unused = _pieces(metadata, source)
    name = metadata.get("tokenizer.ggml.pre", "")
    name = _unnamed_rule(pieces, source) if name == "" else name
    if not isinstance(name, str) or name not in RULE_OF:
        raise ValueError(
            f"{source} cuts texts into words by a rule named {name!r} that is not known here; use the tokenizer.json "
            f"of the model. Known: {', '.join(sorted(RULE_OF))}"
        )
    merges = []
    for merge in _array(metadata, "merges", str, source):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ValueError(f"{source} has the merge {merge!r}, which is not two pieces; it is damaged")
        merges.append((merge[:cut], merge[cut + 1 :]))
    try:
        backend = library.Tokenizer(
            library.models.BPE(
                vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, ignore_merges=name in WHOLE_WORDS
            )
        )
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{source}: its merges do not fit its tokens ({error}); it is damaged") from error
    split = library.pre_tokenizers
    backend.pre_tokenizer = split.Sequence(
        [
            *(split.Split(library.Regex(regex), "isolated") for regex in PRE_TOKENIZERS[RULE_OF[name]]),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = library.decoders.ByteLevel()
    added = {kind: [piece for piece, k in zip(pieces, types, strict=True) if k == kind] for kind in set(types)}
    backend.add_tokens([library.AddedToken(p, normalized=False) for p in added.get(USER_DEFINED, ())])
    backend.add_special_tokens(
        [library.AddedToken(p, normalized=False) for kind in (CONTROL, UNKNOWN) for p in added.get(kind, ())]
    )
    ids = _special_ids(metadata, len(pieces))
    adds_bos, bos = metadata.get("tokenizer.ggml.add_bos_token", name in WHOLE_WORDS), ids["bos"]
    if adds_bos and bos is not None and not set(pieces[bos]) & set(" $:"):  # which mean something in a template
        # For who reads the tokenizer.json: transformers goes by this, not by add_bos_token.
        backend.post_processor = library.processors.TemplateProcessing(
            single=[pieces[bos], "$A"], pair=[pieces[bos], "$A", "$B"], special_tokens=[(pieces[bos], bos)]
        )
    return HuggingFaceTokenizer(
        backend,
        bos_id=bos,
        eos_id=ids["eos"],
        unk_id=ids["unknown"],
        pad_id=ids["padding"],
        adds_bos=bool(adds_bos),
        ends=_ends(ids),
        unused=unused,
        source=source,
    )


def _unnamed_rule(pieces: Sequence[str], source: str) -> str:
    """The rule of a file that names none: that of Llama 3 for its vocabulary, else llama.cpp's. Warns of either."""
    known = is_llama_3(pieces)
    taken = (
        "the vocabulary is that of Llama 3, so its rule, llama-bpe, is taken"
        if known
        else "the rule named default is taken, as llama.cpp does, which suits hardly any model; convert it again with "
        "a newer converter, or use the tokenizer.json of the model"
    )
    warnings.warn(
        f"{source} does not say by which rule it cuts texts into words (tokenizer.ggml.pre): {taken}",
        RuntimeWarning,
        stacklevel=4,
    )
    return "llama-bpe" if known else "default"


def is_llama_3(pieces: Sequence[str]) -> bool:
    """Whether a vocabulary is that of Llama 3, by where its special tokens are."""
    return tuple(pieces[_LLAMA3_PIECES : _LLAMA3_PIECES + 2]) == ("<|begin_of_text|>", "<|end_of_text|>")


def _sentencepiece(metadata: Mapping[str, object], source: str) -> Tokenizer:
    pieces, types, unused = _pieces(metadata, source)
    scores = _array(metadata, "scores", float, source) or [0.0] * len(pieces)
    if len(scores) != len(pieces):
        raise ValueError(f"{source} has {len(pieces)} tokens and {len(scores)} scores; it is damaged")
    if any(score != score for score in scores):
        raise ValueError(f"{source} has scores that are no numbers; it is damaged")
    ids = _special_ids(metadata, len(pieces))
    if ids["unknown"] is None:
        ids["unknown"] = types.index(UNKNOWN) if UNKNOWN in types else 0
    unknown = ids["unknown"]
    for token_id, kind in ((unknown, UNKNOWN), (ids["bos"], CONTROL), (ids["eos"], CONTROL)):
        if token_id is not None:
            types[token_id] = kind
    # sentencepiece has one unknown piece, and merges towards unused ones and undoes it, which llama.cpp does not.
    types = [
        CONTROL if kind == UNKNOWN and i != unknown else NORMAL if kind not in range(1, 7) or kind == UNUSED else kind
        for i, kind in enumerate(types)
    ]
    names = {name: pieces[i] for name, i in ids.items() if i is not None}
    proto = new_model(
        pieces, scores, types, names, add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    )
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
    return Tokenizer(proto, f"the tokenizer of {source}", adds_bos=adds_bos, ends=_ends(ids), unused=unused)
