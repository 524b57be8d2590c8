"""Calls of tools in a model's answer, in the forms that models were trained on.

    tagged     <tool_call>{"name": ..., "arguments": {...}}</tool_call>        Hermes, Qwen
    mistral    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]            Mistral
    bare       {"name": ..., "parameters": {...}}, the whole answer            Llama 3

Which one a model writes is told by its chat template. A call that is asked for (tool_choice) is not hoped for: the
prompt goes on with the beginning of a call, and a grammar keeps the rest to the tool's schema.
"""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitnet.serving.requests import Function
from bitnet.tokenizer import ChatTemplate

Form = Literal["tagged", "mistral", "bare"]
OPENERS: dict[Form, str] = {"tagged": "<tool_call>", "mistral": "[TOOL_CALLS]", "bare": "{"}
CLOSER = "</tool_call>"
_VALUES = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


@dataclass(frozen=True)
class Call:
    """A tool and its arguments, a JSON object as text."""

    id: str
    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def form_of(template: ChatTemplate) -> Form:
    """The form in which the template's model writes calls."""
    forms: tuple[Form, ...] = ("tagged", "mistral")
    return next((form for form in forms if OPENERS[form] in template.source), "bare")


def opening(form: Form) -> str:
    """What stands before the JSON object of a call that is asked for."""
    return {"tagged": "<tool_call>\n", "mistral": "[TOOL_CALLS]", "bare": ""}[form]


def call_schema(form: Form, functions: Sequence[Function]) -> dict[str, Any]:
    """The JSON schema of a call of one of the functions."""
    key = "parameters" if form == "bare" else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, key: {"$ref": f"#/$defs/{number}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for number, function in enumerate(functions)
    ]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    whole = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if form == "mistral" else call
    # Each tool's schema stands whole in a place of its own: what it defines is no other tool's.
    schemas = [
        _moved(function.parameters or {"type": "object"}, f"#/$defs/{i}") for i, function in enumerate(functions)
    ]
    return {**whole, "$defs": {str(i): schema for i, schema in enumerate(schemas)}}


def _moved(schema: Any, to: str, names: bool = False) -> Any:
    """A schema that stands at `to`, a pointer, and not at the top: what it refers to inside itself is there too.
    `names`: the keys are not a schema's words, but names of schemas."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and not names and isinstance(value, str) and value.startswith("#"):
            moved[key] = to + value[1:]
        else:
            moved[key] = value if key in _VALUES and not names else _moved(value, to, key in _NAMED and not names)
    return moved


class CallReader:
    """Splits an answer that comes in pieces into text and calls. `push` and `close` give what has become certain."""

    def __init__(self, form: Form, names: Sequence[str], *, called: bool = False, single: bool = False) -> None:
        """names: of the tools there are; called: the answer begins inside a call; single: take no second call."""
        self._form, self._names, self._single = form, frozenset(names), single
        self._opener = OPENERS[form]
        self._inside = called
        self._held = ""
        self.calls: list[Call] = []
        self._started = False  # something that is no space was read

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        return self._read(final=False)

    def close(self) -> tuple[str, list[Call]]:
        return self._read(final=True)

    def _read(self, final: bool) -> tuple[str, list[Call]]:
        given, calls = "", []
        while True:
            if not self._inside:
                before, found = self._opened(final)
                given += before
                if not found:
                    break
                self._inside = True
            end = self._held.find(CLOSER) if self._form == "tagged" else -1
            if end < 0 and not final:
                break
            body, rest = (self._held[:end], self._held[end + len(CLOSER) :]) if end >= 0 else (self._held, "")
            found_calls = self._parse(body)
            if found_calls is None:  # no call after all: what was written is text
                given += (self._opener if self._form != "bare" else "") + body + (CLOSER if end >= 0 else "")
            else:
                room = max(0, 1 - len(self.calls)) if self._single else len(found_calls)
                calls += found_calls[:room]
                self.calls += found_calls[:room]
            self._inside, self._held = False, rest
            if not rest:
                break
        return ("" if self.calls and not given.strip() else given), calls

    def _opened(self, final: bool) -> tuple[str, bool]:
        """The text before the beginning of a call, and whether there is one; a bare call is the whole answer."""
        if self._form == "bare":
            text = self._held.lstrip()
            if not text and not final:
                return "", False
            if not self._started and text.startswith("{"):
                self._held = text
                return "", True
            self._started = True
            given, self._held = self._held, ""
            return given, False
        at = self._held.find(self._opener)
        if at >= 0:
            given, self._held = self._held[:at], self._held[at + len(self._opener) :]
            return given, True
        keep = 0 if final else max(n for n in range(len(self._opener)) if self._held.endswith(self._opener[:n]))
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given, False

    def _parse(self, body: str) -> list[Call] | None:
        try:
            value = json.loads(body, parse_constant=refuse, parse_float=finite)
        except (ValueError, RecursionError):
            return None
        entries = value if isinstance(value, list) else [value]
        calls = []
        for entry in entries:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or name not in self._names:
                return None
            arguments = entry.get("arguments", entry.get("parameters", {}))
            if not isinstance(arguments, dict):
                return None
            calls.append(Call(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments)))
        return calls or None


def refuse(word: str) -> None:
    """NaN and Infinity, which Python reads. Raises ValueError."""
    raise ValueError(f"{word} is no JSON")


def finite(number: str) -> float:
    """A number of a JSON text. Raises ValueError for one that would be infinite, which JSON has no way to write."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large a number")
    return value
