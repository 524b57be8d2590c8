"""The schedule by hand, the groups of parameters, and an optimizer's state there and back."""

import math

import pytest
import torch

from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.training import optimizer
from bitnet.training.optimizer import OptimConfig, Optimizer, clip_gradients, schedule


def test_two_stage_schedule_by_hand():
    config = OptimConfig(lr=1.5e-3, lr_second=1.0e-3, warmup_steps=10, weight_decay=0.1, decay="linear")
    total = 1000
    assert schedule(0, total, config) == (0.1 * 1.0, 0.1)
    assert schedule(9, total, config) == (pytest.approx(0.991), 0.1)
    assert schedule(499, total, config) == (pytest.approx(0.501), 0.1)
    # Half-way the peak drops from 1.5e-3 to 1e-3 and the weight decay to 0.
    assert schedule(500, total, config) == (pytest.approx(0.5 / 1.5), 0.0)
    assert schedule(999, total, config)[0] == pytest.approx(0.001 / 1.5)


def test_one_stage_keeps_its_weight_decay():
    config = OptimConfig(lr=1e-3, warmup_steps=1, decay="cosine", lr_min_ratio=0.1)
    multipliers = [schedule(step, 100, config) for step in range(101)]
    assert all(decay == 0.1 for _, decay in multipliers)
    assert multipliers[50][0] == pytest.approx(0.55)
    assert multipliers[100][0] == pytest.approx(0.1)
    assert schedule(77, 100, OptimConfig(decay="constant", warmup_steps=1))[0] == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups_decay_matrices_only(name):
    model = BitNetForCausalLM(PRESETS["tiny"].replace(tie_word_embeddings=False))
    optimizer = Optimizer(model, OptimConfig(optimizer=name))
    optimizer.set_schedule(50, 100)
    decayed = {optimizer.names[p] for g in optimizer._groups() if g["weight_decay"] > 0 for p in g["params"]}
    everything = {optimizer.names[p] for g in optimizer._groups() for p in g["params"]}
    assert everything == {name for name, _ in model.named_parameters()}
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip_continues_bit_for_bit(name):
    def make():
        torch.manual_seed(0)
        model = BitNetForCausalLM(PRESETS["tiny"])
        return model, Optimizer(model, OptimConfig(optimizer=name, warmup_steps=1))

    def step(model, optimizer, index):
        ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(index))
        model(ids).square().mean().backward()
        optimizer.set_schedule(index, 10)
        optimizer.step()

    straight, optimizer = make()
    for index in range(4):
        step(straight, optimizer, index)
    first, optimizer = make()
    for index in range(2):
        step(first, optimizer, index)
    weights = {k: v.clone() for k, v in first.state_dict().items()}
    state = {k: v.clone() for k, v in optimizer.state().items()}
    second, optimizer = make()
    second.load_state_dict(weights)
    optimizer.load_state(state)
    for index in range(2, 4):
        step(second, optimizer, index)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_state_of_another_model_is_refused():
    optimizer = Optimizer(BitNetForCausalLM(PRESETS["tiny"]), OptimConfig())
    with pytest.raises(ValueError, match=r"model\.layers\.99"):
        optimizer.load_state({"model.layers.99.weight.exp_avg": torch.zeros(1)})


