"""The Triton kernels, the GPU engine and training on a real GPU: the gates of `bitnet/bench/gpu_gate.py`, as tests."""

import pytest
import torch

from bitnet import kernels
from bitnet.bench.gpu_gate import GATES
from bitnet.bench.gpu_timing import Options
from bitnet.bench.gpu_training import measure_curve, measure_curve_cpu
from bitnet.kernels import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not triton.available(), reason="no GPU, or no Triton"),
]


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gate(gate) -> None:
    assert list(gate(torch.device("cuda", torch.cuda.current_device()), False)) == []


def test_gpu_tensors_go_to_triton_by_themselves() -> None:
    with kernels.use_backend("auto"):
        assert kernels.select_backend(torch.ones(2, 8, device="cuda")) is triton


def test_a_short_run_follows_the_cpu_s_losses(tmp_path) -> None:
    options = Options(torch.device("cuda", torch.cuda.current_device()), quick=True, work=tmp_path)
    list(measure_curve_cpu(options))
    rows = list(measure_curve(options))
    assert {row["backend"] for row in rows} == {"triton", "reference"}
    assert all(row["apart"] < 0.05 for row in rows)
