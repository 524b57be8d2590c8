"""JSON as typed values: `checked(kind, value, where)` reads what was parsed as a type, or says what is wrong with it.

    @dataclass(frozen=True)
    class State:
        step: Annotated[int, Bounds(0, 2**53)]
        history: list[tuple[float, float]] = field(default_factory=list)

    state = checked(State, json.loads(text), "state.json")

A kind is a dataclass (fields by name, those with a default may be missing), int, float (a whole number is one), str,
bool, None, Any, a Literal, a union, list[T], dict[str, T], tuple[T, ...], tuple[A, B], or Annotated with `Bounds` or
`Form`. Numbers are finite. What a class itself refuses (`__post_init__`) is reported under the place where it stands.
"""

import dataclasses
import math
import re
import reprlib
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and the largest number, or length of a list, an object or a text."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Form:
    """A regular expression that the whole text matches, and what it is called."""

    pattern: str
    name: str


WORDS: dict[object, str] = {
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}


def checked(kind: type[T], value: object, where: str) -> T:
    """The value of JSON as `kind`. Raises ValueError naming `where`, the field, what it is and what it must be."""
    result: T = _read(kind, value, where, "")
    return result


def require_finite(record: Any, prefix: str = "") -> None:
    """Raise ValueError, with the name behind `prefix`, for a field of a dataclass that is NaN or infinite, also in
    tuples and in dataclasses within. Comparisons let such numbers pass. Behind "--" the name is the option's."""
    for field in dataclasses.fields(record):
        name = field.name.replace("_", "-") if prefix.startswith("--") else field.name
        _require_finite(getattr(record, field.name), prefix + name)


def _require_finite(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; give a finite number")
    if isinstance(value, tuple):
        for each in value:
            _require_finite(each, name)
    elif dataclasses.is_dataclass(value):
        require_finite(value, f"{name}.")


def describe(kind: Any) -> str:
    """What a kind is called in a message."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = arguments[1]
        if isinstance(bounds, Form):
            return bounds.name
        unit = "" if arguments[0] in (int, float) else " of length"
        return f"{describe(arguments[0])}{unit} from {bounds.low:g} to {bounds.high:g}"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(each) for each in arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if dataclasses.is_dataclass(kind):
        return "an object"
    return WORDS.get(origin or kind, str(kind))


def _read(kind: Any, value: Any, where: str, name: str) -> Any:
    if kind in (Any, object):
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _within(kind, _read(arguments[0], value, where, name), where, name)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, kind, value, where, name)
    if origin is Literal:
        if not any(type(value) is type(each) and value == each for each in arguments):
            raise _refusal(kind, value, where, name)
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where, name)
    if origin in (list, tuple, dict):
        return _container(kind, value, where, name)
    number = kind is float and type(value) is int
    if type(value) is not kind and not number:
        raise _refusal(kind, value, where, name)
    if kind is float and not (-1e308 < value < 1e308):  # NaN is not either
        raise _refusal(kind, value, where, name)
    return value


def _one_of(kinds: tuple[Any, ...], union: Any, value: Any, where: str, name: str) -> Any:
    """The first kind of a union that the value is; the complaint of a list's or an object's own kind, if it is one."""
    deeper: ValueError | None = None
    for each in kinds:
        try:
            return _read(each, value, where, name)
        except ValueError as error:
            if isinstance(value, (dict, list)) and describe(each) in (WORDS[type(value)], "an object"):
                deeper = deeper or error
    raise deeper or _refusal(union, value, where, name)


def _within(kind: Any, value: Any, where: str, name: str) -> Any:
    limits = get_args(kind)[1]
    if isinstance(limits, Form):
        good = re.fullmatch(limits.pattern, value, re.ASCII) is not None
    else:
        good = limits.low <= (value if isinstance(value, (int, float)) else len(value)) <= limits.high
    if not good:
        raise _refusal(kind, value, where, name)
    return value


def _container(kind: Any, value: Any, where: str, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if not isinstance(value, dict if origin is dict else (list, tuple)):
        raise _refusal(kind, value, where, name)
    if isinstance(value, dict):
        return {key: _read(arguments[1], each, where, _join(name, key)) for key, each in value.items()}
    if origin is list or arguments[-1] is Ellipsis:
        return origin(_read(arguments[0], each, where, f"{name}[{i}]") for i, each in enumerate(value))
    if len(value) != len(arguments):
        raise ValueError(f"{where}: {name!r} has {len(value)} values; it must have {len(arguments)}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_read(each, part, where, f"{name}[{i}]") for i, (each, part) in pairs)


def _record(kind: Any, value: Any, where: str, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise _refusal(kind, value, where, name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        known = f"there are {', '.join(fields)}" if len(fields) < 12 else "was this written by a newer version?"
        raise ValueError(f"{where}: unknown field {_join(name, unknown[0])!r:.80}; {known}")
    hints, parts = _hints(kind), {}
    for field in fields.values():
        if field.name in value:
            parts[field.name] = _read(hints[field.name], value[field.name], where, _join(name, field.name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            needed = describe(hints[field.name])
            raise ValueError(f"{where}: there is no {_join(name, field.name)!r}; it must be {needed}")
    try:
        return kind(**parts)
    except ValueError as error:
        raise ValueError(f"{where}: {name + ': ' if name else ''}{error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _refusal(kind: Any, value: object, where: str, name: str) -> ValueError:
    if not name:
        return ValueError(f"{where} holds a {type(value).__name__}, not {describe(kind)}")
    return ValueError(f"{where}: {name!r:.80} is {reprlib.repr(value):.60}; it must be {describe(kind)}")
