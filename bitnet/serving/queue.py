"""Who is next: a queue for each client, and of the clients that wait the one whom the model has worked for least.

A client that comes anew, or comes back, starts level with the least served one that is here: nobody saves up a claim,
and nobody who asks for much keeps another waiting.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of clients, fair by what each client has cost so far. Used by one thread; any may ask for its length."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._served: dict[str, float] = {}  # of the clients that wait or are being served
        self._running: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))

    def push(self, client: str, item: T) -> None:
        if client not in self._served:
            self._served[client] = min(self._served.values(), default=0.0)
        self._waiting.setdefault(client, deque()).append(item)

    def peek(self) -> T | None:
        """The next item, None where nothing waits."""
        client = self._next()
        return None if client is None else self._waiting[client][0]

    def pop(self) -> T:
        """Take the next item; `finished` must follow when it is served."""
        client = self._next()
        assert client is not None
        item = self._waiting[client].popleft()
        self._running[client] = self._running.get(client, 0) + 1
        self._tidy(client)
        return item

    def charge(self, client: str, cost: float) -> None:
        """What a client's running item has cost now."""
        self._served[client] += cost

    def finished(self, client: str) -> None:
        """A client's item is served."""
        self._running[client] -= 1
        self._tidy(client)

    def remove(self, wanted: Callable[[T], bool]) -> list[T]:
        """Take out the waiting items that are wanted."""
        found = []
        for client, items in list(self._waiting.items()):
            found += [item for item in items if wanted(item)]
            self._waiting[client] = deque(item for item in items if not wanted(item))
            self._tidy(client)
        return found

    def _next(self) -> str | None:
        # Of equal ones the one that has waited in this state the longest: dicts keep their order.
        return min(self._waiting, key=lambda client: self._served[client], default=None)

    def _tidy(self, client: str) -> None:
        if not self._waiting.get(client):
            self._waiting.pop(client, None)
        if not self._running.get(client):
            self._running.pop(client, None)
            if client not in self._waiting:
                del self._served[client]
