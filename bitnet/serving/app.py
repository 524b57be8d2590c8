"""The application: every path, the form of every error, and the page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from bitnet.serving import chat, completions, embeddings, responses
from bitnet.serving.answers import Json
from bitnet.serving.errors import ApiError, plain_name
from bitnet.serving.guard import LOG, PAGE_PATHS, Guard, Rules, extra
from bitnet.serving.metrics import Metrics
from bitnet.serving.models import Models
from bitnet.serving.requests import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, ResponseBody, TokenizeBody
from bitnet.serving.streams import ClientGoneError
from bitnet.serving.worker import Worker

PAGE = Path(__file__).parent / "page"
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _documented(*statuses: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of a path as its OpenAPI description has them."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "object"}}  # of each event
    found: dict[int | str, dict[str, Any]] = {200: {"description": "The answer", "content": content}}
    return found | _errors(*statuses)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": "An error", "content": content} for status in statuses}


ASKED = (400, 401, 403, 404, 408, 413, 429, 500, 501, 503, 504)
GOT = (401, 403)


def make_app(models: Models, worker: Worker, metrics: Metrics, rules: Rules, cors: tuple[str, ...] = ()) -> ASGIApp:
    """The server of these models as an ASGI application; the worker runs while it does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start([model.scheduler for model in models])
        yield
        await worker.stop()

    # The pages with a description for people would be fetched from elsewhere; /openapi.json is there.
    app = FastAPI(title="bitnet", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(Exception, _fault)

    @app.post("/v1/completions", responses=_documented(*ASKED, streams=True), response_model=None)
    async def complete(body: CompletionBody, http: HttpRequest) -> Response:
        return await completions.complete(models.find(body.model), body, http)

    @app.post("/v1/chat/completions", responses=_documented(*ASKED, streams=True), response_model=None)
    async def answer(body: ChatBody, http: HttpRequest) -> Response:
        return await chat.answer(models.find(body.model), body, http)

    @app.post("/v1/responses", responses=_documented(*ASKED, streams=True), response_model=None)
    async def respond(body: ResponseBody, http: HttpRequest) -> Response:
        return await responses.respond(models.find(body.model), body, http)

    @app.post("/v1/embeddings", responses=_documented(*ASKED), response_model=None)
    async def embed(body: EmbeddingBody, http: HttpRequest) -> Response:
        return await embeddings.embed(models.find(body.model), body, http)

    @app.get("/v1/models", responses=_documented(*GOT))
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.card() for model in models]}

    @app.get("/v1/models/{model}", responses=_documented(*GOT, 404))
    async def one_model(model: str) -> dict[str, Any]:
        return models.find(model).card()

    @app.post("/tokenize", responses=_documented(*ASKED))
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        model = models.find(body.model)
        if body.messages is not None:
            ids = await asyncio.to_thread(chat.prompt_of, model, body.messages)
        else:
            text, special = body.prompt or "", body.add_special_tokens
            ids = await asyncio.to_thread(model.encode, text, "prompt", special=special)
        return {"tokens": ids, "count": len(ids), "max_model_len": model.context}

    @app.post("/detokenize", responses=_documented(*ASKED))
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        model = models.find(body.model)
        ids = model.check_ids(body.tokens, "tokens") if body.tokens else []
        return {"prompt": model.tokenizer.decode(ids)}

    @app.get("/health", responses=_documented(403, 503))
    async def health() -> dict[str, Any]:
        if not worker.alive:
            raise ApiError(503, "the engine has stopped; restart the server")
        return {"status": "ok"}

    @app.get("/ready", responses=_documented(403, 503))
    async def ready() -> dict[str, Any]:
        if not worker.alive or worker.draining:
            raise ApiError(503, "the server takes no requests now")
        return {"status": "ready"}

    @app.get("/metrics", responses=_errors(*GOT), response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def add_page(path: str, name: str) -> None:
        async def page() -> FileResponse:
            return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

        app.get(path, include_in_schema=False)(page)

    for path, name in PAGE_PATHS.items():
        add_page(path, name)

    paths = [route.path for route in app.routes if hasattr(route, "path")]
    guarded = Guard(app, rules, metrics, paths)
    # Around all of it, so that a page may also read why it was refused.
    return CORSMiddleware(guarded, list(cors), allow_methods=["*"], allow_headers=["*"]) if cors else guarded


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {key.decode(): value.decode() for key, value in extra(error)}
    return Json(error.body(), error.status, headers)


def _place(error: dict[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in a body an error is. pydantic also names the kinds that it has tried there, which are no part of it."""
    place: list[str | int] = []
    parts = error["loc"][1:]
    for number, part in enumerate(parts):
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and part in range(len(body))):
            body = body[part]
        elif error["type"] != "missing" or number < len(parts) - 1:
            continue
        place.append(part)
    return tuple(place)


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    """The first thing that is wrong with a body, by its name: of what is none of several kinds, what is the least."""
    assert isinstance(error, RequestValidationError)
    errors = [(_place(one, error.body), one) for one in error.errors()]
    alike = [one for one in errors if one[0][:1] == errors[0][0][:1]]
    place, first = max(alike, key=lambda one: (len(one[0]), not one[1]["type"].endswith("_type")))
    name = plain_name(place)
    if first["type"] == "extra_forbidden":
        found = ApiError(
            400, f"unknown field {name[:200]!r}: this server does not know it and ignores nothing that may change a "
            "result; leave it out", param=name[:200], code="unknown_parameter",
        )  # fmt: skip
    elif first["type"] == "none_required":
        found = ApiError(
            400, f"{name[:200]!r} is not supported by this server; leave it out", param=name[:200],
            code="unsupported_parameter",
        )  # fmt: skip
    else:
        what = str(first.get("ctx", {}).get("error", "")) or first["msg"]
        if name:
            what = f"{name[:200]}: {what}"
        elif first["type"] != "value_error":
            what = f"the body cannot be read as a JSON object (Content-Type: application/json): {what}"
        found = ApiError(400, what, param=name[:200] or None)
    return await _api_error(http, found)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is nothing at this path", 405: "this path does not take this method"}
    found = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    return Json(found.body(), error.status_code, error.headers)


async def _gone(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)


async def _fault(http: HttpRequest, error: Exception) -> Response:
    """A mistake of this server: the client learns that there is one, the log where."""
    LOG.error("a handler failed", exc_info=error)
    return Json(ApiError(500, "the server failed on this request; its log says why").body(), 500)
