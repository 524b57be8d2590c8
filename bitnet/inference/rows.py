"""Texts side by side: rows of any lengths that share one model, join and leave between steps, and share prefixes.

    rows = rows_of(model)
    cache = rows.new_cache(tokens=4096)                 what all rows together may hold
    first, second = cache.new_row(), cache.new_row()
    logits = rows.step([(first, [1, 2, 3]), (second, [7])])         float32 [2, V], each of the row's last position
    third = first.fork(2)                               begins with the first two tokens of `first`
    logits = rows.step([(second, [9]), (third, [5, 6])])

A step may hold prompts and single tokens at once. Every model can do this: the native CPU engine in one pass over its
weights for all rows, any other by `PlainRows`, which runs the rows one behind the other. What a row computes does not
depend on the others.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from bitnet.inference.cpu_rows import CacheFullError, check_length, check_step
from bitnet.inference.engine import LanguageModel
from bitnet.machine import available_memory
from bitnet.model import ModelConfig

Step = Sequence[tuple[Any, Sequence[int]]]
"""Rows of one cache, each with the tokens that continue it."""

_SHORTEST = 64  # positions of a plain row's first cache


class Row(Protocol):
    """One text in a cache. Rows are used by one thread at a time."""

    @property
    def length(self) -> int:
        """Tokens that it holds."""

    def fork(self, length: int | None = None) -> "Row":
        """A new row that begins with the first `length` tokens of this one (all), without computing them."""

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""

    def close(self) -> None:
        """Give back its memory; the row cannot be used again. Closing twice does nothing."""


class RowCache(Protocol):
    """Memory for the keys and values of rows."""

    @property
    def free_tokens(self) -> int:
        """Tokens for which there is room. Whole blocks are handed out, so a row may take up to a block more."""

    def new_row(self) -> Row:
        """An empty row, which takes no memory yet."""


class Rows(Protocol):
    """A model as rows run it."""

    config: ModelConfig

    def new_cache(self, tokens: int) -> Any:
        """A `RowCache` with room for so many tokens of all rows together."""

    @overload
    def step(self, rows: Step, every: Literal[False] = False) -> Tensor: ...
    @overload
    def step(self, rows: Step, every: Literal[True]) -> list[Tensor]: ...
    def step(self, rows: Step, every: bool = False) -> Tensor | list[Tensor]:
        """Continue rows of one cache by their tokens: logits float32 `[n, V]` behind each row's last token, or with
        `every` a list of `[t_i, V]` behind each of its tokens.

        Raises ValueError for tokens that are not of the vocabulary, a row that is closed or there twice, and a text
        longer than the model's positions, CacheFullError where the cache has no room; the rows are then as before.
        """


def rows_of(model: LanguageModel) -> Rows:
    """The rows of a model: of the native CPU engine its own, of any other `PlainRows`."""
    return getattr(model, "rows", None) or PlainRows(model)


class PlainRow:
    """A row of `PlainRows`: its tokens, and the model's cache for as many of them as it has read."""

    def __init__(self, cache: "PlainRowCache", ids: list[int]) -> None:
        self.cache, self.ids, self.own, self.closed = cache, ids, None, False
        cache.rows.append(self)

    own: Any
    """A cache of the model for this row alone, or None: whatever of `ids` it lacks is read again."""

    @property
    def length(self) -> int:
        return len(self.ids)

    def fork(self, length: int | None = None) -> "PlainRow":
        return PlainRow(self.cache, self.ids[: check_length(self, length)])

    def truncate(self, length: int) -> None:
        del self.ids[check_length(self, length) :]
        if self.own is not None and self.own.length > length:
            self.own.length = length

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads of it."""
        return 0 if self.own is None else int(self.own.nbytes)

    def close(self) -> None:
        if not self.closed:
            self.cache.rows.remove(self)
            self.closed, self.ids, self.own = True, [], None


class PlainRowCache:
    """Counts the tokens of its rows; each row has a cache of its own, which grows by doubling."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; give a cache room for at least 1")
        self.tokens = tokens
        self.rows: list[PlainRow] = []

    @property
    def free_tokens(self) -> int:
        return self.tokens - sum(row.length for row in self.rows)

    def new_row(self) -> PlainRow:
        return PlainRow(self, [])


class PlainRows:
    """Rows of any model, one behind the other, each in a cache of its own.

    A row that was forked, or that has outgrown its cache, reads its tokens once more.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.config = model, model.config

    def new_cache(self, tokens: int) -> PlainRowCache:
        return PlainRowCache(tokens)

    @overload
    def step(self, rows: Step, every: Literal[False] = False) -> Tensor: ...
    @overload
    def step(self, rows: Step, every: Literal[True]) -> list[Tensor]: ...
    @torch.inference_mode()
    def step(self, rows: Step, every: bool = False) -> Tensor | list[Tensor]:
        check_step(self.config, rows)
        if not rows:
            return [] if every else torch.empty(0, self.config.vocab_size, device=self.model.device)
        needed = sum(len(ids) for _, ids in rows)
        if needed > (free := rows[0][0].cache.free_tokens):
            raise CacheFullError(f"the step has {needed} tokens and the cache room for {free}; close rows")
        logits = [self._continue(row, list(ids), every) for row, ids in rows]
        return logits if every else torch.cat(logits)

    def _continue(self, row: PlainRow, ids: list[int], every: bool) -> Tensor:
        """Logits `[t, V]` of the ids, or `[1, V]` of the last."""
        whole, positions = row.ids + ids, self.config.max_position_embeddings
        if row.own is None or row.own.max_length < len(whole):
            row.own = self.model.new_cache(1, min(positions, max(_SHORTEST, 1 << (len(whole) - 1).bit_length())))
        new = torch.tensor([whole[row.own.length :]], device=self.model.device)
        logits = self.model(new, row.own, last_only=not every)[0].float()
        row.ids = whole
        return logits[-len(ids) :]


def default_cache_tokens(config: ModelConfig, context: int, models: int = 1) -> int:
    """Room for sixteen whole texts of `context` tokens, or for what a quarter of the free memory holds of the keys and
    values of so many models in float32, at least one text."""
    bytes_per_token = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_width
    fits = int(min(available_memory(), 2**40) / 4 / models / bytes_per_token)
    return max(context + 256, min(16 * context, fits))
