"""What stands before every handler: keys, hosts, limits of bodies and time, one line of log and one count an answer.

A body that is too long is refused when its headers say so, or when it turns out to be; its rest is thrown away as it
comes, since a client whose connection is closed while it sends never sees the answer. A client that stops in the middle
of its body, or stops reading its answer, is left after `io_seconds`. Without a key the server answers only to
names of this machine, so that no web page can reach it under a name of its own (DNS rebinding).
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitnet.serving.errors import ApiError
from bitnet.serving.metrics import Metrics
from bitnet.serving.streams import ClientGoneError

LOG = logging.getLogger("bitnet.serving")
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
PAGE_FILES = ("theme.css", "page.css", "page.js", "icon.svg")
PAGE_PATHS = {"/": "index.html"} | {f"/{name}": name for name in PAGE_FILES}
OPEN_PATHS = frozenset({*PAGE_PATHS, "/health", "/ready", "/openapi.json"})
"""What needs no key: it tells nothing of models and texts."""
CONTENT_POLICY = "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; style-src 'self'; " \
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """What the guard lets through."""

    api_keys: Sequence[str] = ()
    hosts: Collection[str] | None = LOCAL_HOSTS
    """Names under which the server answers; None: any."""
    body_bytes: int = 4 << 20
    io_seconds: float = 30.0
    log_texts: bool = False


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics, paths: Collection[str]) -> None:
        self.app, self.rules, self.metrics, self._paths = app, rules, metrics, frozenset(paths)
        self._digests = [_digest(key) for key in rules.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Exchange(self, scope, receive, send).run()

    def client_of(self, headers: dict[bytes, bytes], scope: Scope) -> str:
        """Who asks, for the fair queue. Raises ApiError for somebody who may not."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.rules.hosts is not None and name not in self.rules.hosts:
            raise ApiError(403, "this server answers to names of its own machine alone; see --host", code="wrong_host")
        peer = str((scope.get("client") or ("",))[0])
        if not self._digests or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return peer
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(given.decode("latin-1").strip()) if kind.lower() == b"bearer" else b""
        # All keys are compared, each in a time that does not depend on where it differs.
        found = [i for i, known in enumerate(self._digests) if hmac.compare_digest(known, digest)]
        if not found:
            raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                           code="invalid_api_key")  # fmt: skip
        return f"key {found[0]} {peer}"

    def path_of(self, scope: Scope) -> str:
        """The path as metrics and logs name it: strangers' inventions are one."""
        path = scope["path"]
        return path if path in self._paths else "/v1/models/*" if path.startswith("/v1/models/") else "other"


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.rules, self.scope = guard, guard.rules, scope
        self._receive, self._send = receive, send
        self.status, self.begun = 0, False
        self.body: bytes | None = None
        self.texts: list[bytes] = []

    async def run(self) -> None:
        started = time.perf_counter()
        headers = dict(self.scope["headers"])
        try:
            self.scope.setdefault("state", {})["client"] = self.guard.client_of(headers, self.scope)
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self.rules.body_bytes:
                raise self._too_long()
            self.body = await self.read_body()
            if self.rules.log_texts:
                self.texts.append(self.body)
            await self.guard.app(self.scope, self.receive, self.send)
        except ApiError as error:
            if not self.begun:
                await self._refuse(error)
        except (ClientGoneError, TimeoutError, OSError):
            self.status = self.status or 499  # nobody is there to be told
        finally:
            path, seconds = self.guard.path_of(self.scope), time.perf_counter() - started
            self.guard.metrics.requests.labels(path, str(self.status)).inc()
            LOG.info("%s %s %d %.3f s", self.scope["method"], path, self.status, seconds)
            if self.texts:
                LOG.info("%s", b"".join(self.texts).decode("utf-8", "replace"))

    async def read_body(self) -> bytes:
        """The whole body. Raises ApiError for one that is too long or too slow."""
        parts: list[bytes] = []
        read, more = 0, True
        try:
            async with asyncio.timeout(self.rules.io_seconds):
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    parts.append(message.get("body", b""))
                    read, more = read + len(parts[-1]), message.get("more_body", False)
                    if read > self.rules.body_bytes:
                        raise self._too_long()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.rules.io_seconds:g} s", code="timeout") from None
        return b"".join(parts)

    async def receive(self) -> Message:
        """The body, once; behind it nothing comes but the client's leaving."""
        if self.body is None:
            return await self._receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.begun = message["status"], True
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        elif self.rules.log_texts:
            self.texts.append(message.get("body", b""))
        # The transport takes what fits its buffer and waits for the reader with the rest.
        async with asyncio.timeout(self.rules.io_seconds):
            await self._send(message)

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"the body is longer than the {self.rules.body_bytes} bytes that are taken", code="too_long"
        )

    async def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if error.status == 408:
            headers.append((b"connection", b"close"))  # the rest of the body is not waited for
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers + extra(error)})
        await self.send({"type": "http.response.body", "body": body})


_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", CONTENT_POLICY.encode()),
]


def extra(error: ApiError) -> list[tuple[bytes, bytes]]:
    """Headers that go with an error."""
    if error.status == 401:
        return [(b"www-authenticate", b"Bearer")]
    if error.status in (429, 503):
        return [(b"retry-after", b"1")]
    return [(b"x-should-retry", b"false")] if error.status >= 500 else []


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
