"""Drawing tokens: the definitions, and native code against them."""

import math
import re
from itertools import chain

import pytest
import torch
from torch import Tensor

from bitnet import kernels
from bitnet.inference.options import SamplingConfig
from bitnet.inference.sampling import Drawn, RowSampler, draw_rows, sample
from bitnet.kernels.cpu import native

GREEDY = SamplingConfig(temperature=0)
needs_native = pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(logits: list[float], s: SamplingConfig, seen: set[int]) -> list[float]:
    """The distribution of one token, straight from the definitions, in Python floats."""
    r = s.repetition_penalty
    logits = [(x / r if x > 0 else x * r) if i in seen else x for i, x in enumerate(logits)]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[: s.top_k] if s.top_k else order
    top = logits[order[0]]
    weight = {i: torch.tensor((logits[i] - top) / s.temperature).double().exp().item() for i in kept}
    if s.top_p < 1:
        total = sum(weight.values())
        size = next(n for n in range(1, len(kept) + 1) if sum(weight[i] for i in kept[:n]) >= s.top_p * total)
        kept = kept[:size]
    kept = [i for i in kept if weight[i] >= s.min_p]
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.5),
        SamplingConfig(temperature=1.7, top_k=5),
        SamplingConfig(top_k=1),
        SamplingConfig(top_k=100),
        SamplingConfig(top_p=0.6),
        SamplingConfig(top_p=0.999),
        SamplingConfig(top_p=1e-9),
        SamplingConfig(min_p=0.2),
        SamplingConfig(min_p=1.0),
        SamplingConfig(repetition_penalty=2.0),
        SamplingConfig(0.8, 9, 0.9, 0.03, 1.3),
        SamplingConfig(0.7, 0, 0.8, 0.1, 0.5),
    ],
    ids=str,
)
def test_sampling_has_the_distribution_of_the_definitions(config):
    V, draws = 16, 20_000
    logits = 1.5 * torch.randn(2, V)
    seen = torch.rand(2, V) < 0.4
    for row in range(2):
        ids = sample(logits[row].expand(draws, V), config, seeded(), seen[row].expand(draws, V))
        expected = torch.tensor(brute_force(logits[row].tolist(), config, set(seen[row].nonzero().flatten().tolist())))
        assert ids.dtype == torch.int64
        counts = torch.bincount(ids, minlength=V)
        assert not counts[expected == 0].any(), "a token was drawn that the filters exclude"
        allowed = expected > 0
        chi_square = ((counts - draws * expected)[allowed] ** 2 / (draws * expected[allowed])).sum().item()
        freedom = int(allowed.sum()) - 1
        assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5, f"counts {counts.tolist()}, expected {expected}"


def test_rows_of_a_batch_are_filtered_on_their_own():
    # Row 0 is nearly certain, row 1 uniform: their nuclei have different sizes.
    logits = torch.stack([torch.tensor([0.0, 20.0] + [0.0] * 8), torch.zeros(10)]).repeat(2000, 1)
    ids = sample(logits, SamplingConfig(top_p=0.95), seeded()).view(-1, 2)
    assert set(ids[:, 0].tolist()) == {1}
    assert set(ids[:, 1].tolist()) == set(range(10))


def test_ties_go_to_the_lowest_ids():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 3.0]])
    assert sample(logits, GREEDY, None).tolist() == [1]
    many = logits.expand(500, -1)
    assert set(sample(many, SamplingConfig(top_k=2), seeded()).tolist()) == {1, 2}
    assert set(sample(many, SamplingConfig(top_k=1), seeded()).tolist()) == {1}
    # Four tokens of a quarter each, the rest negligible: three of them reach 0.7 of the mass, two do not.
    quarters = torch.full((500, 300), -60.0)
    quarters[:, [7, 99, 100, 250]] = 0.0
    assert set(sample(quarters, SamplingConfig(top_p=0.7), seeded()).tolist()) == {7, 99, 100}


