"""The tiles of AMX belong to whoever configured them: another library in the process finds them as it left them."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bitnet.bench.random_models import write_random_gguf
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.weights import matrix_of, stored
from bitnet.kernels import cpu
from bitnet.kernels.cpu import native
from bitnet.kernels.cpu.matrices import linear
from bitnet.model.weight_only import BlockLinear
from tests.builders import packed_model, random_ids
from tests.inference.builders import CONFIGS
from tests.kernels.builders import lines_of, needs_library, random_codes
from tests.oracles.llama import LlamaModel
from tests.storage.builders import SHAPE

pytestmark = needs_library


def use_every_product() -> None:
    """Of the engine, of ternary codes and of codes with groups, enough tokens for tiles."""
    engine = Engine.from_model(packed_model(CONFIGS["multiples of 64"]))
    engine(random_ids(engine.config, 2, 40))
    cpu.integer_matmul(torch.randn(70, 200), lines_of(random_codes(40, 200, 2), "two_bit"))
    for kind in ("Q4_K", "Q6_K", "Q8_0"):
        for activations in ("int8", "float"):
            layer = BlockLinear.from_linear(nn.Linear(256, 40), kind)
            linear(matrix_of(stored(layer, activations)), torch.randn(40, 256))


@contextmanager
def tile_instructions() -> Iterator[tuple[Callable[[bytes], None], Callable[[], bytes]]]:
    """ldtilecfg and sttilecfg on this thread, as machine code."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page[:16] = bytes.fromhex("c4e2784907c39090 c4e2794907c39090")  # on [rdi], ret
        start = ctypes.addressof(ctypes.c_char.from_buffer(page))
        load, save = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(start + offset) for offset in (0, 8))
        memory = ctypes.create_string_buffer(64)

        def configure(content: bytes) -> None:
            load(ctypes.create_string_buffer(content, 64))

        def configured() -> bytes:
            save(memory)
            return memory.raw

        yield configure, configured


@pytest.mark.skipif("amx" not in native.instruction_sets(), reason="a processor without AMX")
def test_the_configuration_of_tiles_is_left_as_it_was() -> None:
    # Palette 1, tile 3 of 5 rows of 24 bytes: not what our kernels want.
    rows, width = bytearray(16), bytearray(32)
    rows[3], width[6] = 5, 24
    theirs = bytes([1, 0, *bytes(14)]) + bytes(width) + bytes(rows)
    with tile_instructions() as (configure, configured), native.use_instruction_set("amx"):
        for before in (theirs, bytes(64)):
            configure(before)
            assert configured() == before
            use_every_product()
            assert configured() == before
        configure(bytes(64))


def test_llama_cpp_and_the_engine_in_turn(tmp_path) -> None:
    write_random_gguf(tmp_path / "model.gguf", SHAPE.replace(quantizer="none", sub_norm=False), "Q4_0")
    ids = [1, 5, 9, 2] * 8
    with LlamaModel(tmp_path / "model.gguf") as theirs:
        expected = theirs.logits(ids)
        for _ in range(2):
            use_every_product()
            assert (theirs.logits(ids) == expected).all()
