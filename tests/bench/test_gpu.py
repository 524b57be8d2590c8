"""The Triton kernels, the GPU engine and training on a real GPU: the gates of `bitnet/bench/gpu.py`, as tests."""

import pytest
import torch

from bitnet import kernels
from bitnet.bench import gpu as gpu_bench
from bitnet.kernels import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not triton.available(), reason="no GPU, or no Triton"),
]


@pytest.mark.parametrize("gate", gpu_bench.GATES, ids=lambda gate: gate.__name__)
def test_gate(gate) -> None:
    assert list(gate(torch.device("cuda", torch.cuda.current_device()), False)) == []


def test_gpu_tensors_go_to_triton_by_themselves() -> None:
    with kernels.use_backend("auto"):
        assert kernels.select_backend(torch.ones(2, 8, device="cuda")) is triton


def test_a_short_run_follows_the_cpu_s_losses() -> None:
    cpu, *others = gpu_bench.measure_curve(torch.device("cuda"), gpu_bench.Options(quick=True))
    assert cpu["apart"] == 0
    assert {row["backend"] for row in others} == {"triton", "reference"}
    assert all(row["apart"] < 0.05 for row in others)
