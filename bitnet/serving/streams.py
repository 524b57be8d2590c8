"""Requests as a handler sees them: their events side by side, until the client leaves."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from bitnet.serving.answers import DONE, event
from bitnet.serving.errors import ApiError
from bitnet.serving.jobs import Event, Generation
from bitnet.serving.models import ServedModel
from bitnet.serving.worker import Request, events_of

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


def requests_of(generations: Sequence[Generation], http: HttpRequest) -> list[Request]:
    """One job a prompt, of the client whose HTTP request it is."""
    return [Request(generation, http.scope["state"]["client"]) for generation in generations]


async def events(model: ServedModel, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Event]]:
    """The events of all requests as they come, each with its request's number; leaving early cancels them all.

    Raises the first ApiError that one of them ends with.
    """
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()

    async def read(number: int, request: Request) -> None:
        try:
            async with aclosing(events_of(model.scheduler, request)) as found:
                async for one in found:
                    queue.put_nowait((number, one))
            queue.put_nowait((number, None))
        except Exception as error:  # to be raised where the events are read
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(read(number, request)) for number, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            number, one = await queue.get()
            if isinstance(one, BaseException):
                raise one
            if one is None:
                left -= 1
            else:
                yield number, one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is stopped when the client leaves: then ClientGoneError."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def stream(http: HttpRequest, chunks: AsyncIterator[bytes], *, done: bool = True) -> Response:
    """Chunks as server-sent events. What goes wrong before the first one is an error of its own; later it is an event,
    and the stream ends."""

    async def first() -> bytes | None:
        return await anext(chunks, None)

    head = await unless_gone(http, first())

    async def body() -> AsyncIterator[bytes]:
        try:
            if head is not None:
                yield head
            async for chunk in chunks:
                yield chunk
            if done:
                yield DONE
        except ApiError as error:
            yield event(error.body(), None if done else "error")

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)
