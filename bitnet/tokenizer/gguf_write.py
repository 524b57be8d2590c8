"""A tokenizer as GGUF metadata, such that llama.cpp gives the same ids.

llama.cpp's "llama" tokenizer joins the two neighbours whose piece has the highest score, as sentencepiece's byte-pair
models do, and knows neither normalization nor other kinds of model: those are refused. A tokenizer.json is
`gguf_write_json.py`'s.
"""

import warnings
from collections.abc import Mapping

from bitnet.files import JsonObject
from bitnet.tokenizer import BaseTokenizer, HuggingFaceTokenizer, Tokenizer, gguf_write_json
from bitnet.tokenizer.gguf_read import is_llama_3
from bitnet.tokenizer.proto import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, fields, section, user_defined

_BYTE_PAIR = 2  # sentencepiece's TrainerSpec.ModelType
_ALTERNATIVE = "export without a tokenizer, or to a Hugging Face folder"


def vocabulary(tokenizer: BaseTokenizer | JsonObject, vocab_size: int) -> JsonObject:
    """The `tokenizer.*` metadata of a tokenizer, or those of another file, for `vocab_size` rows.

    Rows of the embedding without a token get unused ones. Raises ValueError, with the reason and the alternative, for
    a tokenizer that llama.cpp would run differently or that has more tokens than there are rows.
    """
    if isinstance(tokenizer, Mapping):
        metadata = {key: value for key, value in tokenizer.items() if key.startswith("tokenizer.") and value != []}
        if "tokenizer.ggml.tokens" not in metadata:
            raise ValueError("the metadata hold no tokenizer.ggml.tokens; give those of a GGUF file with a tokenizer")
        if not metadata.get("tokenizer.ggml.pre") and is_llama_3(metadata["tokenizer.ggml.tokens"]):
            metadata["tokenizer.ggml.pre"] = "llama-bpe"  # by which it was read
    elif isinstance(tokenizer, Tokenizer):
        metadata = _sentencepiece(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        metadata = gguf_write_json.metadata_of(tokenizer)
    else:
        raise ValueError(f"a {type(tokenizer).__name__} cannot be written into a GGUF file; {_ALTERNATIVE}")
    if not isinstance(tokenizer, Mapping):
        _name_unused(metadata, tokenizer)
    # A model may have more rows than its tokenizer has tokens; llama.cpp wants a token for each.
    missing = vocab_size - len(metadata["tokenizer.ggml.tokens"])
    if missing < 0:
        raise ValueError(
            f"the tokenizer has {vocab_size - missing} tokens and the model {vocab_size} rows; it is another model's"
        )
    first = vocab_size - missing
    padding: dict[str, list[object]] = {
        "tokens": [f"[PAD{i}]" for i in range(first, vocab_size)],
        "scores": [-1e9] * missing,
        "token_type": [UNUSED] * missing,
    }
    for name, values in padding.items():
        if values and f"tokenizer.ggml.{name}" in metadata:
            metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"], *values]
    return metadata


def _name_unused(metadata: JsonObject, tokenizer: BaseTokenizer) -> None:
    """Give what the tokenizer has unused its type."""
    types, lost = metadata["tokenizer.ggml.token_type"], []
    for i in sorted(tokenizer.unused):
        if types[i] == NORMAL:
            types[i] = UNUSED
        elif types[i] != UNUSED:
            lost.append(tokenizer.id_to_piece(i))
    if lost:
        warnings.warn(
            f"the tokenizer has {len(lost)} tokens that are never drawn and are no plain text, {lost[0]!r} first: "
            "a GGUF file cannot say that of them",
            RuntimeWarning,
            stacklevel=3,
        )


def _sentencepiece(tokenizer: Tokenizer) -> JsonObject:
    import sentencepiece

    model_type = dict(fields(section(tokenizer.model_proto, 2))).get(3)
    if model_type != _BYTE_PAIR:
        raise ValueError(
            f"the sentencepiece model is not of byte-pair kind, the only one llama.cpp runs; {_ALTERNATIVE}"
        )
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_proto)
    # A text that shows every change: runs of spaces, a ligature that NFKC would split, a space at the end.
    if processor.normalize("a  \ufb01 ").lstrip("\u2581") != "a\u2581\u2581\ufb01\u2581":
        raise ValueError(f"the sentencepiece model normalizes its text, which llama.cpp does not; {_ALTERNATIVE}")
    ids = range(tokenizer.vocab_size)
    pieces = [processor.id_to_piece(i) for i in ids]
    if sum(map(processor.is_byte, ids)) != 256:
        raise ValueError(
            "the sentencepiece model has no byte pieces, so llama.cpp could not encode every text; train one with "
            f"byte fallback, or {_ALTERNATIVE}"
        )
    apart = user_defined(tokenizer.model_proto)

    def kind(i: int) -> int:
        if processor.is_unknown(i):
            return UNKNOWN
        if processor.is_control(i):
            return CONTROL
        if processor.is_byte(i):
            return BYTE
        return USER_DEFINED if i in apart else NORMAL

    metadata: JsonObject = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(processor.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_id,
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": tokenizer.adds_space_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    if tokenizer.pad_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = tokenizer.pad_id
    return metadata | gguf_write_json.other_ends(tokenizer)