def test_top_p_stops_at_the_token_that_reaches_it():
    # Two halves, exactly: one of them has a mass of 0.5, and more than 0.5 takes both.
    logits = torch.tensor([[0.0, 0.0]]).expand(200, 2)
    assert set(sample(logits, SamplingConfig(top_p=0.5), seeded()).tolist()) == {0}
    assert set(sample(logits, SamplingConfig(top_p=0.51), seeded()).tolist()) == {0, 1}


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    penalty = SamplingConfig(temperature=0, repetition_penalty=2.0)
    assert sample(logits, penalty, None, torch.tensor([[True, False, False, False]])).tolist() == [1]  # 2 / 2 < 1.5
    negative = torch.tensor([[-5.0, -9.0, -1.0, -1.5]])
    assert sample(negative, penalty, None, torch.tensor([[False, False, True, False]])).tolist() == [3]  # -1 * 2 < -1.5
    assert sample(logits, penalty, None).tolist() == [0]


def test_extreme_logits_and_inputs_stay_as_they_are():
    logits = torch.tensor([[3e38, -3e38, 0.0, 2.9e38]])
    before, seen = logits.clone(), torch.tensor([[False, True, True, False]])
    config = SamplingConfig(temperature=1e-5, top_p=0.99, repetition_penalty=1.5)
    assert sample(logits, config, seeded(), seen).tolist() == [0]
    assert torch.equal(logits, before)
    assert seen.tolist() == [[False, True, True, False]]
    assert sample(torch.tensor([[1.0, 2.0, float("-inf")]]), SamplingConfig(min_p=0.9), seeded()).tolist() == [1]
    assert sample(logits.to(torch.bfloat16), SamplingConfig(), seeded()).tolist() == [0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 1e39),
        ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e39),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value}; give")):
        SamplingConfig(**{field: value})


# Rows


def drawn_by(backend: str, logits: Tensor, samplings: list[SamplingConfig], **options) -> list[list[Drawn]]:
    """Three draws in a row, of logits `[3, n, V]`."""
    V = options.pop("vocab_size", logits.shape[-1])
    allowed = options.pop("allowed", [None] * len(samplings))
    samplers = [
        RowSampler(sampling, seed, [3, 1, 3, 9], vocab_size=V, **options) for seed, sampling in enumerate(samplings)
    ]
    with kernels.use_backend(backend):
        result = []
        for step in logits:
            for sampler, mask in zip(samplers, allowed, strict=True):
                sampler.allowed = mask
            result.append(draw_rows(samplers, step))
    return result


SAMPLINGS = [
    GREEDY,
    SamplingConfig(temperature=0, repetition_penalty=3.0, frequency_penalty=1.0),
    SamplingConfig(),
    SamplingConfig(1.3),
    SamplingConfig(0.8, top_p=0.95),
    SamplingConfig(0.8, top_k=40),
    SamplingConfig(1.0, top_k=3, top_p=0.5, min_p=0.1),
    SamplingConfig(2.0, top_k=700, top_p=0.99, min_p=0.01),
    SamplingConfig(1.0, top_p=0.999, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4),
    SamplingConfig(0.9, min_p=0.3, logit_bias={2: 4.0, 5: -30.0, 9: 1.0}, frequency_penalty=0.5),
    SamplingConfig(1e-5),
    SamplingConfig(1.0, top_p=1e-9),
    SamplingConfig(1.0, top_k=1),
    SamplingConfig(30.0, top_p=0.7),
]


