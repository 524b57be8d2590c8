"""A template's text, from a process that is ended where it does not end: see bitnet/tokenizer/chat_worker.py."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from bitnet.tokenizer import chat_worker
from bitnet.tokenizer.limited import LimitedProcess, OverLimitError

PROCESS = LimitedProcess(
    chat_worker.__file__, ("jinja2", "markupsafe"), chat_worker.MEMORY,
    "chat templates need jinja2 3.1.6 or newer ({}): pip install -U jinja2",
)  # fmt: skip


class TemplateError(ValueError):
    """What a template complains of, or that it does not end."""


class DamagedTemplate(ValueError):
    """Why a text is no template."""


def render(source: str, variables: Mapping[str, object]) -> str:
    """The text that a template makes of variables, which JSON must be able to say. Raises TemplateError with what the
    template complains of, or that it takes more time or memory than a template may; DamagedTemplate for a text that is
    none; TypeError for variables of other kinds."""
    text: str = _ask({"source": source, "variables": variables})["text"]
    return text


@lru_cache(8)
def variables_of(source: str) -> frozenset[str]:
    """The names of the variables that a template looks at. Raises as `render` does."""
    return frozenset(_ask({"source": source})["names"])


def _ask(request: Mapping[str, object]) -> dict[str, Any]:
    try:
        reply = PROCESS.ask(request, chat_worker.SECONDS)
    except OverLimitError:
        raise TemplateError(
            f"it does not end within {chat_worker.SECONDS:g} s of processor time and {chat_worker.MEMORY >> 20} MiB of "
            "memory, which no conversation needs: it is broken, or made to do harm"
        ) from None
    if "damaged" in reply:
        raise DamagedTemplate(reply["damaged"])
    if "error" in reply:
        raise TemplateError(reply["error"])
    return reply
