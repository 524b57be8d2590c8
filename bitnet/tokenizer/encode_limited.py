"""Texts encoded in bounded time by a tokenizer.json that may take any: bitnet/tokenizer/encode_worker.py.

Oniguruma, with which the library searches, goes back and tries again up to ten million times from every place where a
match may begin, and then gives up: `(a+)+$` costs a tenth of a second for each letter of a text. So expressions that
are not known to be linear (bitnet/tokenizer/word_rules.py) do not run in this process, nor does what else can cost far
more than a text is long.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from bitnet.tokenizer import encode_worker
from bitnet.tokenizer.base import check_encodable
from bitnet.tokenizer.limited import LimitedProcess, OverLimitError
from bitnet.tokenizer.word_rules import is_linear

SECONDS, SECONDS_PER_MEGABYTE = 1.0, 20.0
"""Processor time for a tokenizer.json or some texts; those that do no harm take a tenth of it."""
PROCESS = LimitedProcess(
    encode_worker.__file__, ("tokenizers",), encode_worker.MEMORY, "this tokenizer needs: pip install tokenizers ({})"
)


MOST_GROWTH, USUAL_GROWTH = 1000, 8
"""How many times as long normalizers may make a text, and do."""
LONGEST_WORD = 1000
"""Characters of a word that WordPiece cuts into pieces, in a time that grows as their square; usually 100."""


def cost_of(contents: object, source: str) -> str | None:
    """What of a tokenizer.json's contents can take far more time or memory than a text is long; None: nothing that is
    known. Raises ValueError naming `source` where no text is safe from it."""
    if not isinstance(contents, dict):
        return None
    growth = _growth(contents.get("normalizer"))
    if growth > MOST_GROWTH:
        raise ValueError(
            f"{source}: its normalizers can make a text {growth:,.0f} times as long; it was made to do harm"
        )
    if growth > USUAL_GROWTH:
        return f"normalizers that make a text up to {growth:,.0f} times as long"
    parts = [contents.get("normalizer"), contents.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            regex = part.get("Regex")
            if isinstance(regex, str) and not is_linear(regex):
                return f"the expression {regex[:200]!r}"
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    model = contents.get("model")
    longest = model.get("max_input_chars_per_word") if isinstance(model, dict) else None
    if isinstance(longest, int) and longest > LONGEST_WORD:
        return f"words of up to {longest:,} characters"
    return None


def _growth(node: object) -> float:
    """How many times as long a normalizer makes a text: a few replacements in a row, each of one letter by a thousand,
    would take all memory for a word."""
    growth, nodes = 1.0, [node]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict):
            continue
        parts, content, pattern = (node.get(name) for name in ("normalizers", "content", "pattern"))
        nodes += reversed(parts) if isinstance(parts, list) else ()
        if node.get("type") == "Replace" and isinstance(content, str):
            fixed = pattern.get("String") if isinstance(pattern, dict) else pattern
            once = len(content) / len(fixed) if isinstance(fixed, str) and fixed else len(content) + 1
            growth *= max(1.0, once)
        elif node.get("type") == "Prepend" and isinstance(node.get("prepend"), str):
            growth += len(node["prepend"])
    return growth


class LimitedEncoder:
    """A tokenizer.json, loaded and used where it can take no more time and memory than a tokenizer needs."""

    def __init__(self, text: str, cost: str, source: str) -> None:
        """cost: what `cost_of` says, and `source` the file: both are named in errors."""
        self._text, self._cost, self._source = text, cost, source
        self._key = hashlib.sha256(text.encode()).hexdigest()

    def load(self, added: Sequence[tuple[str, Mapping[str, bool]]] = ()) -> None:
        """Load it, and add these tokens with the library's flags. Raises ValueError where that takes too long; where it
        does not, it may be done in this process too. Whether the library refuses the file is not looked at."""
        key = self._key if not added else "other"
        self._ask({"key": key, "json": self._text, "add": list(added)}, len(self._text) + 100 * len(added))

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Ids of each text; `special`: names of special tokens in them are these tokens. Raises ValueError for texts
        that take too long."""
        check_encodable(texts)
        request = {"key": self._key, "texts": list(texts), "special": special}
        size = sum(map(len, texts))
        reply = self._ask(request, size)
        while "unknown" in reply:
            self.load()
            reply = self._ask(request, size)
        if "error" in reply:
            raise ValueError(f"{self._source}: the tokenizers library fails on a text: {reply['error']}")
        ids: list[list[int]] = reply["ids"]
        return ids

    def _ask(self, request: Mapping[str, object], size: int) -> dict[str, Any]:
        seconds = SECONDS + size / 1e6 * SECONDS_PER_MEGABYTE
        try:
            return PROCESS.ask(request, seconds)
        except OverLimitError:
            what = "a text" if "texts" in request else "the file itself"
            raise ValueError(
                f"{self._source} has {self._cost}, which may take any time, and {what} of {size:,} characters takes "
                f"more than {seconds:.3g} s or {encode_worker.MEMORY >> 20} MiB: one of them is made to do harm"
            ) from None
