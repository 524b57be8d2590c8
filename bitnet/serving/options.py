"""What the command and the server are told by the same names. Imports nothing of the server: --help is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingOptions:
    """How models are served."""

    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs --api-key."""
    port: int = 8000
    """0 takes a free one."""
    insecure: bool = False
    """Listen on an address that others can reach without a key."""
    context: int | None = None
    """Most tokens of prompt and answer; the model's positions unless given."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are held, of all texts together; from the free memory unless given."""
    parallel: int = 64
    """Texts that are written at the same time."""
    max_new_tokens: int = 2048
    """Longest answer where a chat's request names none."""
    queue: int = 256
    """Requests that may wait; one more is refused."""
    queue_seconds: float = 60.0
    """Longest wait for a place."""
    request_seconds: float = 600.0
    """Longest time of a request, its wait included."""
    shutdown_seconds: float = 60.0
    """Time that running requests have to end after SIGTERM or Ctrl-C."""
    io_seconds: float = 30.0
    """Time in which a client must send its request whole, and take what it is sent."""
    connections: int = 2048
    """Open connections at a time."""
    log_texts: bool = False
    """Write prompts and answers into the log."""
