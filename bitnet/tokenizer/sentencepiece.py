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

sentencepiece marks a space with U+2581 and therefore cannot tell a real U+2581 from a space. `Tokenizer.encode`
spells that one character in byte pieces, so it survives; other consumers of an exported model read it as a space.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

from bitnet.files import write_atomic
from bitnet.tokenizer.base import BaseTokenizer, check_encodable

SPACE_MARK = "\u2581"  # sentencepiece's visible space
BLOCK_CHARS = 4000  # length of one training block; far below the limit where sentencepiece drops a "sentence"
_SEGMENT_CHARS = 2000  # encode() works on segments: its cost per character grows with the length of the text
_WORD_START = re.compile(r"(?<=[^ ])(?= )")
_RETRAIN = "train one with bitnet.tokenizer.train_tokenizer, or give a sentencepiece .model file"


class Tokenizer(BaseTokenizer):
    """A sentencepiece model. It has a begin and an end of text token; `fingerprint` is of the model file's bytes."""

    file_name = "tokenizer.model"
    bos_id: int
    eos_id: int
    unk_id: int

    def __init__(
        self, model_proto: bytes, source: str = "model bytes", *, adds_bos: bool = True, ends: tuple[int, ...] = ()
    ):
        """Parse a serialized sentencepiece model; ValueError naming `source` if it is not one or has no <s>, </s>.

        `adds_bos` and `ends`, more ids that end a text, are what other files of a model may say about it.
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
        self.fingerprint = hashlib.sha256(self.model_proto).hexdigest()

        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        self._byte_ids = {int(p[3:5], 16): i for i, p in enumerate(pieces) if processor.is_byte(i)}
        self._surfaces = [self._surface(i, p) for i, p in enumerate(pieces)]
        if any(not 0 <= i < self.vocab_size for i in ends):
            raise ValueError(f"{source} has {self.vocab_size} tokens, and the ids {ends} should end a text")
        self.adds_bos = adds_bos
        self._ends = tuple(i for i in ends if i != self.eos_id)
        steering = (i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i))
        self._set_specials({pieces[i]: i for i in steering}, ends)
        # What the model does to the edges of a text, asked of the model itself because its settings sit in a protobuf
        # that would need another dependency to read.
        probe = processor.normalize("a  \ufb01 ")  # "fi" ligature: any Unicode normalization changes it
        self.adds_space_prefix = probe.startswith(SPACE_MARK)
        exact = probe.lstrip(SPACE_MARK) == "a  \ufb01 ".replace(" ", SPACE_MARK)
        # A piece never continues over the start of a word, so that words encode independently and a text may be cut
        # there.
        self._can_cut = exact and not any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", p) for p in pieces)
        self._spells_mark = (
            exact and not self.adds_space_prefix and all(b in self._byte_ids for b in SPACE_MARK.encode())
        )

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
        return partial(Tokenizer, adds_bos=self.adds_bos, ends=self._ends), (self.model_proto,)

    def files(self) -> dict[str, bytes]:
        """The .model file, and two of Hugging Face's where it does not say everything; see the base class."""
        files = {self.file_name: self.model_proto}
        if not self.adds_bos:
            files["tokenizer_config.json"] = json.dumps({"add_bos_token": False}).encode()
        if self._ends:
            files["generation_config.json"] = json.dumps({"eos_token_id": [self.eos_id, *self._ends]}).encode()
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
        if self._spells_mark:
            mark = [self._byte_ids[b] for b in SPACE_MARK.encode()]
            encoded = [mark if segment == SPACE_MARK else ids for segment, ids in zip(segments, encoded, strict=True)]
        return [[i for ids in encoded[start:end] for i in ids] for start, end in pairwise(bounds)]

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
        parts = re.split(f"({SPACE_MARK})", text) if self._spells_mark and SPACE_MARK in text else [text]
        first = True
        for part in parts:
            start = 0
            while start < len(part):
                cut = _WORD_START.search(part, start + _SEGMENT_CHARS)
                end = cut.start() if cut else len(part)
                # A model that adds a space prefix puts back the one space that is left out here.
                yield part[start + 1 : end] if self.adds_space_prefix and not first else part[start:end]
                start, first = end, False


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
