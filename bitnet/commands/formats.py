"""A value in each number format, with its bits and errors, and the formats' ranges.

bitnet formats 3.1416 --params 7e9     write -- before a number like -1e-3
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from bitnet.console import table


@dataclass(frozen=True)
class Options:
    value: tyro.conf.Positional[str]
    """A number, also nan or inf, which no other option takes."""
    params: float | None = None
    """Number of parameters, to print the memory that they take."""
    range: float | None = None
    """Absmax of the INT8 scale; the power of two above |value| unless given."""


def run(options: Options) -> None:
    """Print a value in every format, and the formats' ranges."""
    from bitnet.quant.formats import FORMATS

    try:
        value, absmax = float(options.value), options.range
    except ValueError:
        raise ValueError(f"{options.value!r} is no number; give one, e.g. 3.1416") from None
    if absmax is None:
        absmax = 2.0 ** math.ceil(math.log2(abs(value))) if value and 1e-30 < abs(value) < 1e30 else 1.0
    if not 1e-30 <= absmax <= 1e38:
        raise ValueError(f"--range is {absmax}; it must be a positive number")
    if options.params is not None and not 0 < options.params < 1e30:
        raise ValueError(f"--params is {options.params}; it must be a positive number")
    print(table(list(_rows(value, absmax, options.params))))
    print()
    ranges = [["format", "bits", "largest", "smallest normal", "smallest", "epsilon", "decimal digits"]]
    for f in FORMATS:
        numbers = (f.largest, f.smallest_normal, f.smallest_subnormal, f.epsilon)
        ranges.append([f.name, str(f.bits), *(f"{number:.6g}" for number in numbers), f"{f.decimal_digits:.1f}"])
    step = absmax / 127
    ranges.append(["INT8", "8", f"{absmax:.6g}", f"{step:.6g}", f"{step:.6g}", "(steps of range / 127)", "-"])
    print(table(ranges))


def _rows(value: float, absmax: float, params: float | None) -> Iterator[list[str]]:
    """Rows of the first table: format, bit fields, value, errors, memory."""
    import torch

    from bitnet.quant.affine import dequantize, integer_range, quantize
    from bitnet.quant.formats import FORMATS, memory_bytes

    entries = []
    for format in FORMATS:
        code = format.code(value)
        entries.append((format.name, format.bits, format.bit_string(code), format.value(code)))
    scale = torch.tensor([absmax / 127])
    if math.isnan(value):
        entries.append((f"INT8 ±{absmax:g}", 8, "-", math.nan))
    else:
        codes = quantize(torch.tensor([value]), scale, None, *integer_range(8))
        bits = f"{int(codes) & 255:08b}"
        entries.append((f"INT8 ±{absmax:g}", 8, f"{bits[0]}|{bits[1:]}", float(dequantize(codes, scale))))
    yield ["format", "sign|exponent|mantissa", "value", "absolute error", "relative error"] + ["memory"] * bool(params)
    for name, width, fields, stored in entries:
        error = 0.0 if stored == value else abs(stored - value)
        relative = error / abs(value) if value else error
        memory = [f"{memory_bytes(params, width) / 1e9:.4g} GB"] if params else []
        yield [name, fields, f"{stored:.9g}", f"{error:.3g}", f"{relative:.3g}", *memory]
