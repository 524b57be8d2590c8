"""What every page is made of: sections, tables, and pictures of which a slider shows one at a time.

Everything is in the file: styles (those of the server's page with some more), scripts and data. The page asks nobody
for anything, which its own content policy holds it to.
"""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Section:
    """A part of a page. `body` is HTML."""

    anchor: str
    title: str
    body: str


def page(title: str, intro: str, sections: Sequence[Section], *, script: str = "", data: Any = None) -> str:
    """A whole page as HTML. intro: HTML; script: another script of `static` beside page.js; data: what it reads, as
    JSON."""
    static = resources.files("bitnet.pages") / "static"
    theme = (resources.files("bitnet.serving") / "page" / "theme.css").read_text(encoding="utf-8")
    style = theme + (static / "page.css").read_text(encoding="utf-8")
    scripts = [(static / name).read_text(encoding="utf-8") for name in ("page.js", script) if name]
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in sections)
    parts = "".join(
        f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>{part.body}</section>' for part in sections
    )
    # "<" cannot end the script that holds the data.
    held = json.dumps(data).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape(title)}</h1>{intro}</header>
<nav aria-label="Parts of this page"><ul>{links}</ul></nav>
<main id="content" tabindex="-1">{parts}</main>
<script type="application/json" id="data">{held}</script>
<script>{"".join(scripts)}</script>
</body>
</html>
"""


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def caption(picture: str, text: str, *, anchor: str = "") -> str:
    """A picture (HTML) with what it says below it (text)."""
    name = f' id="{anchor}"' if anchor else ""
    return f"<figure{name}>{picture}<figcaption>{escape(text)}</figcaption></figure>"


def side_by_side(*parts: str) -> str:
    """Parts beside each other where there is room."""
    return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def slip(text: str) -> str:
    """What the guide has wrong, and what is right."""
    return f'<p class="slip"><strong>The guide slips here.</strong> {escape(text)}</p>'


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str,
    marked: Iterable[int] = (),
    html: bool = False,
) -> str:
    """A table that scrolls sideways where it is too wide. title: for its caption; marked: rows to stand out; html: the
    cells are HTML already."""
    marks = set(marked)
    show = str if html else escape
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headings)
    body = ""
    for index, (first, *others) in enumerate(rows):
        cells = f'<th scope="row">{show(first)}</th>' + "".join(f"<td>{show(cell)}</td>" for cell in others)
        body += f"<tr{' class=marked' if index in marks else ''}>{cells}</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}"><table>'
        f"<caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def frames(name: str, label: str, entries: Sequence[tuple[str, str]], *, start: int = 0, play: bool = False) -> str:
    """Pictures of which a slider shows one. name: of this slider, unique on the page; label: what it changes; entries:
    each value as text and its picture as HTML; play: a button goes through them."""
    shown = "".join(
        f'<div class="frame" data-value="{escape(value)}"{"" if index == start else " hidden"}>{picture}</div>'
        for index, (value, picture) in enumerate(entries)
    )
    button = f'<button type="button" data-play="{name}" aria-pressed="false">Play</button>' if play else ""
    return (
        f'<div class="frames"><div class="control"><label for="{name}">{escape(label)}: '
        f'<output for="{name}">{escape(entries[start][0])}</output></label>'
        f'<input type="range" id="{name}" min="0" max="{len(entries) - 1}" value="{start}" step="1" '
        f'aria-valuetext="{escape(entries[start][0])}">{button}</div>{shown}</div>'
    )
