"""Number formats as bit fields: FP32, FP16, BF16, FP8 (E4M3FN, E5M2) and INT8.

A float format with E exponent and M mantissa bits stores `sign | exponent e | mantissa m` and means, with
`bias = 2^(E-1) - 1`,

    e = 0                (-1)^s  m / 2^M        2^(1 - bias)    subnormal, and zero
    0 < e                (-1)^s (1 + m / 2^M)   2^(e - bias)    normal
    e = 2^E - 1          IEEE formats only: infinity where m = 0, else NaN

E4M3FN (arXiv 2209.05433, OCP OFP8) has no infinity and a single NaN, all ones, so its largest exponent holds numbers.
Conversion rounds half to even, once, from float64 bits. What rounds beyond the largest value becomes infinity, or the
largest value where there is no infinity, as torch's dtypes do it (before 2.12 its E4M3FN became NaN there). INT8 has
no exponent: it needs a scale, x ~ code * scale.

    memory in bytes = bits / 8 * parameters

    bitnet formats 3.1416 --params 7e9     the value in every format, and its error
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format of at most 32 bits, drawn at the top of this file."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    infinity: bool = True
    """The last exponent holds infinity and NaN (IEEE); otherwise numbers, and one NaN."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest_code(self) -> int:
        """Bits of the largest finite value."""
        return (
            (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1 if self.infinity else (1 << self.bits - 1) - 2
        )

    @property
    def nan_code(self) -> int:
        """Bits of the NaN that `encode` writes (with the sign of its input)."""
        return self.largest_code + 1 + (1 << self.mantissa_bits - 1 if self.infinity else 0)

    @property
    def largest(self) -> float:
        """Largest finite value; the smallest is its negative."""
        return self.value(self.largest_code)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value of full precision."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next value; rounding errs by at most half of it, relatively, in the normal range."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def decimal_digits(self) -> float:
        """Significant decimal digits of the mantissa, (M + 1) log10(2)."""
        return (self.mantissa_bits + 1) * math.log10(2)

    def split(self, code: int) -> tuple[int, int, int]:
        """Fields sign, exponent and mantissa of the bits. Raises ValueError for more bits than the format has."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"code {code} does not fit the {self.bits} bits of {self.name}")
        exponent = code >> self.mantissa_bits & (1 << self.exponent_bits) - 1
        return code >> self.bits - 1, exponent, code & (1 << self.mantissa_bits) - 1

    def join(self, sign: int, exponent: int, mantissa: int) -> int:
        """Bits of three fields. Raises ValueError for a field that is too large."""
        widths = {
            "sign": (sign, 1),
            "exponent": (exponent, self.exponent_bits),
            "mantissa": (mantissa, self.mantissa_bits),
        }
        for field, (value, width) in widths.items():
            if not 0 <= value < 1 << width:
                raise ValueError(f"{field} {value} does not fit the {width} bits that {self.name} has for it")
        return sign << self.bits - 1 | exponent << self.mantissa_bits | mantissa

    def code(self, value: float) -> int:
        """Bits of the nearest value."""
        return int(encode(torch.tensor(value, dtype=torch.float64), self))

    def value(self, code: int) -> float:
        """Value of the bits."""
        self.split(code)
        return float(decode(torch.tensor(code), self))

    def bit_string(self, code: int) -> str:
        """The bits as `sign|exponent|mantissa`."""
        sign, exponent, mantissa = self.split(code)
        return f"{sign}|{exponent:0{self.exponent_bits}b}|{mantissa:0{self.mantissa_bits}b}"


FP32 = FloatFormat("FP32", 8, 23)
FP16 = FloatFormat("FP16", 5, 10)
BF16 = FloatFormat("BF16", 8, 7)
E5M2 = FloatFormat("FP8 E5M2", 5, 2)
E4M3FN = FloatFormat("FP8 E4M3FN", 4, 3, infinity=False)
FORMATS = (FP32, FP16, BF16, E5M2, E4M3FN)


def encode(x: Tensor, to: FloatFormat, *, saturate: bool | None = None) -> Tensor:
    """Bits of the nearest values, half to even: int64 of x's shape, for float x.

    With `saturate` too large values and infinities become the largest value of their sign, without it infinity, or NaN
    in a format that has none; None saturates the latter.
    """
    if not x.is_floating_point():
        raise ValueError(f"encoding takes a float tensor, got {x.dtype}")
    bits = x.double().view(torch.int64)
    magnitude = bits & ~(-1 << 63)
    exponent = (magnitude >> 52) - 1023  # a subnormal float64 counts as 2^-1023 and is rounded to 0 all the same
    significand = magnitude & (1 << 52) - 1 | 1 << 52
    smallest = 1 - to.bias
    # Below the smallest normal exponent the last place stands still, so more bits drop; 54 drop everything.
    dropped = (52 - to.mantissa_bits + (smallest - exponent).clamp(min=0)).clamp(max=54)
    kept = significand >> dropped
    rest, half = significand & (1 << dropped) - 1, 1 << dropped - 1
    kept = kept + ((rest > half) | (rest == half) & (kept & 1 == 1))
    # The leading 1 of `kept` adds 1 to the exponent field; so does a carry out of the mantissa, and both are right.
    codes = ((exponent.clamp(min=smallest) - smallest) << to.mantissa_bits) + kept
    saturate = not to.infinity if saturate is None else saturate
    codes = codes.clamp(max=to.largest_code if saturate else to.largest_code + 1)
    codes = torch.where(x.isnan(), to.nan_code, codes)
    return torch.where(bits < 0, codes | 1 << to.bits - 1, codes)


def decode(codes: Tensor, format: FloatFormat) -> Tensor:
    """Values of bits (any integer dtype): float64 of the same shape, which holds every format's values exactly."""
    codes = codes.long()
    exponent = codes >> format.mantissa_bits & (1 << format.exponent_bits) - 1
    mantissa = codes & (1 << format.mantissa_bits) - 1
    significand = torch.where(exponent > 0, mantissa | 1 << format.mantissa_bits, mantissa).double()
    power = exponent.clamp(min=1) - format.bias - format.mantissa_bits
    values = significand * ((power + 1023) << 52).view(torch.float64)  # 2^power, put together from its bits
    magnitude = codes & (1 << format.bits - 1) - 1
    if format.infinity:
        values = torch.where(magnitude == format.largest_code + 1, math.inf, values)
    values = torch.where(magnitude > format.largest_code + format.infinity, math.nan, values)
    return torch.where(codes >> format.bits - 1 & 1 == 1, -values, values)


def memory_bytes(params: float, bits: float) -> float:
    """Bytes that a number of parameters takes at `bits` each: bits / 8 * params."""
    if params < 0 or bits < 0 or not math.isfinite(params * bits):
        raise ValueError(f"memory needs a number of parameters and bits, got {params} parameters of {bits} bits")
    return bits / 8 * params
