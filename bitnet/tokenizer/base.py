"""What every tokenizer of this package does, and decoding token by token.

A subclass knows how to encode; everything else follows from four things that it sets: the bytes that each id stands
for, the ids of the special tokens, their texts, and whether the model puts a space in front of a text.

"Special" tokens are those that steer a model and have no text: <s>, <|im_end|> and so on. Written in a text they are
text, unless `encode(..., special=True)` is asked for, as a chat template's output needs it.
"""

from __future__ import annotations

import codecs
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<EOT>", "[EOT]", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>")
END_OF_TEXT = frozenset((*_ENDS_OF_TEXT, *_ENDS_OF_TURN))
"""Special tokens that end a text or a turn whatever else a model's files say, which often name only one of several."""


class Drawable(NamedTuple):
    """The ids that a model may write: those below `vocab_size` but for the `unused` ones, which ascend."""

    vocab_size: int
    unused: tuple[int, ...] = ()

    @property
    def number(self) -> int:
        """How many they are."""
        return self.vocab_size - len(self.unused)


class BaseTokenizer(ABC):
    """Text <-> token ids.

    Attributes: `vocab_size` (int), `bos_id`, `eos_id`, `unk_id`, `pad_id` (int, or None when there is none), `eos_ids`
    (every id that ends a text or a turn, `eos_id` first), `adds_bos` (the model wants `bos_id` in front of a text),
    `adds_space_prefix` (it puts a space there, which decoding takes away), `specials` (texts of the special tokens to
    their ids), `unused` (ids that no model should write: padding, gaps between the ids, pieces of the type "unused",
    `suppress_tokens` of a generation_config.json), `drawable` (all others), `fingerprint` (sha256 of what the ids
    depend on, hex), `file_name` (what `save` writes is called so in a model's folder).
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    adds_space_prefix: bool
    fingerprint: str
    specials: Mapping[str, int]
    unused: frozenset[int]
    drawable: Drawable
    file_name: str
    _surfaces: Sequence[bytes]
    _special_pattern: re.Pattern[str] | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without special tokens; `threads` change only the speed.

        Raises ValueError if a text holds half a surrogate pair, which no UTF-8 file can.
        """

    @abstractmethod
    def id_to_piece(self, token_id: int) -> str:
        """The piece as the model's files write it, e.g. "\u2581the", "\u0120the" or "<0x0A>"."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Contents by name of the files of a model's folder from which `load_tokenizer` makes this tokenizer again."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer's one file, all of it or nothing."""

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, special: bool = False, mark: str = ""
    ) -> list[int]:
        """Token ids of a text, with the begin and end of text tokens on request, where the model has them.

        With `special`, special tokens written in the text become their ids; otherwise "<s>" stays text. `mark` is a
        string that `break_specials` has put into those that are to stay text all the same; it has no ids.
        """
        ids = self._encode_special(text, mark) if special else self.encode_batch([text])[0]
        front = [self.bos_id] if bos and self.bos_id is not None else []
        return [*front, *ids, *([self.eos_id] if eos and self.eos_id is not None else [])]

    def break_specials(self, text: str, mark: str) -> str:
        """The text with `mark` behind every character of the special tokens in it, which are none then."""
        if self._special_pattern is None:
            return text
        return self._special_pattern.sub(lambda match: "".join(letter + mark for letter in match[0]), text)

    def _encode_special(self, text: str, mark: str = "") -> list[int]:
        """Token ids of a text in which special tokens count, but for those with the mark in them."""
        parts = self._parts(text, mark)
        # An empty text has no ids, not even a space's.
        encoded = iter(self._encode_parts([part for part in parts[::2] if part], bool(parts[0])))
        ids = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(self.specials[part])
            elif part:
                ids += next(encoded)
        return ids

    def _parts(self, text: str, mark: str) -> list[str]:
        """A text cut at its special tokens: texts at even places, without the mark, and these tokens at odd ones."""
        parts = self._special_pattern.split(text) if self._special_pattern else [text]
        if mark:
            parts[::2] = [part.replace(mark, "") for part in parts[::2]]
        return parts

    def _encode_parts(self, texts: Sequence[str], at_start: bool) -> list[list[int]]:
        """Token ids of the texts between special tokens; at_start: nothing stands in front of the first one."""
        return self.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens have none, and bytes that are not UTF-8 become U+FFFD.

        `decode(encode(text)) == text` where the model does not normalize and has a token for every byte. ValueError for
        an id outside the vocabulary.
        """
        text = b"".join(self.surface_bytes(i) for i in ids).decode("utf-8", errors="replace")
        return text[1:] if self.adds_space_prefix and text.startswith(" ") else text

    def difference(self, other: BaseTokenizer) -> str | None:
        """In words, the first token that the other tokenizer has no or another one for under the same id; None where
        the ids of both mean the same."""
        if self.vocab_size != other.vocab_size:
            return f"{self.vocab_size} tokens, and {other.vocab_size} there"
        special = [set(each.specials.values()) for each in (self, other)]
        for i in range(self.vocab_size):
            own, theirs = (
                each.id_to_piece(i).encode() if i in steering else each.surface_bytes(i) or each.id_to_piece(i).encode()
                for each, steering in zip((self, other), special, strict=True)
            )
            if own != theirs:
                return f"token {i} is {own!r}, and {theirs!r} there"
        return None

    def surface_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one id stands for (a part of a character for a byte piece, b"" for a special token)."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1}): it comes from another "
                "tokenizer, or from a padded row of an output layer; draw tokens with `drawable`"
            )
        return self._surfaces[token_id]

    def _set_specials(self, specials: Mapping[str, int], ends: Iterable[int | None] = ()) -> None:
        """Take the special tokens; `ends` are ids that end a text beside `eos_id` and the well-known ones."""
        self.specials = specials
        longest_first = sorted(filter(None, specials), key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        known = [token_id for text, token_id in specials.items() if text in END_OF_TEXT]
        self.eos_ids = tuple(dict.fromkeys(i for i in (self.eos_id, *ends, *known) if i is not None))

    def _set_unused(self, unused: Iterable[int], source: str) -> None:
        """Take the ids that are not to be drawn, once the special tokens are known: a text must be able to end. Those
        outside the vocabulary count for nothing. Raises ValueError naming `source` where no id is left."""
        self.unused = frozenset(i for i in unused if 0 <= i < self.vocab_size).difference(self.eos_ids)
        size = next((i + 1 for i in reversed(range(self.vocab_size)) if i not in self.unused), 0)
        if not size:
            raise ValueError(f"{source}: all of the {self.vocab_size} tokens are unused; it is damaged")
        self.drawable = Drawable(size, tuple(sorted(i for i in self.unused if i < size)))


class StreamDecoder:
    """Decode ids one at a time: the pushed pieces, joined, and `flush()` at the end give `tokenizer.decode(ids)`.

    Bytes of an unfinished UTF-8 character are held back until it is complete or cannot become one.
    """

    def __init__(self, tokenizer: BaseTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.adds_space_prefix

    def push(self, token_id: int) -> str:
        """The text that this id makes certain, perhaps ""."""
        return self._stripped(self._decoder.decode(self._tokenizer.surface_bytes(token_id)))

    def flush(self) -> str:
        """What is still held back (U+FFFD for an unfinished character); the decoder is then as new."""
        text = self._stripped(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._strip_space = self._tokenizer.adds_space_prefix
        return text

    def _stripped(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text[1:] if text.startswith(" ") else text
        return text


def check_encodable(texts: Iterable[str]) -> None:
    """Raise ValueError for a text with half a surrogate pair, naming it."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds {text[error.start]!r}, half of a surrogate pair, which has no UTF-8 form: "
                'remove it, e.g. text.encode("utf-8", "replace").decode()'
            ) from error
