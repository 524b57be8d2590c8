"""What a client says anywhere in a conversation is text: no special token of it counts."""

from bitnet.serving.chat import conversation
from bitnet.serving.requests import FunctionCall, Message, ToolCall
from bitnet.tokenizer import ChatTemplate
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
