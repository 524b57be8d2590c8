"""Tokenizers in a tokenizer.json, run by the `tokenizers` library (Hugging Face's, in Rust; an optional dependency).

Which ids mean begin and end of text is not in that file. It is gathered from those beside it: tokenizer_config.json and
special_tokens_map.json (texts), generation_config.json and config.json (ids). They may add tokens too (added.py).

Two families are understood, told apart by the file's decoder, because `surface_bytes` must know each id's bytes:

    ByteLevel                            every byte is one printable character (GPT-2's table); LLaMA 3, Qwen, SmolLM
    Replace or Metaspace, ByteFallback   U+2581 is a space and <0x0A> a byte; LLaMA 2, Mistral, Gemma
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet.files import JsonObject, write_atomic
from bitnet.tokenizer.added import (
    CONFIG,
    GENERATION,
    FolderTokens,
    added_tokens,
    read_settings,
    suppressed,
    suppressed_ids,
)
from bitnet.tokenizer.base import END_OF_TEXT, BaseTokenizer, check_encodable
from bitnet.tokenizer.encode_limited import LimitedEncoder, cost_of

if TYPE_CHECKING:
    import tokenizers

SPACE_MARK = "\u2581"
_EOS = "eos_token_id"
_AS_THE_FILE_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take a tokenizer.json unchanged
_BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


class HuggingFaceTokenizer(BaseTokenizer):
    """A tokenizer of the `tokenizers` library. `encode` adds what it is asked for, not what the post-processor says."""

    file_name = "tokenizer.json"

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        unk_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool = False,
        ends: Iterable[int] = (),
        unused: Iterable[int] = (),
        source: str = "tokenizer",
    ):
        """Take a library object, which is changed (no truncation, no padding), and the ids of its special tokens.

        `unused` are tokens that are not to be drawn, beside the ids that have none.

        Raises ValueError naming `source` for a decoder of another family and for ids outside the vocabulary.
        """
        self._backend, self._source, self._lock = backend, source, threading.RLock()
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # in the library's words: special tokens in a text are encoded as text
        # Some files forget that these are no text.
        plain = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
        _add(backend, [(text, {"special": True, "normalized": False}) for text in plain if text in END_OF_TEXT])
        added = backend.get_added_tokens_decoder()
        pieces = {token_id: piece for piece, token_id in backend.get_vocab().items()}
        pieces |= {token_id: token.content for token_id, token in added.items()}
        self.vocab_size = max(pieces, default=-1) + 1
        if not 0 < self.vocab_size <= 2 * len(pieces) + 65536:
            raise ValueError(f"{source} has {len(pieces)} tokens and ids up to {self.vocab_size - 1}: it is damaged")
        self._pieces = [pieces.get(i, "") for i in range(self.vocab_size)]
        surface, self.adds_space_prefix = _read_decoder(backend, source)
        self._surfaces = [surface(piece) for piece in self._pieces]
        for i, token in added.items():
            self._surfaces[i] = b"" if token.special else token.content.encode()

        self._ends = tuple(ends)
        named = {"bos_id": bos_id, "eos_id": eos_id, "unk_id": unk_id, "pad_id": pad_id}
        for name, token_id in (*named.items(), *(("an end of text id", i) for i in self._ends)):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{source}: {name} is {token_id} and the vocabulary has {self.vocab_size} tokens")
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = bos_id, eos_id, unk_id, pad_id
        self.adds_bos = adds_bos and bos_id is not None
        self._set_specials({token.content: i for i, token in added.items() if token.special}, self._ends)
        self._set_unused((set(range(self.vocab_size)) - pieces.keys()).union(unused), source)
        self._json: str = backend.to_str()
        cost = _cost_of(backend, source)
        self._limited = LimitedEncoder(self._json, cost, source) if cost else None
        self._marked: tuple[str, HuggingFaceTokenizer, dict[int, int]] | None = None
        said = f"{bos_id} {self.eos_ids} {self._json}"
        if bos_id is not None and backend.post_processor is not None:
            with library_errors(source):
                said += f" adds_bos {self.adds_bos}" * (self.adds_bos != _puts_first(backend, bos_id))  # by other files
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Mapping[str, object] | None = None) -> HuggingFaceTokenizer:
        """Read a tokenizer.json, or the one of a folder, and the files beside it. `config` is what config.json
        there holds, where it has been read already. Raises ValueError naming the file."""
        path = Path(path)
        path = path / cls.file_name if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer file {os.fspath(path)!r} cannot be read: {error}") from error
        config = read_settings(path.parent / "config.json") if config is None else config
        backend = backend_from_json(text, f"tokenizer file {os.fspath(path)!r}", config.get("vocab_size"))
        tokens = added_tokens(path.parent)
        _check_prefix(backend, read_settings(path.parent / CONFIG), os.fspath(path))
        _complete(backend, tokens, config.get("vocab_size"), os.fspath(path))
        return cls(backend, source=os.fspath(path), **_special_ids(backend, path.parent, config, tokens))

    @classmethod
    def from_json(cls, text: str, **settings: Any) -> HuggingFaceTokenizer:
        """The tokenizer of a tokenizer.json's text; `settings` are the constructor's."""
        return cls(backend_from_json(text, settings.get("source", "tokenizer.json")), **settings)

    def __reduce__(self) -> tuple[Callable[..., HuggingFaceTokenizer], tuple[str]]:
        names = ("bos_id", "eos_id", "unk_id", "pad_id", "adds_bos")
        settings = {name: getattr(self, name) for name in names} | {"ends": self._ends, "unused": self.unused}
        return partial(HuggingFaceTokenizer.from_json, **settings), (self._json,)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, and two files that say what it does not; see the base class."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        config: dict[str, object] = {f"{name}_token": self._pieces[i] for name, i in ids.items() if i is not None}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.adds_bos}
        generation: JsonObject = {"eos_token_id": list(self.eos_ids)}
        generation |= {} if self.bos_id is None else {"bos_token_id": self.bos_id}
        generation |= suppressed(i for i in self.unused if self._pieces[i])
        return {
            self.file_name: self._json.encode(),
            "tokenizer_config.json": json.dumps(config, indent=1).encode(),
            GENERATION: json.dumps(generation, indent=1).encode(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer.json."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self._json)

    def id_to_piece(self, token_id: int) -> str:
        self.surface_bytes(token_id)  # refuses ids outside the vocabulary
        return self._pieces[token_id]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without special tokens.

        With more than one thread the library takes as many as it likes (RAYON_NUM_THREADS); with an expression that may
        take any time there is one, which is ended behind a time.
        """
        if isinstance(texts, str):
            raise TypeError("encode_batch takes a list of texts, not one text: use encode")
        if self._limited:
            return self._limited.encode(texts, special=False)
        try:
            with self._lock, library_errors(self._source):
                if threads > 1:
                    batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
                    return [encoding.ids for encoding in batch]
                return [self._backend.encode(text, add_special_tokens=False).ids for text in texts]
        except (UnicodeError, TypeError) as error:  # by the library's version; it does not say which text it was
            check_encodable(texts)
            raise error

    def _encode_special(self, text: str, mark: str = "") -> list[int]:
        if mark and mark in text:
            return self._encode_marked(text, mark)
        if self._limited:
            return self._limited.encode([text], special=True)[0]
        with self._lock:  # the setting is everyone's
            self._backend.encode_special_tokens = False
            try:
                return self.encode_batch([text])[0]
            finally:
                self._backend.encode_special_tokens = True

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """The library knows no marks, and what stands beside a special token is not a text of its own to it. So special
        tokens that count are written as others, which stand for them, where those that do not are text."""
        with self._lock:
            if self._marked is None or self._marked[0] != mark:
                self._marked = mark, *self._with_marks(mark)
            _, tokenizer, meant = self._marked
        parts = self._parts(text, mark)
        parts[1::2] = [mark + part for part in parts[1::2]]
        return [meant.get(i, i) for i in tokenizer.encode_batch(["".join(parts)])[0]]

    def _with_marks(self, mark: str) -> tuple[HuggingFaceTokenizer, dict[int, int]]:
        """A tokenizer that knows each special token behind a mark, as text that is always one token, and of those the
        ids that they stand for."""
        backend, added = backend_from_json(self._json, self._source), self._backend.get_added_tokens_decoder()
        tokens = {mark + token.content: (i, token) for i, token in added.items() if token.special}
        _add(backend, [
            (text, {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word,
                    "normalized": False, "special": False})
            for text, (_, token) in tokens.items()
        ])  # fmt: skip
        meant = {i: tokens[token.content][0] for i, token in backend.get_added_tokens_decoder().items()
                 if token.content in tokens}  # fmt: skip
        return HuggingFaceTokenizer(backend, source=self._source), meant


