"""Prompt look-up speculation: where a text repeats itself or its prompt, several tokens go through the model at once.

    lookup = PromptLookup(16)                           for the texts of a model, one behind the other
    ahead = Ahead(lookup, rows, row, ids)               `row` has read all of the list `ids`
    ids.append(token)                                   drawn from the logits behind them
    logits = ahead.next_logits(room)                    float32 [1, V] behind it

    drafters = [Drafter(lookup, row, ids), ...]         or many texts side by side, a pass at a time
    drafts = lookup.begin([(drafter, room), ...])       read by each row behind the text's last token
    drafter.take(token)                                 drawn; `drafter.ahead`: the next logits are there

A draft is what followed where the text ended before as it ends now. One pass reads the drawn token and the draft behind
it. A row's logits do not depend on how its tokens were cut into passes (`cpu_rows.py`), so those behind each token of
the draft are what a pass for it alone gives, to the bit: tokens are drawn one by one as ever, with the same random
numbers, and the text is the same with and without. While they are those of the draft, the next logits are there
already; at the first other one the row forgets the rest.

How long the drafts of a pass are, is chosen before it: what gives most tokens a second of all its texts together,
perhaps none. The times of passes are measured as they run. How often a draft is right is counted by the length of the
match, whether it was run or not.

After Saxena's prompt look-up decoding (2023); transformers has it as `prompt_lookup_num_tokens`.
"""

import heapq
import statistics
import time
from collections.abc import Iterable, Sequence

from torch import Tensor

from bitnet.inference.cpu_rows import BlockRow, NativeRows
from bitnet.inference.rows import Row

_GRAMS = (6, 2)
"""Tokens by which earlier places are found, the more certain first."""
_LONGEST = 16  # from here on longer matches are alike
_SIZES = (1, 3, 7, 15, 31, 63)
"""Tokens of all drafts of a pass: few sizes, so that the times of each are soon known."""
_MEMORY = 1 / 32  # share of what is known of a match's length that the next token of one replaces
_GAIN = 1.1  # that drafts must promise
_SLOPE = 0.25
"""Of a pass's time for each text, that a further token of a draft takes until a pass of its size was measured."""
_TIMES = 9  # of a size of pass, of which the median counts
_RENEW = 256
"""Passes without a draft until one time of each size is forgotten: what was slow beside other programs, or behind long
texts, is tried again."""


