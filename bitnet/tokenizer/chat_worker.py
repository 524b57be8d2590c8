"""Jinja's side of chat templates, in a process of its own (bitnet/tokenizer/limited_worker.py).

A template is a program that comes with a model, and no sandbox bounds what one costs: `{{ 10 ** (10 ** 9) }}`, doubling
strings, loops in loops. So it has `SECONDS` of processor time for one text, and `MEMORY` bytes in all.

Requests are `{"source": template, "variables": {...}}`, and answers `{"text": ...}`, `{"error": what the template
complains of}` or `{"damaged": why it is no template}`. Without variables the answer is the names of those that the
template looks at, `{"names": [...]}`.
"""

from __future__ import annotations

import datetime
import importlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

SECONDS, MEMORY, TEXT = 1.0, 192 << 20, 16 << 20
OLDEST = (3, 1, 6)
"""Earlier versions of Jinja have known ways out of the sandbox (CVE-2025-27516 and before)."""


@lru_cache(8)
def compiled(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateError for a text that is no template."""
    return environment().from_string(source)


@lru_cache(1)
def environment() -> jinja2.Environment:
    """What transformers gives to templates (`apply_chat_template`)."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's words for training; here it stands for what it encloses."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A scope of its own, as in transformers: what is set inside is gone behind it.
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def answer(request: dict[str, object]) -> dict[str, object]:
    try:
        if "variables" not in request:
            from jinja2 import meta

            return {"names": sorted(meta.find_undeclared_variables(environment().parse(str(request["source"]))))}
        template = compiled(str(request["source"]))
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
        return {"damaged": str(error) or type(error).__name__}
    try:
        text = template.render(request["variables"])
    except MemoryError:
        raise
    except Exception as error:  # a template can fail like any program: TypeError, ZeroDivisionError, ...
        return {"error": str(error)[:2000] or type(error).__name__}
    return {"text": text} if len(text) <= TEXT else {"error": f"its text has {len(text):,} characters"}


def prepare() -> Callable[[dict[str, object]], dict[str, object]]:
    """Import whatever a template may want. Raises ImportError without a Jinja that is known to be safe."""
    global jinja2
    import jinja2

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < OLDEST:
        raise ImportError(f"jinja2 {jinja2.__version__} is known to be unsafe")
    for name in ("constants", "debug", "meta"):  # what would be imported late
        importlib.import_module(f"jinja2.{name}")
    for name in ("pprint", "textwrap"):
        importlib.import_module(name)
    "x".encode("idna")
    compiled("{{ messages | tojson(indent=1) }}{{ strftime_now('%d') }}").render(messages=[1.5])
    return answer