def backend_from_json(text: str, source: str, rows: object = None) -> tokenizers.Tokenizer:
    """The library's object for a tokenizer.json, without added tokens that a model of so many `rows` has none for.
    Raises ValueError naming `source` for a file it does not take."""
    library = import_tokenizers()
    # Before the library has it, which normalizes the added tokens at once. What is no JSON, or of another form, it
    # refuses itself.
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError):
        contents = None
    if lost := _beyond(contents, rows):
        message = f"{source} adds {', '.join(lost)}, for which the model has no rows: left out"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] not in lost]
        text = json.dumps(contents)
    if cost := cost_of(contents, source):
        LimitedEncoder(text, cost, source).load()
    with library_errors(source):
        return library.Tokenizer.from_str(text)


def _beyond(contents: Any, rows: object) -> list[str]:
    """Texts of the added tokens of a tokenizer.json that stand behind its vocabulary and a model's rows."""
    if not isinstance(contents, dict) or type(rows) is not int:
        return []
    model, added = contents.get("model"), contents.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list) or not isinstance(added, list):
        return []
    tokens: list[tuple[Any, Any]] = [(t.get("content"), t.get("id")) for t in added if isinstance(t, dict)]
    if len(tokens) < len(added) or not all(isinstance(text, str) and type(i) is int for text, i in tokens):
        return []
    return [text for text, i in tokens if i >= max(rows, len(vocab))]


