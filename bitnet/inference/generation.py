"""Text from a model: sampling, the decode loop over a static cache, stop strings, and what it cost.

    stats = GenerationStats()
    text = TextStream(tokenizer, stop=["\\n\\n"], prompt=prompt_ids)
    for ids in generate(model, input_ids, max_new_tokens=200, sampling=SamplingConfig(0.8), seed=1, stats=stats):
        print(text.push(int(ids[0])), end="")

How a token is drawn is in `sampling.py`. Row i of a call draws the numbers of its own seed, which is seed + i where
one seed is given, so a text depends on its seed, its prompt and its options. On the native engine it does not depend on
anything else; in torch and on a GPU it can still differ between devices, batch sizes and thread counts where rounding
in the model moves a logit.

Letters: B batch, T prompt length, V vocab_size.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.cpu_rows import BLOCK
from bitnet.inference.engine import NOT_FINITE, LanguageModel, check_ids
from bitnet.inference.lookup import Ahead
from bitnet.inference.memory import Memory, cache_of
from bitnet.inference.options import SamplingConfig
from bitnet.inference.rows import rows_of
from bitnet.inference.sampling import Drawn, RowSampler, choose, draw_rows, without
from bitnet.kernels import triton as backend
from bitnet.model import ModelConfig
from bitnet.tokenizer import BaseTokenizer, StreamDecoder

FILLER = -1
"""What `generate` yields for a row that has already ended."""

_AHEAD = 32  # steps whose random numbers go to a device together


@dataclass
class GenerationStats:
    """Counts and times of one generation, over the whole batch; `generate` fills it in while it runs.

    Times are the model's and the sampling's, not the consumer's. The prefill gives the first token of every row, the
    decoding steps the others.
    """

    prompt_tokens: int = 0
    known_tokens: int = 0
    """The part of prompt_tokens that need not be read: it was before, or another row has the same."""
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    """All generated tokens, the end-of-text tokens included."""
    decode_tokens: int = 0
    """The part of new_tokens that decoding steps gave."""
    decode_steps: int = 0
    """Passes through the model behind the prefill."""
    decode_seconds: float = 0.0
    bytes_read: int = 0
    """Bytes that the decoding steps had to read: the model's `weight_bytes` and the filled cache at every step."""

    def count(
        self, running: int, prompt_tokens: int, bytes_read: int, seconds: float, passes: int = 1, known: int = 0
    ) -> None:
        """One more step, which gave a token to so many rows; the first one has read the prompts, but for tokens that
        are known. Logits of a step may be there already, without a pass."""
        if not self.new_tokens:
            self.prompt_tokens += prompt_tokens
            self.known_tokens += known
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += running
            self.decode_steps += passes
            self.decode_seconds += seconds
            self.bytes_read += bytes_read * passes
        self.new_tokens += running

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, of those that were read."""
        return (self.prompt_tokens - self.known_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the decoding steps, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per token of the decoding steps; a batch shares the weights."""
        return self.bytes_read / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def bandwidth(self) -> float:
        """GB/s (10^9 bytes) of the decoding steps."""
        return self.bytes_read / self.decode_seconds / 1e9 if self.decode_seconds else 0.0

    def __str__(self) -> str:
        known = f" ({self.known_tokens} known)" if self.known_tokens else ""
        return (
            f"prefill {self.prompt_tokens} tokens{known} {self.prefill_rate:.0f} tok/s | "
            f"decode {self.new_tokens} tokens {self.decode_rate:.0f} tok/s {self.bandwidth:.2f} GB/s"
        )


