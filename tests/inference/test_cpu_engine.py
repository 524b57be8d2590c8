"""The native engine against the packed torch model: logits, bits, caches, greedy text, and packed models on disk."""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import generate as cli
import train as trainer
from bitnet import kernels
from bitnet.data.mixture import Mixture
from bitnet.data.tokens import TokenArray
from bitnet.evaluation.loss import evaluate
from bitnet.inference import cpu_engine
from bitnet.inference.cpu_engine import CACHE_DTYPES, Engine, NativeCache
from bitnet.inference.generation import SamplingConfig, generate
from bitnet.inference.loading import load_for_inference
from bitnet.kernels import reference
from bitnet.kernels.cpu import native
from bitnet.model import PRESETS, BitLinear, BitNetForCausalLM, ModelConfig
from bitnet.model.linear import PackedEmbedding, PackedLinear
from bitnet.model.transformer import rope_tables
from bitnet.storage.folders import CONFIG, MODEL, TOKENIZER, load_model, resolve, save_packed
from bitnet.storage.safetensors import CheckpointError, load_tensors
from bitnet.tokenizer import Tokenizer
from bitnet.training import config as recipes
from bitnet.training.checkpoint import save_checkpoint
from tests.builders import packed_model, random_ids, torch_logits

ISAS = native.instruction_sets()
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not ISAS, reason="the native kernels were not built; install with a C++ compiler"),
]
BASE = ModelConfig(
    vocab_size=50, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
CHANGES: dict[str, dict] = {
    "base": {},
    "relu2": {"hidden_act": "relu2"},
    "no sub-norms": {"sub_norm": False},
    "relu2, no sub-norms": {"hidden_act": "relu2", "sub_norm": False},
    "untied": {"tie_word_embeddings": False},
    "MHA": {"num_key_value_heads": 4},
    "one kv head of six": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16},
    "head_dim 2": {"head_dim": 2, "intermediate_size": 17},
    "head_dim 80": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80},
    "odd sizes": {"hidden_size": 33, "intermediate_size": 67, "vocab_size": 97, "head_dim": 6},
    "multiples of 64": {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "head_dim": 32},
    "binary": {"quantizer": "binary"},
    "int4": {"quantizer": "int4"},
    "int8, untied": {"quantizer": "int8", "tie_word_embeddings": False, "hidden_act": "relu2"},
}
CONFIGS = {name: BASE.replace(**changes) for name, changes in CHANGES.items()}


# Wider than q, k and v together, than the heads and than the feed-forward layer.
NARROW = BASE.replace(hidden_size=320, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=10)
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(autouse=True)
def automatic_choices() -> Iterator[None]:
    """Whatever the environment variables say."""
    with kernels.use_backend("auto"), native.use_instruction_set("auto"):
        yield


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
    for seed in range(300):
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
    for isa in ISAS:
        with native.use_instruction_set(isa):
            logits = Engine.from_model(model)(ids)
        assert logits.shape == expected.shape
        assert logits.dtype == torch.float32
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5, isa


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
            # Positions lie in blocks of 16, queries go in fours, tokens in tiles of 6, 12 or 16.
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
    with pytest.raises(ValueError, match="'bfloat16' is unknown; choose one of float32, float16, int8"):
        NativeCache(BASE, 1, 8, "bfloat16")
    with pytest.raises(ValueError, match="'bfloat16' is unknown; choose one of float32, float16, int8"):
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
    twin = BASE.replace(quantizer="none")
    for model in (BitNetForCausalLM(twin), BitNetForCausalLM(twin).pack()):
        with pytest.raises(ValueError, match=r"not packed|float model; run it in torch"):
            Engine.from_model(model)
    with pytest.raises(ValueError, match="head_dim is 1026; the native attention takes at most 1024"):
        Engine(BASE.replace(head_dim=1026), {}.__getitem__)


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


# Packed models on disk


@pytest.mark.parametrize("name", ["base", "untied", "odd sizes", "binary", "int4", "int8, untied"])
def test_a_packed_model_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model, ids = packed_model(config), random_ids(config, 2, 11)
    folder = tmp_path / "deep" / "packed"
    save_packed(folder, model, b"tokenizer")
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, MODEL, TOKENIZER])
    assert [path.name for path in folder.parent.iterdir()] == ["packed"]
    assert (folder / TOKENIZER).read_bytes() == b"tokenizer"
    stored, state = load_tensors(folder / MODEL), model.state_dict()
    assert stored.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(stored[key], value), key
        assert stored[key].dtype == value.dtype, key

    with kernels.use_backend("reference"):
        loaded = load_for_inference(folder)
    assert isinstance(loaded, BitNetForCausalLM)
    assert not loaded.training
    assert loaded.config == config
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(torch_logits(loaded, ids), torch_logits(model, ids))
    for table, expected in zip((loaded.model.cos, loaded.model.sin), rope_tables(config), strict=True):
        assert table.device.type == "cpu"
        assert torch.equal(table, expected)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])

    for backend in ("native", "auto"):
        with kernels.use_backend(backend):
            engine = load_for_inference(folder, cache_dtype="float16")
        assert isinstance(engine, Engine)
        assert engine.new_cache(1, 1).keys.dtype == torch.float16
        assert torch.equal(engine(ids), Engine.from_model(model, cache_dtype="float16")(ids))


