"""How a text is written, by the names that generate.py and the Python API share. Imports no torch, so that --help is
quick."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

_GREEDY_BELOW = 1e-6  # a smaller temperature leaves one token anyway, and would overflow float32
_MOST = 1e30  # float32 holds it, and what cannot be drawn is still nothing when divided by it


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
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the text has, the prompt not counted; 0 changes nothing."""
    frequency_penalty: float = 0.0
    """The same, times how often it has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= _MOST:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number, e.g. 0.8")
        if self.top_k < 0 or not isinstance(self.top_k, int):
            raise ValueError(f"top_k is {self.top_k}; give a number of tokens, e.g. 40, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a probability above 0, e.g. 0.95, or 1 to keep all")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; give a share between 0 (keep all) and 1, e.g. 0.05")
        if not 0 < self.repetition_penalty <= _MOST:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; give 1 (off) or a bit more, e.g. 1.1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (off) or a number, e.g. 0.5")

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


DEFAULTS = SamplingConfig(temperature=0.8, top_p=0.95, min_p=0.05)
"""Where neither the user nor the model says otherwise."""


@dataclass(frozen=True)
class TextOptions:
    """How a text is written. How tokens are chosen is, unless given, what the model's generation_config.json (or its
    GGUF file) says, and where that is silent, temperature 0.8, top-p 0.95 and min-p
    0.05."""

    max_new_tokens: int = 200
    """Most tokens to generate."""
    temperature: float | None = None
    """Divides the logits; 0 always takes the most likely token. The model's own, or 0.8, unless given."""
    top_k: int | None = None
    """Sample from the k most likely tokens; 0 from all. The model's own, or 0, unless given."""
    top_p: float | None = None
    """Sample from the most likely tokens that hold this share of the probability; 1 from all. The model's own, or 0.95,
    unless given."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the most likely one; 0 leaves out none. The model's own, or 0.05,
    unless given."""
    repetition_penalty: float | None = None
    """Above 1, tokens that occurred become less likely. The model's own, or 1, unless given."""
    presence_penalty: float = 0.0
    """Makes tokens that the text already has less likely by this much in the logit."""
    frequency_penalty: float = 0.0
    """The same, times how often it has them."""
    seed: int | None = None
    """Start of the random numbers; without one it is random, and the result says which."""
    stop: tuple[str, ...] = ()
    """End the text before the first of these strings."""

    def sampling(self, model: Mapping[str, Any]) -> SamplingConfig:
        """How each token is chosen, where the model's own settings are `Source.sampling`. Raises ValueError for a value
        out of range."""
        given = {field.name: getattr(self, field.name, None) for field in fields(SamplingConfig)}
        return replace(DEFAULTS, **{**model, **{name: value for name, value in given.items() if value is not None}})
