"""The server's life: models on an address, until SIGTERM or Ctrl-C, after which what runs is finished.

uvicorn speaks HTTP. What it leaves open is closed here: connections on which no whole request comes within a time, and
more connections than there may be.
"""

import asyncio
import ipaddress
import logging
import math
import socket
from dataclasses import dataclass
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitnet.inference.rows import default_cache_tokens
from bitnet.inference.text_model import TextModel
from bitnet.serving.app import make_app
from bitnet.serving.guard import LOCAL_HOSTS, LOG, Rules
from bitnet.serving.jobs import Limits
from bitnet.serving.metrics import Metrics, ModelMetrics
from bitnet.serving.models import Models, ServedModel, now
from bitnet.serving.options import ServingOptions
from bitnet.serving.scheduler import Scheduler
from bitnet.serving.worker import Worker

HEADER_BYTES = 32 << 10
"""Longest line of a request and its headers."""


@dataclass(frozen=True)
class Settings(ServingOptions):
    """All that the server is told. Raises ValueError for what does not fit."""

    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    body_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        local = self.host == "localhost" or _is_loopback(self.host)
        if not local and not self.api_keys and not self.insecure:
            raise ValueError(
                f"--host {self.host} can be reached from outside this machine and there is no --api-key; give one, or "
                "--insecure to let everybody in"
            )
        if any(not key.strip() or key != key.strip() or not key.isascii() for key in self.api_keys):
            raise ValueError("an API key is empty, has spaces around it or letters beyond ASCII; give a plain word")
        if self.context is not None and self.context < 2:
            raise ValueError(f"--context is {self.context}; give room for a prompt and an answer, e.g. 2048")
        for name in ("shutdown_seconds", "body_bytes", "io_seconds", "connections", "max_new_tokens"):
            if not getattr(self, name) > 0:
                option = "max-body" if name == "body_bytes" else name.replace("_", "-")
                raise ValueError(f"--{option} is {getattr(self, name)}; give a positive number")

    @property
    def rules(self) -> Rules:
        # Somebody who binds another address or uses keys may be called by any name.
        hosts = None if self.api_keys or not (_is_loopback(self.host) or self.host == "localhost") else LOCAL_HOSTS
        return Rules(self.api_keys, hosts, self.body_bytes, self.io_seconds, self.log_texts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Application:
    """Models, their engine thread and the ASGI application over them."""

    def __init__(self, models: list[tuple[str, TextModel]], settings: Settings) -> None:
        self.worker, self.metrics = Worker(), Metrics()
        self.models = Models([self._serve(name, model, settings, len(models)) for name, model in models])
        self.app = make_app(self.models, self.worker, self.metrics, settings.rules, settings.cors)

    def _serve(self, name: str, model: TextModel, settings: Settings, count: int) -> ServedModel:
        context = min(model.positions, settings.context or model.positions)
        if settings.context is not None and settings.context > context:
            LOG.warning("%s has %d positions, fewer than --context %d", name, context, settings.context)
        cache_tokens = settings.cache_tokens
        if cache_tokens is None:
            cache_tokens = default_cache_tokens(model.model.config, context, count)
        limits = Limits(
            context, cache_tokens, settings.parallel, settings.queue, settings.queue_seconds, settings.request_seconds
        )
        metrics = ModelMetrics(self.metrics, name)
        tokenizer = model.source.tokenizer
        scheduler = Scheduler(model.model, tokenizer, limits, self.worker.post, metrics, self.worker.wake, model.lookup)
        self.metrics.watch(name, lambda: scheduler.counts)
        return ServedModel(name, model, context, settings.max_new_tokens, scheduler, now())


def protocol_class(io_seconds: float, most: int) -> type[H11Protocol]:
    """uvicorn's protocol with an end to connections that do not ask, and to their number."""

    class Protocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._waiting is not None:
                self._waiting.cancel()

        def _wait(self) -> None:
            """A request must be there, or begin and be complete, within a time."""
            if self.cycle is not None and not self.cycle.response_complete:
                if self._waiting is not None:
                    self._waiting.cancel()
                self._waiting = None
            elif self._waiting is None:
                self._waiting = self.loop.call_later(io_seconds, self._give_up)

        def _give_up(self) -> None:
            self._waiting = None
            if not self.transport.is_closing():
                self.transport.close()

    return Protocol


class Server(uvicorn.Server):
    """uvicorn's server, which tells the models when it is to end."""

    def __init__(self, application: Application, settings: Settings) -> None:
        self._worker = application.worker
        super().__init__(
            uvicorn.Config(
                application.app,
                http=protocol_class(settings.io_seconds, settings.connections),
                # The protocol ends what waits. uvicorn's own 5 seconds are those for which httpx, and so OpenAI's
                # client, takes a connection again: its request could meet the server's closing.
                timeout_keep_alive=math.ceil(settings.io_seconds) + 1,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_graceful_shutdown=int(max(1, settings.shutdown_seconds)),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal may come while this thread holds any lock, so the work is done between two of its tasks.
        self._loop.call_soon_threadsafe(self._worker.drain)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)


def listen(settings: Settings) -> socket.socket:
    """The socket of the address, with the port that was chosen where 0 was asked for. Raises OSError, naming both."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}") from error


def serve(models: list[tuple[str, TextModel]], settings: Settings) -> None:
    """Serve until a signal."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    _raise_file_limit(settings.connections + 128)
    server = Server(Application(models, settings), settings)
    with listen(settings) as listener:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        names, port = ", ".join(name for name, _ in models), listener.getsockname()[1]
        LOG.info("%s on http://%s:%d (Ctrl-C ends)", names, host, port)
        server.run([listener])


def _raise_file_limit(wanted: int) -> None:
    """A connection is an open file, of which a process may have few unless it asks."""
    try:  # not everywhere
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