@contextmanager
def library_errors(source: str) -> Iterator[None]:
    """ValueErrors naming `source` in place of what the library raises: plain Exceptions, and for a panic in Rust a
    BaseException."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) and type(error) is not Exception:
            raise
        raise ValueError(
            f"{source} is not a tokenizer.json that tokenizers {import_tokenizers().__version__} can read ({error}); "
            "it is damaged, or needs a newer version: pip install -U tokenizers"
        ) from error


def import_tokenizers() -> Any:
    """The `tokenizers` library. Raises ValueError with the command that installs it."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("byte-level and tokenizer.json tokenizers need: pip install tokenizers") from None
    return tokenizers


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the 68 other bytes for U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _cost_of(backend: tokenizers.Tokenizer, source: str) -> str | None:
    """`cost_of` what the library has read."""
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    contents: JsonObject = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part}
    contents["model"] = {"max_input_chars_per_word": getattr(backend.model, "max_input_chars_per_word", None)}
    return cost_of(contents, source)


def _read_decoder(backend: tokenizers.Tokenizer, source: str) -> tuple[Callable[[str], bytes], bool]:
    """What turns a piece into its bytes, and whether decoding takes a space from the front of a text."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    parts = {part["type"]: part for part in state.get("decoders", [state])}
    if "ByteLevel" in parts:
        table = byte_of_character()

        def byte_level(piece: str) -> bytes:
            try:
                return bytes([table[character] for character in piece])
            except KeyError:  # a piece that was added as it is
                return piece.encode()

        return byte_level, False
    metaspace, replace = parts.get("Metaspace"), parts.get("Replace", {})
    mark = metaspace["replacement"] if metaspace else replace.get("pattern", {}).get("String")
    if mark is None or (not metaspace and replace["content"] != " "):
        raise ValueError(
            f"{source} decodes with {' and '.join(map(str, parts))}; byte-level (ByteLevel) and sentencepiece-like "
            "(Replace or Metaspace) tokenizers are supported"
        )
    strips = metaspace["prepend_scheme"] != "never" if metaspace else parts.get("Strip", {}).get("start") == 1
    fallback = _BYTE_PIECES if "ByteFallback" in parts else {}

    def marked(piece: str) -> bytes:
        return fallback.get(piece) or piece.replace(mark, " ").encode()

    return marked, strips


def _add(backend: tokenizers.Tokenizer, tokens: Iterable[tuple[str, Mapping[str, bool]]]) -> None:
    library = import_tokenizers()
    backend.add_tokens([library.AddedToken(content, **flags) for content, flags in tokens])


def _complete(backend: tokenizers.Tokenizer, tokens: FolderTokens, rows: object, source: str) -> None:
    """Add the tokens of the other files of a folder to those of a tokenizer.json, as transformers does, but for those
    that a model of so many rows has no row for. Raises ValueError for one with an id that it cannot have."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    size = backend.get_vocab_size(with_added_tokens=True)
    wanted = []
    for token in tokens.added:
        is_new = backend.token_to_id(token.content) is None
        if (token.id is not None or token.content not in known) and not (is_new and type(rows) is int and size >= rows):
            wanted.append(token)
            size += is_new
    names = ("special", "normalized", "lstrip", "rstrip", "single_word")
    added = [(token.content, {name: getattr(token, name) for name in names}) for token in wanted]
    if added and (cost := _cost_of(backend, source)):
        LimitedEncoder(backend.to_str(), cost, source).load(added)
    _add(backend, added)
    for token in wanted:
        found = backend.token_to_id(token.content)
        if token.id not in (None, found):
            raise ValueError(
                f"the files beside {source} give the token {token.content!r} the id {token.id}, and behind the tokens "
                f"that are there it has {found}; the files belong to different tokenizers"
            )


