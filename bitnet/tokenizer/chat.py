"""Chat templates: a conversation as the text that an instruct model was trained on.

    template = find_chat_template(folder, tokenizer)        # or chat_template_of_gguf(metadata, tokenizer)
    ids = template.encode([{"role": "user", "content": "Hello"}])

A template is a Jinja program that comes with a model, so it is compiled when it is used, not when the model is opened,
and runs in Jinja's sandbox in a process of its own that ends in time and has little memory
(bitnet/tokenizer/chat_render.py). There it can compute text and nothing else, with what transformers gives to templates
(`apply_chat_template`): `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception`,
`strftime_now`, `tojson`, `break` and `continue`, and blocks without the newline and the indentation of their lines. It
is looked for where transformers looks: chat_template.jinja, then
tokenizer_config.json, then chat_template.json; in a GGUF file it is `tokenizer.chat_template`.

What a message says is text: "<|im_end|>" in it ends no turn. Which tokens of a conversation are the model's to write is
known exactly (`encode_answers`), for training on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from bitnet.tokenizer.base import BaseTokenizer
from bitnet.tokenizer.chat_render import DamagedTemplate, TemplateError, render, variables_of
from bitnet.tokenizer.huggingface import read_settings

Message = Mapping[str, object]
"""{"role": "system", "user" or "assistant", "content": text}, and whatever else a template reads."""

TEMPLATE_LIMIT = 2**20
PLAIN_TEMPLATE = (
    "{% set begin = bos_token or eos_token %}{% for message in messages %}"
    "{{ begin + message['role'] + begin + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ begin + 'assistant' + begin }}{% endif %}"
)
"""For models without a template: `<s>user<s>Hello</s><s>assistant<s>Hi</s>`. It needs no tokens but the begin and the
end of a text, and every message stands between two of them: it is tokenized as if it were alone, and cannot be taken
for the name of a role, whatever it says."""


class ChatTemplate:
    """A chat template and the tokenizer whose tokens it writes."""

    def __init__(self, source: str, tokenizer: BaseTokenizer, where: str = "chat template"):
        """Take a template's text; what is wrong with it shows when it is used."""
        self.source, self.tokenizer, self.where = source, tokenizer, where
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
        self._variables: dict[str, object] = {"tools": None, "documents": None} | {
            f"{name}_token": tokenizer.id_to_piece(token_id) for name, token_id in ids.items() if token_id is not None
        }
        ends = [text for text, token_id in tokenizer.specials.items() if text and token_id in tokenizer.eos_ids]
        ends.sort(key=len, reverse=True)
        self._end_of_turn = re.compile("|".join(map(re.escape, ends))) if ends else None

    def files(self) -> dict[str, bytes]:
        """Contents by name of the file of a model's folder in which `find_chat_template` finds this template."""
        return {"chat_template.jinja": self.source.encode()}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object) -> str:
        """The text of a conversation, with the beginning of the assistant's next turn unless that is not wanted.

        `variables` are more names that the template may read. Raises ValueError with the template's own complaint,
        for instance about roles that it does not know or that do not alternate.
        """
        for message in messages:
            if "role" not in message or "content" not in message:
                raise ValueError(f'a message needs "role" and "content", this one has {sorted(message)}')
        given = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            return render(self.source, given | self._variables | variables)
        except DamagedTemplate as error:
            raise ValueError(f"{self.where} is not a Jinja template that can be read: {error}") from error
        except TypeError as error:
            raise ValueError(f"messages and variables of a chat template are what JSON can say: {error}") from error
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages) or "none"
            raise ValueError(
                f"{self.where} does not take this conversation (roles: {roles:.200}): {error}. Templates differ in the "
                "roles they know and in their order; try without a system message, users and assistants in turn"
            ) from error

    def reads(self, name: str) -> bool:
        """Whether the template looks at a variable, such as `tools`; a text that is no template does not."""
        try:
            return name in variables_of(self.source)
        except (DamagedTemplate, TemplateError):
            return False

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object) -> list[int]:
        """The token ids of `render`, with the template's special tokens; those in the words of a message or a variable
        stay text.

        The begin of text token comes in front where the tokenizer wants it and the template has not written it.
        """
        messages, broken, mark = self._broken(messages, variables)
        return self._ids(self.render(messages, add_generation_prompt, **broken), mark)

    def encode_answers(self, messages: Sequence[Message]) -> list[list[int]]:
        """The token ids of a conversation up to its last answer, in pieces: what the model reads, what it has to write
        there, what it reads next, and so on.

        A piece to write begins where the prompt ends with which the model is asked to (`encode`), and ends with the
        token that ends the turn. Joined, the pieces are the ids of the rendered conversation, unless a token would
        reach over the begin of an answer, where a model that answers has none; then they meet there. Empty without an
        answer. Raises ValueError for a template that writes a turn otherwise than it asks for it, or never ends it.
        """
        messages, _, mark = self._broken(messages, {})
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return []
        text = self.render(messages[: answers[-1] + 1], False)
        cuts = [0]
        for i in answers:
            prompt = self.render(messages[:i], True)
            # The answer begins where the prompt for it ends, and ends with the first token that ends a turn.
            end = self._end_of_turn.search(text, len(prompt)) if self._end_of_turn else None
            if not text.startswith(prompt) or len(prompt) < cuts[-1] or end is None:
                raise ValueError(
                    f"{self.where} writes no answer that can be learnt: {text[-200:]!r} should go on from "
                    f"{prompt[-200:]!r} and end with a token that ends a turn; take another template"
                )
            cuts += [len(prompt), end.end()]
        text = text[: cuts[-1]]
        # Cut at the borders, the pieces must be the tokens of the whole: otherwise training would show the model other
        # tokens than it will see.
        whole = self._ids(text, mark)
        pieces = [self.tokenizer.encode(text[a:b], special=True, mark=mark) for a, b in pairwise(cuts)]
        pieces[0] = self._ids(text[: cuts[1]], mark)
        if [*chain(*pieces)] == whole:
            return pieces
        # A space that is put in front of each piece, or a token across a border: does the whole begin as prompts do?
        prefixes = [[], *(self._ids(text[:cut], mark) for cut in cuts[1:])]
        if all(whole[: len(ids)] == ids for ids in prefixes):
            return [whole[len(a) : len(b)] for a, b in pairwise(prefixes)]
        return pieces

    def _broken(
        self, messages: Sequence[Message], variables: Mapping[str, object]
    ) -> tuple[Sequence[Message], Mapping[str, object], str]:
        """The messages and variables with the special tokens in them broken by a character that occurs in none, and
        that character; as they are, and "", where there are no such tokens."""
        texts = [*_texts([*messages, variables])]
        if all(self.tokenizer.break_specials(text, "-") == text for text in texts):
            return messages, variables, ""
        unused = (chr(code) for code in range(0xFDD0, 0xFDF0))  # code points that are no characters and never will be
        mark = next((letter for letter in unused if not any(letter in text for text in texts)), None)
        if mark is None:
            raise ValueError("a conversation holds special tokens and all of U+FDD0 to U+FDEF; take these out")

        def broken(value: Any) -> Any:
            if isinstance(value, str):
                return self.tokenizer.break_specials(value, mark)
            if isinstance(value, Mapping):
                return {broken(key): broken(item) for key, item in value.items()}
            return [broken(item) for item in value] if isinstance(value, list | tuple) else value

        def of(names: Mapping[str, object]) -> dict[str, object]:  # names that the template's author chose
            return {name: broken(value) for name, value in names.items()}

        return [of(message) for message in messages], of(variables), mark

    def _ids(self, text: str, mark: str) -> list[int]:
        ids = self.tokenizer.encode(text, special=True, mark=mark)
        bos = self.tokenizer.bos_id
        return [bos, *ids] if bos is not None and self.tokenizer.adds_bos and ids[:1] != [bos] else ids