def limit_new_tokens(config: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many of `max_new_tokens` fit behind the prompt. Raises ValueError where not even one does."""
    if max_new_tokens < 1 or max_new_tokens % 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give a whole number of tokens, at least 1")
    if prompt_tokens < 1:
        raise ValueError("the prompt has no tokens; give at least one, e.g. the begin-of-text token")
    positions = config.max_position_embeddings
    if prompt_tokens >= positions:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens leaves no room in a model of {positions} positions; "
            f"shorten it to at most {positions - 1} tokens"
        )
    return int(min(max_new_tokens, positions - prompt_tokens))


def generate(
    model: LanguageModel,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | Sequence[SamplingConfig],
    seed: int | Sequence[int],
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    unused: Sequence[int] = (),
    stats: GenerationStats | None = None,
) -> Iterator[Tensor]:
    """Continue prompts token by token: an iterator of ids int64 `[B]`, on the CPU.

    input_ids:   int64 `[B, T]`, or lists of ids of any lengths.
    sampling:    for all rows, or one for each.
    seed:        of row 0, the others take the following ones; or one for each.
    vocab_size:  leaves out the last rows of a head; with `unused`, ids below it, what `BaseTokenizer.drawable` says.

    A row ends with `eos_id`, or any of several, which is yielded; from then on it yields FILLER (-1), and when all rows
    have ended the iterator stops. Otherwise a row ends after `max_new_tokens`, or earlier, where prompt and text fill
    the model's positions (`limit_new_tokens` tells). Raises ValueError at once for input the model cannot take, and
    later for logits that are not finite.
    """
    if isinstance(input_ids, Tensor) and (input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not len(input_ids)):
        raise ValueError(
            f"input_ids are {input_ids.dtype} of shape {list(input_ids.shape)}; give int64 [batch, tokens], "
            "e.g. torch.tensor([ids])"
        )
    prompts = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(ids) for ids in input_ids]
    stats = GenerationStats() if stats is None else stats
    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
    seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else list(seed)
    samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
    if not len(prompts) == len(seeds) == len(samplings):
        raise ValueError(
            f"there are {len(prompts)} prompts, {len(samplings)} samplings and {len(seeds)} seeds; give one for each"
        )
    V = check_vocab_size(model.config, vocab_size)
    rooms = [limit_new_tokens(model.config, len(ids), max_new_tokens) for ids in prompts]
    samplers = [
        RowSampler(how, number % 2**63 if row else number, ids, vocab_size=V, unused=unused)
        for row, (how, number, ids) in enumerate(zip(samplings, seeds, prompts, strict=True))
    ]
    steps = draw_texts(model, prompts, samplers, rooms, ends, stats)
    return (torch.tensor([FILLER if drawn is None else drawn.token for drawn in step]) for step in steps)


def check_vocab_size(config: ModelConfig, vocab_size: int | None) -> int:
    """Columns of the logits that count."""
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}; the model's is {config.vocab_size}, give at most that")
    return vocab_size


def draw_texts(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    samplers: Sequence[RowSampler],
    rooms: Sequence[int],
    ends: Collection[int],
    stats: GenerationStats,
    memory: Memory | None = None,
) -> Iterator[list[Drawn | None]]:
    """Continue every prompt by at most its `rooms` tokens: what was drawn in each step, None for rows that have ended.

    `memory`, of the native engine and a single prompt: where the model has read its beginning already. Raises
    ValueError at once for ids outside the vocabulary, and later for logits that are not finite.
    """
    for ids in prompts:
        check_ids(model.config, min(ids), max(ids))
    alike = len({(len(ids), room, *_plain(one)) for ids, room, one in zip(prompts, rooms, samplers, strict=True)}) == 1
    if isinstance(model, Engine) or not alike or _plain(samplers[0])[0]:
        return _draw_rows(model, prompts, samplers, rooms, set(ends), stats, memory)
    return _draw_batch(model, prompts, samplers, rooms[0], set(ends), stats)


def _plain(sampler: RowSampler) -> tuple[object, ...]:
    """What the rows of a static batch must have in common; first, whether a row needs more than it does."""
    how = sampler.sampling
    more = bool(sampler.logprobs is not None or how.logit_bias or how.presence_penalty or how.frequency_penalty)
    return more, how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty


def time_generation(
    model: LanguageModel,
    input_ids: Tensor,
    steps: int,
    *,
    sampling: SamplingConfig | None = None,
    consume: Callable[[Tensor], object] | None = None,
) -> GenerationStats:
    """Times of a prefill of `input_ids` int64 `[B, T]` and of so many decoding steps behind it, which no token ends.

    sampling: greedy unless given; consume: what is done with each step's ids `[B]`, within the step's time (the way to
    text, for instance). Raises ValueError as `generate` does.
    """
    stats = GenerationStats()
    sampling = sampling or SamplingConfig(temperature=0)
    for ids in generate(model, input_ids, max_new_tokens=steps + 1, sampling=sampling, seed=0, stats=stats):
        if consume is None:
            continue
        started = time.perf_counter()
        consume(ids)
        seconds = time.perf_counter() - started  # which generate() leaves out
        if stats.decode_steps:
            stats.decode_seconds += seconds
        else:
            stats.prefill_seconds += seconds
    return stats


@torch.inference_mode()
def _draw_rows(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    samplers: Sequence[RowSampler],
    rooms: Sequence[int],
    ends: set[int],
    stats: GenerationStats,
    memory: Memory | None,
) -> Iterator[list[Drawn | None]]:
    rows, bytes_of_weights = rows_of(model), model.weight_bytes()
    ids = [list(prompt) for prompt in prompts]
    texts: dict[int, Any] = {}  # the rows that have not ended
    ahead: Ahead | None = None
    known = weights = 0
    started = time.perf_counter()
    if memory is not None and isinstance(model, Engine) and len(ids) == 1:
        texts[0], known, weights = memory.take(model, ids[0], len(ids[0]) + rooms[0])
        logits = rows.step([(texts[0], ids[0][known:])])
        ahead = Ahead(memory.lookup, model.rows, texts[0], ids[0]) if memory.lookup.tokens else None
    else:
        cache = cache_of(model, sum(-(-(len(p) + room) // BLOCK) * BLOCK for p, room in zip(ids, rooms, strict=True)))
        # A prompt that several rows have is read once.
        first: dict[tuple[int, ...], int] = {}
        which = [first.setdefault(tuple(prompt), len(first)) for prompt in ids]
        read = [cache.new_row() for _ in first]
        logits = rows.step([(row, prompt) for row, prompt in zip(read, first, strict=True)])[which]
        texts = {row: read[place].fork() for row, place in enumerate(which)}
        known = sum(map(len, prompts)) - sum(map(len, first))
        for row in read:
            row.close()
    step = 0
    try:
        while True:
            running = list(texts)
            drawn = dict(zip(running, draw_rows([samplers[row] for row in running], logits), strict=True))
            for row, one in drawn.items():
                if not one.finite:
                    raise _not_finite(len(ids[row]))
                ids[row].append(one.token)
            now = time.perf_counter()
            filled = sum(texts[row].nbytes for row in running)
            passes = 1 if ahead is None else int(ahead.passed)
            stats.count(len(running), sum(map(len, prompts)), bytes_of_weights + filled, now - started, passes, known)
            step += 1
            yield [drawn.get(row) for row in range(len(ids))]
            started = time.perf_counter()
            for row in running:
                if drawn[row].token in ends or step == rooms[row]:
                    if memory is None:
                        texts[row].close()
                        del texts[row]
                    else:
                        return
            if not texts:
                return
            if ahead is None:
                logits = rows.step([(text, ids[row][-1:]) for row, text in texts.items()])
            else:
                logits = ahead.next_logits(rooms[0] - step)
    finally:
        if ahead is not None:
            ahead.forget()
        if memory is not None and 0 in texts:
            memory.put(texts[0], ids[0], weights)


@torch.inference_mode()
def _draw_batch(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    samplers: Sequence[RowSampler],
    room: int,
    ends: set[int],
    stats: GenerationStats,
) -> Iterator[list[Drawn | None]]:
    """Prompts of one length in a static cache, for models that run batches faster than rows: in torch and on a GPU."""
    (B, T), V, sampling = (len(prompts), len(prompts[0])), samplers[0].vocab_size, samplers[0].sampling
    unused = None if samplers[0].unused is None else samplers[0].unused.to(model.device)
    cache = model.new_cache(B, T + room - 1)  # the last token is never fed back, so it needs no position
    bytes_of_weights = model.weight_bytes()
    tokens = torch.tensor(prompts).to(model.device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=model.device)
        seen = seen.scatter_(1, tokens, True)[:, :V]
        seen = seen if unused is None else seen.index_fill(1, unused, False)
    finished = [False] * B
    arrival = _Arrival(B, model.device)

    def read() -> Tensor:
        logits = model(tokens, cache, last_only=True)[:, -1, :V]
        return logits if unused is None else without(logits, unused)

    started = time.perf_counter()
    logits = read()
    for step in range(room):
        if not sampling.greedy and step % _AHEAD == 0:  # on their way to the device at once, not in every step
            drawn = [[sampler.uniform() for sampler in samplers] for _ in range(min(_AHEAD, room - step))]
            uniforms = torch.tensor(drawn, dtype=torch.float64).to(model.device)
        tokens, arriving = _choose_finite(logits, sampling, None if sampling.greedy else uniforms[step % _AHEAD], seen)
        if seen is not None:
            seen.scatter_(1, tokens, True)
        filled = cache.nbytes
        arrival.send(arriving)
        if arrival.asynchronous and step + 1 < room:
            # The device goes on with the next step while the host waits for this one's ids and uses them.
            logits = read()
        ids = arrival.wait().tolist()
        if NOT_FINITE in ids:
            raise _not_finite(T + step)
        now = time.perf_counter()
        seconds, started = now - started, now  # of the device, which does not stop while the consumer works
        stats.count(finished.count(False), B * T, bytes_of_weights + filled, seconds)
        yield [None if finished[row] else Drawn(ids[row]) for row in range(B)]
        finished = [done or ids[row] in ends for row, done in enumerate(finished)]
        if all(finished):
            return
        if not arrival.asynchronous and step + 1 < room:
            started = time.perf_counter()
            logits = read()


def _choose_finite(
    logits: Tensor, sampling: SamplingConfig, uniform: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens `[B, 1]` to go on with, whatever the logits `[B, V]` are, and the same ids `[B]` with NOT_FINITE for rows
    that drew from logits which are not finite; `uniform` float64 `[B]`. Nothing here waits for a GPU."""
    beyond = seen is not None or 0 < sampling.top_k < logits.shape[1] or logits.dtype != torch.float32
    # Else torch is as fast or faster on an H200: nothing to sort, or many candidates of few rows.
    pays = sampling.top_p < 1 and (sampling.min_p > 0 or len(logits) >= 4)
    if uniform is not None and pays and not beyond and logits.device.type == "cuda" and backend.available():
        from bitnet.kernels.triton.sampling import draw

        ids = draw(
            logits,
            uniform,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            not_finite=NOT_FINITE,
        )
        return ids.clamp(min=0)[:, None], ids
    finite = logits.isfinite().all(-1)
    ids = choose(logits.where(finite[:, None], 0), sampling, None if uniform is None else uniform[:, None], seen)
    return ids[:, None], torch.where(finite, ids, NOT_FINITE)


def _not_finite(tokens: int) -> ValueError:
    return ValueError(
        f"the model's logits are not finite after {tokens} tokens: its training diverged or its dtype overflows; use "
        "another checkpoint or float32"
    )


class _Arrival:
    """Ids of one step on their way to the CPU: from a GPU in page-locked memory, so that work launched after them need
    not end before they are there."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.asynchronous = device.type == "cuda"
        self._ids = torch.empty(batch_size, dtype=torch.int64, pin_memory=self.asynchronous)
        self._event = torch.cuda.Event() if self.asynchronous else None

    def send(self, ids: Tensor) -> None:
        self._ids.copy_(ids, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(ids.device))

    def wait(self) -> Tensor:
        """The ids int64 `[B]`, a copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._ids.clone()


class TextStream:
    """Ids of one sample to text, as soon as it is certain, up to the first stop string or end-of-text token.

    The pieces of `push` and the one of `close`, joined, are the text before the stop string that is completed first
    (of those completed by the same character, the longest), however the text is cut into tokens. What could still
    become a stop string or a character of several bytes is held back.
    """

    def __init__(self, tokenizer: BaseTokenizer, stop: Sequence[str] = (), prompt: Iterable[int] = ()) -> None:
        """`prompt`: the ids before the text, so that the space of a first word is not taken for a text's start."""
        if isinstance(stop, str):
            raise TypeError("stop is one string; give a list of them")
        if strange := [each for each in stop if not isinstance(each, str)]:
            raise TypeError(f"a stop string is {strange[0]!r:.60}; give text")
        if "" in stop:
            raise ValueError("a stop string is empty and would end every text at once; leave it out")
        self.stop = tuple(stop)
        self.finished = False
        """Nothing more will come: a stop string, an end-of-text token or `close` was met."""
        self.ends = frozenset((FILLER, *tokenizer.eos_ids))
        """Ids that close the stream."""
        self._decoder = StreamDecoder(tokenizer)
        self._held = ""
        for token_id in prompt:
            self._decoder.push(token_id)

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def push(self, token_id: int) -> str:
        """The text that this id makes certain, perhaps ""; end-of-text or FILLER closes the stream."""
        if self.finished:
            return ""
        if token_id in self.ends:
            return self.close()
        return self._advance(self._decoder.push(token_id))

    def close(self) -> str:
        """What was held back and turns out to be text."""
        if self.finished:
            return ""
        text = self._advance(self._decoder.flush())
        if not self.finished:
            self.finished = True
            text, self._held = text + self._held, ""
        return text

    def _advance(self, piece: str) -> str:
        self._held += piece
        starts = [(self._held.find(stop), len(stop)) for stop in self.stop]
        found = [(start + length, start) for start, length in starts if start >= 0]  # end first: completed first
        if found:
            self.finished = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
