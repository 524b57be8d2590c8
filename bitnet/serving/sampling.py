"""The next token of one text: penalties, bias and grammar, then the sampling of `bitnet generate`.

    1. presence and frequency penalty   l -= presence + frequency * count, for tokens of the answer (OpenAI's)
    2. bias                             l += bias of the token
    3. grammar                          l = -inf for every token that it does not allow
    4. repetition penalty and the rest  `bitnet/inference/generation.py`

Sample i of a request draws from the numbers of seed + i, one a token. So a request's text depends on its seed, prompt
and options alone, and sample i of it is the text of a request with that seed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bitnet.inference.options import SamplingConfig
from bitnet.inference.sampling import sample


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
class Choice:
    """How the tokens of a request are chosen."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)


class Sampler:
    """Chooses the tokens of one sample."""

    def __init__(self, choice: Choice, index: int, prompt: list[int], vocab_size: int, matcher: Matcher | None) -> None:
        self.choice, self.matcher = choice, matcher
        self._generator = torch.Generator().manual_seed((choice.seed + index) % 2**63)
        self._counts: Counter[int] = Counter()
        self._seen = None
        if choice.sampling.repetition_penalty != 1:
            self._seen = torch.zeros(1, vocab_size, dtype=torch.bool)
            self._seen[0, [i for i in prompt if i < vocab_size]] = True
        self._bias = None
        if choice.bias:
            self._bias = torch.tensor([*choice.bias]), torch.tensor([*choice.bias.values()])

    def draw(self, logits: Tensor) -> int:
        """The next token under logits float32 `[V]`, which stay as they are. Raises ValueError where a grammar leaves
        none."""
        choice = self.choice
        if (choice.presence or choice.frequency) and self._counts:
            places = torch.tensor([*self._counts])
            counts = torch.tensor([*self._counts.values()], dtype=torch.float32)
            logits = logits.index_add(0, places, -(choice.presence + choice.frequency * counts))
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        if self.matcher is not None:
            mask = self.matcher.mask()
            if not bool(mask.any()):
                raise ValueError("the grammar of response_format leaves no token of this model to go on with")
            logits = logits.masked_fill(~mask, -torch.inf)
        token = int(sample(logits[None], choice.sampling, self._generator, self._seen))
        self._counts[token] += 1
        if self._seen is not None:
            self._seen[0, token] = True
        if self.matcher is not None:
            self.matcher.take(token)
        return token
