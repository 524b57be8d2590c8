"""How a text is written, by the names that generate.py and the Python API share. Imports no torch, so that --help is
quick."""

import math
from dataclasses import dataclass

_GREEDY_BELOW = 1e-6  # a smaller temperature leaves one token anyway, and would overflow float32


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from logits. Raises ValueError for a value out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy decoding."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this share of the probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Makes tokens that occurred less likely, the CTRL paper's form (arXiv 1909.05858); 1 changes nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number, e.g. 0.8")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give a number of tokens, e.g. 40, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a probability above 0, e.g. 0.95, or 1 to keep all")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; give a share between 0 (keep all) and 1, e.g. 0.05")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; give 1 (off) or a bit more, e.g. 1.1")

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True)
class TextOptions:
    """How a text is written."""

    max_new_tokens: int = 200
    """Most tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 from all."""
    top_p: float = 0.95
    """Sample from the most likely tokens that hold this share of the probability; 1 from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one; 0 leaves out none."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred become less likely."""
    seed: int | None = None
    """Start of the random numbers; without one it is random, and the result says which."""
    stop: tuple[str, ...] = ()
    """End the text before the first of these strings."""

    @property
    def sampling(self) -> SamplingConfig:
        """How each token is chosen. Raises ValueError for a value out of range."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
