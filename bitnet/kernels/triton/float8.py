"""FP8 (E4M3) on any GPU: bytes to numbers and back by operations on bits.

    decode    the byte s eeee mmm as float16 bits s 0eeee mmm0000000, times 2^8, since the biases are 7 and 15: exact
    encode    float32 bits, rounded half to even once; below 2^-6, where the last place stands still, as at 2^14

The format is OCP's, torch.float8_e4m3fn (`bitnet/quant/formats.py`): no infinity, one NaN, 448 the largest number.
Larger numbers become 448 ("saturate"); NaN and infinities become NaN, so that who looks for a diverged model finds it.

Conversions of Triton's own are not used: compute capability 8.0 has none, and the interpreter's give other numbers.
"""

# mypy: disable-error-code="no-untyped-def"

from bitnet.kernels.triton.language import tl, triton


@triton.jit
def decode_e4m3(codes):
    """Values, float32, of codes uint8."""
    # The sign of the byte fills the upper half; all but the highest bit of that go.
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def encode_e4m3(x):
    """Codes uint8 of x, float32."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Exponents count from 2^-7, whose code is 0; a carry out of the mantissa adds to the exponent.
    normal = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
    code = tl.where(size >= 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
