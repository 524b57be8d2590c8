"""Prompt look-up speculation: where a text repeats itself or its prompt, several tokens go through the model at once.

    lookup = PromptLookup(16)                           for the texts of a model, one behind the other
    ahead = Ahead(lookup, rows, row, ids)               `row` has read all of the list `ids`
    ids.append(token)                                   drawn from the logits behind them
    logits = ahead.next_logits(room)                    float32 [1, V] behind it

A draft is what followed where the text ended before as it ends now. One pass reads the drawn token and the draft behind
it. A row's logits do not depend on how its tokens were cut into passes (`cpu_rows.py`), so those behind each token of
the draft are what a pass for it alone gives, to the bit: tokens are drawn one by one as ever, with the same random
numbers, and the text is the same with and without. While they are those of the draft, the next logits are there
already; at the first other one the row forgets the rest.

How long a draft is, is chosen for every pass: what gives most tokens a second, perhaps none. The times of passes are
measured as they run. How often a draft is right is counted by the length of the match, whether it was run or not.

After Saxena's prompt look-up decoding (2023); transformers has it as `prompt_lookup_num_tokens`.
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from bitnet.inference.cpu_rows import BlockRow, NativeRows

_GRAMS = (6, 2)
"""Tokens by which earlier places are found, the more certain first."""
_LONGEST = 16  # from here on longer matches are alike
_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of a pass: few sizes, so that the times of each are soon known."""
_MEMORY = 1 / 32  # share of what is known of a match's length that the next token of one replaces
_GAIN = 1.1  # that a draft must promise
_SLOPE = 0.25  # of a pass's time for each further token, until one of its size was measured


class PromptLookup:
    """What is known of a model's passes and drafts. Threads may share it."""

    def __init__(self, tokens: int) -> None:
        """`tokens`: of the longest draft. Raises ValueError for a number out of range."""
        if not 0 <= tokens < _SIZES[-1]:
            raise ValueError(
                f"prompt_lookup_num_tokens is {tokens}; give the tokens of a draft, at most {_SIZES[-1] - 1}, or 0 for "
                "none"
            )
        self.tokens = tokens
        self._right = [max(0, length - 1) / (length + 1) for length in range(_LONGEST + 1)]
        """The share of right tokens behind a match of so many."""
        self._seconds = {size: deque[float](maxlen=9) for size in _SIZES}

    def count(self, length: int, right: bool) -> None:
        """What a match of so many tokens said of the next one."""
        length = min(length, _LONGEST)
        self._right[length] += _MEMORY * (right - self._right[length])

    def measured(self, size: int, seconds: float) -> None:
        """A pass of so many tokens was run."""
        if size in self._seconds:
            self._seconds[size].append(seconds)

    def draft_length(self, match: int, room: int) -> int:
        """Tokens of the draft behind a match of so many, at most `room`, that gives most tokens a second."""
        one = self._seconds[1]
        if not one or match == 0:
            return 0
        alone, most = statistics.median(one), min(self.tokens, room)
        best, rate, expected, likely = 0, _GAIN / alone, 1.0, 1.0
        for length in range(1, most + 1):
            likely *= self._right[min(match + length - 1, _LONGEST)]
            expected += likely
            size = length + 1
            if size in self._seconds:
                guess = alone * (1 + _SLOPE * length)
                seconds = statistics.median([guess, *self._seconds[size]])
                if expected / seconds > rate:
                    best, rate = length, expected / seconds
        return best


class Repeats:
    """Where a text, given token by token, ended before as it ends now."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.match = 0
        """How many tokens before the end are those before `at`, as far as that was counted."""
        self.at = 0
        """Where, with a match, the token stands that followed then."""
        self._behind: dict[tuple[int, ...], int] = {}

    def push(self, token: int) -> None:
        goes_on = self.match and self.ids[self.at] == token
        self.ids.append(token)
        if goes_on:
            self.match, self.at = self.match + 1, self.at + 1
        else:
            self.match = 0
        for size in _GRAMS:
            if len(self.ids) < size:
                continue
            gram = tuple(self.ids[-size:])
            if not self.match and (at := self._behind.get(gram)) is not None:
                self.at, self.match = at, size
                while self.match < min(_LONGEST, at) and self.ids[at - 1 - self.match] == self.ids[-1 - self.match]:
                    self.match += 1
            self._behind[gram] = len(self.ids)

    def draft(self, length: int) -> list[int]:
        """What followed then, of a match; where that reaches the end, the draft goes on with itself."""
        following = self.ids[self.at : self.at + length]
        return [following[i % len(following)] for i in range(length)]


class Ahead:
    """The logits behind the tokens of one text, some of them before their time."""

    def __init__(self, lookup: PromptLookup, rows: NativeRows, row: BlockRow, ids: Sequence[int]) -> None:
        """`row` has read all of `ids`, a list that grows by every drawn token."""
        self._lookup, self._rows, self._row, self._ids = lookup, rows, row, ids
        self._repeats = Repeats()
        for token in ids:
            self._repeats.push(token)
        self._draft: list[int] = []
        self._logits: list[Tensor] = []
        """Behind each token of the draft that is left."""
        self.passed = True
        """Whether the last logits took a pass."""

    def next_logits(self, room: int) -> Tensor:
        """Logits `[1, V]` behind the last of `ids`, of a text that takes at most `room` more tokens."""
        token, repeats = self._ids[-1], self._repeats
        if repeats.match:
            self._lookup.count(repeats.match, repeats.ids[repeats.at] == token)
        repeats.push(token)
        self.passed = not self._draft or self._draft[0] != token
        if not self.passed:
            del self._draft[0]
            return self._logits.pop(0)
        self.forget()
        length = self._lookup.draft_length(repeats.match, room - 1)
        self._draft = repeats.draft(length) if length else []
        started = time.perf_counter()
        (logits,) = self._rows.step([(self._row, [token, *self._draft])], every=True)
        self._lookup.measured(1 + length, time.perf_counter() - started)
        first, *self._logits = logits.split(1)
        return first

    def forget(self) -> None:
        """Let the row hold no more than all but the last of `ids`."""
        self._row.truncate(min(self._row.length, len(self._ids) - 1))
