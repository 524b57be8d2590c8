"""Rows of activations that are spread over processes: norm and product to the bit those of one process."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.kernels import reference, sharded
from bitnet.model.transformer import RMSNorm
from bitnet.quant import pack_codes
from tests.forked import Forked

WIDTH, PROCESSES = 6 * 130, 2


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of every size, one of zeros, one with a NaN, one with an infinity; codes, norm weights, scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, WIDTH, generator=generator) * torch.logspace(-35, 12, 8)[:, None]
    x[2], x[3, 5], x[4, WIDTH - 1] = 0, torch.nan, torch.inf
    codes = torch.randint(-1, 2, (48, WIDTH), generator=generator, dtype=torch.int8)
    return x, codes, torch.rand(WIDTH, generator=generator) + 0.5, torch.rand(48, 1, generator=generator)


def results(part: slice, group: str) -> tuple[Tensor, Tensor, Tensor]:
    x, codes, weight, scale = operands()
    x, codes = x[:, part].contiguous(), codes[:, part].contiguous()
    normed = sharded.row_parallel_norm(x, weight[part], 1e-5, WIDTH, group)
    packed, bias = pack_codes(codes, 2), torch.arange(48.0)
    products = [
        sharded.row_parallel_linear(rows, packed, scale, bias, 2, codes.shape[1], group)
        for rows in (normed, x.to(torch.bfloat16))
    ]
    return normed, *(product.float() for product in products)


def worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    mine = WIDTH // PROCESSES
    found = results(slice(rank * mine, (rank + 1) * mine), torch.distributed.group.WORLD.group_name)
    np.savez(f"{folder}/{rank}.npz", *(tensor.numpy() for tensor in found))
    torch.distributed.destroy_process_group()


def test_two_processes_compute_the_bits_of_one(tmp_path):
    code = f"import os\nfrom {__name__} import worker\nworker(int(os.environ['RANK']), {str(tmp_path)!r})"
    done = Forked(tmp_path, processes=PROCESSES, code=code).wait()
    assert done.returncode == 0, done.stderr
    normed, *products = (tensor.numpy() for tensor in results(slice(None), ""))
    found = [list(np.load(tmp_path / f"{rank}.npz").values()) for rank in range(PROCESSES)]
    np.testing.assert_array_equal(np.concatenate([parts[0] for parts in found], 1), normed)
    for parts in found:
        for product, whole in zip(parts[1:], products, strict=True):
            np.testing.assert_array_equal(product, whole)
    assert np.isnan(normed).any(1).tolist() == [False, False, False, True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_the_models(dtype):
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    norm = RMSNorm(384, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        found = sharded.row_parallel_norm(x, norm.weight, 1e-5, 384, "")
        assert found.dtype == dtype
        torch.testing.assert_close(found, norm(x), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_one_process_runs_the_ordinary_product():
    x, codes, _, scale = operands()
    x = x[:3]
    found = sharded.row_parallel_linear(x, pack_codes(codes, 2), scale, None, 2, WIDTH, "")
    wanted = reference.packed_linear(x, pack_codes(codes, 2), scale, None, bits=2, in_features=WIDTH)
    assert torch.equal(found, wanted)


def test_the_operators_say_what_they_return():
    x, codes, weight, scale = operands()
    torch.library.opcheck(sharded.row_parallel_norm, (x[:2], weight, 1e-5, WIDTH, ""))
    torch.library.opcheck(sharded.row_parallel_linear, (x[:2], pack_codes(codes, 2), scale, None, 2, WIDTH, ""))
