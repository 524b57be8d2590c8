"""Text from a model: sampling, the decode loop over a static cache, stop strings, and what it cost.

    stats = GenerationStats()
    text = TextStream(tokenizer, stop=["\\n\\n"], prompt=prompt_ids)
    for ids in generate(model, input_ids, max_new_tokens=200, sampling=SamplingConfig(0.8), seed=1, stats=stats):
        print(text.push(int(ids[0])), end="")

A token is drawn in these steps, transformers' order:

    1. repetition penalty   l = l / r if l > 0 else l * r, for every token of the prompt and of the text so far
    2. temperature          w = exp((l - max l) / temperature); 0 takes the largest logit instead and ends here
    3. top-k                the k largest
    4. top-p                the smallest set of what is left whose mass reaches p of it, at least one token
    5. min-p                what has at least min_p times the weight of the most likely token
    6. draw                 the first token whose cumulative weight exceeds u * total, u uniform in [0, 1)

Equal logits count in the order of their ids. One generator on the CPU, started from the seed, gives one u per row and
step, also to rows that have finished. So a seed means the same numbers on every device, and a row's text depends on
the seed, its prompt, its number and the batch size, not on the other rows' texts. It can still differ between
devices, batch sizes and thread counts where rounding in the model moves a logit.

Letters: B batch, T prompt length, V vocab_size, N candidates.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.inference.engine import LanguageModel
from bitnet.inference.options import SamplingConfig
from bitnet.model import ModelConfig
from bitnet.tokenizer import BaseTokenizer, StreamDecoder

FILLER = -1
"""What `generate` yields for a row that has already ended."""

_NOT_FINITE = -2  # in place of the id of a row whose logits are not


def sample(
    logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None, seen: Tensor | None = None
) -> Tensor:
    """Draw one token per row: logits `[B, V]` of any float dtype to ids int64 `[B]`, on the logits' device.

    `seen` is a bool mask `[B, V]` of the tokens that the repetition penalty applies to. `generator` may be None
    when decoding is greedy, and may live on another device. Inputs stay as they are.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.greedy:
        return logits.argmax(-1)  # of equal ones the first

    # From here on unnormalized probabilities, the largest exactly 1.
    weights = torch.exp((logits - logits.amax(-1, keepdim=True)) / sampling.temperature)
    ids = None  # of the candidates, in descending order, once something needs that order
    if 0 < sampling.top_k < weights.shape[-1]:
        kth = weights.topk(sampling.top_k).values[:, -1:]
        weights, ids = (part[:, : sampling.top_k] for part in _descending(weights, kth))
    if sampling.top_p < 1:
        total = weights.sum(-1, keepdim=True, dtype=torch.float64)
        if ids is None and weights.device.type != "cpu":
            # Where waiting for a count costs more than sorting: all of them.
            weights, ids = weights.sort(dim=-1, descending=True, stable=True)
        elif ids is None:
            # All tokens below this floor together weigh less than (1 - p) of the total, so none is in the set.
            weights, ids = _descending(weights, total * (1 - sampling.top_p) / weights.shape[-1])
        mass_before = weights.cumsum(-1, dtype=torch.float64) - weights
        weights = weights.masked_fill(mass_before >= sampling.top_p * total, 0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p, 0)

    # Inverse CDF: one random number per row, where torch.multinomial draws V of them (3 ms at V = 128 k, one x86 core).
    # u <= 1 - 2^-53, so u * total < total also after rounding, and a weight of 0 is never drawn.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    device = None if generator is None else generator.device
    u = torch.rand(len(weights), 1, generator=generator, dtype=torch.float64, device=device).to(weights.device)
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def _descending(weights: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """All weights of `[B, V]` that reach their row's floor `[B, 1]`, in descending order, with their ids: `[B, N]`.

    Rows with fewer than N of them are filled up with weights of 0, which are never drawn. Only N values are sorted.
    """
    reached = weights >= floor
    counts = reached.sum(-1)
    rows, columns = reached.nonzero(as_tuple=True)
    places = torch.arange(len(rows), device=weights.device) - (counts.cumsum(0) - counts)[rows]
    ids = rows.new_zeros(len(weights), int(counts.amax()))
    values = weights.new_zeros(ids.shape)
    ids[rows, places] = columns
    values[rows, places] = weights[rows, columns]
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


@dataclass
class GenerationStats:
    """Counts and times of one generation, over the whole batch; `generate` fills it in while it runs.

    Times are the model's and the sampling's, not the consumer's. The prefill gives the first token of every row, the
    decoding steps the others.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    """All generated tokens, the end-of-text tokens included."""
    decode_tokens: int = 0
    """The part of new_tokens that decoding steps gave."""
    decode_steps: int = 0
    decode_seconds: float = 0.0
    bytes_read: int = 0
    """Bytes that the decoding steps had to read: the model's `weight_bytes` and the filled cache at every step."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

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
        return (
            f"prefill {self.prompt_tokens} tokens {self.prefill_rate:.0f} tok/s | decode {self.new_tokens} tokens "
            f"{self.decode_rate:.0f} tok/s {self.bandwidth:.2f} GB/s"
        )


def limit_new_tokens(config: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many of `max_new_tokens` fit behind the prompt. Raises ValueError where not even one does."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; generate at least 1 token")
    if prompt_tokens < 1:
        raise ValueError("the prompt has no tokens; give at least one, e.g. the begin-of-text token")
    positions = config.max_position_embeddings
    if prompt_tokens >= positions:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens leaves no room in a model of {positions} positions; "
            f"shorten it to at most {positions - 1} tokens"
        )
    return min(max_new_tokens, positions - prompt_tokens)