def test_what_save_packed_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"call model.pack\(\) first"):
        save_packed(tmp_path / "a", BitNetForCausalLM(BASE), b"")
    assert not list(tmp_path.iterdir())
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="already exists"):
        save_packed(tmp_path / "b", packed_model(BASE), b"")
    assert not list((tmp_path / "b").iterdir())

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("bitnet.storage.folders.write_atomic", full)
    with pytest.raises(OSError, match=r"was not written to .*c: no space left"):
        save_packed(tmp_path / "c", packed_model(BASE), b"")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    save_packed(tmp_path / "packed", packed_model(BASE.replace(tie_word_embeddings=False)), b"")
    return tmp_path / "packed"


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("size", [0, 5, 500, -1])
def test_truncated_files_are_named(packed_folder: Path, backend: str, size: int) -> None:
    whole = (packed_folder / MODEL).read_bytes()
    (packed_folder / MODEL).write_bytes(whole[:size])
    with kernels.use_backend(backend), pytest.raises(CheckpointError, match=MODEL):
        load_for_inference(packed_folder)
    (packed_folder / MODEL).unlink()
    with kernels.use_backend(backend), pytest.raises(CheckpointError, match=MODEL):
        load_for_inference(packed_folder)


MISFITS: list[tuple[str, object]] = [
    ("num_hidden_layers", 3), ("num_hidden_layers", 1), ("quantizer", "int4"), ("tie_word_embeddings", True),
    ("sub_norm", False), ("intermediate_size", 73), ("intermediate_size", 71), ("vocab_size", 10), ("vocab_size", 51),
    ("hidden_size", 48), ("num_key_value_heads", 1),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("field", "value"), MISFITS)
def test_files_that_are_not_of_their_configuration(
    packed_folder: Path, backend: str, field: str, value: object
) -> None:
    config = json.loads((packed_folder / CONFIG).read_text())
    config["model"][field] = value
    (packed_folder / CONFIG).write_text(json.dumps(config))
    with kernels.use_backend(backend), pytest.raises(CheckpointError, match=MODEL):
        load_for_inference(packed_folder)


