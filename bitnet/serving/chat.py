"""POST /v1/chat/completions: a conversation is answered, with the model's own template."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitnet.serving.answers import Json, Usage, chat_logprobs, event, head
from bitnet.serving.errors import invalid
from bitnet.serving.grammar import ANY_OBJECT
from bitnet.serving.jobs import Generation, Piece, Token
from bitnet.serving.models import ServedModel
from bitnet.serving.requests import ChatBody, Function, Message, NamedTool, ObjectFormat, SchemaFormat
from bitnet.serving.streams import events, requests_of, stream, unless_gone
from bitnet.serving.tools import Call, CallReader, call_schema, finite, form_of, opening, refuse


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as templates read them: developers are the system, arguments of calls are objects."""
    found = []
    for number, message in enumerate(messages):
        entry: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                try:
                    arguments = json.loads(call.function.arguments, parse_constant=refuse, parse_float=finite)
                except (ValueError, RecursionError) as error:
                    raise invalid(
                        f"the arguments of {call.function.name} are not JSON: {error}", f"messages[{number}].tool_calls"
                    ) from error
                function = {"name": call.function.name, "arguments": arguments}
                calls.append({"id": call.id, "type": "function", "function": function})
            entry["tool_calls"] = calls
        found.append(entry)
    return found


def prompt_of(model: ServedModel, messages: list[Message], **variables: object) -> list[int]:
    """The token ids that the model sees of a conversation. Raises ApiError for one that its template does not take."""
    template = model.require_template()
    try:
        return template.encode(conversation(messages), True, **variables)
    except RecursionError as error:
        raise invalid("arguments or parameters of a tool are nested too deeply", "messages") from error
    except ValueError as error:
        # Without the path that the template was read from.
        raise invalid(str(error).replace(template.where, "the chat template"), "messages") from error


