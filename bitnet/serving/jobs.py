"""What is asked of a scheduler and what comes of it: a prompt's generation, its samples while they are written, events.

job = Job(Generation(prompt, 100, SamplingConfig(0.8), seed=1))     for `Scheduler.submit`
Piece(index=0, text=" is", tokens=[...])                            what came to sample 0
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from bitnet.inference.generation import TextStream
from bitnet.inference.lookup import Drafter, PromptLookup
from bitnet.inference.options import SamplingConfig
from bitnet.inference.rows import Row
from bitnet.inference.sampling import RowSampler
from bitnet.inference.scoring import Score
from bitnet.serving.errors import ApiError
from bitnet.tokenizer import BaseTokenizer

SLACK = 64
"""Tokens that a row may take beyond its length, since memory is handed out in blocks."""

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Limits:
    """What one model's clients may ask for. Raises ValueError for a value out of range."""

    context: int
    """Most tokens of prompt and answer together."""
    cache_tokens: int
    """Tokens whose keys and values are held, of all texts together."""
    parallel: int = 64
    """Texts that are written at the same time."""
    queue: int = 256
    """Requests that may wait."""
    queue_seconds: float = 60.0
    """Longest wait of a request."""
    request_seconds: float = 600.0
    """Longest time from a request's arrival to its last token."""

    def __post_init__(self) -> None:
        for name in ("context", "cache_tokens", "parallel", "queue", "queue_seconds", "request_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive number")


class Matcher(Protocol):
    """Where a text stands in a grammar."""

    def mask(self) -> Tensor:
        """The tokens that may come next, bool `[V]`."""

    def take(self, token_id: int) -> None:
        """Go on by one token, which `mask` allowed."""

    @property
    def complete(self) -> bool:
        """Nothing but the end of the text may come next."""


@dataclass(frozen=True)
class Generation:
    """A prompt, and what is to follow it."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    """Sample i draws the numbers of seed + i, so it is the text of a request with that seed."""
    count: int = 1
    """Samples, each a text of its own."""
    stop: tuple[str, ...] = ()
    continues: bool = True
    """The text goes on from the prompt's; False: it is an answer and starts afresh."""
    alternatives: int | None = None
    """Give the log-probability of each token, and so many of the most likely tokens beside it."""
    scores_from: int | None = None
    """Give these of the prompt's tokens too, from this one on; nothing predicts the first one, token 0."""
    grammar: Callable[[], Matcher] | None = None
    """Makes the grammar that each sample keeps to."""
    ends: bool = True
    """An end-of-text token ends the text."""
    limited_by: str = "max_tokens"
    """The field of the request that errors of length name."""
    counted_by: str = "n"
    """The one that `count` comes from."""


@dataclass(frozen=True)
class Token:
    """A token of an answer, with its score where it was asked for."""

    id: int
    start: int
    """Characters of the answer before it."""
    score: Score | None = None
    ends: bool = False
    """It ends the text and is none of it."""


@dataclass(frozen=True)
class Piece:
    """What came to one sample."""

    index: int
    text: str
    tokens: list[Token]
    finish: Finish | None = None


@dataclass(frozen=True)
class PromptScores:
    """Scores of the prompt's tokens, from the first that was to be scored."""

    scores: list[Score]


Event = Piece | PromptScores | ApiError


class Job:
    """A request on its way through the scheduler."""

    def __init__(self, generation: Generation, client: str = "") -> None:
        self.generation, self.client = generation, client
        self.arrived = time.monotonic()
        self.cancelled = False
        self.cached_tokens = 0
        """Tokens of the prompt that were known; written before the first event."""
        self.samples: list[Sample] = []
        self.reserved = 0
        self.done = False

    def need(self, shared: bool) -> int:
        """Tokens of memory that it takes at most."""
        generation = self.generation
        prompts = 1 if shared else generation.count
        return prompts * (len(generation.prompt) + SLACK) + generation.count * (generation.max_new_tokens + SLACK)


class Sample:
    """One text of a job while it is read and written."""

    def __init__(self, job: Job, index: int, row: Row, tokenizer: BaseTokenizer, lookup: PromptLookup) -> None:
        generation = job.generation
        prompt = list(generation.prompt)
        self.job, self.index, self.row = job, index, row
        self.ids = prompt
        self.prompt_length = len(prompt)
        self.drafter = Drafter(lookup, row, prompt) if lookup.tokens else None
        self.matcher = generation.grammar() if generation.grammar else None
        vocab_size, unused = tokenizer.drawable
        self.sampler = RowSampler(
            generation.sampling, (generation.seed + index) % 2**63, prompt, vocab_size=vocab_size, unused=unused,
            logprobs=generation.alternatives,
        )  # fmt: skip
        self.text = TextStream(tokenizer, generation.stop, prompt=prompt if generation.continues else ())
        self.released = 0  # characters that were given out
        self.held: list[Token] = []  # tokens whose text was not yet
        self.scores: list[Score] = []
        self.last_token_at = 0.0
        self.ends = frozenset(tokenizer.eos_ids) if generation.ends else frozenset()

    @property
    def pending(self) -> int:
        """Tokens that the row has not yet read."""
        return len(self.ids) - self.row.length

    @property
    def reading(self) -> bool:
        """The prompt is not yet read."""
        return self.row.length < self.prompt_length

    @property
    def new_tokens(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def ahead(self) -> bool:
        """The logits behind the last token are there."""
        return self.drafter is not None and self.drafter.ahead

    def take(self, token_id: int, found: Score | None) -> Piece:
        """Add a token to the text: what it makes certain."""
        self.ids.append(token_id)
        if self.drafter is not None:
            self.drafter.take(token_id)
        if self.matcher is not None:
            self.matcher.take(token_id)
        generation = self.job.generation
        finish: Finish | None = None
        ended = token_id in self.ends
        self.held.append(Token(token_id, self.released + self.text.held, found, ended))
        if ended:
            text, finish = self.text.close(), "stop"
        else:
            text = self.text.push(token_id) if token_id not in self.text.ends else ""
        stopped = self.text.finished and not ended
        if stopped or (self.matcher is not None and self.matcher.complete):
            finish = "stop"
        elif not ended and self.new_tokens >= generation.max_new_tokens:
            finish = "length"
        if finish:
            text += self.text.close()
        self.released += len(text)
        # A token goes out with its text; those of a stop string have none, and without one the last may have none.
        sure = len(self.held) if finish and not stopped else sum(t.start < self.released for t in self.held)
        tokens, self.held = self.held[:sure], [] if finish else self.held[sure:]
        return Piece(self.index, text, tokens, finish)
