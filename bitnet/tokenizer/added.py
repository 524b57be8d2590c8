"""Tokens that the files of a model's folder add to its vocabulary, and what its special tokens are called.

They are in `tokenizer_config.json` ("added_tokens_decoder"; names such as "eos_token"; lists of more special ones), or
in the older `special_tokens_map.json` and `added_tokens.json`, which count where the first is silent. transformers puts
them behind the vocabulary in the order of their ids, then those that have only a name; and so does this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bitnet.files import JsonObject, read_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION = "generation_config.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """A token of a folder's files: its text, whether it is special, its id where a file gives one, and the flags of the
    `tokenizers` library."""

    content: str
    special: bool
    id: int | None = None
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def strips(self) -> bool:
        """Whether it takes spaces around it away or wants to stand alone."""
        return self.lstrip or self.rstrip or self.single_word


class FolderTokens(NamedTuple):
    """The added tokens in their order, and the texts of the special ones by name, such as "eos_token"."""

    added: list[AddedToken]
    names: dict[str, str]


def added_tokens(folder: Path) -> FolderTokens:
    """What the files of a folder say. Raises ValueError naming one that is damaged."""
    config = read_settings(folder / CONFIG)
    decoder = config.get("added_tokens_decoder")
    older, place = read_settings(folder / MAP), folder / CONFIG
    values = older | config if decoder is None else config
    names = {key: token for key in _NAMED if (token := _token(values.get(key, older.get(key)), True, place))}
    # Names of the model's own, such as "image_token", count like these.
    own = [key for key in values if key.endswith("_token") and key not in _NAMED and not key.startswith("add_")]
    extra = [token for key in own if isinstance(values[key], str) and (token := _token(values[key], True, place))]
    for key in _LISTS:
        found = values.get(key) or []
        for value in found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ():
            if token := _token(value, True, place):
                extra.append(token)
    named = [*names.values(), *extra]
    if decoder is not None:
        with_ids = list(_of_decoder(decoder, place))
    else:
        special = {token.content for token in named}
        with_ids = list(_of_list(read_settings(folder / ADDED), special, folder / ADDED))
    with_ids.sort(key=lambda token: token.id or 0)
    known = {token.content: token for token in with_ids}
    for token in named:  # a name makes special what it names
        known.setdefault(token.content, token)
    everywhere = {token.content for token in names.values()}
    added = [
        AddedToken(**{**vars(token), "special": token.special or token.content in everywhere})
        for token in known.values()
    ]
    return FolderTokens(added, {key: token.content for key, token in names.items()})


def _text(content: str, place: Path) -> str:
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} has the token {content!r:.60}, half a surrogate pair; it is damaged") from None
    return content


def _token(value: object, special: bool, place: Path, token_id: int | None = None) -> AddedToken | None:
    """A token as the files write it, a text or an object; None for no token."""
    if isinstance(value, str):
        return AddedToken(_text(value, place), special, token_id) if value else None
    if not isinstance(value, Mapping):
        if value is None or value is False:
            return None
        raise ValueError(f"{place} has the token {value!r:.60}, which is neither a text nor an object; it is damaged")
    content = value.get("content")
    flags = {name: value.get(name, False) for name in (*_FLAGS, "normalized")}
    special = value.get("special", special)
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in (special, *flags.values())):
        raise ValueError(f"{place} has the token {value!r:.60}, whose fields are of other kinds; it is damaged")
    return AddedToken(_text(content, place), special, token_id, **flags) if content else None


def _of_decoder(decoder: object, place: Path) -> Iterator[AddedToken]:
    if not isinstance(decoder, Mapping):
        raise ValueError(f"{place}: added_tokens_decoder is a {type(decoder).__name__}, not an object; it is damaged")
    for key, value in decoder.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise ValueError(f"{place}: added_tokens_decoder has the id {key!r:.40}; it is damaged")
        if token := _token(value, False, place, int(key)):
            yield token


def _of_list(ids: JsonObject, special: set[str], place: Path) -> Iterator[AddedToken]:
    for content, token_id in ids.items():
        if type(token_id) is not int or not 0 <= token_id < 10**9:
            raise ValueError(f"{place} gives the token {content!r:.40} the id {token_id!r:.40}; it is damaged")
        if content:
            yield AddedToken(_text(content, place), content in special, token_id, normalized=content not in special)


def suppressed_ids(folder: Path) -> list[int]:
    """Ids that generation_config.json of a folder wants never to be drawn: transformers' `suppress_tokens`."""
    found = read_settings(folder / GENERATION).get("suppress_tokens")
    return [i for i in found if type(i) is int] if isinstance(found, list) else []


def suppressed(ids: Iterable[int]) -> JsonObject:
    """What `suppressed_ids` reads, for a generation_config.json; nothing where there are none."""
    found = sorted(ids)
    return {"suppress_tokens": found} if found else {}


def read_settings(path: Path) -> JsonObject:
    """The object of a JSON file, {} where there is no such file. Raises ValueError naming a damaged one."""
    return read_json(path) if path.is_file() else {}