def _check_prefix(backend: tokenizers.Tokenizer, config: JsonObject, source: str) -> None:
    """Warn where tokenizer_config.json contradicts a tokenizer.json on the space in front of a text: the classes of
    transformers that build a tokenizer anew go by the former, the others by the latter."""
    wanted = config.get("add_prefix_space")
    if not isinstance(wanted, bool) or config.get("tokenizer_class") in _AS_THE_FILE_IS:
        return
    puts = None
    for state in (json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part):
        for step in state.get("normalizers", state.get("pretokenizers", [state])):
            match step:
                case {"type": "Replace", "pattern": {"String": " "}}:
                    puts = bool(puts)
                case {"type": "Prepend"}:
                    puts = True
                case {"type": "ByteLevel", "add_prefix_space": puts}:
                    pass
                case {"type": "Metaspace", "prepend_scheme": scheme}:
                    puts = scheme != "never"
    if puts not in (None, wanted):
        warnings.warn(
            f"{source} puts {'a' if puts else 'no'} space in front of a text, as is done here, and add_prefix_space in "
            f"the {CONFIG} beside it is {str(wanted).lower()}: some readers go by that. If it is what the model was "
            "trained with, save the tokenizer again with transformers",
            RuntimeWarning,
            stacklevel=4,
        )


def _special_ids(
    backend: tokenizers.Tokenizer, folder: Path, model: Mapping[str, object], tokens: FolderTokens
) -> JsonObject:
    """The constructor's settings, from the files beside a tokenizer.json; `model` is the contents of config.json."""
    config = read_settings(folder / CONFIG)
    settings: JsonObject = {}
    for kind in ("bos", "eos", "unk", "pad"):
        text = tokens.names.get(f"{kind}_token")
        settings[f"{kind}_id"] = None if text is None else backend.token_to_id(text)
    ends = end_ids(folder, model)
    if settings["eos_id"] is None and ends:
        settings["eos_id"] = ends[0]
    if settings["bos_id"] is None and "bos_token" not in config:
        stored = read_settings(folder / GENERATION)  # of a folder whose config.json is not transformers'
        settings["bos_id"] = next(iter(_ids(model.get("bos_token_id")) + _ids(stored.get("bos_token_id"))), None)
    adds_bos = config.get("add_bos_token")
    if not isinstance(adds_bos, bool):  # ask the file's post-processor
        adds_bos = _puts_first(backend, settings["bos_id"])
    return settings | {"ends": ends, "adds_bos": adds_bos, "unused": suppressed_ids(folder)}


def _puts_first(backend: tokenizers.Tokenizer, token_id: int | None) -> bool:
    """Whether the post-processor of a tokenizer.json puts this token in front of a text."""
    return backend.encode("a").ids[:1] == [token_id]


def end_ids(folder: Path, config: Mapping[str, object] | None = None) -> list[int]:
    """What generation_config.json and config.json of a folder call the end of a text."""
    config = read_settings(folder / "config.json") if config is None else config
    return _ids(read_settings(folder / GENERATION).get(_EOS)) + _ids(config.get(_EOS))


def _ids(value: object) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]
