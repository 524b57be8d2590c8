"""The one thread that runs the models: a pass of each in turn, as long as any has something to do.

What a pass gave goes to the server's event loop in one call, and from there into the queues of the requests.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Sequence

from bitnet.serving.errors import ApiError
from bitnet.serving.jobs import Event, Generation, Job, Piece
from bitnet.serving.scheduler import Scheduler

LOG = logging.getLogger("bitnet.serving")
IDLE_SECONDS = 1.0
"""Longest sleep, after which deadlines are looked at though nobody called."""


class Request(Job):
    """A job whose events an asyncio task reads."""

    def __init__(self, generation: Generation, client: str = "") -> None:
        super().__init__(generation, client)
        self.events: asyncio.Queue[Event] = asyncio.Queue()


class Worker:
    """The thread, from `start` to `stop`."""

    def __init__(self) -> None:
        self.schedulers: Sequence[Scheduler] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = threading.Event()
        self._stopping = False
        self.draining = False
        """No new requests are taken."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        """There is something to do."""
        self._work.set()

    def post(self, events: list[tuple[Job, Event]]) -> None:
        """Hand events to the requests that wait for them; called on the thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_deliver, events)
        except RuntimeError:  # the loop has closed: nobody waits any more
            self._stopping = True

    def start(self, schedulers: Sequence[Scheduler]) -> None:
        """Begin; to be called on the event loop that reads the events."""
        self.schedulers, self._loop = schedulers, asyncio.get_running_loop()
        self._thread.start()

    def drain(self) -> None:
        """Let what runs end, and take nothing more."""
        self.draining = True
        for scheduler in self.schedulers:
            scheduler.drain()

    async def stop(self) -> None:
        """End whatever still runs, and the thread."""
        self._stopping = True
        self.wake()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while not self._stopping:
            self._work.clear()
            busy = [self._step(scheduler) for scheduler in self.schedulers]
            if not any(busy):
                self._work.wait(IDLE_SECONDS)
        for scheduler in self.schedulers:
            scheduler.close()

    @staticmethod
    def _step(scheduler: Scheduler) -> bool:
        try:
            return scheduler.step()
        except Exception:  # a fault of ours must not leave every client waiting
            LOG.exception("the scheduler failed")
            scheduler.abort(ApiError(500, "the server failed on this request; its log says why"))
            return True


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        assert isinstance(job, Request)
        job.events.put_nowait(event)


async def events_of(scheduler: Scheduler, request: Request) -> AsyncGenerator[Event, None]:
    """Everything that comes to a request, until all its samples have ended; leaving early cancels it.

    Raises the ApiError that it ended with.
    """
    scheduler.submit(request)
    left = request.generation.count
    try:
        while left:
            event = await request.events.get()
            if isinstance(event, ApiError):
                left = 0
                raise event
            left -= isinstance(event, Piece) and event.finish is not None
            yield event
    finally:
        if left:
            scheduler.cancel(request)
