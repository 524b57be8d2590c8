"""A sentencepiece tokenizer as the tokenizer.json that transformers reads."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from bitnet.files import JsonObject
from bitnet.tokenizer import BaseTokenizer, Tokenizer
from bitnet.tokenizer.added import GENERATION, suppressed
from bitnet.tokenizer.proto import user_defined

if TYPE_CHECKING:
    import tokenizers

SPACE_MARK = "\u2581"


def sentencepiece_files(
    model: bytes | Tokenizer, *, max_length: int | None = None, chat: bool = False
) -> dict[str, bytes]:
    """What AutoTokenizer and `generate` need, by file name, from a sentencepiece tokenizer or the bytes of its model.

    max_length: positions of the model, in tokens. "<s>" goes in front of every text where the tokenizer wants it, as in
    training, and "<s>" inside a text stays text, but with `chat`: transformers tokenizes what a chat template has
    written as it does any text. Raises ValueError for a model that a tokenizer.json cannot express, found by comparing
    ids.
    """
    tokenizer = model if isinstance(model, Tokenizer) else Tokenizer.from_bytes(model)
    library = _byte_pair_tokenizer(tokenizer)
    _compare(tokenizer, library)
    bos, eos, unk = (tokenizer.id_to_piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id))
    settings: JsonObject = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "split_special_tokens": not chat,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.adds_bos,
        "legacy": tokenizer.legacy,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if max_length is not None:
        settings["model_max_length"] = max_length
    ends = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id
    generation: JsonObject = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends} | suppressed(tokenizer.unused)
    if tokenizer.pad_id is not None:
        settings["pad_token"] = tokenizer.id_to_piece(tokenizer.pad_id)
        generation["pad_token_id"] = tokenizer.pad_id
    return {
        "tokenizer.json": library.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
        GENERATION: json.dumps(generation, indent=1).encode(),
        Tokenizer.file_name: tokenizer.model_proto,
    }


def _byte_pair_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A `tokenizers.Tokenizer` with the pieces of a sentencepiece model and no pre-tokenizer.

    sentencepiece joins the two neighbours whose piece has the highest score; a merge here is a way to cut a piece in
    two pieces, in the order of the scores.
    """
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_proto)
    vocab = {tokenizer.id_to_piece(i): i for i in range(tokenizer.vocab_size)}
    special = [i for i in range(tokenizer.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
    apart = {tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size) if processor.is_byte(i)}
    defined = user_defined(tokenizer.model_proto)
    apart |= {tokenizer.id_to_piece(i) for i in (*special, *defined)}
    pieces = vocab.keys() - apart
    # Every way to cut a piece in two pieces is a merge; that of the best score comes first, then that of the lowest
    # ids.
    merges = [
        (-processor.get_score(vocab[piece]), vocab[piece[:cut]], vocab[piece[cut:]])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    pairs = [(tokenizer.id_to_piece(left), tokenizer.id_to_piece(right)) for _, left, right in sorted(merges)]
    unk, bos = tokenizer.id_to_piece(tokenizer.unk_id), tokenizer.id_to_piece(tokenizer.bos_id)
    library = Library(models.BPE(vocab=vocab, merges=pairs, unk_token=unk, fuse_unk=True, byte_fallback=True))
    library.add_special_tokens([AddedToken(tokenizer.id_to_piece(i), normalized=False) for i in special])
    library.add_tokens(
        [AddedToken(tokenizer.id_to_piece(i).replace(SPACE_MARK, " "), normalized=False) for i in sorted(defined)]
    )
    marks: list[object] = [normalizers.Replace(" ", SPACE_MARK)]
    text: list[object] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if tokenizer.adds_space_prefix:
        text.append(decoders.Strip(" ", 1, 0))
    if tokenizer.adds_space_prefix and not tokenizer.legacy:
        library.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, "first", split=False)
    else:
        marks[:0] = [normalizers.Prepend(SPACE_MARK)] if tokenizer.adds_space_prefix else []
        library.normalizer = normalizers.Sequence(marks)
    library.decoder = decoders.Sequence(text)
    front = [bos] if tokenizer.adds_bos else []  # transformers goes by this, not by add_bos_token
    library.post_processor = processors.TemplateProcessing(
        single=[*front, "$A"], pair=[*front, "$A", *front, "$B"], special_tokens=[(bos, tokenizer.bos_id)]
    )
    library.encode_special_tokens = True
    return library


def probing_texts(tokenizer: BaseTokenizer) -> list[str]:
    """Texts on which two forms of a tokenizer are compared: every piece, pieces put together, and odd ones."""
    pieces = [tokenizer.surface_bytes(i).decode("utf-8", "ignore") for i in range(tokenizer.vocab_size)]
    pieces = [piece for piece in pieces if piece]
    shuffled = random.Random(0).sample(pieces, len(pieces))
    # Five pieces behind each other make merges across their borders.
    texts = pieces + ["".join(shuffled[i : i + 5]) for i in range(0, len(pieces), 2)]
    return [
        *texts,
        "",
        " ",
        "  two  spaces  ",
        "\n\n\t",
        "<s></s><unk><0x41>",
        "\ufb01 \u00e9 e\u0301 \u3000 \U0001f600",
        "007 1,000",
    ]


def _compare(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    """Raise ValueError unless both give the same ids for every piece, for pieces put together, and for odd texts."""
    texts = probing_texts(tokenizer)
    if tokenizer.adds_space_prefix and not tokenizer.legacy:
        texts = [text for text in texts if not text.startswith(" ")]  # Metaspace puts no space in front of one
    for text, ids, encoding in zip(
        texts, tokenizer.encode_batch(texts), library.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        if ids != encoding.ids:
            raise ValueError(
                f"this sentencepiece model cannot be written as a tokenizer.json: {text!r} gives {ids} and would give "
                f"{encoding.ids}; it is no byte-pair model, or normalizes its text. Export to GGUF instead, which "
                "takes the pieces as they are"
            )
