"""What a client says is text; schemas of tools, and calls.

No special token counts anywhere in a conversation.
"""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from bitnet.serving.chat import conversation
from bitnet.serving.grammar import Grammars
from bitnet.serving.requests import Function, FunctionCall, Message, ToolCall
from bitnet.serving.tools import CallReader, Form, call_schema
from bitnet.tokenizer import ChatTemplate, HuggingFaceTokenizer
from bitnet.tokenizer.huggingface import byte_of_character
from tests.oracles import require
from tests.serving.builders import TOOL_TEMPLATE


def test_special_tokens_in_calls_and_tools_stay_text(tokenizer):
    template = ChatTemplate(TOOL_TEMPLATE, tokenizer)

    def encoded(word: str) -> list[int]:
        call = FunctionCall(name="look", arguments=f'{{"{word}": ["{word}"]}}')
        messages = [
            Message(role="user", content="Hi"),
            Message(role="assistant", tool_calls=[ToolCall(id="1", function=call)]),
            Message(role="tool", tool_call_id="1", content=word),
        ]
        tool = {
            "type": "function",
            "function": {"name": "look", "parameters": {"properties": {word: {"enum": [word]}}}},
        }
        return template.encode(conversation(messages), True, tools=[tool])

    for special in ("<s>", "</s>"):
        token = tokenizer.specials[special]
        assert encoded(special).count(token) == encoded("word").count(token), special
        assert tokenizer.decode(encoded(special)).count(special) == 5


POINTS = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "default": {"$ref": "#/$defs/X"}},
    "required": ["next"],
    "additionalProperties": False,
    "$defs": {"X": {"type": "integer"}},
}
NAMES = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/X"}, "y": {"$ref": "#/$defs/Y"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"X": {"enum": ["$ref", "b"]}, "Y": {"type": "null"}},
}


def test_without_an_end_of_text_no_token_stands_for_it() -> None:
    """Token 0 did, so that a number could end with it: "4!"."""
    require("llguidance")
    letters = sorted(byte_of_character(), key=lambda letter: (letter != "!", letter))  # 256 of them
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    endless = HuggingFaceTokenizer(backend)
    assert (endless.eos_ids, endless.id_to_piece(0)) == ((), "!")
    matcher = Grammars(endless).json_schema({"type": "integer"}, "x")()
    matcher.take(letters.index("4"))
    assert {endless.id_to_piece(i) for i in matcher.mask().nonzero().flatten().tolist()} == set("0123456789")
    matcher = Grammars(endless).json_schema({"enum": ["a"]}, "x")()
    for letter in '"a"':
        assert not matcher.complete
        assert matcher.mask().nonzero().flatten().tolist() == [letters.index(letter)]
        matcher.take(letters.index(letter))
    assert matcher.complete


def test_what_is_nested_too_deeply_is_the_clients(client, monkeypatch) -> None:
    def deep(*_: object, **__: object) -> list[int]:
        raise RecursionError

    monkeypatch.setattr(ChatTemplate, "encode", deep)
    with pytest.raises(require("openai").BadRequestError, match="nested too deeply"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("form", ["tagged", "mistral", "bare"])
def test_each_tool_has_definitions_of_its_own(tokenizer, form: Form) -> None:
    require("llguidance")
    grammars = Grammars(tokenizer)
    tools = [Function(name="points", parameters=POINTS), Function(name="names", parameters=NAMES), Function(name="no")]
    key = "parameters" if form == "bare" else "arguments"

    def taken(name: str, arguments: str) -> bool:
        """Whether the grammar goes through a whole call."""
        matcher = grammars.json_schema(call_schema(form, tools), "tools")()
        call = f'{{"name": "{name}", "{key}": {arguments}}}'
        for token in tokenizer.encode(f"[{call}]" if form == "mistral" else call):
            if not matcher.mask()[token]:
                return False
            matcher.take(token)
        return matcher.complete

    good = [("points", '{"next": {"next": null}, "default": 3}'), ("names", '{"x": "b", "y": null}'), ("no", "{}")]
    assert [taken(*call) for call in good] == [True] * 3
    bad = [("points", '{"next": null, "default": "b"}'), ("names", '{"x": 3}'), ("points", '{"next": {"name": "no"}}')]
    assert [taken(*call) for call in bad] == [False] * 3


@pytest.mark.parametrize(
    "call",
    [
        '{"name": ["look"], "arguments": {}}', '{"name": "look", "arguments": {"x": NaN}}',
        '{"name": "look", "arguments": {"x": 1e999}}',
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(call: str) -> None:
    reader = CallReader("tagged", ["look"])
    text, calls = reader.push(f"<tool_call>{call}</tool_call>")
    assert (text + reader.close()[0], calls, reader.calls) == (f"<tool_call>{call}</tool_call>", [], [])
