"""Rows of the native CPU engine: texts of any lengths in one pass over the weights, their cache in shared blocks.

A cache is a pool of blocks of BLOCK positions, each with the keys and values of all layers. A row has a list of them; a
fork begins with the same ones, which are counted, and whoever appends to a block that others have too copies it first.

Steps of several threads are joined: whoever comes while a pass runs waits for its end, and the next one takes all that
wait. So many threads that each write one text are as fast as one that writes them all, and nobody sees the others: a
row's logits do not depend on them, to the bit.
"""

import array
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from bitnet.inference.engine import check_ids
from bitnet.kernels.cpu import native
from bitnet.model import ModelConfig

BLOCK = 32
"""Positions of a block, a multiple of 16."""
MAX_CHUNK = 512
"""New tokens that go through the layers together: more would only need more memory."""
CACHE_DTYPES = {"float32": (0, torch.float32), "float16": (1, torch.float16), "int8": (2, torch.int8)}


def check_cache_dtype(dtype: str | None) -> None:
    """Raise ValueError for a type of keys and values that the native kernels do not have; None is their own choice."""
    if dtype not in (None, *CACHE_DTYPES):
        raise ValueError(f"cache {dtype!r} is unknown to the native kernels; choose one of {', '.join(CACHE_DTYPES)}")


class Forward(Protocol):
    """What rows need of the engine."""

    config: ModelConfig
    cache_dtype: str | None

    meeting: "Meeting"

    def forward(self, rows: Any, ids: array.array, wanted: Sequence[int], logits: Tensor) -> None: ...


