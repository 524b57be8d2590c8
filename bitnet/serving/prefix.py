"""Texts that were computed before: where a new prompt begins like one of them, its first tokens need not be read again.

Rows of finished texts are kept until their memory is wanted, the least recently used one goes first. Rows share their
blocks in the engine's cache, so a block lives as long as the last row that holds it: what many texts begin with stays.

A row is found by the hashes of its blocks of BLOCK tokens, each over all tokens up to there, and then by its tokens
themselves: equal hashes alone never join two texts.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from bitnet.inference.rows import Row

BLOCK = 16
MOST_LOOKED_AT = 32
"""Rows with one beginning of which the one is chosen that goes on like the prompt: the latest."""


class PrefixCache:
    """Rows by what they begin with. Used by one thread."""

    def __init__(self) -> None:
        self._rows: OrderedDict[int, tuple[Row, array[int]]] = OrderedDict()  # by number, least recently used first
        self._places: dict[int, list[int]] = {}  # hash of a beginning to the numbers of the rows that have it
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def fork(self, ids: Sequence[int]) -> Row | None:
        """A new row with the longest known beginning of `ids`, short of the last one, whose logits are still wanted;
        None where not even a block is known."""
        wanted, start = array("i", ids[:-1]), 0
        numbers: list[int] = []
        for place in _hashes(wanted):
            if place not in self._places:
                break
            numbers, start = self._places[place], start + BLOCK
        best, length = None, 0
        for number in numbers[-MOST_LOOKED_AT:]:
            known = self._rows[number][1]
            pairs = zip(known[start:], wanted[start:], strict=False)
            same = start + next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(known), len(wanted)) - start)
            if same > length and known[:same] == wanted[:same]:
                best, length = number, same
        if best is None:
            return None
        self._rows.move_to_end(best)
        return self._rows[best][0].fork(length)

    def keep(self, row: Row, ids: Sequence[int]) -> None:
        """Take over a row that holds these tokens."""
        known = array("i", ids[: row.length])
        places = list(_hashes(known))
        if not places:
            row.close()
            return
        for number in self._places.get(places[-1], ()):
            if self._rows[number][1][: len(known)] == known:
                self._rows.move_to_end(number)  # nothing in it is new
                row.close()
                return
        self._rows[self._next] = row, known
        for place in places:
            self._places.setdefault(place, []).append(self._next)
        self._next += 1

    def drop(self) -> bool:
        """Give up the row that was not used for the longest time; False where there is none."""
        if not self._rows:
            return False
        number, (row, known) = self._rows.popitem(last=False)
        row.close()
        for place in _hashes(known):
            self._places[place].remove(number)
            if not self._places[place]:
                del self._places[place]
        return True


def _hashes(ids: Sequence[int]) -> Iterator[int]:
    """Of every whole block, over all tokens up to its end."""
    value = 0
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        value = hash((value, *ids[start : start + BLOCK]))
        yield value
