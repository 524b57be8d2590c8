"""The native engine against the packed torch model: logits, bits, caches, and input that is refused."""

import itertools

import pytest
import torch
from torch import Tensor

from bitnet import kernels
from bitnet.inference import cpu_engine
from bitnet.inference.cpu_engine import Engine, NativeCache
from bitnet.inference.cpu_rows import CACHE_DTYPES
from bitnet.inference.generation import SamplingConfig, generate
from bitnet.kernels import reference
from bitnet.kernels.cpu import native
from bitnet.model import BitNetForCausalLM, ModelConfig
from tests.builders import packed_model, random_ids, torch_logits
from tests.inference.builders import BASE, CONFIGS, ON_NATIVE_KERNELS

ISAS = native.instruction_sets()
pytestmark = ON_NATIVE_KERNELS
# Wider than q, k and v together, than the heads and than the feed-forward layer.
NARROW = BASE.replace(hidden_size=320, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=10)
GREEDY = SamplingConfig(temperature=0)


def engine_of(config: ModelConfig, seed: int = 0, **options: str) -> Engine:
    return Engine.from_model(packed_model(config, seed), **options)


def in_pieces(engine: Engine, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of all positions, the ids given to one cache in pieces."""
    assert sum(sizes) == ids.shape[1]
    cache = engine.new_cache(*ids.shape)
    return torch.cat([engine(piece, cache) for piece in ids.split(sizes, dim=1)], dim=1)


# Against the specification


def off_borders(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[BitNetForCausalLM, Tensor, Tensor]:
    """A model, ids and logits of the specification where no activation lies within 3e-4 codes of a rounding border.

    There another order of float additions gets the same codes, so logits may differ by rounding only.
    """
    original = reference.quantize_activations
    margins: list[float] = []

    def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = original(x)
        margins.append(float(((x / scale).frac().abs() - 0.5).abs().min()))
        return codes, scale

    monkeypatch.setattr(reference, "quantize_activations", quantize_activations)
    first = {"ternary-g64": 106, "ternary-g128": 147}.get(config.quantizer, 0)  # of those the first; it may vary
    for seed in range(first, first + 300):
        margins.clear()
        model = packed_model(config, seed)
        ids = random_ids(config, 2, 3)
        logits = torch_logits(model, ids)
        if min(margins) > 3e-4:
            monkeypatch.undo()
            assert logits.isfinite().all()
            return model, ids, logits
    raise AssertionError("every seed has an activation on a rounding border")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_torch_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, expected = off_borders(CONFIGS[name], monkeypatch)
    with kernels.use_backend("reference"), torch.inference_mode():
        expected_states = model.model(ids, None)
    for isa in ISAS:
        with native.use_instruction_set(isa):
            engine = Engine.from_model(model)
            logits, states = engine(ids), engine.hidden_states(ids)
        for found, wanted in ((logits, expected), (states, expected_states)):
            assert found.shape == wanted.shape
            assert found.dtype == torch.float32
            assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5, isa


def test_hidden_states_of_long_texts_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = engine_of(CONFIGS["odd sizes"]), random_ids(CONFIGS["odd sizes"], 2, 60)
    whole = engine.hidden_states(ids)
    monkeypatch.setattr(cpu_engine, "MAX_CHUNK", 14)
    assert torch.equal(engine.hidden_states(ids), whole)
    assert torch.equal(engine.hidden_states(ids[1:]), whole[1:])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.hidden_states(ids + 1000)


def test_the_engine_shares_nothing_with_the_model() -> None:
    for config in (BASE, BASE.replace(tie_word_embeddings=False)):
        model = packed_model(config)
        engine, ids = Engine.from_model(model), random_ids(config, 1, 9)
        expected = engine(ids)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        assert torch.equal(engine(ids), expected)
        assert not torch_logits(model, ids).any()


# The same bits on every path


def assert_same_bits(config: ModelConfig, B: int, T: int, cache_dtype: str, model: BitNetForCausalLM) -> None:
    ids, expected = random_ids(config, B, T), None
    for isa in ISAS:
        with native.use_instruction_set(isa):
            engine = Engine.from_model(model, cache_dtype=cache_dtype)
            whole = engine(ids)
            assert whole.isfinite().all()
            expected = whole if expected is None else expected
            where = f"{isa}, cache {cache_dtype}, batch {B}"
            assert torch.equal(whole, expected), where
            # Positions lie in blocks of 16, queries go in fours, sixes or twelves, tokens in tiles of 6, 12 or 16.
            for sizes in ([3, 12, 1, T - 16], *([[1] * T, [T - 1, 1]] if B == 1 else [])):
                assert torch.equal(in_pieces(engine, ids, sizes), expected), f"{where}, pieces {sizes}"
            assert torch.equal(engine(ids, last_only=True), expected[:, -1:]), where
    for row in range(B):
        assert torch.equal(engine(ids[row : row + 1]), expected[row : row + 1]), "a row depends on its neighbours"


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_instruction_set_and_every_cut_gives_the_same_bits(name: str, cache_dtype: str) -> None:
    model = packed_model(CONFIGS[name])
    for B in (1, 3):
        assert_same_bits(CONFIGS[name], B, 21, cache_dtype, model)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("name", ["base", "one kv head of six", "head_dim 80"])
def test_the_same_bits_over_longer_texts(name: str, cache_dtype: str) -> None:
    assert_same_bits(CONFIGS[name], 1, 100, cache_dtype, packed_model(CONFIGS[name]))


@pytest.mark.parametrize("shrink", [1e-3, 1e-5, 1e-7, 1e-9])
def test_small_halves_have_the_same_bits(shrink: float) -> None:
    # Keys and values around and below float16's normal numbers, and down to its zero.
    model = packed_model(BASE)
    for name, scale in model.named_buffers():
        if name.endswith(("k_proj.weight_scale", "v_proj.weight_scale")):
            scale.mul_(shrink)
    assert_same_bits(BASE, 1, 21, "float16", model)


@pytest.mark.parametrize("name", ["base", "odd sizes", "no sub-norms"])
def test_both_ternary_layouts_give_the_same_bits(name: str) -> None:
    config = CONFIGS[name]
    ids = random_ids(config, 2, 20)
    expected = engine_of(config)(ids)
    for codec in ("base3", "two_bit"):
        engine = engine_of(config, codec=codec)  # made under one instruction set, run under all
        for isa in ISAS:
            with native.use_instruction_set(isa):
                assert torch.equal(engine(ids), expected), (codec, isa)
                assert torch.equal(in_pieces(engine, ids, [19, 1]), expected), (codec, isa)


@pytest.mark.parametrize(
    ("name", "cache_dtype"),
    [
        ("base", "float32"), ("one kv head of six", "float16"), ("head_dim 80", "int8"), ("odd sizes", "float32"),
        ("int8, untied", "int8"), ("no sub-norms", "float16"),
    ],
)  # fmt: skip
def test_the_number_of_threads_changes_no_bit(name: str, cache_dtype: str, set_threads: None) -> None:
    config = CONFIGS[name]
    model = packed_model(config)
    for isa in (ISAS[0], ISAS[-1]):
        with native.use_instruction_set(isa):
            engine = Engine.from_model(model, cache_dtype=cache_dtype)
            for B, T in ((1, 8), (3, 3)):
                ids, results = random_ids(config, B, T), []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results += [engine(ids), in_pieces(engine, ids, [1, T - 2, 1])]
                    assert torch.equal(engine(ids, last_only=True), results[0][:, -1:])
                assert all(torch.equal(result, results[0]) for result in results), (isa, B)


@pytest.mark.parametrize("limit", [1, 2, 7, 16, 40])
def test_inputs_longer_than_a_chunk(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(BASE)
    for B in (1, 3):
        ids = random_ids(BASE, B, 40)
        expected = engine(ids)
        monkeypatch.setattr(cpu_engine, "MAX_CHUNK", limit)
        assert torch.equal(engine(ids), expected)
        assert torch.equal(engine(ids, last_only=True), expected[:, -1:])
        assert torch.equal(in_pieces(engine, ids, [11, 1, 28]), expected)
        out = torch.empty_like(expected)
        assert engine(ids, out=out) is out
        assert torch.equal(out, expected)
        monkeypatch.undo()


def test_last_only_is_the_last_of_all_in_a_model_that_is_wide_and_thin() -> None:
    model = packed_model(NARROW)
    engine = Engine.from_model(model)
    for B, T in ((1, 2), (1, 9), (3, 5)):
        ids = random_ids(NARROW, B, T)
        logits = engine(ids)
        assert torch.equal(in_pieces(engine, ids, [1] * T), logits)
        assert torch.equal(engine(ids, last_only=True), logits[:, -1:]), (B, T)


def test_output_memory_is_used_and_nothing_beside_it() -> None:
    engine, ids = engine_of(BASE), random_ids(BASE, 2, 6)
    memory = torch.full((2 * 6 * 50 + 64,), 77.0)
    out = memory[:-64].view(2, 6, 50)
    assert engine(ids, out=out) is out
    assert torch.equal(out, engine(ids))
    assert (memory[-64:] == 77).all()
    last = torch.empty(2, 1, 50)
    assert engine(ids, last_only=True, out=last) is last
    assert torch.equal(last, out[:, -1:])
    with torch.inference_mode():
        assert torch.equal(engine(ids), out)


@pytest.mark.parametrize("isa", ISAS)
def test_the_workspace_is_as_large_as_the_instruction_set_needs(isa: str, set_threads: None) -> None:
    """Tiles and what attends together differ between them, and so does what lies there."""
    config = CONFIGS["base"].replace(max_position_embeddings=256)
    ids = torch.randint(config.vocab_size, (1, 200))
    with native.use_instruction_set(isa):
        engine = engine_of(config)
        for threads, (first, last) in itertools.product((1, 3), ((0, 200), (0, 7), (190, 197))):
            torch.set_num_threads(threads)
            cache = engine.new_cache(1, 256)
            if first:
                engine(ids[:, :first], cache)
            size = native.kernels().workspace(engine._struct, last - first, 1, native.round_up(last, 1024), threads)
            room = torch.full((size + 4096,), 0x5A, dtype=torch.uint8)
            engine._scratch._free = [room]
            engine(ids[:, first:last], cache)
            assert (room[:size] != 0x5A).any(), "another workspace was taken"
            assert bool((room[size:] == 0x5A).all()), f"{threads} threads, tokens {first} to {last}"


def test_strided_ids_and_several_caches_at_once() -> None:
    engine, ids = engine_of(BASE), random_ids(BASE, 2, 12)
    expected = engine(ids)
    wide = torch.stack([ids, ids], -1)
    assert torch.equal(engine(wide[..., 0]), expected)
    assert torch.equal(engine(ids.T.contiguous().T), expected)
    first, second = engine.new_cache(2, 12), engine.new_cache(1, 128)
    parts, others = [], []
    for t in range(12):
        parts.append(engine(ids[:, t : t + 1], first))
        others.append(engine(ids[1:, t : t + 1], second))
    assert torch.equal(torch.cat(parts, 1), expected)
    assert torch.equal(torch.cat(others, 1), expected[1:])
    assert (first.length, second.length) == (12, 12)


# Caches


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dtype", "element", "scales"), [("float32", 4, 0), ("float16", 2, 0), ("int8", 1, 4)])
def test_bytes_of_the_cache(batch: int, dtype: str, element: int, scales: int) -> None:
    config = CONFIGS["head_dim 2"]
    engine = engine_of(config, cache_dtype=dtype)
    cache = engine.new_cache(batch, 20)
    assert (cache.length, cache.nbytes, cache.max_length, cache.batch_size) == (0, 0, 20, batch)
    for count in (5, 1, 14):
        engine(random_ids(config, batch, count), cache)
        # 2 layers, keys and values, 2 heads, 2 dimensions; what is padded is not read for a purpose
        assert cache.nbytes == cache.length * batch * 2 * 2 * 2 * (2 * element + scales)
    assert cache.length == 20
    assert cache.keys.numel() == cache.values.numel() == 2 * batch * 2 * 32 * 16  # S and D padded to 16


def test_a_full_cache_is_refused_and_left_as_it_is() -> None:
    engine = engine_of(BASE)
    cache, ids = engine.new_cache(1, 17), random_ids(BASE, 1, 17)
    expected = engine(ids)
    engine(ids[:, :10], cache)
    for count in (8, 20):
        with pytest.raises(ValueError, match=f"the cache holds 17 positions and {10 + count} are needed"):
            engine(random_ids(BASE, 1, count), cache)
    assert cache.length == 10
    assert torch.equal(engine(ids[:, 10:], cache), expected[:, 10:])


def test_cache_and_weights_in_memory_as_counted() -> None:
    engine = engine_of(BASE, codec="two_bit")
    # q, k, v of 40, 20 and 20 rows in blocks of 16; gate and up of 72 rows; the head; all in pairs of blocks.
    per_layer = [(48 + 32 + 32, 40), (40, 40), (2 * 80, 40), (40, 72)]
    expected = 0
    for rows, columns in per_layer:
        padded = -(-rows // 32) * 32
        expected += 2 * padded * (-(-columns // 16) * 4 + 4)
    expected += 64 * (40 + 4)
    assert engine.weight_bytes() == expected
    assert engine.device == torch.device("cpu")


# Errors


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, -1]]), r"token id -1 is outside the vocabulary \(0 to 49\)"),
        (torch.tensor([[50, 3]]), "token id 50 is outside"),
        (torch.tensor([[2**40]]), "token id 1099511627776 is outside"),
        (torch.ones(1, 4), r"float32 \[1, 4\]; give int64 \[batch, tokens\]"),
        (torch.ones(1, 4, dtype=torch.int32), "int32"),
        (torch.ones(1, 0, dtype=torch.int64), r"\[1, 0\]; give"),
        (torch.ones(0, 4, dtype=torch.int64), r"\[0, 4\]; give"),
        (torch.ones(1, 129, dtype=torch.int64), "129 positions does not fit a model of 128"),
    ],
)
def test_bad_ids_are_named(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(BASE)(ids)


def test_ids_of_another_rank_are_refused() -> None:
    for ids in (torch.ones(4, dtype=torch.int64), torch.ones(1, 1, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"give int64 \[batch, tokens\]"):
            engine_of(BASE)(ids)


def test_caches_that_do_not_fit() -> None:
    engine = engine_of(BASE)
    with pytest.raises(ValueError, match="the cache is for 2 sequences and the input has 1"):
        engine(torch.ones(1, 3, dtype=torch.int64), engine.new_cache(2, 8))
    for length in (0, 129, -1):
        with pytest.raises(ValueError, match=f"a cache of {length} positions does not fit a model of 128"):
            engine.new_cache(1, length)
    assert engine.new_cache(1, 128).max_length == 128
    with pytest.raises(
        ValueError, match="'bfloat16' is unknown to the native kernels; choose one of float32, float16, int8"
    ):
        NativeCache(BASE, 1, 8, "bfloat16")
    with pytest.raises(
        ValueError, match="'bfloat16' is unknown to the native kernels; choose one of float32, float16, int8"
    ):
        engine_of(BASE, cache_dtype="bfloat16")


def test_output_memory_that_does_not_fit() -> None:
    engine, ids = engine_of(BASE), torch.ones(2, 3, dtype=torch.int64)
    for out in (
        torch.empty(2, 3, 49),
        torch.empty(2, 1, 50),
        torch.empty(6, 50),
        torch.empty(2, 3, 50, dtype=torch.float64),
        torch.empty(2, 3, 100)[..., ::2],
    ):
        with pytest.raises(ValueError, match=r"out must be contiguous float32 \[2, 3, 50\]"):
            engine(ids, out=out)
    with pytest.raises(ValueError, match=r"float32 \[2, 1, 50\], got torch.float32 \[2, 3, 50\]"):
        engine(ids, last_only=True, out=torch.empty(2, 3, 50))


def test_models_that_are_not_packed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"call model.pack\(\) first"):
        Engine.from_model(BitNetForCausalLM(BASE))
    model = packed_model(BASE)
    model.config = BASE.replace(head_dim=1026)
    with pytest.raises(ValueError, match="head_dim is 1026; the native attention takes at most 1024"):
        Engine.from_model(model)


def test_without_the_library_there_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(BASE)
    monkeypatch.setattr(native, "_tables", lambda: {})
    with pytest.raises(ValueError, match="native CPU kernels were not built"):
        Engine.from_model(model)


NORMS = [
    "model.norm.weight",
    *(
        f"model.layers.0.{name}.weight"
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm", "mlp.ffn_sub_norm")
    ),
]
SCALES = [
    *(f"model.layers.1.self_attn.{name}.weight_scale" for name in ("v_proj", "o_proj")),
    *(f"model.layers.1.mlp.{name}.weight_scale" for name in ("gate_proj", "up_proj", "down_proj")),
]
DIVERGED = [
    *(("silu", name) for name in [*NORMS, *SCALES]),
    *(("relu2", name) for name in [*NORMS, *SCALES]),
]


@pytest.mark.parametrize(("activation", "name"), DIVERGED)
def test_a_diverged_model_is_named(activation: str, name: str) -> None:
    # Not q_proj and k_proj: torch's own softmax loses a NaN there.
    model = packed_model(BASE.replace(hidden_act=activation))
    model.state_dict()[name].view(-1)[0] = float("nan")
    assert torch_logits(model, torch.tensor([[1, 2]])).isnan().any()
    steps = generate(Engine.from_model(model), torch.tensor([[1, 2]]), max_new_tokens=5, sampling=GREEDY, seed=0)
    with pytest.raises(ValueError, match="logits are not finite after 2 tokens"):
        list(steps)
