"""Text <-> token ids: a thin wrapper around sentencepiece, and the training of a new model.

A trained model is LLaMA-style: byte-pair encoding with byte fallback, so that every text has an encoding, and it can
be exported to transformers and llama.cpp as it is. Three choices differ from the sentencepiece defaults, each for an
exact round trip:

* `normalization "identity"`, `remove_extra_whitespaces=False`: the text is the text. Runs of spaces become pieces of
  their own (`allow_whitespace_only_pieces`), which is what Python indentation needs.
* `add_dummy_prefix=False`: no space is invented in front of the text. With the dummy prefix "a" and " a" are one step
  from being confused in every consumer (a prompt continued by generated ids, a document cut in two, a decoder that
  must strip exactly one space); the price is that a word has one more spelling at the start of a line. Exporters must
  say so: `add_space_prefix = false` in GGUF, no `Prepend` normalizer in tokenizer.json.
* training sees blocks of about 4,000 characters with their newlines inside, not lines: pieces such as ".\\n\\n" or
  ":\\n" are learnt, 1.7 % fewer tokens on English prose and 7 % fewer on Python source than with lines (vocabulary
  4096).

sentencepiece marks a space with U+2581 and cannot tell a real U+2581 from a space: that one character becomes a space,
as it does in transformers and llama.cpp.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

from bitnet.files import JsonObject, write_atomic
from bitnet.tokenizer.added import GENERATION, FolderTokens, suppressed
from bitnet.tokenizer.base import END_OF_TEXT, BaseTokenizer, check_encodable
from bitnet.tokenizer.proto import CONTROL, USER_DEFINED, user_defined, with_pieces, without_dummy_prefix

SPACE_MARK = "\u2581"  # sentencepiece's visible space
BLOCK_CHARS = 4000  # length of one training block; far below the limit where sentencepiece drops a "sentence"
_SEGMENT_CHARS = 2000  # encode() works on segments: its cost per character grows with the length of the text
_WORD_START = re.compile(r"(?<=[^ ])(?= )")
_RETRAIN = "train one with bitnet.tokenizer.train_tokenizer, or give a sentencepiece .model file"


class Tokenizer(BaseTokenizer):
    """A sentencepiece model. It has a begin and an end of text token; `fingerprint` is of the model file's bytes and
    what other files say of its ids."""

    file_name = "tokenizer.model"
    bos_id: int
    eos_id: int
    unk_id: int

    def __init__(
        self,
        model_proto: bytes,
        source: str = "model bytes",
        *,
        adds_bos: bool = True,
        ends: tuple[int, ...] = (),
        unused: Iterable[int] = (),
        legacy: bool = True,
    ):
        """Parse a serialized sentencepiece model; ValueError naming `source` if it is not one or has no <s>, </s>.

        `adds_bos`, `ends`, more ids that end a text, `unused`, more that are not to be drawn, and `legacy` are what
        other files of a model may say about it. A legacy tokenizer that puts a space in front of a text also puts one
        behind every special token in it.
        """
        self.model_proto = bytes(model_proto)
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self.model_proto)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{source} is not a sentencepiece model ({len(self.model_proto)} bytes; {error}): "
                f"it is empty, truncated or of another kind; {_RETRAIN}"
            ) from error
        self._sp = processor
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id, self.unk_id = processor.bos_id(), processor.eos_id(), processor.unk_id()
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else None
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{source} has no begin or end of text token (bos_id {self.bos_id}, eos_id {self.eos_id}), "
                f"and documents need both: {_RETRAIN}"
            )
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        self._surfaces = [self._surface(i, p) for i, p in enumerate(pieces)]
        if any(not 0 <= i < self.vocab_size for i in ends):
            raise ValueError(f"{source} has {self.vocab_size} tokens, and the ids {ends} should end a text")
        self.adds_bos, self.legacy = adds_bos, legacy
        self._ends = tuple(i for i in ends if i != self.eos_id)
        steering = (i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i))
        self._set_specials({pieces[i]: i for i in steering}, ends)
        self._set_unused({*unused, *filter(processor.is_unused, range(self.vocab_size))}, source)
        # What the model does to the edges of a text, asked of the model itself because its settings sit in a protobuf
        # that would need another dependency to read.
        probe = processor.normalize("a  \ufb01 ")  # "fi" ligature: any Unicode normalization changes it
        self.adds_space_prefix = probe.startswith(SPACE_MARK)
        exact = probe.lstrip(SPACE_MARK) == "a  \ufb01 ".replace(" ", SPACE_MARK)
        # A piece never continues over the start of a word, so that words encode independently and a text may be cut
        # there.
        self._can_cut = exact and not any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", p) for p in pieces)
        # As transformers has it since its legacy mode: a space only in front of what begins with text.
        self._first_only = self.adds_space_prefix and not legacy
        self._apart = tuple(pieces[i].replace(SPACE_MARK, " ") for i in user_defined(self.model_proto))
        # What is not in the model file counts where it changes ids.
        said = (" without <s>" if not adds_bos else "") + (" not legacy" if self._first_only and self._apart else "")
        self.fingerprint = hashlib.sha256(self.model_proto + said.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str], **settings: Any) -> Tokenizer:
        """Read a `.model` file; `settings` are the constructor's.

        Raises ValueError naming the path if it is missing, a folder, or not a sentencepiece model.
        """
        if not Path(path).is_file():
            raise ValueError(f"there is no tokenizer file {os.fspath(path)!r}; {_RETRAIN}")
        return cls(Path(path).read_bytes(), source=f"tokenizer file {os.fspath(path)!r}", **settings)

    @classmethod
    def from_bytes(cls, model_proto: bytes) -> Tokenizer:
        """The tokenizer whose `.model` file has these bytes (`Tokenizer.model_proto` gives them back)."""
        return cls(model_proto)

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[bytes]]:
        settings: JsonObject = {"adds_bos": self.adds_bos, "ends": self._ends, "legacy": self.legacy}
        settings["unused"] = self.unused
        return partial(Tokenizer, **settings), (self.model_proto,)

    def files(self) -> dict[str, bytes]:
        """The .model file, and two of Hugging Face's where it does not say everything; see the base class."""
        files = {self.file_name: self.model_proto}
        settings = {"add_bos_token": self.adds_bos, "legacy": self.legacy}
        if not all(settings.values()):
            files["tokenizer_config.json"] = json.dumps({k: v for k, v in settings.items() if not v}).encode()
        generation: JsonObject = {"eos_token_id": [self.eos_id, *self._ends]} if self._ends else {}
        if generation := generation | suppressed(self.unused):
            files[GENERATION] = json.dumps(generation).encode()
        return files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the `.model` file, all of it or nothing: a temporary file beside it is renamed over it."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.model_proto)

    def id_to_piece(self, token_id: int) -> str:
        """The piece as sentencepiece writes it, e.g. "\u2581the" or "<0x0A>"."""
        return self._sp.id_to_piece(token_id)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without special tokens; `threads` (sentencepiece's own) change only the speed."""
        if isinstance(texts, str):
            raise TypeError("encode_batch takes a list of texts, not one text: use encode")
        if self._first_only and any(text.startswith(self._apart) for text in texts):
            one = {True: self._without_prefix, False: self}
            return [one[text.startswith(self._apart)]._encode([text], threads)[0] for text in texts]
        return self._encode(texts, threads)

    def _encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        segments: list[str] = []
        bounds = [0]
        for text in texts:
            segments += self._segments(text)
            bounds.append(len(segments))
        try:
            encoded = self._sp.encode(segments, num_threads=max(1, min(threads, len(segments))))
        except (UnicodeError, TypeError) as error:  # by sentencepiece version; it does not say which text it was
            check_encodable(segments)
            raise error
        return [[i for ids in encoded[start:end] for i in ids] for start, end in pairwise(bounds)]

    def _encode_parts(self, texts: Sequence[str], at_start: bool) -> list[list[int]]:
        if not self._first_only:
            return self.encode_batch(texts)
        return self.encode_batch(texts[:at_start]) + self._without_prefix.encode_batch(texts[at_start:])

    @cached_property
    def _without_prefix(self) -> Tokenizer:
        return Tokenizer(without_dummy_prefix(self.model_proto))

    def _surface(self, token_id: int, piece: str) -> bytes:
        if self._sp.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._sp.is_control(token_id):
            return b""
        if self._sp.is_unknown(token_id):
            return " \u2047 ".encode()  # sentencepiece's own surface for <unk>
        return piece.replace(SPACE_MARK, " ").encode()

    def _segments(self, text: str) -> Iterator[str]:
        """Cut a text where no piece can reach across; the ids of the segments, joined, are the ids of the text."""
        if not self._can_cut:
            yield text
            return
        start = 0
        while start < len(text):
            cut = _WORD_START.search(text, start + _SEGMENT_CHARS)
            end = cut.start() if cut else len(text)
            # A model that adds a space prefix puts back the one space that is left out here.
            yield text[start + 1 : end] if self.adds_space_prefix and start else text[start:end]
            start = end


def with_added_tokens(model_proto: bytes, tokens: FolderTokens, rows: object, source: str) -> bytes:
    """A model with what other files of its folder add to it, as transformers knows it: special tokens as control
    pieces, others as user-defined ones, and the names of the begin and the end of a text.

    rows: of the model's embedding; tokens behind them are left out. Raises ValueError for a token with an id that it
    cannot have, or that takes the spaces around it.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    size = processor.vocab_size()
    ids = {processor.id_to_piece(i): i for i in range(size)}
    new: list[tuple[str, int]] = []
    types: dict[int, int] = {}
    defined = user_defined(model_proto)
    for token in tokens.added:
        kind = CONTROL if token.special or token.content in END_OF_TEXT else USER_DEFINED
        piece = token.content if kind == CONTROL else token.content.replace(" ", SPACE_MARK)
        found = ids.get(piece)
        if found is None and type(rows) is int and size + len(new) >= rows:
            continue
        place = size + len(new) if found is None else found
        if token.id not in (None, place):
            raise ValueError(
                f"{source} and the files beside it do not fit together: the token {token.content!r} has the id "
                f"{token.id} there, and {place} by the pieces that are here; take all files from one model"
            )
        if token.strips:
            raise ValueError(
                f"{source}: the token {token.content!r} takes the spaces around it (lstrip, rstrip or single_word), "
                "which a sentencepiece model cannot do; convert the tokenizer to a tokenizer.json with transformers"
            )
        if found is None:
            new.append((piece, kind))
            ids[piece] = place
        elif found < size and not (processor.is_unknown(found) or processor.is_byte(found)):
            has = CONTROL if processor.is_control(found) else USER_DEFINED if found in defined else None
            if kind != has:
                types[found] = kind
    own = {"bos": processor.bos_id(), "eos": processor.eos_id()}
    names = {kind: tokens.names.get(f"{kind}_token", "") for kind in own}
    names = {kind: text for kind, text in names.items() if text in ids and ids[text] != own[kind]}
    padding = tokens.names.get("pad_token", "")
    if ids.get(padding, -1) >= size:
        names["padding"] = padding
    return with_pieces(model_proto, new, types, names) if new or types or names else model_proto


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_bytes: int = 8_000_000,
    threads: int = 4,
    character_coverage: float = 0.9999,
) -> Tokenizer:
    """Train a byte-pair model on a sample of the texts, spread evenly over them.

    texts:       read once, lazily; a corpus larger than memory works, at most 2 `max_bytes` are held.
    vocab_size:  pieces in all, including <unk> <s> </s> (ids 0 1 2), 256 byte pieces and one per frequent character.
    max_bytes:   size of the sample. English at vocabulary 4096: from 4 MB on, bytes per token change by 0.1 %.
    threads:     speed only, but sentencepiece notes the number in the model file: another number gives equal pieces and
                 another fingerprint.

    The same texts and settings give the same bytes. Raises ValueError for an empty corpus and for a vocabulary that
    is too large or too small for it; the message says what would work.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: it counts the pieces, give a positive number, e.g. 4096")
    if isinstance(texts, str):
        raise TypeError("train_tokenizer takes an iterable of texts, not one text: use [text]")
    sample = _sample_blocks(texts, max_bytes)
    check_encodable(sample)
    if not any(block.strip() for block in sample):
        raise ValueError("the corpus holds no text to train a tokenizer on: give a corpus that is not empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            split_digits=True,
            character_coverage=character_coverage,
            max_sentence_length=8 * BLOCK_CHARS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=threads,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _explain_training_failure(error, vocab_size, sum(len(b.encode()) for b in sample)) from error
    return Tokenizer.from_bytes(model.getvalue())


def _explain_training_failure(error: RuntimeError, vocab_size: int, sample_bytes: int) -> ValueError:
    """sentencepiece's error as a ValueError that names the request, the limit and the remedy."""
    message = str(error)
    if largest := re.search(r"value <= (\d+)", message):
        return ValueError(
            f"vocab_size {vocab_size} is too large for this corpus ({sample_bytes} bytes of text sampled): "
            f"the largest that works is {largest[1]}; ask for at most that, or give more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ValueError(
            f"vocab_size {vocab_size} is too small: 3 special tokens, 256 bytes and the corpus's own characters need "
            f"{smallest[1]}; ask for at least that, or lower character_coverage"
        )
    return ValueError(
        f"sentencepiece could not train a tokenizer with vocab_size {vocab_size}: {message}; try another vocab_size"
    )


def _sample_blocks(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Blocks of the texts, about `max_bytes` of them in all, evenly spaced over the whole.

    Every stride-th block is kept; when more than 2 `max_bytes` have gathered, every other one is dropped and the
    stride doubles.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}: give a positive number of bytes to sample, e.g. 8000000")
    kept: list[str] = []
    kept_bytes, stride, index = 0, 1, 0
    for text in texts:
        for block in _blocks(text):
            if index % stride == 0:
                kept.append(block)
                kept_bytes += len(block.encode("utf-8", "replace"))
                if kept_bytes > 2 * max_bytes and len(kept) > 1:
                    kept = kept[::2]
                    kept_bytes = sum(len(b.encode("utf-8", "replace")) for b in kept)
                    stride *= 2
            index += 1
    if kept_bytes > max_bytes:
        wanted = max(1, len(kept) * max_bytes // kept_bytes)
        kept = [kept[i * len(kept) // wanted] for i in range(wanted)]
    return kept


# sentencepiece drops a training sentence with NUL or U+2585 in it and takes U+2581 for a space. All three are then
# written in byte pieces, so the sample can do without them.
_RESERVED = str.maketrans({"\0": " ", "\u2585": " ", SPACE_MARK: " "})


def _blocks(text: str) -> Iterator[str]:
    """Blocks of at most BLOCK_CHARS characters, cut before a newline, else a space, of their second half."""
    text = text.translate(_RESERVED)
    start = 0
    while start < len(text):
        end = min(start + BLOCK_CHARS, len(text))
        if end < len(text):
            for separator in ("\n", " "):
                cut = text.rfind(separator, start + BLOCK_CHARS // 2, end)
                if cut > 0:
                    end = cut
                    break
        yield text[start:end]
        start = end
