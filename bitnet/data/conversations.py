"""Conversations in the forms in which they are published, as messages and which of them are learnt.

    for where, conversation in read_conversations("chats.jsonl"): ...      # None for a record without one

A record is one of

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}       OpenAI, TRL
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}           ShareGPT
    {"prompt": "...", "completion": "..."}, or a list of messages in each                             TRL
    {"instruction": "...", "input": "...", "output": "..."}, perhaps with "history"                   Alpaca

with the roles system, user and assistant (ShareGPT's human and gpt; OpenAI's developer is the system), perhaps a system
message beside it in a field such as "system", and perhaps a weight of 0 or 1 on a message: what an assistant says with
weight 0 is read and not learnt. Of a prompt nothing is learnt. An Alpaca record's input stands two lines below its
instruction, in one message.

What would change what is learnt and is not understood, such as tools, pictures, rejected answers or another weight, is
refused by its name. Fields with nothing in them (null, "", []) are as if they were not there, since tables of several
forms are full of them, but for the text of a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bitnet.data.corpus import folder_files
from bitnet.data.records import JSON_SUFFIXES, kind_of, read_records

ROLES = ("system", "user", "assistant")
CHAT_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
Message = dict[str, str]
_OPENAI = ("role", "content")

_ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "developer": "system",
}  # fmt: skip
# Names of fields without capitals and underscores.
_SYSTEM = {"system", "sys", "systemprompt", "systemmessage", "systeminstruction", "sysprompt", "systemtext"}
# Of a message, beside who says what: what no template reads and no one learns.
_REMARKS = {
    "id", "message_id", "parent_id", "index", "timestamp", "created_at", "create_time", "date", "time", "model", "lang",
    "language", "source", "url", "tokens", "num_tokens", "token_count", "score", "rating", "hash",
}  # fmt: skip
# Words in the name of a record's field that says something about what is learnt.
_NOT_UNDERSTOOD = {
    "tool": "calls of tools", "function": "calls of tools", "document": "a text to answer from",
    "context": "a text to answer from", "image": "pictures", "picture": "pictures", "video": "pictures",
    "audio": "sound", "weight": "the weight of a conversation", "mask": "what is learnt", "loss": "what is learnt",
    "train": "what is learnt", "chosen": "answers to prefer", "rejected": "answers to prefer",
    "template": "another template", "persona": "who speaks",
}  # fmt: skip
_TEXTS = ("prompt", "completion", "response", "instruction", "input", "output", "history", "question", "answer")
_HELP = (
    'it should be like {"messages": [{"role": "user", "content": "..."}, ...]}, in ShareGPT\'s or Alpaca\'s form, or '
    "a prompt and a completion; another name of the list of messages is given with --data.field"
)


class Conversation(NamedTuple):
    """What is said, {"role", "content"} each, and of every message whether it is learnt, which only answers can be."""

    messages: list[Message]
    learnt: list[bool]


def chat_files(path: str | Path) -> tuple[list[Path], str]:
    """The files of conversations that a path stands for, and in words what of a folder is left out. Raises ValueError
    where there are none."""
    path = Path(path)
    if path.is_dir():
        return folder_files(path, CHAT_SUFFIXES, ".jsonl or .parquet")
    if not path.exists():
        beside = "" if path.is_absolute() else f" in {str(Path.cwd())!r}, the current folder"
        raise ValueError(f"there is no file or folder {str(path)!r}{beside}; give a .jsonl file of conversations")
    return [path], ""


def read_conversations(path: str | Path, field: str | None = None) -> Iterator[tuple[str, Conversation | None]]:
    """The conversations of a file or folder, each behind the words that say where it stands; None for a record that has
    nothing in the fields where they are.

    field: what the list of messages is called, if not as above. Raises ValueError for a record that is no conversation
    or says something that is not understood, naming it.
    """
    for file in chat_files(path)[0]:
        if kind_of(file) == "text":
            raise ValueError(f"{str(file)!r} is plain text, not conversations; {_HELP}. Texts are given as a corpus")
        for where, record in read_records(file):
            yield where, _conversation(record, where, field)


def _empty(value: object) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _conversation(record: object, where: str, field: str | None) -> Conversation | None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no conversation (it is a {type(record).__name__}); {_HELP}")
    given = {name: value for name, value in record.items() if not _empty(value)}
    for name, value in given.items():
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
        words += [word.removesuffix("s") for word in words]
        what = next((_NOT_UNDERSTOOD[word] for word in words if word in _NOT_UNDERSTOOD), None)
        if what and name != field and not (name == "weight" and value == 1):
            raise ValueError(
                f"{where} has a field {name!r} ({what}), which is not understood and would be left out: "
                f"{_short(value)}; remove the field, or the records that need it"
            )
    lists = [field] if field else ["messages", "conversations"]
    found = [name for name in lists if name in given]
    if len(found) == 2:
        raise ValueError(f"{where} has both 'messages' and 'conversations'; choose one with --data.field")
    if found:
        conversation = _messages(given[found[0]], where, found[0])
        said = {message["content"].strip() for message in conversation.messages}
        for name in () if field else _TEXTS:  # some have the first question twice
            if name in given and not (isinstance(given[name], str) and given[name].strip() in said):
                raise ValueError(
                    f"{where} has a field {name!r} beside {found[0]!r} that none of its messages says: "
                    f"{_short(given[name])}; remove it, or read the messages alone with --data.field {found[0]}"
                )
    elif not field and {"prompt", "completion"} <= given.keys():
        conversation = _completed(given, where)
    elif not field and "output" in given and {"instruction", "input"} & given.keys():
        conversation = _alpaca(given, where)
    elif any(names <= record.keys() for names in ({name} for name in lists)) or (
        not field and any(names <= record.keys() for names in ({"prompt", "completion"}, {"instruction", "output"}))
    ):
        return None
    else:
        raise ValueError(f"{where} is no conversation (it is an object with {sorted(record)}); {_HELP}")
    return _with_system(conversation, given, where)


def _completed(given: Mapping[str, object], where: str) -> Conversation:
    """A prompt and its completion, each a text or messages."""
    if given.get("label") is False:
        raise ValueError(f"{where} has the label false, a completion not to give; remove such records")
    parts = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = given[name]
        parts.append(_messages([{"role": role, "content": value}] if isinstance(value, str) else value, where, name))
    prompt, completion = parts
    return Conversation(prompt.messages + completion.messages, [False] * len(prompt.learnt) + completion.learnt)


def _alpaca(given: Mapping[str, object], where: str) -> Conversation:
    """An instruction, perhaps with an input, and the output, behind the turns of a history."""
    turns = given.get("history", [])
    if not isinstance(turns, list) or any(not isinstance(turn, list | tuple) or len(turn) != 2 for turn in turns):
        raise ValueError(f"{where} has a 'history' that is no list of [instruction, output]: {_short(turns)}")
    asked = [given[name] for name in ("instruction", "input") if name in given]
    if not all(isinstance(text, str) for text in asked):
        raise ValueError(f"{where} has an instruction or input that is no text: {_short(asked)}")
    said = [text for turn in turns for text in turn] + ["\n\n".join(map(str, asked)), given["output"]]
    roles = ("user", "assistant") * (len(said) // 2)
    return _messages([{"role": r, "content": c} for r, c in zip(roles, said, strict=True)], where, "history")


def _with_system(conversation: Conversation, given: Mapping[str, object], where: str) -> Conversation:
    """The system message that a record has beside its messages, in front of them."""
    texts = {name: text for name, text in given.items() if re.sub("[^a-z]", "", name.lower()) in _SYSTEM}
    if not texts:
        return conversation
    name, text = next(iter(texts.items()))
    if not isinstance(text, str) or len(set(map(str, texts.values()))) > 1:
        raise ValueError(f"{where} has a system message in {' and '.join(texts)} that is not one text: {_short(texts)}")
    messages, learnt = conversation
    if any(message["role"] == "system" for message in messages):
        if messages[0] != {"role": "system", "content": text}:
            raise ValueError(f"{where} has a system message in {name!r} and another one among its messages; keep one")
        return conversation
    return Conversation([{"role": "system", "content": text}, *messages], [False, *learnt])


def _messages(found: object, where: str, name: str) -> Conversation:
    """A list of messages, in our words."""
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise ValueError(f"{where} has no list of messages in {name!r} but {_short(found)}; {_HELP}")
    messages, learnt = [], []
    for message in found:
        fields = message if isinstance(message, dict) else {}
        role_key, text_key = ("from", "value") if fields.get("role") is None and "from" in fields else _OPENAI
        for key, value in fields.items():
            if key not in (role_key, text_key, "weight", *_REMARKS) and not _empty(value):
                raise ValueError(
                    f"{where} has a message with a field {key!r}, which is not understood and would be left out: "
                    f"{_short(value)}; remove it"
                )
        role, text = fields.get(role_key), _joined(fields.get(text_key), where)
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES or not isinstance(text, str):
            raise ValueError(
                f"{where} has a message with {role_key} {role!r} and {text_key} of type {type(text).__name__}; there "
                f"are the roles {', '.join(ROLES)}, and a message is a text"
            )
        messages.append({"role": role, "content": text})
        learnt.append(_learnt(fields.get("weight"), role, where))
    return Conversation(messages, learnt)


def _joined(content: object, where: str) -> object:
    """The text of a content in parts, [{"type": "text", "text": ...}]; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        if given.keys() != {"type", "text"} or given["type"] != "text" or not isinstance(given["text"], str):
            raise ValueError(
                f"{where} has a message with a part that is no text: {_short(part)}; only texts are learnt"
            )
        texts.append(given["text"])
    return "".join(texts)


def _learnt(weight: object, role: str, where: str) -> bool:
    """Whether a message is learnt. Raises ValueError for a weight that cannot be honoured."""
    if weight is None:
        return role == "assistant"
    if weight not in (0, 1) or not isinstance(weight, int | float):
        raise ValueError(f"{where} has a message of weight {_short(weight)}; a message counts, 1, or does not, 0")
    if weight == 1 and role != "assistant":
        raise ValueError(
            f"{where} has a message of the {role} with weight 1; only what the assistant says is learnt. Leave the "
            "weight out"
        )
    return bool(weight)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