def generate(
    model: LanguageModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[Tensor]:
    """Continue `input_ids` int64 `[B, T]` token by token: an iterator of ids int64 `[B]`, on the CPU.

    A row ends with `eos_id`, or any of several, which is yielded; from then on it yields FILLER (-1), and when all rows
    have ended the iterator stops. Otherwise it stops after `max_new_tokens`, or earlier, where prompt and text fill the
    model's positions (`limit_new_tokens` tells). The prompts of a batch have one length; padding is not supported.
    `vocab_size` leaves out the last rows of a head that is larger than its tokenizer. Raises ValueError at once for
    input the model cannot take, and later for logits that are not finite.
    """
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not len(input_ids):
        raise ValueError(
            f"input_ids are {input_ids.dtype} of shape {list(input_ids.shape)}; give int64 [batch, tokens], "
            "e.g. torch.tensor([ids])"
        )
    config = model.config
    max_new_tokens = limit_new_tokens(config, input_ids.shape[1], max_new_tokens)
    smallest, largest = (int(bound) for bound in input_ids.aminmax())
    if smallest < 0 or largest >= config.vocab_size:
        raise ValueError(
            f"token id {smallest if smallest < 0 else largest} is outside the model's vocabulary (0 to "
            f"{config.vocab_size - 1}); encode the prompt with the model's own tokenizer"
        )
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}; the model's is {config.vocab_size}, give at most that")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; give a whole number from 0 to 2^63 - 1")
    generator = torch.Generator().manual_seed(seed)
    stats = GenerationStats() if stats is None else stats
    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
    return _generate(model, input_ids, max_new_tokens, sampling, generator, ends, vocab_size, stats)


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
def _generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: SamplingConfig,
    generator: torch.Generator,
    ends: list[int],
    vocab_size: int,
    stats: GenerationStats,
) -> Iterator[Tensor]:
    B, T = input_ids.shape
    cache = model.new_cache(B, T + max_new_tokens - 1)  # the last token is never fed back, so it needs no position
    bytes_of_weights = model.weight_bytes()
    tokens = input_ids.to(model.device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(B, vocab_size, dtype=torch.bool, device=model.device)
        seen.scatter_(1, tokens.clamp(max=vocab_size - 1), True)
    finished = torch.zeros(B, dtype=torch.bool)
    arrival = _Arrival(B, model.device)
    started = time.perf_counter()
    logits = model(tokens, cache, last_only=True)[:, -1, :vocab_size]
    for step in range(max_new_tokens):
        finite = logits.isfinite().all(-1)
        if arrival.asynchronous:
            logits = logits.where(finite[:, None], 0)  # something to draw from; refused when the ids are here
        elif not bool(finite.all()):
            raise _not_finite(T + step)
        chosen = sample(logits, sampling, generator, seen)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        filled = cache.nbytes
        tokens = chosen[:, None]
        arrival.send(torch.where(finite, chosen, _NOT_FINITE))
        if arrival.asynchronous and step + 1 < max_new_tokens:
            # The device goes on with the next step while the host waits for this one's ids and uses them.
            logits = model(tokens, cache, last_only=True)[:, -1, :vocab_size]
        ids = arrival.wait()
        if bool((ids == _NOT_FINITE).any()):
            raise _not_finite(T + step)
        now = time.perf_counter()
        seconds, started = now - started, now  # of the device, which does not stop while the consumer works

        running = int((~finished).sum())
        stats.new_tokens += running
        if step == 0:
            stats.prompt_tokens += input_ids.numel()
            stats.prefill_seconds += seconds
        else:
            stats.decode_tokens += running
            stats.decode_steps += 1
            stats.decode_seconds += seconds
            stats.bytes_read += bytes_of_weights + filled
        ids = ids.masked_fill(finished, FILLER)
        for end in ends:
            finished |= ids == end
        yield ids
        if bool(finished.all()):
            return
        if not arrival.asynchronous and step + 1 < max_new_tokens:
            started = time.perf_counter()
            logits = model(tokens, cache, last_only=True)[:, -1, :vocab_size]


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
