"""Jinja's side of chat templates: a program of its own, in which whatever a template does ends in time.

A template is a program that comes with a model, and no sandbox bounds what one costs: `{{ 10 ** (10 ** 9) }}`, doubling
strings, loops in loops. So it runs here, in a process that has no environment variables, may write no file, start no
other process and open no more than it has open, and is ended by the system behind `SECONDS` of processor time for one
text or `MEMORY` bytes in all. (Windows and macOS know fewer of these limits: there the parent ends it by the clock.)

Requests come as lines of JSON on standard input, `{"source": template, "variables": {...}}`, and answers go as lines to
standard output: `{"text": ...}`, `{"error": what the template complains of}` or `{"damaged": why it is no template}`.
Without variables the answer is the names of those that the template looks at, `{"names": [...]}`.
This file imports nothing of the package, which would take seconds: `bitnet/tokenizer/chat.py` starts it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import signal
import sys
from functools import lru_cache

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


def limit() -> None:
    """Take from this process what a template has no use for."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, value in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0), ("NOFILE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def main(seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for name in (
        "jinja2.constants",
        "jinja2.debug",
        "jinja2.meta",
        "pprint",
        "textwrap",
    ):  # what would be imported late
        importlib.import_module(name)
    "x".encode("idna")
    compiled("{{ messages | tojson(indent=1) }}{{ strftime_now('%d') }}").render(messages=[1.5])
    limit()
    timer = getattr(signal, "setitimer", None)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if timer:  # of processor time; its signal ends the process, whatever it does
            timer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(answer(request)).encode()
        if timer:
            timer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.path += json.loads(sys.argv[1])  # where the parent has jinja2
    try:
        import jinja2

        version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
        if version < OLDEST:
            raise ImportError(f"jinja2 {jinja2.__version__} is known to be unsafe")
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        sys.exit(1)
    print("{}", flush=True)
    main(float(sys.argv[2]))