def test_clip_gradients_scales_and_reports():
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert clip_gradients([weight], 0) == 5.0
    assert weight.grad.norm() == 5.0
    assert clip_gradients([weight], 1.0) == 5.0
    assert math.isclose(float(weight.grad.norm()), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        *({"optimizer": "sgd"}, {"decay": "step"}, {"lr": 0.0}, {"lr_second": -1.0}, {"warmup_steps": -5}),
        *({"weight_decay": -0.1}, {"weight_decay_second": -0.1}, {"grad_clip": -1.0}, {"beta1": 1.0}, {"beta2": 95.0}),
        *({"lr_min_ratio": -1.0}, {"lr_min_ratio": 10.0}, {"second_from": -0.1}),
    ],
)
def test_bad_configuration_names_the_value(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        OptimConfig(**bad)


# Muon


def matrices(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 12), (12, 8), (8, 12), (5, 5)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_muon_in_bfloat16_is_torch_s_to_the_bit(monkeypatch):
    monkeypatch.setattr(optimizer, "iteration_dtype", lambda device: torch.bfloat16)
    ours, theirs = matrices(), matrices()
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    updates = [optimizer.Muon(ours, **options), torch.optim.Muon(theirs, **options)]
    for step in range(3):
        for mine, other, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            mine.grad, other.grad = gradient.detach().clone(), gradient.detach().clone()
        for update in updates:
            update.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_muon_iterates_in_float32_where_the_processor_has_no_bfloat16(monkeypatch):
    for capabilities, expected in [
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({}, torch.bfloat16),  # a torch that does not say
    ]:
        monkeypatch.setattr(optimizer, "cpu_capabilities", lambda found=capabilities: found)
        optimizer.iteration_dtype.cache_clear()
        assert optimizer.iteration_dtype(torch.device("cpu")) == expected
        assert optimizer.iteration_dtype(torch.device("cuda")) == torch.bfloat16
    optimizer.iteration_dtype.cache_clear()


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (3, 24, 36)])
@pytest.mark.parametrize("decades", [0, 6])
def test_collected_factors_give_the_iteration_s_numbers(shape, decades):
    """Beside the plain iteration in float64, and far nearer to it than bfloat16, in which others compute it."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrices = u @ (torch.logspace(0, -decades, u.shape[-1], dtype=torch.float64)[:, None] * v)
    assert optimizer.collects(*shape[-2:], torch.float32)
    wanted = optimizer.orthogonalize(matrices)
    error, coarse = (
        float((optimizer.orthogonalize(matrices.to(kind)) - wanted).norm() / wanted.norm())
        for kind in (torch.float32, torch.bfloat16)
    )
    assert error < 1e-3
    assert error < coarse / 10


def test_four_iterations_in_float32_end_near_one():
    values = torch.logspace(math.log10(0.0022), 0, 10_000, dtype=torch.float64)
    for a, b, c in optimizer.COEFFICIENTS:
        values = values * (a + b * values**2 + c * values**4)
    assert float((values - 1).abs().max()) < 0.31


@pytest.mark.parametrize("decades", [0, 1, 2, 4])
@pytest.mark.parametrize("first", [1.0, 5.0, 30.0])
def test_they_do_what_five_of_torch_s_do(decades, first):
    """Of singular values like a gradient's, of which one is `first` times the next: 348 times the small ones, where
    torch's do 485 times, and behind a tighter bound."""
    values = torch.logspace(0, -decades, 40, dtype=torch.float64)
    values[0] = first
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64))[0] for n in (40, 60))
    found = torch.linalg.svdvals(optimizer.orthogonalize((u * values @ v.mT).float()).double())
    theirs = values / values.norm()
    for a, b, c in optimizer.TORCH_COEFFICIENTS:
        theirs = theirs * (a + b * theirs**2 + c * theirs**4)
    ours, others = ((each - 1).square().mean().sqrt() for each in (found, theirs))
    assert ours < max(1.2 * others, 0.3)
    assert float(found.max()) < 1.31


def test_factors_are_collected_where_that_saves_operations():
    def plain(N, K):
        return optimizer.iteration_flops(N, K, torch.float64)

    for N, K in [(256, 768), (768, 256), (512, 1536), (64, 96)]:
        assert optimizer.iteration_flops(N, K, torch.float32) <= plain(N, K)
    assert optimizer.iteration_flops(256, 768, torch.float32) < 0.7 * plain(256, 768)
    for N, K in [(256, 256), (256, 320)]:
        assert optimizer.iteration_flops(N, K, torch.float32) == plain(N, K)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_a_batch_of_matrices_is_made_orthogonal_like_single_ones(shape):
    batch = torch.randn(3, *shape, dtype=torch.float64)
    together = optimizer.orthogonalize(batch)
    for one, result in zip(batch, together, strict=True):
        torch.testing.assert_close(optimizer.orthogonalize(one), result, rtol=1e-9, atol=1e-9)
        singular = torch.linalg.svdvals(result)
        assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.5
    for one, result in zip(batch.float(), optimizer.orthogonalize(batch.float()), strict=True):
        assert float((optimizer.orthogonalize(one) - result).norm() / result.norm()) < 1e-4
