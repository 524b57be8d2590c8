"""POST /v1/responses, as far as a plain chat goes: a text answers a conversation, whole or as a stream of events.

Nothing is stored on the server: the conversation is sent again with every turn, and `previous_response_id` is refused.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitnet.serving.answers import Json, Usage, event, new_id
from bitnet.serving.chat import prompt_of
from bitnet.serving.grammar import ANY_OBJECT
from bitnet.serving.jobs import Generation, Piece
from bitnet.serving.models import ServedModel, now
from bitnet.serving.requests import Message, ObjectFormat, ResponseBody, ResponseSchema, Writing
from bitnet.serving.streams import events, requests_of, stream, unless_gone


class PlainResponse:
    """One request: its job, and how its answer is put together."""

    def __init__(self, model: ServedModel, body: ResponseBody, http: HttpRequest) -> None:
        self.model, self.body, self.http = model, body, http
        messages = [Message(role="system", content=body.instructions)] if body.instructions else []
        if isinstance(body.input, str):
            messages.append(Message(role="user", content=body.input))
        else:
            messages += [Message(role=message.role, content=message.text) for message in body.input]
        prompt = prompt_of(model, messages)
        wanted = body.text.format if body.text else None
        grammar = None
        if isinstance(wanted, ObjectFormat | ResponseSchema):
            schema = ANY_OBJECT if isinstance(wanted, ObjectFormat) else wanted.schema_
            grammar = model.grammars.json_schema(schema, "text.format")
        left = max(1, min(model.scheduler.room(len(prompt), 1), model.default_new_tokens))
        writing = Writing(temperature=body.temperature, top_p=body.top_p)
        generation = Generation(
            tuple(prompt),
            body.max_output_tokens or left,
            sampling=writing.sampling(model.tokenizer.drawable, model.own_sampling),
            seed=writing.chosen_seed,
            continues=False,
            grammar=grammar,
            limited_by="max_output_tokens" if body.max_output_tokens else "input",
        )
        self.request = requests_of([generation], http)[0]
        self.usage = Usage([self.request])
        self.id, self.item_id, self.created = new_id("resp_"), new_id("msg_"), now()

    def response(self, status: str, text: str | None = None, cut: bool = False) -> dict[str, Any]:
        """The object as it is now, with its text once there is one."""
        body, usage, sampling = self.body, self.usage.body(), self.request.generation.sampling
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model.name,
            "output": [] if text is None else [self.item(status, text)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": _format(body)},
            "tool_choice": "none",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None
            if text is None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    async def answer(self) -> Response:
        return Json(await unless_gone(self.http, self._whole()))

    async def _whole(self) -> dict[str, Any]:
        text, cut = "", False
        async for _, one in events(self.model, [self.request]):
            if isinstance(one, Piece):
                text, cut = text + one.text, one.finish == "length"
        return self.response("incomplete" if cut else "completed", text, cut)

    async def chunks(self) -> AsyncIterator[bytes]:
        number = 0
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}

        def chunk(name: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": name, "sequence_number": number - 1, **fields}, name)

        text, cut, begun = "", False, False
        async for _, one in events(self.model, [self.request]):
            if not isinstance(one, Piece):
                continue
            if not begun:
                begun = True
                yield chunk("response.created", response=self.response("in_progress"))
                yield chunk("response.in_progress", response=self.response("in_progress"))
                yield chunk("response.output_item.added", output_index=0, item=self.item("in_progress", None))
                yield chunk("response.content_part.added", **place, part=_part(""))
            text, cut = text + one.text, one.finish == "length"
            if one.text:
                yield chunk("response.output_text.delta", **place, delta=one.text, logprobs=[])
        status = "incomplete" if cut else "completed"
        yield chunk("response.output_text.done", **place, text=text, logprobs=[])
        yield chunk("response.content_part.done", **place, part=_part(text))
        yield chunk("response.output_item.done", output_index=0, item=self.item(status, text))
        yield chunk(f"response.{status}", response=self.response(status, text, cut))


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _format(body: ResponseBody) -> dict[str, Any]:
    wanted = body.text.format if body.text else None
    return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)


async def respond(model: ServedModel, body: ResponseBody, http: HttpRequest) -> Response:
    """Raises ApiError for what cannot be asked of this model."""
    response = await asyncio.to_thread(PlainResponse, model, body, http)
    return await stream(http, response.chunks(), done=False) if body.stream else await response.answer()
