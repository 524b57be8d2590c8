"""Golden bytes of the GGUF block formats: the same on every machine, and ggml's where they are compatible."""

import functools
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.kernels import blocks
from bitnet.quant.blocks import TYPES
from tests.oracles import ggml
from tests.quant.builders import weights_for

KINDS = list(TYPES)
# Golden bytes: CRC-32 of ggml's bytes (plain, with importance) and of the default's, for the weights below.
GOLDEN = {
    "Q4_0": (0x3194D7C0, 0xF0BF26C1, 0xE04C8ED6, 0x0FBB0A6F),
    "Q4_1": (0x98FAE27F, 0x62E1F687, 0x5A32AE0B, 0x649AF095),
    "Q5_0": (0xC6A8D327, 0x63683BA6, 0xE82E1F1C, 0x39073234),
    "Q5_1": (0xB19AB556, 0x01B5AE1E, 0xDB39F4BC, 0x7C0A4B7F),
    "Q8_0": (0xF349B52C, 0xF349B52C, 0x12E44D7B, 0x1F538B70),
    "Q2_K": (0x144566AB, 0x1BE63132, 0x00D1D880, 0x4129643F),
    "Q3_K": (0x1281DA39, 0xBD0C994E, 0x155741F6, 0xFB1E0D2E),
    "Q4_K": (0x6A63BCAB, 0xB276973C, 0x147FB31D, 0x214EB228),
    "Q5_K": (0x66EBAD52, 0x3D7AB15F, 0xA97C2EA7, 0xC1CE2DEE),
    "Q6_K": (0x6360EF32, 0xE561FE86, 0xA79B7D05, 0x73F64441),
    "IQ4_NL": (0xFE481936, 0xF565D437, 0x83421CE7, 0x499062BB),
    "IQ4_XS": (0x440297E8, 0xA52E1F2E, 0xC6F41A78, 0xE3EF1C84),
    "IQ3_S": (0xDBCD4B1F, 0xAF023BC7, 0x6D2CC488, 0x6D142A64),
    "IQ3_XXS": (0xE7B03445, 0x26BA42A7, 0xEA723BDC, 0x34321998),
    "IQ2_S": (0x5115C25A, 0xF8E85C6C, 0x4D3A1974, 0x867B15C0),
    "IQ2_XS": (0x051B1CCE, 0x7FBE229E, 0xF7FAFDE7, 0x6182A335),
    "IQ2_XXS": (0xF05B733B, 0xDA3ADE9D, 0xEA672E53, 0x0C332B67),
    "IQ1_M": (0x3DE9FEAD, 0x243AD11F, 0x30AD9F35, 0x1337636A),
    "IQ1_S": (0xCCDF4EC2, 0xE41DD46B, 0x9B7AACA1, 0x95BD7AF6),
    "TQ1_0": (0x92C87543, 0x92C87543, 0xF02012BA, 0xA7B2F078),
    "TQ2_0": (0x8FB5700C, 0x8FB5700C, 0xFB9AF1BC, 0xA5BA1C7A),
    "Q1_0": (0x7EF7DE86, 0x7EF7DE86, 0x7EF7DE86, 0xF97A7078),
    "Q2_0": (0xDB379082, 0xDB379082, 0xC42F98D1, 0x579317E9),
    "PQ2_0": (0xDDDE1BB9, 0xDDDE1BB9, 0xBB1F865F, 0x45F098DE),
}


def golden_weights() -> tuple[Tensor, Tensor]:
    """Bell-shaped weights and an importance by integer arithmetic, the same everywhere."""
    state, numbers = 12345, []
    for _ in range(5 * 8 * 512):
        state = (1103515245 * state + 12345) % 2**31
        numbers.append((state >> 12) - 2**18)
    parts = torch.tensor(numbers, dtype=torch.float32).view(5, 8, 512) / 2**18
    return parts[:4].sum(dim=0) * 0.03125, parts[4, 0].abs()


def golden(kind: str, quantizer: Any) -> tuple[int, ...]:
    x, weight = golden_weights()
    return tuple(zlib.crc32(bytes(quantizer(x, kind, w).flatten().tolist())) for w in (weights_for(kind, None), weight))


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes(kind):
    compatible = functools.partial(blocks.quantize, compatible=True)
    assert golden(kind, compatible) + golden(kind, blocks.quantize) == GOLDEN[kind]


@pytest.mark.parametrize("kind", ggml.QUANTIZED_KINDS)
def test_golden_bytes_are_ggml_s(kind):
    assert golden(kind, ggml.quantize) == GOLDEN[kind][:2]