@needs_native
@pytest.mark.parametrize("V", [10, 16, 17, 64, 1000, 5003])
@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "ties", "extreme"])
def test_native_draws_are_the_specifications(V: int, kind: str) -> None:
    torch.manual_seed(V)
    n = len(SAMPLINGS)
    logits = {
        "peaked": 3 * torch.randn(3, n, V),
        "flat": 0.1 * torch.randn(3, n, V),
        "equal": torch.full((3, n, V), 0.5),
        "ties": torch.randn(3, n, V).mul(2).round(),
        "extreme": 1e38 * torch.randn(3, n, V).clamp(-3, 3),
    }[kind]
    masks = [None if i % 3 else torch.rand(V) < 0.5 for i in range(n)]
    for mask in masks:
        if mask is not None:
            mask[i := int(torch.randint(V, ()))] = True
            assert mask[i]
    for isa in native.instruction_sets():
        with native.use_instruction_set(isa):
            for allowed in ([None] * n, masks):
                expected = drawn_by("reference", logits, SAMPLINGS, logprobs=4, allowed=allowed)
                found = drawn_by("native", logits, SAMPLINGS, logprobs=4, allowed=allowed)
                for step, other in zip(found, expected, strict=True):
                    for row, (one, two) in enumerate(zip(step, other, strict=True)):
                        assert one.token == two.token, (isa, SAMPLINGS[row])
                        assert one.logprob == pytest.approx(two.logprob, rel=1e-5, abs=1e-5)
                        assert [token for token, _ in one.top] == [token for token, _ in two.top]
                        assert [p for _, p in one.top] == pytest.approx([p for _, p in two.top], rel=1e-5, abs=1e-5)
                        assert allowed[row] is None or bool(allowed[row][one.token])


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, math.nan])
def test_unused_tokens_are_as_if_they_had_no_logits(backend: str, value: float) -> None:
    torch.manual_seed(0)
    unused = (0, 3, 9, 255, 256, 300, 599)
    used = [i for i in range(600) if i not in unused]
    samplings = [s for s in SAMPLINGS if not s.logit_bias and s.repetition_penalty == 1]  # which name tokens
    logits = torch.randn(3, len(samplings), 610)
    logits[:, :, list(unused)] = value
    before = logits.clone()
    found = drawn_by(backend, logits, samplings, vocab_size=600, unused=unused, logprobs=5)
    wanted = drawn_by("reference", logits[:, :, used], samplings, logprobs=5)
    for one, two in zip(chain(*found), chain(*wanted), strict=True):
        assert one.token == used[two.token]
        assert one.logprob == pytest.approx(two.logprob, abs=1e-5)
        assert [token for token, _ in one.top] == [used[token] for token, _ in two.top]
        assert [p for _, p in one.top] == pytest.approx([p for _, p in two.top], abs=1e-5)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    for mask, seen in ((torch.ones(600, dtype=torch.bool), 1e-38), (None, 1e30)):
        hot = SamplingConfig(1e30, repetition_penalty=seen)
        rows, allowed = [hot] * len(samplings), [mask] * len(samplings)
        drawn = drawn_by(backend, logits, rows, vocab_size=600, unused=unused, allowed=allowed)
        assert not {one.token for step in drawn for one in step} & {*unused}


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_a_text_draws_alone_what_it_draws_in_a_crowd(backend: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, len(SAMPLINGS), 300)
    together = drawn_by(backend, logits, SAMPLINGS, vocab_size=290)
    for row, sampling in enumerate(SAMPLINGS):
        sampler = RowSampler(sampling, row, [3, 1, 3, 9], vocab_size=290)
        with kernels.use_backend(backend):
            for step in range(3):
                (alone,) = draw_rows([sampler], logits[step, row : row + 1])
                assert alone == together[step][row]
                assert alone.token < 290
                assert alone.logprob is None


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_p": 0.9, "min_p": 0.1}], ids=str
)
def test_what_penalties_and_bias_take_beyond_float32_is_the_largest(backend: str, cut: dict[str, float]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 300)
    mask = torch.ones(300, dtype=torch.bool)
    mask[9] = False
    for text, changes, allowed, among in (
        ([5, 9, 7], {"repetition_penalty": 1e-300}, mask, {i for i in (5, 7) if logits[0, i] > 0}),
        (range(300), {"repetition_penalty": 1e-300}, None, set((logits[0] > 0).nonzero()[:, 0].tolist())),
        ([], {"logit_bias": {3: 1e300, 9: 1e300}}, mask, {3}),
        ([], {"logit_bias": dict.fromkeys(range(300), -1e300) | {4: -1e30}}, None, {4}),
        ([], {"frequency_penalty": -1e39, "logit_bias": {3: 50.0}}, None, {3}),
        ([9, 8], {"repetition_penalty": 1e30, "logit_bias": {8: -1e30}}, mask, set(range(300)) - {8, 9}),
    ):
        sampler = RowSampler(SamplingConfig(**changes, **cut), 0, text, vocab_size=300, logprobs=1)
        sampler.allowed = allowed
        with kernels.use_backend(backend):
            drawn = [draw_rows([sampler], logits)[0] for _ in range(4)]
        assert {one.token for one in drawn} <= among, changes
        assert all(one.logprob == pytest.approx(float(logits.log_softmax(-1)[0, one.token])) for one in drawn)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_draw_nothing(backend: str, value: float) -> None:
    logits = torch.zeros(2, 100)
    logits[0, 97] = value
    samplers = [RowSampler(SamplingConfig(), 0, vocab_size=100) for _ in range(2)]
    with kernels.use_backend(backend):
        bad, good = draw_rows(samplers, logits)
    assert (bad.finite, good.finite) == (False, True)
    assert samplers[0].uniform() in torch.rand(3, dtype=torch.float64, generator=seeded()).tolist()