def test_packed_folders_hold_no_latent_weights(packed_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds packed weights and no latent floats"):
        load_model(packed_folder)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_float_twins_have_no_packed_form(tmp_path: Path, backend: str) -> None:
    model = BitNetForCausalLM(BASE.replace(quantizer="none"))
    folder = save_checkpoint(
        tmp_path, model=model, optimizer_state={}, state={"step": 1},
        config={"model": dataclasses.asdict(model.config)}, tokenizer=b"", best=True,
    )  # fmt: skip
    with kernels.use_backend(backend), pytest.raises(ValueError, match="float model, which has no packed form"):
        load_for_inference(folder)


def test_packing_a_float_twin_packs_its_head_only() -> None:
    for tied in (True, False):
        torch.manual_seed(0)
        model = BitNetForCausalLM(BASE.replace(quantizer="none", tie_word_embeddings=tied)).eval()
        ids = random_ids(BASE, 2, 9)
        with torch.no_grad():
            hidden = model.model(ids)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert model.pack() is model
        assert isinstance(model.model.embed_tokens, PackedEmbedding)
        assert isinstance(model.lm_head, PackedLinear) == (not tied)
        assert sum(isinstance(module, BitLinear) for module in model.modules()) == 2 * 7
        for name, value in model.state_dict().items():
            if "embed_tokens" not in name and "lm_head" not in name:
                assert torch.equal(value, before[name]), name
        assert model.head_is_packed
        again = model.pack().state_dict()  # a second time changes nothing
        assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            packed = model.model(ids)
        assert float((packed - hidden).norm() / hidden.norm()) < 0.02  # the embedding's INT8


# A trained model

ROUNDS = {
    "days": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "seasons": ["spring", "summer", "autumn", "winter"],
    "numbers": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
PROMPTS = {
    "The days: Friday, Saturday,": " Sunday, Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday,",
    "The seasons: winter, spring,": " summer, autumn, winter, spring, summer, autumn, winter, spring,",
    "The numbers: eight, nine,": " one, two, three, four, five, six, seven, eight, nine, one, two,",
    "The numbers: four, five, six,": " seven, eight, nine, one, two, three, four, five, six, seven,",
}
TEXT_TOKENS = 80


@dataclasses.dataclass(frozen=True)
class Trained:
    run: Path
    folder: Path
    tokenizer: Tokenizer
    held_out: TokenArray
    bytes_per_token: float

    def prompt(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer.encode(text, bos=True)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of some seconds on text that goes round in circles, so that every next word of it is certain, with
    sentences between that are not, so that the loss is not zero."""
    root = tmp_path_factory.mktemp("trained")
    (root / "corpus").mkdir()
    generator = torch.Generator().manual_seed(0)

    def pick(words: list[str]) -> int:
        return int(torch.randint(len(words), (1,), generator=generator))

    nouns, verbs = ["cat", "dog", "bird", "fish", "horse"], ["sees", "likes", "hears", "follows"]
    for index in range(60):
        name = list(ROUNDS)[index % 3]
        words = ROUNDS[name]
        start = pick(words)
        text = f"The {name}: " + ", ".join(words[(start + i) % len(words)] for i in range(120)) + ".\n"
        for _ in range(25):
            text += f"The {nouns[pick(nouns)]} {verbs[pick(verbs)]} the {nouns[pick(nouns)]}.\n"
        (root / "corpus" / f"{index:02}.txt").write_text(text)
    config = recipes.TrainConfig(
        model=PRESETS["tiny"].replace(vocab_size=400), out=str(root / "run"), steps=200, batch_size=4, context=96,
        data=recipes.DataConfig(corpus=str(root / "corpus"), cache=str(root / "data"), val_fraction=0.1),
        optim=dataclasses.replace(recipes.SHORT_RUN, warmup_steps=10, lr=2e-2), float_start=0.4, eval_every=200,
        eval_tokens=512, sample_every=0, log_every=100, dtype="float32", compile="off", wandb="off", device="cpu",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        run = trainer.train(config)
    folder = resolve(run.folder)
    assert isinstance(run.data, Mixture)
    [held_out] = run.data.split("val").values()
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    return Trained(run.folder, folder, tokenizer, held_out, run.data.bytes_per_token("val"))


@pytest.fixture
def call(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run generate.py's main() on the trained model: exit status, standard output, standard error."""

    def run_main(*arguments: str, model: Path = trained.run) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        status = cli.main([str(model), "--device", "cpu", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_main


def write(model: BitNetForCausalLM | Engine, prompt: Tensor, sampling: SamplingConfig = GREEDY) -> list[int]:
    steps = generate(model, prompt, max_new_tokens=TEXT_TOKENS, sampling=sampling, seed=3)
    return torch.stack(list(steps), 1)[0].tolist()


@pytest.fixture(scope="module")
def golden(trained: Trained) -> dict[str, list[int]]:
    """The greedy text of the specification behind every prompt. Its next token always leads by several times what an
    activation that rounds the other way moves a logit (0.1), so no machine's order of float additions decides."""
    texts = {}
    with kernels.use_backend("reference"):
        model = load_for_inference(trained.folder)
        for prompt in PROMPTS:
            ids = trained.prompt(prompt)
            texts[prompt] = write(model, ids)
            whole = torch.cat([ids, torch.tensor([texts[prompt]])], 1)
            first, second = torch_logits(model, whole)[0, ids.shape[1] - 1 : -1].topk(2).values.unbind(1)
            assert float((first - second).min()) > 1
    return texts


def test_the_golden_text_is_what_was_learned(trained: Trained, golden: dict[str, list[int]]) -> None:
    for prompt, expected in PROMPTS.items():
        ids = trained.tokenizer.encode(prompt, bos=True)
        text = trained.tokenizer.decode(ids + golden[prompt]).removeprefix(prompt)
        assert text.startswith(expected)
        assert len(golden[prompt]) == TEXT_TOKENS


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_greedy_text_is_the_same_on_every_instruction_set(
    trained: Trained, golden: dict[str, list[int]], cache_dtype: str
) -> None:
    for isa in ISAS:
        with native.use_instruction_set(isa), kernels.use_backend("native"):
            engine = load_for_inference(trained.folder, cache_dtype=cache_dtype)
            assert isinstance(engine, Engine)
            for prompt, expected in golden.items():
                assert write(engine, trained.prompt(prompt)) == expected, (isa, prompt)


def test_greedy_text_is_the_same_in_torch_on_native_products(trained: Trained, golden: dict[str, list[int]]) -> None:
    model = load_model(trained.folder).pack()
    with kernels.use_backend("native"):
        for prompt, expected in golden.items():
            assert write(model, trained.prompt(prompt)) == expected, prompt


def test_rows_of_a_batch_write_what_they_write_alone(trained: Trained, golden: dict[str, list[int]]) -> None:
    engine = load_for_inference(trained.folder)
    by_length: dict[int, list[str]] = {}
    for prompt in PROMPTS:
        by_length.setdefault(trained.prompt(prompt).shape[1], []).append(prompt)
    for prompts in by_length.values():
        ids = torch.cat([trained.prompt(prompt) for prompt in [*prompts, prompts[0]]])
        rows = torch.stack(list(generate(engine, ids, max_new_tokens=TEXT_TOKENS, sampling=GREEDY, seed=0)), 1)
        assert rows.tolist() == [golden[prompt] for prompt in [*prompts, prompts[0]]]


def test_sampled_text_is_the_same_on_every_instruction_set(trained: Trained) -> None:
    texts = []
    for isa in ISAS:
        with native.use_instruction_set(isa):
            engine = load_for_inference(trained.folder)
            texts.append(write(engine, trained.prompt("The"), SamplingConfig(1.2, top_p=0.98)))
    assert all(text == texts[0] for text in texts)
    assert texts[0] != write(engine, trained.prompt("The"))


def test_the_command_line_writes_the_golden_text(trained: Trained, golden: dict[str, list[int]], call) -> None:
    for prompt, expected in list(golden.items())[:2]:
        options = ("--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(TEXT_TOKENS))
        text = trained.tokenizer.decode(trained.tokenizer.encode(prompt, bos=True) + expected)
        status, out, err = call(*options, "--backend", "reference")
        assert (status, out.removesuffix("\n")) == (0, text)
        assert f"decode {TEXT_TOKENS} tokens" in err
        for more in ((), ("--cache", "float16"), ("--cache", "int8"), ("--backend", "auto")):
            assert call(*options, "--backend", "native", *more)[:2] == (0, out), (prompt, more)
    for isa in ISAS:
        with native.use_instruction_set(isa):
            assert call(*options, "--backend", "native")[:2] == (0, out), isa


def test_the_command_line_takes_a_packed_folder(trained: Trained, call, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    save_packed(folder, load_model(trained.folder).pack(), trained.tokenizer.model_proto)
    prompt = next(iter(PROMPTS))
    options = ("--prompt", prompt, "--temperature", "0", "--max-new-tokens", "70")
    for backend in ("reference", "native", "auto"):
        expected = call(*options, "--backend", backend)
        assert expected[0] == 0
        assert call(*options, "--backend", backend, model=folder)[:2] == expected[:2]
    status, out, err = call(*options, "--no-pack", model=folder)
    assert (status, out) == (2, "")
    assert "error: " in err
    assert "holds packed weights and no latent floats" in err
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:3000])
    for backend in ("reference", "native"):
        status, out, err = call(*options, "--backend", backend, model=folder)
        assert (status, out) == (2, "")
        assert MODEL in err
        assert "Traceback" not in err


def test_the_command_line_says_what_native_needs(trained: Trained, call, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--prompt", "The", "--temperature", "0", "--max-new-tokens", "5")
    expected = call(*options, "--backend", "reference")
    monkeypatch.setattr(native, "_tables", lambda: {})
    kernels.native_available.cache_clear()
    try:
        status, out, err = call(*options, "--backend", "native")
        assert (status, out) == (2, "")
        assert "error: the native CPU kernels were not built" in err
        with pytest.warns(RuntimeWarning, match="were not built"):
            assert call(*options, "--backend", "auto")[:2] == expected[:2]
    finally:
        kernels.native_available.cache_clear()


def test_narrow_caches_stay_close(trained: Trained) -> None:
    ids = torch.from_numpy(trained.held_out.read(0, 4 * 96).astype("int64")).view(4, 96)
    exact = load_for_inference(trained.folder)(ids)
    for cache_dtype in ("float16", "int8"):
        logits = load_for_inference(trained.folder, cache_dtype=cache_dtype)(ids)
        # Measured: 0.004 and 0.005, nearly all of it from activations that then round the other way.
        assert 0 < float((logits - exact).abs().mean() / exact.abs().mean()) < 0.02


def test_the_int8_head_costs_next_to_nothing(trained: Trained) -> None:
    def perplexity(model: BitNetForCausalLM) -> float:
        tokens = trained.held_out
        return evaluate(model, tokens, context=96, bytes_per_token=trained.bytes_per_token).perplexity

    model = load_model(trained.folder)
    exact = perplexity(model)
    assert 1.1 < exact < 5  # learned, and not all of it certain
    packed = model.pack()
    for backend in ("reference", "native"):
        with kernels.use_backend(backend):
            assert abs(perplexity(packed) / exact - 1) < 1e-3