class Storage:
    """Keys and values of so many blocks, in the layout of `bn_cache` in `layout.h`.

    Keys lie as `[S / 16, D, 16]` for every block, layer and head, values as `[S, D]`, S and D padded to 16, in float32,
    float16, or int8 with a float32 scale for every position of a head (absmax, as activations are quantized).
    """

    def __init__(self, config: ModelConfig, blocks: int, block: int, strides: tuple[int, int, int], dtype: str) -> None:
        """`strides`: positions from one block, layer and head to the next."""
        check_cache_dtype(dtype)
        number, torch_dtype = CACHE_DTYPES[dtype]
        width = -(-config.head_width // 16) * 16
        positions = config.num_hidden_layers * config.num_key_value_heads * blocks * block
        self.keys = torch.empty(positions * width, dtype=torch_dtype)
        self.values = torch.empty(positions * width, dtype=torch_dtype)
        scales = positions if dtype == "int8" else 0
        self.key_scale, self.value_scale = torch.empty(scales), torch.empty(scales)
        tensors = (self.keys, self.values, self.key_scale, self.value_scale)
        self.struct = native.Cache(*(tensor.data_ptr() for tensor in tensors), number, block, *strides)
        each = config.head_width * self.keys.element_size() + (4 if scales else 0)
        self.per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * each
        """Bytes of a row's position that a step reads."""


class BlockCache:
    """Memory for rows of one engine, in blocks that several rows may share. Rows of one cache may be used from several
    threads, each row from one at a time."""

    def __init__(self, config: ModelConfig, tokens: int, dtype: str) -> None:
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; give a cache room for at least 1")
        blocks, heads = -(-tokens // BLOCK), config.num_key_value_heads
        strides = (config.num_hidden_layers * heads * BLOCK, heads * BLOCK, BLOCK)
        self.config, self.dtype = config, dtype
        self.storage = Storage(config, blocks, BLOCK, strides, dtype)
        self.shares = [0] * blocks
        """How many rows have each block."""
        self.free = list(range(blocks))[::-1]
        self.lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Positions of all blocks."""
        return len(self.shares) * BLOCK

    @property
    def free_tokens(self) -> int:
        return len(self.free) * BLOCK

    def new_row(self) -> "BlockRow":
        return BlockRow(self, [], 0)

    def copy(self, source: int, target: "BlockCache", to: int) -> None:
        """The content of a block, to one of a cache of the same model and dtype."""
        for name in ("keys", "values", "key_scale", "value_scale"):
            tensor, other = getattr(self.storage, name), getattr(target.storage, name)
            other.view(len(target.shares), -1)[to] = tensor.view(len(self.shares), -1)[source]

    def release(self, blocks: Sequence[int]) -> None:
        """One row less has these blocks."""
        for block in blocks:
            self.shares[block] -= 1
            if not self.shares[block]:
                self.free.append(block)


class BlockRow:
    """A text in a `BlockCache`."""

    def __init__(self, cache: BlockCache, blocks: Sequence[int], length: int) -> None:
        self.cache, self.blocks, self.length, self.closed = cache, array.array("i", blocks), length, False

    def fork(self, length: int | None = None) -> "BlockRow":
        length = check_length(self, length)
        with self.cache.lock:
            shared = self.blocks[: -(-length // BLOCK)]
            for block in shared:
                self.cache.shares[block] += 1
        return BlockRow(self.cache, shared, length)

    def move(self, cache: BlockCache) -> "BlockRow":
        """This row in another cache of the same model and dtype, which has room for it; the row is closed."""
        blocks = []
        with cache.lock:
            for block in self.blocks:
                blocks.append(to := cache.free.pop())
                cache.shares[to] = 1
                self.cache.copy(block, cache, to)
        moved = BlockRow(cache, blocks, self.length)
        self.close()
        return moved

    def truncate(self, length: int) -> None:
        self.length, keep = check_length(self, length), -(-length // BLOCK)
        with self.cache.lock:
            self.cache.release(self.blocks[keep:])
        del self.blocks[keep:]

    def close(self) -> None:
        if not self.closed:
            self.truncate(0)
            self.closed = True

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads of it."""
        return self.length * self.cache.storage.per_position


class CacheFullError(ValueError):
    """The rows of a step need more positions than the cache has left; nothing was changed."""


def check_length(row: Any, length: int | None) -> int:
    """A length to which a row can be cut. Raises ValueError for others."""
    length = row.length if length is None else length
    if row.closed:
        raise ValueError("the row is closed; take another from new_row")
    if not 0 <= length <= row.length:
        raise ValueError(f"length is {length} and the row has {row.length} tokens; give at most that")
    return int(length)


def check_step(config: ModelConfig, rows: Sequence[tuple[Any, Sequence[int]]]) -> None:
    """What every implementation refuses, with the errors of `Rows.step`."""
    if len({id(row) for row, _ in rows}) < len(rows):
        raise ValueError("a row is twice in one step; give its tokens together")
    if len({id(row.cache) for row, _ in rows}) > 1:
        raise ValueError("the rows of a step are of different caches; give those of one")
    for row, ids in rows:
        if row.closed:
            raise ValueError("a row of the step is closed; take another from new_row")
        if not len(ids):
            raise ValueError("a row of the step has no tokens; leave it out or give at least one")
        check_ids(config, min(ids), max(ids))
        if row.length + len(ids) > config.max_position_embeddings:
            raise ValueError(
                f"a row of {row.length} tokens cannot take {len(ids)} more: the model has "
                f"{config.max_position_embeddings} positions"
            )


class _Job:
    """One call of `step`, on its way through the passes."""

    def __init__(self, rows: Sequence[tuple[BlockRow, Sequence[int]]], every: bool) -> None:
        self.rows, self.every = rows, every
        self.taken = [0] * len(rows)
        """Tokens of each row that have gone through."""
        self.logits: list[list[Tensor]] = [[] for _ in rows]
        self.whole: Tensor | None = None
        """The logits of all rows, where one pass gave them."""
        self.error: BaseException | None = None

    @property
    def left(self) -> int:
        return sum(len(ids) for _, ids in self.rows) - sum(self.taken)

    def result(self) -> Tensor | list[Tensor]:
        if self.error is not None:
            raise self.error
        if self.whole is not None:
            return self.whole
        each = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self.logits]
        return each if self.every else torch.cat(each)


class Meeting:
    """Where the steps of an engine's threads find each other."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.jobs: list[_Job] = []
        self.passing = False
        self.passed: set[_Job] = set()
        """Jobs of the pass that runs."""
        self.company, self.seconds = 1, 0.0
        """Jobs of the last pass, and how long it took."""

    @contextmanager
    def between_passes(self) -> Iterator[None]:
        """No pass runs during the `with` block."""
        with self.changed:
            self.changed.wait_for(lambda: not self.passing)
            yield


def meeting_of(engine: Forward) -> Meeting:
    """Where the threads of this process meet."""
    if engine.meeting.process != os.getpid():  # forked: no thread of the parent is here to end its pass
        engine.meeting = Meeting()
    return engine.meeting


class NativeRows:
    """`Rows` of the native engine."""

    def __init__(self, engine: Forward) -> None:
        self.engine, self.config = engine, engine.config

    def new_cache(self, tokens: int, dtype: str | None = None) -> BlockCache:
        """A cache of so many tokens; dtype: float32, float16 or int8, the engine's own unless given, else float16."""
        return BlockCache(self.config, tokens, dtype or self.engine.cache_dtype or "float16")

    @overload
    def step(self, rows: Any, every: Literal[False] = False) -> Tensor: ...
    @overload
    def step(self, rows: Any, every: Literal[True]) -> list[Tensor]: ...
    def step(self, rows: Any, every: bool = False) -> Tensor | list[Tensor]:
        check_step(self.config, rows)
        if not rows:
            return [] if every else torch.empty(0, self.config.vocab_size)
        _reserve(rows)
        job, meeting = _Job(rows, every), meeting_of(self.engine)
        with meeting.changed:
            meeting.jobs.append(job)
            meeting.changed.notify_all()
            try:
                while job.left and job.error is None:
                    if meeting.passing:
                        meeting.changed.wait()
                    else:
                        self._pass_for_all(meeting, job)
            except BaseException:  # Ctrl-C: the rows are the caller's again, so nobody may go on with them
                meeting.jobs = [one for one in meeting.jobs if one is not job]
                while job in meeting.passed:
                    meeting.changed.wait()
                raise
        return job.result()

    def _pass_for_all(self, meeting: "Meeting", job: _Job) -> None:
        """The next pass, of whatever jobs wait, run by the thread of one of them, which holds `meeting.changed`."""
        meeting.passing = True
        try:
            # Threads that were in the last pass are about to be back: a moment's wait saves a pass for each.
            meeting.changed.wait_for(lambda: len(meeting.jobs) >= meeting.company, meeting.seconds / 8)
            chosen = _choose(meeting.jobs)
            meeting.passed = {one for one, _, _ in chosen}
            meeting.changed.release()
            started = time.perf_counter()
            try:
                self._pass(chosen)
            except BaseException as error:
                for one in meeting.passed:
                    one.error = error
                if not isinstance(error, Exception):  # Ctrl-C is of this thread, whether its job was chosen or not
                    job.error = error
            finally:
                meeting.changed.acquire()
            meeting.seconds, meeting.company = time.perf_counter() - started, len(meeting.passed)
            meeting.jobs = [one for one in meeting.jobs if one.left and one.error is None]
        finally:
            meeting.passing, meeting.passed = False, set()
            meeting.changed.notify_all()

    def _pass(self, chosen: list[tuple[_Job, int, int]]) -> None:
        rows = (native.Row * len(chosen))()
        ids, wanted, owners = array.array("q"), array.array("i"), []
        for struct, (job, index, count) in zip(rows, chosen, strict=True):
            row, tokens = job.rows[index]
            first = job.taken[index]
            struct.cache.contents = row.cache.storage.struct
            struct.blocks = row.blocks.buffer_info()[0]
            struct.length, struct.tokens = row.length, count
            begin = len(ids)
            ids.extend(tokens[first : first + count])
            if job.every:
                wanted.extend(range(begin, len(ids)))
                owners.append(count)
            else:
                last = first + count == len(tokens)
                wanted.extend([len(ids) - 1] if last else [])
                owners.append(int(last))
        logits = torch.empty(len(wanted), self.config.vocab_size)
        self.engine.forward(rows, ids, wanted, logits)
        for (job, index, count), part in zip(chosen, logits.split(owners), strict=True):
            job.rows[index][0].length += count
            job.taken[index] += count
            if len(part):
                job.logits[index].append(part)
        job = chosen[0][0]
        if not job.every and len(wanted) == len(job.rows) and all(one is job for one, _, _ in chosen):
            job.whole = logits


def _choose(jobs: list[_Job]) -> list[tuple[_Job, int, int]]:
    """What goes through the layers next, as (job, row, tokens): the short ones first, then as much as there is room
    for, at least one token."""
    chosen: list[tuple[_Job, int, int]] = []
    room = MAX_CHUNK
    for job in sorted(jobs, key=lambda job: job.left):
        for index, (_, ids) in enumerate(job.rows):
            count = min(room, len(ids) - job.taken[index])
            if count:
                chosen.append((job, index, count))
                room -= count
    return chosen


def _reserve(rows: Sequence[tuple[BlockRow, Sequence[int]]]) -> None:
    """Blocks of their own for the positions that the rows will write. Raises CacheFullError without having changed
    anything."""
    cache = rows[0][0].cache
    with cache.lock:
        shared, fresh = [], 0
        shares: dict[int, int] = {}  # of blocks to which rows append: all of them but the last one copy
        for row, ids in rows:
            # A row may have more than it needs: what a pass that failed was to write.
            fresh += max(0, -(-(row.length + len(ids)) // BLOCK) - len(row.blocks))
            if row.length % BLOCK:
                last = row.blocks[-1]
                shares.setdefault(last, cache.shares[last])
                if shares[last] > 1:
                    shares[last] -= 1
                    shared.append(row)
        if fresh + len(shared) > len(cache.free):
            needed = sum(len(ids) for _, ids in rows)
            raise CacheFullError(
                f"the step has {needed} tokens and takes {fresh + len(shared)} blocks of {BLOCK}; the cache has room "
                f"for {len(cache.free)}: close rows or make it larger"
            )
        for row in shared:
            block = cache.free.pop()
            cache.shares[block] = 1
            cache.copy(row.blocks[-1], cache, block)
            cache.release([row.blocks[-1]])
            row.blocks[-1] = block
        for row, ids in rows:
            for _ in range(-(-(row.length + len(ids)) // BLOCK) - len(row.blocks)):
                row.blocks.append(block := cache.free.pop())
                cache.shares[block] = 1
