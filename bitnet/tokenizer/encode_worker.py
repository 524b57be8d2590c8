"""The `tokenizers` library with files whose expressions may take any time, in a process of its own
(bitnet/tokenizer/limited_worker.py).

Requests and answers, beside `{"error": what the library complains of}`:

    {"key": name, "json": tokenizer.json, "add": [[text, flags], ...]}        loads it under that name         {}
    {"key": name, "texts": [...], "special": whether names of special tokens are these}          {"ids": [[...], ...]}
                                                                      or, where it is not loaded, {"unknown": true}
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

MEMORY = 2 << 30
"""Bytes in all: several times what the largest vocabulary takes."""
KEPT = 4
_loaded: dict[str, tokenizers.Tokenizer] = {}


def answer(request: dict[str, Any]) -> dict[str, object]:
    try:
        return _answer(**request)
    except MemoryError:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return {"error": str(error)[:2000] or type(error).__name__}


def _answer(
    key: str, json: str = "", add: list[Any] | None = None, texts: list[str] | None = None, special: bool = False
) -> dict[str, object]:
    if texts is None:
        backend = tokenizers.Tokenizer.from_str(json)
        backend.no_truncation()
        backend.no_padding()
        backend.add_tokens([tokenizers.AddedToken(text, **flags) for text, flags in add or ()])
        _loaded[key] = backend
        if len(_loaded) > KEPT:
            del _loaded[next(iter(_loaded))]
        return {}
    if key not in _loaded:
        return {"unknown": True}
    _loaded[key].encode_special_tokens = not special
    return {"ids": [_loaded[key].encode(text, add_special_tokens=False).ids for text in texts]}


def prepare() -> Callable[[dict[str, Any]], dict[str, object]]:
    """Import the library, which is told to start no threads: the process may not. Raises ImportError without it."""
    global tokenizers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    return answer
