"""Codes in bytes: the layouts by hand, and there and back."""

import pytest
import torch
from torch import Tensor

from bitnet.quant import (
    pack_codes,
    packed_width,
    unpack_codes,
)
from bitnet.quant.packing import codes_per_block

LIMITS = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    low, high = LIMITS[bits]
    return torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300])
@pytest.mark.parametrize("rows", [1, 3])
def test_packing_round_trip(bits: int, columns: int, rows: int) -> None:
    codes = random_codes(rows, columns, bits)
    codes[0, 0], codes[-1, -1] = LIMITS[bits]
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(columns, bits))
    unpacked = unpack_codes(packed, bits, columns)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, before)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(("bits", "block"), [(2, 128), (4, 64), (8, 32)])
def test_packed_width(bits: int, block: int) -> None:
    assert codes_per_block(bits) == block
    assert [packed_width(k, bits) for k in (1, block - 1, block, block + 1, 3 * block)] == [32, 32, 32, 64, 96]


def test_bytes_of_one_2_bit_block_by_hand() -> None:
    codes = torch.zeros(1, 128, dtype=torch.int8)  # all bytes 01 01 01 01
    codes[0, 0], codes[0, 32], codes[0, 64], codes[0, 96] = -1, 0, 1, 1  # byte 0: 10 10 01 00
    codes[0, 1], codes[0, 33], codes[0, 65], codes[0, 97] = 1, -1, -1, -1  # byte 1: 00 00 00 10
    codes[0, 31], codes[0, 127] = -1, 1  # byte 31: 10 01 01 00
    expected = [0b01010101] * 32
    expected[0], expected[1], expected[31] = 0b10100100, 0b00000010, 0b10010100
    assert pack_codes(codes, 2).tolist() == [expected]


def test_bytes_of_one_4_bit_block_by_hand() -> None:
    codes = torch.zeros(1, 64, dtype=torch.int8)
    codes[0, 0], codes[0, 32] = -8, 7
    codes[0, 31], codes[0, 63] = 7, -1
    expected = [0x88] * 32
    expected[0], expected[31] = 0xF0, 0x7F
    assert pack_codes(codes, 4).tolist() == [expected]


def test_bytes_of_one_8_bit_block_by_hand() -> None:
    codes = torch.arange(-16, 16, dtype=torch.int8)[None]
    codes[0, 0], codes[0, 31] = -128, 127
    expected = [0, *range(113, 143), 255]
    assert pack_codes(codes, 8).tolist() == [expected]


def test_2_bit_layout_is_ggml_tq2_0() -> None:
    codes = random_codes(2, 512, 2)
    packed = pack_codes(codes, 2)
    for row in range(2):
        for block in range(2):  # 256 weights, 64 bytes
            bytes_ = packed[row, block * 64 : (block + 1) * 64].tolist()
            for g in range(2):
                for lane in range(4):
                    for m in range(32):
                        code = int(codes[row, block * 256 + g * 128 + lane * 32 + m])
                        assert bytes_[g * 32 + m] >> 2 * lane & 3 == code + 1


@pytest.mark.parametrize(("bits", "zero"), [(2, 0b01010101), (4, 0x88), (8, 0x80)])
def test_padding_is_the_code_of_zero(bits: int, zero: int) -> None:
    block = codes_per_block(bits)
    codes = random_codes(2, block + 1, bits)
    packed = pack_codes(codes, bits)
    padded = unpack_codes(packed, bits, 2 * block)
    assert torch.equal(padded[:, : block + 1], codes)
    assert not padded[:, block + 1 :].any()
    assert (packed[:, 33:] == zero).all()
    # A tail is read back to zeros only: other bytes in it do not reach the codes.
    packed[:, 33:] = 0
    assert torch.equal(unpack_codes(packed, bits, block + 1), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_non_contiguous_and_empty(bits: int) -> None:
    codes = random_codes(70, 5, bits)
    assert torch.equal(unpack_codes(pack_codes(codes.t(), bits), bits, 70), codes.t())
    packed = pack_codes(torch.cat([codes, codes]).t(), bits)
    assert torch.equal(unpack_codes(packed.t().contiguous().t(), bits, 140)[:, :70], codes.t())
    assert unpack_codes(pack_codes(codes[:0], bits), bits, 5).shape == (0, 5)


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 16])
def test_packing_names_the_bad_width(bits: int) -> None:
    message = f"bits is {bits}; .*2, 4, 8"
    with pytest.raises(ValueError, match=message):
        pack_codes(torch.zeros(1, 4, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=message):
        unpack_codes(torch.zeros(1, 32, dtype=torch.uint8), bits, 4)
    with pytest.raises(ValueError, match=message):
        packed_width(4, bits)


@pytest.mark.parametrize(("bits", "value"), [(2, 2), (2, -2), (4, 8), (4, -9)])
def test_packing_names_the_code_out_of_range(bits: int, value: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.int8)
    codes[1, 2] = value
    with pytest.raises(ValueError, match=f"{value}.*{bits} bits"):
        pack_codes(codes, bits)


def test_packing_names_the_wrong_dtype_and_shape() -> None:
    with pytest.raises(ValueError, match=r"torch.int32 \[2, 3\]"):
        pack_codes(torch.zeros(2, 3, dtype=torch.int32), 2)
    with pytest.raises(ValueError, match=r"\[3\]"):
        pack_codes(torch.zeros(3, dtype=torch.int8), 2)
    with pytest.raises(ValueError, match=r"\[2, 32\]"):
        unpack_codes(torch.zeros(2, 32, dtype=torch.uint8), 2, 129)
    with pytest.raises(ValueError, match="int8"):
        unpack_codes(torch.zeros(2, 32, dtype=torch.int8), 2, 128)


def test_codes_that_were_just_made_need_no_check(monkeypatch):
    codes = torch.randint(-1, 2, (3, 130), dtype=torch.int8)
    expected = pack_codes(codes, 2)

    def waits(tensor):
        raise AssertionError("this waits for a GPU")

    monkeypatch.setattr(torch.Tensor, "__bool__", waits)
    assert pack_codes(codes, 2, checked=False).tolist() == expected.tolist()
    with pytest.raises(AssertionError, match="waits"):
        pack_codes(codes, 2)
