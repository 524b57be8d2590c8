"""Parts of stored ternary matrices: what processes hold together is the matrix, in every form."""

import pytest
import torch

from bitnet import kernels
from bitnet.quant import unpack_codes
from bitnet.storage.hf.read import pack_rows
from bitnet.vllm import shards
from bitnet.vllm.shards import Part

N, K = 40, 6 * 53  # parts begin and end inside of bytes, in both directions


@pytest.fixture
def codes():
    return torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def parts(processes: int, rows: bool) -> list[Part]:
    count = (N if rows else K) // processes
    return [Part(i * count, count, 0, K) if rows else Part(0, N, i * count, count) for i in range(processes)]


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stored", ["bytes", "floats"])
def test_parts_are_the_codes(codes, rows, processes, stored):
    weight = pack_rows(codes) if stored == "bytes" else codes.to(torch.bfloat16)
    found = [unpack_codes(shards.packed_part(weight, p), 2, p.columns) for p in parts(processes, rows)]
    assert torch.equal(torch.cat(found, 0 if rows else 1), codes)


@pytest.mark.parametrize("rows", [True, False])
def test_latent_floats_are_quantized_by_the_mean_of_the_whole_matrix(rows):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, K)
    wanted, wanted_scale = kernels.quantize_weight(weight, "ternary")
    packed = [shards.quantized_part(weight, part) for part in parts(2, rows)]
    columns = K if rows else K // 2
    assert torch.equal(torch.cat([unpack_codes(p, 2, columns) for p, _ in packed], 0 if rows else 1), wanted)
    assert all(torch.equal(scale, wanted_scale) for _, scale in packed)


def test_latent_floats_are_quantized_alike_by_any_number_of_threads():
    weight = torch.randn(256, 768, generator=torch.Generator().manual_seed(2))
    threads, scales = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            scales.append(shards.quantized_part(weight, Part(0, 4, 0, 4))[1])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(scale, scales[0]) for scale in scales)


def test_a_part_fills_its_rows_of_the_layer():
    target = torch.zeros(6, 1)
    Part(0, 2, 0, 1, at=3).place(target).fill_(1)
    assert target.flatten().tolist() == [0, 0, 0, 1, 1, 0]


def test_damaged_matrices_are_refused(codes):
    with pytest.raises(ValueError, match=r"wants rows 36 to 44 of it; the folder is damaged"):
        shards.packed_part(pack_rows(codes), Part(36, 8, 0, K))
    with pytest.raises(ValueError, match=r"wants columns 300 to 319"):
        shards.packed_part(pack_rows(codes), Part(0, 8, 300, 19))
    with pytest.raises(ValueError, match="other codes than -1, 0 and 1"):
        shards.packed_part(torch.full((2, 4), 255, dtype=torch.uint8), Part(0, 8, 0, 4))
    with pytest.raises(ValueError, match="other codes than -1, 0 and 1"):
        shards.packed_part(codes.float() * 0.5, Part(0, 8, 0, 4))


@pytest.mark.parametrize(("form", "stored"), [("packed", "scale"), ("packed-inverse", "reciprocal")])
def test_scales_and_biases_are_those_of_the_form(form, stored):
    scale = torch.tensor([0.3], dtype=torch.float32)
    kept = scale if stored == "scale" else 1 / scale.double()
    assert torch.equal(shards.read_scale(kept, form), scale.view(1, 1))
    bias = torch.tensor([0.7], dtype=torch.float32)
    kept = bias.double() / scale if form == "packed" else bias
    assert torch.equal(shards.exact_bias(kept, scale, form).float(), bias)
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        shards.read_scale(torch.zeros(1), form)
