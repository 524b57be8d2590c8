"""Rotary positions in config.json: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` before it.

Understood are plain rotary positions, linear scaling by 1, which is plain, and Llama 3.1's: of D / 2 frequencies
f_i = theta^(-2i/D), with wavelengths w_i = 2 pi / f_i and the length L that the model was trained on first,

    w_i < L / high_freq_factor     f_i
    w_i > L / low_freq_factor      f_i / factor
    between                        f_i (s + (1 - s) / factor),  s = (L / w_i - low) / (high - low)

A table of divisors of the frequencies, which GGUF files have, is written as "longrope" with the same table for short
and long texts, and is read from there. Everything else is refused. Source: transformers' modeling_rope_utils.py.
"""

import math
from collections.abc import Sequence

from bitnet.files import JsonObject

ORIGINAL = "original_max_position_embeddings"
# What each type's object may hold; other keys would ask for something that is not computed.
_KEYS = {
    "default": {"factor", ORIGINAL},
    "linear": {"factor", ORIGINAL},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", ORIGINAL},
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)


def parse_rope(values: JsonObject, head_dim: int) -> tuple[float, tuple[float, ...]]:
    """theta, and the divisors of the frequencies or () for plain rotary positions. Raises ValueError, with the field
    and its value, for positions of another kind."""
    theta: object = values["rope_theta"]
    factors: tuple[float, ...] = ()
    for name in ("rope_parameters", "rope_scaling"):  # transformers lets the older one win
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{name} is {rope!r:.200}; it must be an object")
        if not rope:
            continue
        theta = rope.get("rope_theta", theta)
        if ORIGINAL in values:  # beside the object: it wins too
            rope = {**rope, ORIGINAL: values[ORIGINAL]}
        try:
            factors = _factors(rope, _number("rope_theta", theta), head_dim, values["max_position_embeddings"])
        except ValueError as error:
            raise ValueError(
                f"{name} is {rope!r:.300}: {error}; positions here are plain rotary or Llama 3.1's, so the model would "
                "read texts wrongly; take a model without scaling"
            ) from None
    return _number("rope_theta", theta), factors


def _factors(rope: JsonObject, theta: float, head_dim: int, positions: object) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"rope_type {kind!r} is not understood")
    plain = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(set(rope) - plain - _KEYS[kind]):
        raise ValueError(f"{unknown[0]} is not understood for {kind}")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError("partial_rotary_factor is not 1, and whole heads are rotated")
    if kind in ("default", "linear"):
        if rope.get("factor", 1.0) not in (None, 1.0):
            raise ValueError("factor is not 1")
        return ()
    if kind == "llama3":
        if ORIGINAL not in rope:
            rope = {**rope, ORIGINAL: positions}
        if missing := [key for key in _LLAMA3 if key not in rope]:
            raise ValueError(f"{missing[0]} is missing")
        return llama3_factors(theta, head_dim, *(_number(key, rope[key]) for key in _LLAMA3))
    table = rope.get("short_factor")
    if not isinstance(table, list) or table != rope.get("long_factor"):
        raise ValueError("short_factor and long_factor are not one table")
    if rope.get("attention_factor") != 1.0:
        raise ValueError("attention_factor is not 1")
    return tuple(_number("short_factor", value) for value in table)


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: float
) -> tuple[float, ...]:
    """The divisors of the D / 2 frequencies, drawn at the top of this file. Raises ValueError for parameters that are
    not in order."""
    if not (factor > 0 and 0 < low < high and original > 0 and theta > 0):
        raise ValueError("llama3 wants factor, low_freq_factor < high_freq_factor and the original length above 0")
    factors = []
    for i in range(head_dim // 2):
        periods = original * theta ** (-2 * i / head_dim) / (2 * math.pi)  # L / w_i
        share = min(1.0, max(0.0, (periods - low) / (high - low)))
        factors.append(1 / (share + (1 - share) / factor))
    return tuple(factors)


def rope_parameters(theta: float, factors: Sequence[float], head_dim: int, positions: int) -> JsonObject:
    """What config.json says of these positions: `parse_rope` gives them back, up to the last bits of a table."""
    if not factors:
        return {"rope_type": "default", "rope_theta": theta}
    for exponent in range(21):  # parameters that give this table, where there are such
        numbers = (max(factors), 1.0, 4.0, 2**exponent)
        if all(map(_near, llama3_factors(theta, head_dim, *numbers), factors)):
            return {"rope_type": "llama3", "rope_theta": theta, **dict(zip(_LLAMA3, numbers, strict=True))}
    table = {"short_factor": list(factors), "long_factor": list(factors), "factor": 1.0, "attention_factor": 1.0}
    return {"rope_type": "longrope", "rope_theta": theta, **table, ORIGINAL: positions}


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)  # GGUF's tables are float32


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e30:
        raise ValueError(f"{name} is {value!r:.60}; it must be a number")
    return float(value)
