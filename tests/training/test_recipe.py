"""The recipe's parts: shapes of the ramp, the second stage; and the grid that measures them, run by run."""

import dataclasses
import re

import pytest
import torch

from benchmarks import recipe, recipe_runs
from bitnet.quant import quantize_ternary
from bitnet.training.config import RAMPS, TrainConfig
from bitnet.training.optimizer import OptimConfig, schedule


@pytest.mark.parametrize("shape", RAMPS)
def test_a_ramp_rises_from_nothing_to_all(shape):
    config = TrainConfig(steps=100, float_start=0.4, ramp=0.3, ramp_shape=shape)
    strengths = [config.quantizer_strength(step) for step in range(100)]
    assert strengths[:40] == [0.0] * 40
    assert strengths[70:] == [1.0] * 30
    assert 0 < strengths[40] < strengths[69] < 1
    assert strengths == sorted(strengths)
    middle = {"linear": 0.5, "cosine": 0.5, "square": 0.25, "root": 0.5**0.5, "soft": 0.5}[shape]
    assert RAMPS[shape](0.5) == pytest.approx(middle)


def test_the_second_stage_begins_where_it_is_told():
    config = OptimConfig(lr=1e-2, lr_second=2e-2, second_from=0.4, decay="constant", warmup_steps=0)
    assert schedule(39, 100, config) == (1.0, 0.1)
    assert schedule(40, 100, config) == (2.0, 0.0)
    with pytest.raises(ValueError, match=r"second_from is 1\.5"):
        dataclasses.replace(config, second_from=1.5)


def play(grid: recipe.Grid, limit: int = 1000) -> list[recipe.Job]:
    """Run the grid with made-up losses, one job at a time; the rate 1e-2 is always the best."""
    order = []
    while (job := grid.ready([])) and len(order) < limit:
        order.append(job)
        grid.done[job.key] = {"loss": 4 + abs(job.lr - 1e-2) + job.seed / 10, "seconds": 1.0, "lr": job.lr}
        if job.keep:
            (grid.runs / job.key).mkdir(parents=True)
    return order


def test_a_grid_takes_the_best_rate_and_its_teachers_and_ends(tmp_path):
    rows = ["float", "ramp, teacher", "int4 from float"]
    grid = recipe.Grid(rows, ["a", "b"], ["64x2"], [0, 1, 2], 1e5, tmp_path)
    order = play(grid)
    assert len(order) == len({job.key for job in order}) == grid.total() == 2 * (5 + 5 + 5)
    for job in order:
        if job.row == "float":
            assert job.keep
            assert job.seed == 0 or job.lr == 1e-2
        else:
            model = job.teacher or job.init
            assert re.fullmatch(rf"{job.corpus}-64x2-float-lr0.01-0.1M-seed{job.seed}", model)
            assert [each.key for each in order].index(model) < order.index(job)
    assert [job.seed for job in order] == sorted(job.seed for job in order)
    text = recipe.table(grid)
    assert "| ramp, teacher | 4.1000, +0.0% ± 0.0%, lr 0.01; 3 seeds |" in text
    # A model that was left on another machine is trained again where somebody needs it.
    gone = next(iter(grid.runs.glob("a-*-float-lr0.01-*seed2")))
    gone.rmdir()
    del grid.done[next(key for key in grid.done if key.startswith("a-64x2-ramp--teacher") and key.endswith("seed2"))]
    assert [job.row for job in play(grid, 5)][:2] == ["float", "ramp, teacher"]


def test_a_failed_run_takes_only_those_with_it_that_need_it(tmp_path):
    grid = recipe.Grid(["float", "ramp", "ramp, teacher"], ["a"], ["64x2"], [0], 1e5, tmp_path)
    grid.failed.add(next(grid.jobs()).key)
    assert {job.row for job in play(grid)} == {"float", "ramp"}


def test_the_median_takes_the_mean_s_place_and_gives_it_back():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    _, scale = quantize_ternary(weight)
    with recipe_runs.median_scale():
        _, median = quantize_ternary(weight)
    assert float(median) == float(weight.abs().median())
    assert float(quantize_ternary(weight)[1]) == float(scale)