def find_chat_template(folder: Path, tokenizer: BaseTokenizer) -> ChatTemplate | None:
    """The chat template among a model's files, None for a base model, which has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > TEMPLATE_LIMIT:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a chat template has a few thousand")
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer, str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if source := _default(read_settings(path).get("chat_template"), str(path)):
            return ChatTemplate(source, tokenizer, f"the chat template in {path}")
    return None


def chat_template_of_gguf(
    metadata: Mapping[str, object], tokenizer: BaseTokenizer, where: str = "GGUF file"
) -> ChatTemplate | None:
    """The chat template in a GGUF file's metadata, None for a base model, which has none."""
    source = _default(metadata.get("tokenizer.chat_template"), where)
    return ChatTemplate(source, tokenizer, f"the chat template in {where}") if source else None


def require(template: ChatTemplate | None, model: object) -> ChatTemplate:
    """The template. Raises ValueError for a base model."""
    if template is None:
        raise ValueError(
            f"{model} has no chat template: it is a base model, which continues texts and does not answer. Leave out "
            "--chat, take an instruct model, or put its template beside the model as chat_template.jinja"
        )
    return template


def _texts(value: object) -> Iterator[str]:
    """Every text in a value as JSON has them, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, chain(value.keys(), value.values())))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))


def _default(value: object, where: str) -> str | None:
    """One template of what a file says: a text, or several as [{"name": ..., "template": ...}]."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default") or next(iter(named.values()), None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the chat template in {where} is a {type(value).__name__}, not a text; it is damaged")
    return value
