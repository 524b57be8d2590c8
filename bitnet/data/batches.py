"""Training batches from tokenized corpora: shuffled windows, mixtures of corpora, and a thread that reads ahead.

    sampler = BatchSampler({"a": tokens_a, "b": tokens_b}, context=256, batch_size=32, seed=0, counts=(7, 3))
    input_ids, labels = sampler.batch(step)         # a pure function of the step
    prefetcher = Prefetcher(sampler.batch)
    input_ids, labels = prefetcher[step]                 # the same, with the next ones being read meanwhile

Sample g of a run comes from a corpus that depends on g alone, and is there the n-th window of that corpus's shuffled
epochs, n being how many samples before g came from it. So nothing but the step number is needed to resume, and nothing
depends on how many processes or micro-batches share a step.

In a mixture of weights w_i a block of L samples, repeated without end, has exactly c_i = w_i L of corpus i. Within it,
sample j of corpus i comes no earlier than place floor(j L / c_i) and no later than ceil((j + 1) L / c_i) - 1, the
earliest deadline first; then the first t samples have floor(t w_i) or ceil(t w_i) of corpus i, for every t and i.

Letters: B batch_size, T context, N tokens of a split, L length of a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch

from bitnet.data.tokens import TokenArray, check_window, samples_of

Loaded = TypeVar("Loaded")


def interleave(counts: Sequence[int]) -> np.ndarray:
    """Which corpus each sample of a block comes from, int64 [sum(counts)]."""
    length, given = sum(counts), [0] * len(counts)
    deadlines = [-(-length // count) for count in counts]
    order = np.empty(length, dtype=np.int64)
    for place in range(length):
        # One is always due: together they have given `place` samples, and their shares of place + 1 add up to more.
        due = [i for i, count in enumerate(counts) if given[i] * length < count * (place + 1)]
        i = min(due, key=deadlines.__getitem__)
        order[place] = i
        given[i] += 1
        deadlines[i] = -(-(given[i] + 1) * length // counts[i])
    return order


class Windows:
    """Shuffled windows of T + 1 tokens of a stream, numbered without end.

    An epoch is a shuffle of W non-overlapping windows, T apart, from a random offset below 2 T; W = (N - 1) // T - 1
    (the slack that the offset needs), at least 1. Window n is number n % W of epoch n // W.

    Attributes: `windows_per_epoch`.
    """

    def __init__(self, tokens: TokenArray, context: int, seed: int, name: str = ""):
        """tokens: N >= context + 1 of them, else ValueError, which calls the corpus by its name."""
        if len(tokens) < context + 1:
            raise ValueError(
                f"{f'corpus {name!r}' if name else 'the corpus'} has {len(tokens)} tokens, and one window of context "
                f"{context} needs {context + 1}: use a context of at most {len(tokens) - 1}, or more text"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}: give 0 or more")
        self.tokens, self.context, self.seed = tokens, context, seed
        self.windows_per_epoch = max(1, (len(tokens) - 1) // context - 1)
        # Two epochs, as a batch may lie across a border; kept, because an order can have millions of entries.
        self._epochs: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, epoch])
            slack = len(self.tokens) - 1 - self.windows_per_epoch * self.context
            self._epochs[epoch] = int(rng.integers(slack + 1)), rng.permutation(self.windows_per_epoch)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def start(self, number: int) -> int:
        """Where in the stream a window begins."""
        epoch, place = divmod(number, self.windows_per_epoch)
        offset, order = self._epoch(epoch)
        return offset + int(order[place]) * self.context

    def read(self, number: int) -> np.ndarray:
        """The tokens of a window, [T + 1]."""
        return self.tokens.read(self.start(number), self.context + 1)


class BatchSampler:
    """Batches of windows, as a pure function of the step number: step s has samples s B to s B + B - 1 of the run.

    Attributes: `context`, `batch_size`, `windows` (of each stream, by name), `counts`.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenArray],
        context: int,
        batch_size: int,
        seed: int,
        counts: Sequence[int] = (1,),
    ):
        """streams: at least context + 1 tokens of each corpus; counts: as in `Mixture`."""
        for tokens in streams.values():
            check_window(tokens, context, batch_size)
        if len(counts) != len(streams) or min(counts) < 1:
            raise ValueError(f"counts are {tuple(counts)}: give a positive one for each of {len(streams)} corpora")
        self.context, self.batch_size, self.counts = context, batch_size, tuple(counts)
        self.windows = {name: Windows(tokens, context, seed, name) for name, tokens in streams.items()}
        self._names = list(streams)
        self._order = interleave(counts)
        self._before = np.empty_like(self._order)  # samples of the same corpus in front, within the block
        for i, count in enumerate(counts):
            self._before[self._order == i] = np.arange(count)

    def sample(self, number: int) -> tuple[str, int]:
        """Corpus and number of the window that sample `number` of the run is."""
        block, place = divmod(number, len(self._order))
        corpus = int(self._order[place])
        return self._names[corpus], block * self.counts[corpus] + int(self._before[place])

    def epochs(self, steps: int) -> dict[str, float]:
        """How often the windows of each corpus are seen in so many steps."""
        share = steps * self.batch_size / len(self._order)
        pairs = zip(self.windows.items(), self.counts, strict=True)
        return {name: share * count / windows.windows_per_epoch for (name, windows), count in pairs}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels) of a step, int64 [B, T] each; labels are the inputs one token on.

        rank, world: rows rank B / world to (rank + 1) B / world only, [B / world, T]; for data parallel ranks or, the
        same thing in time, the micro-batches of gradient accumulation. B must be divisible by world.
        """
        samples = samples_of(step, self.batch_size, rank, world)
        window = np.empty((len(samples), self.context + 1), dtype=np.int64)  # [B / world, T + 1]
        for row, sample in enumerate(samples):
            name, number = self.sample(sample)
            window[row] = self.windows[name].read(number)
        both = torch.from_numpy(window)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class Prefetcher(Generic[Loaded]):
    """`prefetcher[n]` is `load(n)`, while a thread is loading the next `depth` numbers.

    Reading a memory-mapped shard waits for the disk and copies; meanwhile the step computes. Numbers may be asked for
    in any order, and what was loaded in vain is dropped. An exception of `load` reaches whoever asks for that number.
    The thread starts with the first number, ends with `close`, and starts again if need be; depth 0 has none.
    """

    def __init__(self, load: Callable[[int], Loaded], depth: int = 2):
        self._load, self._depth = load, depth
        self._pool: ThreadPoolExecutor | None = None
        self._loading: dict[int, Future[Loaded]] = {}

    def __getitem__(self, number: int) -> Loaded:
        if not self._depth:
            return self._load(number)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetcher")
        wanted = range(number, number + self._depth + 1)
        for other in [n for n in self._loading if n not in wanted]:
            self._loading.pop(other).cancel()
        for other in wanted:
            if other not in self._loading:
                self._loading[other] = self._pool.submit(self._load, other)
        return self._loading.pop(number).result()

    def close(self) -> None:
        """End the thread, when it has loaded what it is loading."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._loading.clear()