class PromptLookup:
    """What is known of a model's passes and drafts. Threads may share it."""

    def __init__(self, tokens: int) -> None:
        """`tokens`: of the longest draft. Raises ValueError for a number out of range."""
        if not 0 <= tokens <= _SIZES[-1]:
            raise ValueError(
                f"prompt_lookup_num_tokens is {tokens}; give the tokens of a draft, at most {_SIZES[-1]}, or 0 for none"
            )
        self.tokens = tokens
        self._right = [max(0, length - 1) / (length + 1) for length in range(_LONGEST + 1)]
        """The share of right tokens behind a match of so many."""
        self._seconds: dict[tuple[int, int], list[float]] = {}
        """Of the last passes of so many texts, with drafts of so many tokens in all."""
        self._plain = 0
        """Passes without a draft."""

    def count(self, length: int, right: bool) -> None:
        """What a match of so many tokens said of the next one."""
        length = min(length, _LONGEST)
        self._right[length] += _MEMORY * (right - self._right[length])

    def measured(self, texts: int, drafted: int, seconds: float) -> None:
        """A pass was run that read one token of each of so many texts, and drafts of so many tokens in all."""
        self._seconds[texts, drafted] = [*self._seconds.get((texts, drafted), ()), seconds][-_TIMES:]
        self._plain += not drafted
        if not drafted and self._plain % _RENEW == 0:
            for (count, size), known in list(self._seconds.items()):
                if size:
                    self._seconds[count, size] = known[1:]

    def draft_lengths(self, texts: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens of the draft of each text of a pass, which give most tokens a second. A text is given as the length of
        its match and the most tokens that its draft may have."""
        lengths, count = [0] * len(texts), len(texts)
        most = [min(self.tokens, room) if match else 0 for match, room in texts]
        plain = self._seconds.get((count, 0))
        if not plain or not any(length > 0 for length in most):
            return lengths
        alone = statistics.median(plain)
        best, rate, expected = 0, _GAIN * count / alone, float(count)
        # The likeliest tokens first. One is at most as likely as those before it in its draft, so no draft has a gap.
        order: list[int] = []
        ahead = [(-self._share(match), text, 1) for text, (match, _) in enumerate(texts) if most[text] > 0]
        heapq.heapify(ahead)
        while ahead and len(order) < _SIZES[-1]:
            unlikely, text, length = heapq.heappop(ahead)
            expected -= unlikely
            order.append(text)
            if length < most[text]:
                heapq.heappush(ahead, (unlikely * self._share(texts[text][0] + length), text, length + 1))
            if (drafted := len(order)) in _SIZES:
                guess = alone * (1 + _SLOPE * drafted / count)
                seconds = statistics.median([guess, *self._seconds.get((count, drafted), ())])
                if expected / seconds > rate:
                    best, rate = drafted, expected / seconds
        for text in order[:best]:
            lengths[text] += 1
        return lengths

    def begin(self, texts: Sequence[tuple["Drafter", int]]) -> list[list[int]]:
        """Begin the drafts of the texts of a pass, each given with the most tokens that are still to come to it."""
        # Behind the last one nothing is drawn, so it need not be read.
        lengths = self.draft_lengths([(drafter.match, room - 1) for drafter, room in texts])
        return [drafter.begin(length) for (drafter, _), length in zip(texts, lengths, strict=True)]

    def _share(self, match: int) -> float:
        return self._right[min(match, _LONGEST)]


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


class Drafter:
    """The drafts of one text, and how far it keeps to them."""

    def __init__(self, lookup: PromptLookup, row: Row, ids: Iterable[int]) -> None:
        """`ids`: what the text has so far; `row` is to read it."""
        self._lookup, self._row, self._repeats = lookup, row, Repeats()
        for token in ids:
            self._repeats.push(token)
        self._draft: list[int] = []
        """What is left of the last one."""
        self.ahead = False
        """The last token was the draft's: the row has read it, and the logits behind it are there."""

    @property
    def match(self) -> int:
        """Tokens before the text's end that are those before its draft; 0: there is none."""
        return self._repeats.match

    def begin(self, length: int) -> list[int]:
        """The draft of so many tokens behind the text's last, which is run now."""
        self._draft = self._repeats.draft(length) if length else []
        return list(self._draft)

    def take(self, token: int) -> None:
        """Go on by a token. Where the text leaves the draft, the row forgets the rest."""
        repeats = self._repeats
        if repeats.match:
            self._lookup.count(repeats.match, repeats.ids[repeats.at] == token)
        repeats.push(token)
        self.ahead = self._draft[:1] == [token]
        if self.ahead:
            del self._draft[0]
        else:
            self.forget()

    def forget(self) -> None:
        """Let the row hold no more than all but the last of the text."""
        self._draft = []
        self._row.truncate(min(self._row.length, len(self._repeats.ids) - 1))


class Ahead:
    """The logits behind the tokens of one text, some of them before their time."""

    def __init__(self, lookup: PromptLookup, rows: NativeRows, row: BlockRow, ids: Sequence[int]) -> None:
        """`row` has read all of `ids`, a list that grows by every drawn token."""
        self._lookup, self._rows, self._row, self._ids = lookup, rows, row, ids
        self._drafter = Drafter(lookup, row, ids)
        self._logits: list[Tensor] = []
        """Behind each token of the draft that is left."""
        self.passed = True
        """Whether the last logits took a pass."""

    def next_logits(self, room: int) -> Tensor:
        """Logits `[1, V]` behind the last of `ids`, of a text that takes at most `room` more tokens."""
        token, drafter = self._ids[-1], self._drafter
        drafter.take(token)
        self.passed = not drafter.ahead
        if not self.passed:
            return self._logits.pop(0)
        (draft,) = self._lookup.begin([(drafter, room)])
        started = time.perf_counter()
        (logits,) = self._rows.step([(self._row, [token, *draft])], every=True)
        self._lookup.measured(1, len(draft), time.perf_counter() - started)
        first, *self._logits = logits.split(1)
        return first

    def forget(self) -> None:
        """Let the row hold no more than all but the last of `ids`."""
        self._row.truncate(min(self._row.length, len(self._ids) - 1))