def test_penalties_and_bias_by_hand() -> None:
    sampling = SamplingConfig(temperature=0, presence_penalty=0.5, frequency_penalty=1.0, logit_bias={2: 0.25})
    sampler = RowSampler(sampling, 0, [0, 0, 0], vocab_size=3)  # the prompt does not count
    logits = torch.tensor([[2.0, 1.0, 0.6]])
    assert [draw_rows([sampler], logits)[0].token for _ in range(5)] == [0, 1, 2, 0, 0]
    # After 0: 0.5 1.0 0.85; after 1: 0.5 -0.5 0.85; after 2: 0.5 -0.5 -0.65; after 0: -0.5 -0.5 (the first), -0.65.


def test_log_probabilities_are_the_models() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    sampling = SamplingConfig(temperature=0, logit_bias={0: 100.0})
    (drawn,) = draw_rows([RowSampler(sampling, 0, vocab_size=4, logprobs=3)], logits)
    scores = logits[0].log_softmax(-1).tolist()
    assert drawn.token == 0
    assert drawn.logprob == pytest.approx(scores[0])
    assert [token for token, _ in drawn.top] == [1, 2, 3]
    assert [p for _, p in drawn.top] == pytest.approx([scores[1], scores[2], scores[3]])


def test_what_a_sampler_refuses() -> None:
    for sampling, options, message in (
        (GREEDY, {"seed": -1}, "seed is -1"),
        (GREEDY, {"seed": 2**63}, "seed is 9223372036854775808"),
        (GREEDY, {"logprobs": 11}, "logprobs is 11; give a number of tokens from 0 to 10"),
        (SamplingConfig(logit_bias={10: 1.0}), {}, "logit_bias has 10: 1.0"),
        (SamplingConfig(logit_bias={1: math.nan}), {}, "logit_bias has 1: nan"),
        (SamplingConfig(logit_bias={1: 1.0}), {"unused": (1,)}, "logit_bias has 1: 1.0, and that token is unused"),
        (GREEDY, {"unused": (10,)}, "1 of 10 ids are unused; they must be among them"),
        (GREEDY, {"unused": tuple(range(10))}, "10 of 10 ids are unused"),
    ):
        with pytest.raises(ValueError, match=message):
            RowSampler(sampling, **{"seed": 0, **options}, vocab_size=10)
    with pytest.raises(ValueError, match="presence_penalty is inf"):
        SamplingConfig(presence_penalty=math.inf)
    assert draw_rows([], torch.empty(0, 10)) == []


ENDS: list[dict] = [
    *({"top_p": p} for p in (1e-300, 1e-40, 1 - 1e-12)),
    *({"min_p": p} for p in (1.0, 1e-300, 1 - 1e-12)),
    *({"temperature": t} for t in (1e-6, 1e-5, 1e30)),
    *({"presence_penalty": p} for p in (1e300, -1e300)),
    *({"frequency_penalty": p} for p in (3e38, -1e300)),
    {"logit_bias": {3: 1e300, 4: 1e300}},
    {"logit_bias": dict.fromkeys(range(50), -1e300)},
    {"logit_bias": dict.fromkeys(range(50), 3e38)},
    *({"repetition_penalty": p} for p in (1e-300, 1e-30, 1e30)),
    *({"top_k": k} for k in (1, 10**15)),
    {"presence_penalty": 1e308, "frequency_penalty": 1e308},
    {"presence_penalty": 1e308, "frequency_penalty": -1e308, "logit_bias": {1: 1e308}},
]


@needs_native
@pytest.mark.parametrize("how", ENDS, ids=str)
def test_settings_at_the_ends_of_their_ranges_draw_the_same_natively(how: dict) -> None:
    usual = torch.randn(1, 50, generator=seeded())
    for logits in (usual, usual * 1e30, torch.zeros(1, 50)):
        found = []
        for backend in ("native", "reference"):
            sampler = RowSampler(SamplingConfig(**how), 5, (1, 2, 3), vocab_size=50, logprobs=2)
            with kernels.use_backend(backend):
                found.append([draw_rows([sampler], logits.clone())[0] for _ in range(8)])
        assert [(one.token, one.finite) for one in found[0]] == [(one.token, one.finite) for one in found[1]]
