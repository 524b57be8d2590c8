"""The codebooks of the IQ types: gguf-py's tables, and their neighbours as the definition has them."""

import pytest
import torch

from bitnet.quant.blocks.codebooks import CODEBOOKS
from tests import oracles


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_the_vectors_are_gguf_py_s(kind):
    table = getattr(oracles.require("gguf").quants, kind)
    table.init_grid()
    assert torch.equal(CODEBOOKS[kind].values, torch.from_numpy(table.grid[0, 0].copy()))


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ2_S", "IQ3_S"])
def test_neighbours_are_the_vectors_at_the_smallest_distances(kind):
    book = CODEBOOKS[kind]
    for number in torch.randint(len(book.place), (40,), generator=torch.Generator().manual_seed(0)).tolist():
        found = [i for i in book.neighbours[number].tolist() if i >= 0]
        if book.place[number] >= 0:
            assert found == []
            continue
        digits = [number // book.base**i % book.base for i in range(book.size)]
        squared = [sum((a - b) ** 2 for a, b in zip(v, digits, strict=True)) for v in book.digits.tolist()]
        last = sorted(set(squared))[book.distances - 1]
        assert found == sorted((i for i, s in enumerate(squared) if s <= last), key=lambda i: squared[i])