class Chat:
    """One request: its job, and how its answer is put together."""

    def __init__(self, model: ServedModel, body: ChatBody, http: HttpRequest) -> None:
        self.model, self.body, self.http = model, body, http
        self.functions = [] if body.tool_choice == "none" else [tool.function for tool in body.tools or []]
        self.forced = self._forced()
        variables: dict[str, object] = {}
        if self.functions:
            template = model.require_template()
            if not template.reads("tools"):
                raise invalid(f"the chat template of {model.name!r} has no place for tools", "tools")
            self.form = form_of(template)
            variables["tools"] = [
                {"type": "function", "function": function.model_dump(exclude_none=True, exclude={"strict"})}
                for function in self.functions
            ]
        prompt = prompt_of(model, body.messages, **variables)
        if self.forced:
            prompt += model.tokenizer.encode(opening(self.form), special=True)
        limits = {"max_tokens": body.max_tokens, "max_completion_tokens": body.max_completion_tokens}
        limited_by, limit = next(((name, given) for name, given in limits.items() if given), ("messages", None))
        left = model.scheduler.room(len(prompt), body.n or 1)
        generation = Generation(
            tuple(prompt),
            max(1, min(left, model.default_new_tokens)) if limit is None else limit,
            sampling=body.sampling(model.tokenizer.drawable, model.own_sampling),
            seed=body.chosen_seed,
            count=body.n or 1,
            stop=body.stops,
            continues=False,
            alternatives=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=self._grammar(),
            ends=not body.ignore_eos,
            limited_by=limited_by,
        )
        self.request = requests_of([generation], http)[0]
        self.usage = Usage([self.request])
        # A marker that is a special token has no text in an answer, and is put there for the reader of calls.
        self.markers = {
            token_id: text
            for text, token_id in model.tokenizer.specials.items()
            if text in ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")
        }

    def _forced(self) -> list[Function]:
        """The tools of which one must be called."""
        choice = self.body.tool_choice
        if choice == "required":
            return self.functions
        if not isinstance(choice, NamedTool):
            return []
        wanted = [function for function in self.functions if function.name == choice.function.name]
        if not wanted:
            raise invalid(f"tool_choice names {choice.function.name!r}, which is no tool of the request", "tool_choice")
        return wanted

    def _grammar(self) -> Any:
        grammars, wanted = self.model.grammars, self.body.response_format
        if self.forced:
            if isinstance(wanted, ObjectFormat | SchemaFormat):
                raise invalid(
                    "tool_choice asks for a call and response_format for a text; leave one out", "tool_choice"
                )
            return grammars.json_schema(call_schema(self.form, self.forced), "tools")
        if isinstance(wanted, ObjectFormat):
            return grammars.json_schema(ANY_OBJECT, "response_format")
        if isinstance(wanted, SchemaFormat):
            return grammars.json_schema(wanted.json_schema.schema_, "response_format")
        return None

    def _reader(self) -> CallReader | None:
        if not self.functions:
            return None
        names = [function.name for function in self.functions]
        return CallReader(self.form, names, called=bool(self.forced), single=self.body.parallel_tool_calls is False)

    async def pieces(self) -> AsyncIterator[tuple[Piece, str, list[Call], str | None]]:
        """Pieces of the samples, split into text and calls, with the reason to stop once there is one."""
        readers: dict[int, CallReader | None] = {}
        begun: dict[int, int] = {}
        async for _, one in events(self.model, [self.request]):
            if not isinstance(one, Piece):
                continue
            reader = readers.setdefault(one.index, self._reader())
            text, finish = one.text, cast("str | None", one.finish)
            calls: list[Call] = []
            if reader is not None:
                start = begun.get(one.index, 0)
                begun[one.index] = start + len(text)
                text, calls = reader.push(self._marked(text, start, one.tokens))
                if one.finish:
                    last, more = reader.close()
                    text, calls = text + last, calls + more
                    finish = "tool_calls" if reader.calls and one.finish == "stop" else one.finish
            yield one, text, calls, finish

    def _marked(self, text: str, start: int, tokens: list[Token]) -> str:
        for token in reversed(tokens):
            if token.id in self.markers:
                at = max(0, token.start - start)
                text = text[:at] + self.markers[token.id] + text[at:]
        return text

    async def answer(self) -> Response:
        return Json(await unless_gone(self.http, self._whole()))

    async def _whole(self) -> dict[str, Any]:
        count = self.request.generation.count
        texts = [""] * count
        tokens: list[list[Token]] = [[] for _ in range(count)]
        calls: list[list[Call]] = [[] for _ in range(count)]
        finishes: list[str | None] = [None] * count
        async for piece, text, found, finish in self.pieces():
            texts[piece.index] += text
            tokens[piece.index] += piece.tokens
            calls[piece.index] += found
            finishes[piece.index] = finish
        choices = []
        for index in range(count):
            message: dict[str, Any] = {"role": "assistant", "content": texts[index], "refusal": None}
            if calls[index]:
                message["content"] = texts[index] or None
                message["tool_calls"] = [call.body() for call in calls[index]]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(tokens[index]),
                    "finish_reason": finishes[index],
                }
            )
        return head("chat.completion", "chatcmpl", self.model) | {"choices": choices, "usage": self.usage.body()}

    async def chunks(self) -> AsyncIterator[bytes]:
        options = self.body.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        base = head("chat.completion.chunk", "chatcmpl", self.model)
        begun: dict[int, int] = {}

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return event(base | {"choices": [choice]} | usage)

        async for piece, text, calls, finish in self.pieces():
            index = piece.index
            if index not in begun:
                begun[index] = 0
                yield chunk(index, {"role": "assistant", "content": ""})
            if text or (piece.tokens and self.body.logprobs):
                yield chunk(index, {"content": text}, self._logprobs(piece.tokens))
            for call in calls:
                yield chunk(index, {"tool_calls": [{"index": begun[index], **call.body()}]})
                begun[index] += 1
            if finish:
                yield chunk(index, {}, None, finish)
        if usage:
            yield event(base | {"choices": [], "usage": self.usage.body()})

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": chat_logprobs(self.model.tokenizer, tokens), "refusal": None}


async def answer(model: ServedModel, body: ChatBody, http: HttpRequest) -> Response:
    """Raises ApiError for what cannot be asked of this model."""
    chat = await asyncio.to_thread(Chat, model, body, http)
    return await stream(http, chat.chunks()) if body.stream else await chat.answer()
