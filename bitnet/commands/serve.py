"""Models behind a URL: OpenAI's HTTP interface, and a page to talk to them.

bitnet serve runs/demo                              http://127.0.0.1:8000, the page at /
bitnet serve small=runs/demo big=model.gguf --port 8080
bitnet serve model.gguf --host 0.0.0.0 --api-key "$KEY"

Needs `pip install bitnet[serve]`.
"""

import os
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    models: tyro.conf.Positional[tuple[str, ...]]
    """Models of any kind, or NAME=PATH; clients name them in "model"."""
    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs --api-key."""
    port: int = 8000
    """0 takes a free one."""
    api_key: tuple[str, ...] = ()
    """Keys of which a client must send one; the words of BITNET_API_KEY too, which no list of processes shows."""
    insecure: bool = False
    """Listen on an address that others can reach without a key."""
    cors_origin: tuple[str, ...] = ()
    """Web pages of these origins may use the server, "*" for all; none may unless given."""
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
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    io_seconds: float = 30.0
    """Time in which a client must send its request whole, and take what it is sent."""
    connections: int = 2048
    """Open connections at a time."""
    log_texts: bool = False
    """Write prompts and answers into the log."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and cache of a model that runs in floats."""
    cache: Literal["float32", "float16", "int8"] | None = None
    """Of keys and values in the native CPU engine."""
    threads: int | None = None
    """Processor threads of the model; torch's number unless given."""


def run(options: Options) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError where the extra is missing and for options that do not fit."""
    try:
        from bitnet.serving import server
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; run pip install 'bitnet[serve]'") from error
    import torch

    from bitnet.serving.models import open_all

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads is {options.threads}; give at least 1")
        torch.set_num_threads(options.threads)
    settings = server.Settings(
        host=options.host,
        port=options.port,
        api_keys=(*options.api_key, *os.environ.get("BITNET_API_KEY", "").split()),
        insecure=options.insecure,
        cors=options.cors_origin,
        context=options.context,
        cache_tokens=options.cache_tokens,
        parallel=options.parallel,
        max_new_tokens=options.max_new_tokens,
        queue=options.queue,
        queue_seconds=options.queue_seconds,
        request_seconds=options.request_seconds,
        shutdown_seconds=options.shutdown_seconds,
        body_bytes=options.max_body,
        io_seconds=options.io_seconds,
        connections=options.connections,
        log_texts=options.log_texts,
    )
    server.serve(open_all(options.models, options.device, options.dtype, options.cache), settings)
