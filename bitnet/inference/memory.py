"""What a native engine has read, for the next text that begins alike."""

from typing import Any

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.cpu_rows import BlockRow
from bitnet.inference.engine import LanguageModel
from bitnet.inference.lookup import PromptLookup
from bitnet.inference.rows import rows_of


class Memory:
    """The last text that a native engine has read, for the next one that begins alike, and what was seen of drafts. Any
    thread may use it."""

    def __init__(self, lookup: PromptLookup) -> None:
        self.lookup = lookup
        self._kept: dict[int, tuple[BlockRow | None, list[int], int]] = {}  # one, as 0, taken out by one operation
        self._weights = 0

    def forget(self) -> None:
        """Use nothing that was read by now, nor what texts that have begun by now still read: by other weights."""
        self._weights += 1

    def take(self, engine: Engine, ids: list[int], tokens: int) -> tuple[BlockRow, int, int]:
        """A row with room for so many tokens that has read as much of `ids` as is known, and how many that are: not
        the last, whose logits are wanted. Then the number of the weights, for `put`."""
        weights = self._weights
        row, known, read_by = self._kept.pop(0, (None, [], weights))
        known = known if read_by == weights else []
        pairs = enumerate(zip(known, ids[:-1], strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(known), len(ids) - 1))
        if row is not None:
            row.truncate(same)
        if row is None or row.cache.tokens < tokens:
            cache = cache_of(engine, min(2 * tokens, engine.config.max_position_embeddings))
            row = cache.new_row() if row is None else row.move(cache)
        return row, row.length, weights

    def put(self, row: BlockRow, ids: list[int], weights: int) -> None:
        self._kept[0] = row, ids[: row.length], weights


def cache_of(model: LanguageModel, tokens: int) -> Any:
    """A cache of rows in the type that `model.new_cache` has."""
    if isinstance(model, Engine):
        return model.rows.new_cache(tokens, model.cache_dtype or "float32")
    return rows_of(model).new_cache(tokens)
