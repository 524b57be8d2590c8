"""Models behind a URL: OpenAI's HTTP interface, and a page to talk to them.

    bitnet serve runs/demo                              http://127.0.0.1:8000, the page at /
    bitnet serve small=runs/demo big=model.gguf --port 8080
    bitnet serve model.gguf --host 0.0.0.0 --api-key "$KEY"

Needs `pip install -e '.[serve]'` in a clone.
"""

import os
from dataclasses import dataclass, fields
from typing import Literal

import tyro

from bitnet.serving.options import ServingOptions


@dataclass(frozen=True, kw_only=True)
class Options(ServingOptions):
    models: tyro.conf.Positional[tuple[str, ...]]
    """Models of any kind, or NAME=PATH; clients name them in "model"."""
    api_key: tuple[str, ...] = ()
    """Keys of which a client must send one; the words of BITNET_API_KEY too, which no list of processes shows."""
    cors_origin: tuple[str, ...] = ()
    """Web pages of these origins may use the server, "*" for all; none may unless given."""
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and cache of a model that runs in floats."""
    cache: Literal["float32", "float16", "int8", "fp8"] | None = None
    """Of keys and values in the engines, by itself float16 in the native one and bfloat16 on a GPU; fp8 (E4M3) is on a
    GPU alone."""
    activations: Literal["int8", "int16", "float"] | None = None
    """In the native engine, of weights with group scales: int8 by groups, the fastest; int16 by groups (by itself, for
    integer codes of at most 6 bits); or float, exact to the format."""
    embeddings: Literal["int8", "float16"] | None = None
    """In the native engine, of a float embedding and head: int8 by itself for ternary models, float16 is exact."""
    prompt_lookup_num_tokens: int = 0
    """In the native engine, of the longest draft by which a text goes on where it repeats its prompt or itself: faster
    for code and quotations while few texts are written, and the same texts. 0 drafts nothing."""
    threads: int | None = None
    """Processor threads of the model; torch's number unless given."""


def run(options: Options) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError where the extra is missing and for options that do not fit."""
    try:
        from bitnet.serving import server
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; run pip install -e '.[serve]' in the clone") from error
    from bitnet.machine import use_threads
    from bitnet.serving.models import open_all

    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port is {options.port}; give 1 to 65535, or 0 for any that is free")
    use_threads(options.threads)
    settings = server.Settings(
        **{field.name: getattr(options, field.name) for field in fields(ServingOptions)},
        api_keys=(*options.api_key, *os.environ.get("BITNET_API_KEY", "").split()),
        cors=options.cors_origin,
        body_bytes=options.max_body,
    )
    models = open_all(
        options.models, device=options.device, dtype=options.dtype, cache=options.cache,
        activations=options.activations, embeddings=options.embeddings,
        prompt_lookup_num_tokens=options.prompt_lookup_num_tokens,
    )  # fmt: skip
    for _, model in models:
        model.warm_up()
    server.serve(models, settings)
