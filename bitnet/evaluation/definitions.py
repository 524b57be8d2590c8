"""Questions from WordNet: a noun, and of four definitions the one that is its own.

WordNet's data files are read as they are distributed (`man 5 wndb`): a line of data.noun is one meaning,

    offset lexfile type count word id [word id ..] pointers .. | definition; "example"

Debian has them in the package wordnet-base, in the folder DEBIAN. The questions are our own, and no published test's.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

DEBIAN = Path("/usr/share/wordnet")
CHOICES = 4


@dataclass(frozen=True)
class Meaning:
    """A noun and its definition."""

    noun: str
    definition: str
    field: str
    """The lexicographer's file that it is from: animals, artifacts, ..."""


def read_meanings(folder: Path) -> list[Meaning]:
    """The meanings of common nouns of one word: each noun's first, where no noun shares it. Raises ValueError where the
    folder has no data.noun or no meaning is in it."""
    path = folder / "data.noun"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give WordNet's folder, or install Debian's package wordnet-base")
    found: dict[str, Meaning] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        head, bar, gloss = line.partition(" | ")
        parts = head.split()
        if not bar or len(parts) < 5 or not parts[0].isdigit():  # the licence, at the top
            continue
        noun, definition = parts[4], re.split(r"[;\"(]", gloss)[0].strip()
        alone = parts[3] == "01" and re.fullmatch(r"[a-z]{3,12}", noun)
        if alone and 3 <= len(definition.split()) <= 12 and noun not in definition.split():
            found.setdefault(noun, Meaning(noun, definition, parts[1]))
    different = len({meaning.definition for meaning in found.values()})
    if different < CHOICES:
        raise ValueError(f"{path} has {different} nouns with a definition of their own; is it WordNet's data.noun?")
    return list(found.values())


def questions(meanings: list[Meaning], count: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    """`count` nouns, each as the start of a text and its definition, which comes first, with three of other nouns, from
    the same field where that has enough. The same ones on every call."""
    drawn = random.Random(seed)
    fields: dict[str, list[Meaning]] = {}
    for meaning in meanings:
        fields.setdefault(meaning.field, []).append(meaning)
    asked = []
    for meaning in drawn.sample(meanings, min(count, len(meanings))):
        others = fields[meaning.field] if len(fields[meaning.field]) > CHOICES else meanings
        wrong: list[str] = []
        while len(wrong) < CHOICES - 1:
            other = drawn.choice(others)
            if other.definition not in (meaning.definition, *wrong):
                wrong.append(other.definition)
            elif len({each.definition for each in others}) < CHOICES:
                others = meanings
        asked.append((f"{meaning.noun.capitalize()}:", [f" {each}" for each in (meaning.definition, *wrong)]))
    return asked
