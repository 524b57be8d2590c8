"""Number formats: every code, tie and border against torch and numpy, and the command that prints them."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.__main__ import main
from bitnet.quant.formats import BF16, E4M3FN, E5M2, FORMATS, FP16, FP32, FloatFormat, decode, encode, memory_bytes
from tests import ROOT

DTYPES = {
    FP32: (torch.float32, torch.int32), FP16: (torch.float16, torch.int16), BF16: (torch.bfloat16, torch.int16),
    E5M2: (torch.float8_e5m2, torch.uint8), E4M3FN: (torch.float8_e4m3fn, torch.uint8),
}  # fmt: skip


# torch's E4M3FN saturates since 2.12 and gave NaN before.
SATURATE = dict.fromkeys(FORMATS) | {E4M3FN: not torch.tensor(1000.0).to(torch.float8_e4m3fn).float().isnan().item()}
SMALL = [format for format in FORMATS if format.bits < 32]
names = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
small_names = pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)


def some_codes(format: FloatFormat) -> Tensor:
    """All bit patterns of up to 16 bits; of 32 bits random ones and those around every change of exponent."""
    if format.bits < 32:
        return torch.arange(1 << format.bits)
    edges = (torch.arange(512)[:, None] << 23) + torch.arange(-3, 4)
    return torch.cat([torch.randint(0, 1 << 32, (200_000,)), edges.flatten() & 0xFFFFFFFF])


def torch_values(codes: Tensor, format: FloatFormat) -> Tensor:
    dtype, storage = DTYPES[format]
    return codes.to(torch.int64).to(storage).view(dtype)


def torch_codes(x: Tensor, format: FloatFormat) -> Tensor:
    dtype, storage = DTYPES[format]
    return x.to(dtype).view(storage).long() & ((1 << format.bits) - 1)


def assert_same_bits(ours: Tensor, theirs: Tensor, nan: Tensor) -> None:
    assert torch.equal(ours[~nan], theirs[~nan])


def random_float32() -> Tensor:
    return torch.randint(-(2**31), 2**31, (300_000,)).to(torch.int32).view(torch.float32)


@names
def test_decode_equals_torch(format: FloatFormat) -> None:
    codes = some_codes(format)
    expected = torch_values(codes, format).double()
    got = decode(codes, format)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])  # -0, too


@names
def test_encode_undoes_decode(format: FloatFormat) -> None:
    codes = some_codes(format)
    values = decode(codes, format)
    assert_same_bits(encode(values, format), codes, values.isnan())
    assert decode(encode(values[values.isnan()], format), format).isnan().all()


@small_names
def test_encode_equals_torch_on_random_bits(format: FloatFormat) -> None:
    x = random_float32()
    got, expected = encode(x, format, saturate=SATURATE[format]), torch_codes(x, format)
    nan = decode(expected, format).isnan()
    assert_same_bits(got, expected, nan)
    assert decode(got[nan], format).isnan().all()
    assert not decode(got[~nan], format).isnan().any()


@small_names
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_encode_equals_torch_on_every_half(format: FloatFormat, source: torch.dtype) -> None:
    x = torch.arange(1 << 16).to(torch.int16).view(source)
    got, expected = encode(x, format, saturate=SATURATE[format]), torch_codes(x.float(), format)
    assert_same_bits(got, expected, decode(expected, format).isnan())


@small_names
def test_ties_and_their_neighbours_equal_torch(format: FloatFormat) -> None:
    codes = torch.arange(format.largest_code)
    middles = ((decode(codes, format) + decode(codes + 1, format)) / 2).float()
    assert torch.equal(decode(encode(middles, format), format), decode(codes + (codes & 1), format))
    for x in (middles, torch.nextafter(middles, torch.tensor(math.inf)), torch.nextafter(middles, torch.tensor(0.0))):
        assert torch.equal(encode(x, format), torch_codes(x, format))
        assert torch.equal(encode(-x, format), torch_codes(-x, format))


def test_float64_to_fp32_equals_numpy() -> None:
    x = torch.randint(-(2**63), 2**63 - 1, (200_000,)).view(torch.float64)
    scaled = torch.randn(200_000, dtype=torch.float64) * torch.exp2(torch.randint(-160, 130, (200_000,)).double())
    codes = some_codes(FP32) & 0x7FFFFFFF
    codes = codes[codes < FP32.largest_code]
    middles = (decode(codes, FP32) + decode(codes + 1, FP32)) / 2
    above, below = (torch.nextafter(middles, torch.tensor(b, dtype=torch.float64)) for b in (math.inf, 0.0))
    for values in (x, scaled, middles, -middles, above, below):
        with np.errstate(over="ignore", invalid="ignore"):
            expected = torch.from_numpy(values.numpy().astype(np.float32).view(np.int32)).long() & 0xFFFFFFFF
        assert_same_bits(encode(values, FP32), expected, values.isnan())


def test_conversion_from_float64_rounds_once() -> None:
    # Just above the middle of 1 and the next FP16: by way of float32 it would become the tie, and then 1.
    x = torch.tensor(1 + 2**-11 + 2**-40, dtype=torch.float64)
    assert FP16.value(int(encode(x, FP16))) == 1 + 2**-10
    assert FP16.value(int(encode(x.float(), FP16))) == 1.0


@small_names
def test_overflow_equals_torch(format: FloatFormat) -> None:
    step = format.largest - format.value(format.largest_code - 1)
    edge = format.largest + step / 2  # the tie between the largest value and what would come next
    x = torch.tensor([format.largest, edge, edge * (1 - 1e-6), edge * (1 + 1e-6), 3.4e38, math.inf]).float()
    x = torch.cat([x, -x, torch.tensor([math.nan])])
    expected = torch_values(torch_codes(x, format), format).double()
    got = decode(encode(x, format, saturate=SATURATE[format]), format)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    saturated = decode(encode(x, format, saturate=True), format)
    assert torch.equal(saturated[:-1], format.largest * x[:-1].sign().double())
    assert saturated[-1].isnan()


def test_overflow_by_hand() -> None:
    assert FP16.value(FP16.code(65519.0)) == 65504.0
    assert FP16.value(FP16.code(65520.0)) == math.inf
    assert BF16.value(BF16.code(-3.4e38)) == -math.inf
    assert E5M2.value(E5M2.code(61439.0)) == 57344.0
    assert E5M2.value(E5M2.code(61440.0)) == math.inf
    assert E4M3FN.value(E4M3FN.code(464.0)) == 448.0  # a tie: 448 is even
    assert E4M3FN.value(E4M3FN.code(-1000.0)) == -448.0
    x = torch.tensor([464.0, 464.001, math.inf, -math.inf])
    assert decode(encode(x, E4M3FN), E4M3FN).tolist() == [448, 448, 448, -448]
    assert encode(x, E4M3FN, saturate=False).tolist() == [0x7E, 0x7F, 0x7F, 0xFF]
    assert FP32.value(FP32.code(3.5e38)) == math.inf


@names
def test_limits_equal_torch(format: FloatFormat) -> None:
    info = torch.finfo(DTYPES[format][0])
    assert format.bits == info.bits
    assert format.largest == info.max
    assert format.smallest_normal == info.tiny
    assert format.epsilon == info.eps
    values = decode(some_codes(format), format)
    assert format.smallest_subnormal == values[values > 0].min()
    assert format.value(1) == format.smallest_subnormal
    assert format.value(1 << format.mantissa_bits) == format.smallest_normal
    assert math.isnan(format.value(format.nan_code))


@names
def test_precision(format: FloatFormat) -> None:
    one = format.code(1.0)
    assert format.value(one + 1) - 1 == format.epsilon
    assert format.decimal_digits == pytest.approx(math.log10(2 / format.epsilon))
    x = (torch.rand(50_000, dtype=torch.float64) + 0.5) * torch.exp2(torch.randint(-5, 5, (50_000,)).double())
    error = (decode(encode(x, format), format) - x).abs() / x
    assert error.max() <= format.epsilon / 2
    assert error.max() > format.epsilon / 2 / (1 + format.epsilon / 2) * 0.98  # half-way between 1 and the next


@names
def test_fields_come_apart_and_together(format: FloatFormat) -> None:
    for code in {
        0,
        1,
        1 << (format.bits - 1),
        (1 << format.bits) - 1,
        *some_codes(format)[:: 997 if format.bits > 8 else 1],
    }:
        code = int(code)
        sign, exponent, mantissa = format.split(code)
        assert format.join(sign, exponent, mantissa) == code
        text = format.bit_string(code)
        assert int(text.replace("|", ""), 2) == code
        assert [len(part) for part in text.split("|")] == [1, format.exponent_bits, format.mantissa_bits]
        value = format.value(code)
        if math.isfinite(value):  # the formula of the docstring
            scale = 2.0 ** (max(exponent, 1) - format.bias)
            expected = (-1) ** sign * (mantissa / 2**format.mantissa_bits + (exponent > 0)) * scale
            assert value == expected


@pytest.mark.parametrize(
    ("format", "value", "bits"),
    [
        (FP32, 3.1416, "0|10000000|10010010000111111111001"), (FP16, 3.1416, "0|10000|1001001000"),
        (BF16, 3.1416, "0|10000000|1001001"), (E4M3FN, -0.015625, "1|0001|000"), (E5M2, 2.0**-16, "0|00000|01"),
        (FP16, math.inf, "0|11111|0000000000"), (FP32, -0.0, "1|00000000|00000000000000000000000"),
        (E4M3FN, 448.0, "0|1111|110"), (E4M3FN, math.nan, "0|1111|111"), (BF16, 1.0, "0|01111111|0000000"),
    ],
)  # fmt: skip
def test_bits_by_hand(format: FloatFormat, value: float, bits: str) -> None:
    assert format.bit_string(format.code(value)) == bits


def test_shapes_inputs_and_other_integer_types() -> None:
    x = torch.randn(3, 4, 5)
    before = x.clone()
    codes = encode(x, BF16)
    assert codes.shape == x.shape
    assert codes.dtype == torch.int64
    assert torch.equal(x, before)
    assert torch.equal(decode(codes, BF16), x.bfloat16().double())
    # A signed storage type sign-extends; the upper bits don't matter.
    assert torch.equal(decode(x.bfloat16().view(torch.int16), BF16), x.bfloat16().double())
    assert encode(torch.zeros(0), FP16).shape == (0,)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="int64"):
        encode(torch.ones(2, dtype=torch.int64), FP16)
    for code in (-1, 256):
        with pytest.raises(ValueError, match=f"{code} does not fit the 8 bits of FP8 E5M2"):
            E5M2.split(code)
    with pytest.raises(ValueError, match="exponent 32 does not fit the 5 bits that FP16"):
        FP16.join(0, 32, 0)
    with pytest.raises(ValueError, match="sign 2"):
        FP16.join(2, 0, 0)
    with pytest.raises(ValueError, match="mantissa -1"):
        FP16.join(0, 0, -1)
    for params, bits in ((-1, 8), (1, -8), (math.inf, 8), (math.nan, 8)):
        with pytest.raises(ValueError, match="memory"):
            memory_bytes(params, bits)


def test_memory() -> None:
    assert memory_bytes(7e9, 32) == 28e9
    assert memory_bytes(70e9, 16) == 140e9
    assert memory_bytes(7e9, 8) == 7e9
    assert memory_bytes(8, 1.58) == pytest.approx(1.58)


# The command


def test_command_prints_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    main(["formats", "3.1416", "--params", "7e9", "--range", "10"])
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: re.split(r"\s{2,}", line) for line in out.splitlines() if line}
    assert re.search(r"^FP16 +0\|10000\|1001001000 +3.140625 +0.000975 +0.00031 +14 GB$", out, re.M)
    assert re.search(r"^FP32 .* 28 GB$", out, re.M)
    # 3.1416 * 127 / 10 = 39.9: code 40
    assert re.search(r"^INT8 ±10 +0\|0101000 +3\.149606\d* +0.00801 +0.00255 +7 GB$", out, re.M)
    assert rows["FP8 E4M3FN"] == ["FP8 E4M3FN", "8", "448", "0.015625", "0.00195312", "0.125", "1.2"]
    main(["formats", "-1000"])
    out = capsys.readouterr().out
    assert "memory" not in out
    assert re.search(r"^INT8 ±1024 +1\|0000100 ", out, re.M)  # -124 in two's complement
    assert re.search(r"^FP8 E4M3FN +1\|1111\|110 +-448 ", out, re.M)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "1e-300", "1e300"])
def test_command_survives_extremes(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["formats", value, "--params", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 15


@pytest.mark.parametrize("option", ["--range", "--params"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_command_names_bad_options(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "1", f"{option}={value}"]) == 2
    assert f"{option} is {float(value)}" in capsys.readouterr().err


def test_command_runs_as_a_module() -> None:
    command = [sys.executable, "-W", "error", "-m", "bitnet", "formats", "--", "-1e-3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "-0.001" in result.stdout
