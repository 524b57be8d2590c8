"""The model against transformers and its formulas: logits, cache, initialization, configuration, presets."""

import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor

from bitnet.model import PRESETS, BitNetForCausalLM, KVCache, ModelConfig, PackedLinear, pack
from bitnet.model.transformer import MLP, RMSNorm, apply_rope, rope_tables
from tests import oracles
from tests.builders import random_ids, random_model, tiny_model
from tests.oracles.transformers import SHAPES, TINY, load_into, oracle

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_names_and_shapes_are_transformers(transformers, shape: str) -> None:
    config = TINY.replace(**SHAPES[shape])
    ours = {name: tensor.shape for name, tensor in BitNetForCausalLM(config).state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in oracle(transformers, config).state_dict().items()}
    if config.tie_word_embeddings:
        assert "lm_head.weight" not in ours
        theirs.pop("lm_head.weight")
    assert ours == theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_float_logits_equal_transformers(transformers, shape: str) -> None:
    config = TINY.replace(quantizer="none", **SHAPES[shape])
    ours, theirs = random_model(config), oracle(transformers, config)
    load_into(theirs, ours)
    ids = random_ids(config, 2, 20)
    with torch.no_grad():
        logits = ours(ids)
        assert logits.std() > 0.3
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["gqa", "mha", "relu2", "untied"])
def test_ternary_logits_equal_transformers_online_quantization(transformers, shape: str) -> None:
    bitnet = oracles.require("transformers.integrations.bitnet")
    config = TINY.replace(**SHAPES[shape])
    ours, theirs = random_model(config), oracle(transformers, config)
    quantization = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    theirs = bitnet.replace_with_bitnet_linear(theirs, ["lm_head"], quantization)
    assert sum(type(module).__name__ == "AutoBitLinear" for module in theirs.modules()) == 2 * 7
    theirs.load_state_dict(ours.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    seen = {}
    for name, module in theirs.named_modules():
        if type(module).__name__ == "AutoBitLinear":
            module.register_forward_hook(lambda _, inputs, y, name=name: seen.update({name: (inputs[0], y)}))
    dense = BitNetForCausalLM(config.replace(quantizer="none"))
    dense.load_state_dict(ours.state_dict())
    ids = random_ids(config, 2, 10)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = theirs.eval()(ids).logits
        assert len(seen) == 2 * 7
        for name, (x, y) in seen.items():
            layer = ours.get_submodule(name)
            # They multiply by 127 / absmax where we divide by absmax / 127: now and then one code of a token flips.
            one_code = x.abs().amax(-1, keepdim=True) / 127 * layer.weight.abs().mean()
            difference = (layer(x) - y).abs()
            assert (difference <= 1.01 * one_code).all(), name
            assert (difference < 1e-5).float().mean() > 0.8, name
        # Flips of one layer reach the next ones, so the whole is close and not equal; in float it is equal, above.
        assert (ours(ids) - expected).norm() < 0.1 * (dense(ids) - expected).norm()


# The parts


@pytest.mark.parametrize("head_dim", [2, 8, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_is_a_complex_rotation(head_dim: int, theta: float) -> None:
    config = TINY.replace(head_dim=head_dim, rope_theta=theta, max_position_embeddings=100)
    cos, sin = rope_tables(config)
    assert cos.shape == sin.shape == (100, head_dim)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(2, 3, 100, head_dim)
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / head_dim)
    turns = torch.polar(torch.ones(100, half).double(), torch.arange(100).double()[:, None] * frequencies)
    rotated = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    expected = torch.cat([rotated.real, rotated.imag], -1).float()
    y = apply_rope(x, cos, sin)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=3e-5)  # 100 positions of float32 angles, 6e-6 each
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_rope_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rope_tables(TINY.replace(head_dim=16, max_position_embeddings=64))
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    scores = [
        (apply_rope(q, cos[i + 5 : i + 6], sin[i + 5 : i + 6]) * apply_rope(k, cos[i : i + 1], sin[i : i + 1])).sum()
        for i in range(0, 59, 7)
    ]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(len(scores)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_and_norm_keep_the_dtype_and_compute_in_float32(dtype: torch.dtype) -> None:
    cos, sin = rope_tables(TINY)
    x = torch.randn(1, 4, 32, 8).to(dtype)
    y = apply_rope(x, cos, sin)
    assert y.dtype == dtype
    assert torch.equal(y, apply_rope(x.float(), cos, sin).to(dtype))
    norm = RMSNorm(8, 1e-5).to(dtype)
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), F.rms_norm(x.float(), (8,), eps=1e-5).to(dtype))


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_rms_norm_against_float64(eps: float, magnitude: float) -> None:
    norm, x = RMSNorm(100, eps), torch.randn(3, 4, 100) * magnitude
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    expected = norm.weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(norm(x), expected.float())


def test_rms_norm_of_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # its square is inf in float16
    torch.testing.assert_close(RMSNorm(8, 1e-5).half()(x), torch.ones(1, 8, dtype=torch.float16))
    assert not RMSNorm(8, 1e-5)(torch.zeros(1, 8)).any()


@pytest.mark.parametrize(
    ("act", "formula"), [("relu2", lambda x: x.clamp(min=0) ** 2), ("silu", lambda x: x / (1 + (-x).exp()))]
)
@pytest.mark.parametrize("sub_norm", [True, False])
def test_mlp_formula(act: str, formula, sub_norm: bool) -> None:
    mlp = MLP(TINY.replace(hidden_act=act, quantizer="none", sub_norm=sub_norm))
    x = torch.randn(2, 3, 32)
    hidden = formula(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    if sub_norm:
        hidden = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.T, rtol=1e-5, atol=1e-5)


# The whole model


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False}, {"sub_norm": False}, {"hidden_act": "relu2"}])
@pytest.mark.parametrize("quantizer", ["ternary", "none"])
def test_gradient_reaches_every_parameter(shape: dict, quantizer: str) -> None:
    model = BitNetForCausalLM(TINY.replace(quantizer=quantizer, **shape))
    ids = random_ids(model.config, 2, 16)
    logits = model(ids)
    assert logits.shape == (2, 16, 67)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_compiled_step_quantizes_what_q_k_v_and_gate_up_share_once() -> None:
    counts = []

    def compiler(module: torch.fx.GraphModule, inputs: list[Tensor]):
        counts.append(sum("amax" in str(node.target) for node in module.graph.nodes))
        return make_boxed_func(module.forward)

    # What torch.compile makes of a graph before inductor sees it.
    model = tiny_model(num_hidden_layers=1)
    step = aot_module(model, compiler, partition_fn=min_cut_rematerialization_partition)
    step(random_ids(model.config, 2, 8)).square().mean().backward()
    assert counts == [4, 0]  # of the layer's seven products, forward; none again on the way back


def test_loss_at_the_start_is_that_of_a_uniform_guess() -> None:
    model, ids = BitNetForCausalLM(TINY), random_ids(TINY, 4, 32)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(67), abs=0.1)


def test_initialization_follows_the_seed_and_the_range() -> None:
    config = TINY.replace(hidden_size=128, tie_word_embeddings=False, initializer_range=0.05)
    models = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        models.append(BitNetForCausalLM(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    for name, tensor in models[0].items():
        if tensor.ndim == 1:
            assert (tensor == 1).all(), name
        else:
            assert tensor.std().item() == pytest.approx(0.05, rel=0.05), name
            assert not torch.equal(tensor, models[2][name]), name


def test_quantizers_and_twins_start_from_the_same_weights() -> None:
    states = []
    for quantizer in ("ternary", "none"):
        torch.manual_seed(1)
        states.append(BitNetForCausalLM(TINY.replace(quantizer=quantizer)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_last_only_is_the_last_position() -> None:
    model, ids = random_model(TINY), random_ids(TINY, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


@pytest.mark.parametrize("quantizer", ["none", "ternary", "int8"])
@pytest.mark.parametrize("position", [1, 5, 15])
def test_causality(quantizer: str, position: int) -> None:
    model = random_model(TINY.replace(quantizer=quantizer), torch.float64)
    ids = random_ids(TINY, 2, 16)
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 1) % 67
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-9)
    assert ((before - after)[:, position:].abs().amax(-1) > 1e-3).all()


def test_batch_rows_do_not_mix() -> None:
    model, ids = random_model(TINY, torch.float64), random_ids(TINY, 3, 10)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in ids])
        torch.testing.assert_close(model(ids), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["ternary", "int4"])
def test_packed_model_equals_its_evaluation(quantizer: str) -> None:
    model = random_model(TINY.replace(quantizer=quantizer))
    ids = random_ids(TINY, 2, 12)
    with torch.no_grad():
        expected = model(ids)
        pack(model)
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 7
        error = (model(ids) - expected).norm() / expected.norm()
    assert error < 1e-2  # a few int8 codes flip where float32 sums differ; see test_linear.py for the exact layer


# The key/value cache


SPLITS = [[16], [15, 1], [1] * 16, [5, 1, 1, 9], [4, 4, 4, 4], [1, 15], [6, 2, 7, 1]]


def run_in_pieces(model: BitNetForCausalLM, ids: Tensor, pieces: list[int], dtype: torch.dtype) -> Tensor:
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], dtype=dtype)
    logits = []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            logits.append(model(piece, cache))
    assert cache.length == ids.shape[1]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("pieces", SPLITS)
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_cache_equals_the_full_pass_in_float(pieces: list[int], heads: int) -> None:
    model = random_model(TINY.replace(quantizer="none", num_key_value_heads=heads))
    ids = random_ids(TINY, 2, 16)
    with torch.no_grad():
        expected = model(ids)
    torch.testing.assert_close(run_in_pieces(model, ids, pieces, torch.float32), expected, rtol=1e-5, atol=1e-5)


# In float64, where the order of a sum changes no float32 value that is quantized: no int8 code flips.
@pytest.mark.parametrize("pieces", SPLITS)
@pytest.mark.parametrize("quantizer", ["ternary", "int8"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cache_equals_the_full_pass_quantized(pieces: list[int], quantizer: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = random_model(TINY.replace(quantizer=quantizer), torch.float64)
    ids = random_ids(TINY, 2, 16)
    with torch.no_grad():
        expected = model(ids)
    torch.testing.assert_close(run_in_pieces(model, ids, pieces, torch.float64), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pieces", [[15, 1], [5, 1, 1, 9]])
def test_cache_of_a_packed_model(pieces: list[int]) -> None:
    model = pack(random_model(TINY, torch.float64))
    ids = random_ids(TINY, 2, 16)
    with torch.no_grad():
        expected = model(ids)
    torch.testing.assert_close(run_in_pieces(model, ids, pieces, torch.float64), expected, rtol=0, atol=1e-5)


def test_cache_in_bfloat16_serves_a_float32_model() -> None:
    model, ids = random_model(TINY.replace(quantizer="none")), random_ids(TINY, 2, 16)
    with torch.no_grad():
        expected = model(ids)
    logits = run_in_pieces(model, ids, [8, 1, 7], torch.bfloat16)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 2e-2 * expected.norm()


def test_cache_overflow_is_an_error_that_leaves_the_cache_usable() -> None:
    model, ids = random_model(TINY.replace(quantizer="none")), random_ids(TINY, 1, 12)
    cache = KVCache(TINY, 1, 10)
    with torch.no_grad():
        model(ids[:, :7], cache)
        with pytest.raises(ValueError, match=r"10.*11"):
            model(ids[:, 7:11], cache)
        assert cache.length == 7
        logits = model(ids[:, 7:10], cache)
        torch.testing.assert_close(logits, model(ids[:, :10])[:, 7:], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="11"):
            model(ids[:, 10:11], cache)


@pytest.mark.parametrize("length", [-1, 0, 33])
def test_cache_of_impossible_length_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=rf"{length} .*32"):
        KVCache(TINY, 1, length)


def test_cache_shape_and_bytes() -> None:
    cache = KVCache(TINY, 3, 20, dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 20, 8)
    assert cache.nbytes == 0
    cache.advance(5)
    assert cache.nbytes == 2 * (2 * 3 * 2 * 5 * 8) * 2


def test_too_many_positions_is_an_error() -> None:
    model = random_model(TINY)
    with torch.no_grad():
        assert model(random_ids(TINY, 1, 32)).shape == (1, 32, 67)
        with pytest.raises(ValueError, match=r"33 .*32"):
            model(random_ids(TINY, 1, 33))
        cache = KVCache(TINY, 1, 32)
        model(random_ids(TINY, 1, 30), cache)
        with pytest.raises(ValueError, match=r"33 .*32"):
            model(random_ids(TINY, 1, 3), cache)


# The configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field.name, value) for field in dataclasses.fields(ModelConfig) if field.type is int for value in (0, -3)),
        ("quantizer", "fp7"), ("hidden_act", "gelu"), ("num_attention_heads", 7),
        ("num_key_value_heads", 3), ("num_key_value_heads", 16), ("head_dim", 7), ("head_dim", 0), ("head_dim", -2),
        ("rope_theta", 0.0), ("rope_theta", -1.0), ("rope_theta", math.nan), ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", math.nan), ("initializer_range", -0.02), ("initializer_range", math.nan),
    ],
)  # fmt: skip
def test_bad_config_is_named(field: str, value: object) -> None:
    message = f"{field}.*{re.escape(str(value))}"
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{field: value})
    with pytest.raises(ValueError, match=message):
        ModelConfig().replace(**{field: value})


def test_heads_that_leave_an_odd_width_are_an_error() -> None:
    with pytest.raises(ValueError, match="head_dim 1 is odd"):
        ModelConfig(hidden_size=512, num_attention_heads=512)


def test_every_size_is_checked() -> None:
    checked = {field.name for field in dataclasses.fields(ModelConfig) if field.type is int}
    assert checked == {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings",
    }  # fmt: skip


def test_head_width() -> None:
    assert ModelConfig(hidden_size=512, num_attention_heads=8).head_width == 64
    assert ModelConfig(hidden_size=512, head_dim=48).head_width == 48
    assert ModelConfig(hidden_size=510, head_dim=48).head_width == 48
    # A width that nobody gave follows the sizes; one that was given stays.
    assert ModelConfig(hidden_size=512).replace(hidden_size=1024).head_width == 128
    assert ModelConfig(hidden_size=512, head_dim=48).replace(hidden_size=1024).head_width == 48


def test_config_round_trip_and_unknown_fields() -> None:
    for config in (*PRESETS.values(), ModelConfig(head_dim=48), TINY):
        assert ModelConfig.from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="moe_experts"):
        ModelConfig.from_dict({"hidden_size": 512, "moe_experts": 8})


def expected_parameters(config: ModelConfig) -> int:
    C, ffn, D = config.hidden_size, config.intermediate_size, config.head_width
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    layer = 2 * C * queries + 2 * C * keys + 3 * C * ffn + 2 * C + (queries + ffn if config.sub_norm else 0)
    embeddings = config.vocab_size * C * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + C + embeddings


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tiny", None), ("demo", None), ("small", None), ("125m", 125e6), ("700m", 700e6), ("1.3b", 1.3e9), ("3b", 3e9),
     ("2b-4t", 2.41e9)],
)  # fmt: skip
def test_presets_on_the_meta_device(name: str, parameters: float | None) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = BitNetForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_parameters() == expected_parameters(config)
    assert (
        model.num_parameters(embeddings=False) == expected_parameters(config) - config.vocab_size * config.hidden_size
    )
    if parameters is not None:
        assert model.num_parameters() == pytest.approx(parameters, rel=0.13)


def test_every_preset_is_tested_and_packs_without_padding_where_the_source_does() -> None:
    assert set(PRESETS) == {"tiny", "demo", "small", "125m", "700m", "1.3b", "3b", "2b-4t"}
    for name in ("demo", "small", "125m", "700m", "2b-4t"):
        assert PRESETS[name].hidden_size % 256 == PRESETS[name].intermediate_size % 256 == 0


def test_2b_4t_is_microsofts_shape() -> None:
    config = PRESETS["2b-4t"]
    assert config == ModelConfig(
        vocab_size=128256, hidden_size=2560, intermediate_size=6912, num_hidden_layers=30, num_attention_heads=20,
        num_key_value_heads=5, head_dim=128, max_position_embeddings=4096, rope_theta=500000.0, rms_norm_eps=1e-5,
        hidden_act="relu2", sub_norm=True, tie_word_embeddings=True, quantizer="ternary",
    )  # fmt: skip
    assert expected_parameters(config) == pytest.approx(2.41e9, rel=0.005)


@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters_counts_tied_ones_once(tied: bool) -> None:
    model = BitNetForCausalLM(TINY.replace(tie_word_embeddings=tied))
    assert model.num_parameters() == expected_parameters(model.config)
    assert model.num_parameters(embeddings=False) == expected_parameters(TINY) - 67 * 32


@pytest.mark.parametrize("sub_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_tensor_shapes_are_those_of_the_model(tied: bool, sub_norm: bool) -> None:
    config = TINY.replace(tie_word_embeddings=tied, sub_norm=sub_norm, head_dim=6, num_key_value_heads=2)
    state = {name: tuple(tensor.shape) for name, tensor in BitNetForCausalLM(config).state_dict().items()}
    assert config.tensor_shapes() == state
    layer = {f"model.layers.1.{name}.weight": shape for name, shape in config.projections().items()}
    assert layer == {name: shape for name, shape in state.items() if ".1." in name and name.endswith("_proj.weight")}
    assert len(layer) == 7


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["latent", "packed", "packed, float embeddings", "packed head of a float twin"])
def test_a_model_of_its_tensors_is_the_model(tied: bool, form: str) -> None:
    config = TINY.replace(tie_word_embeddings=tied, quantizer="none" if "float twin" in form else "ternary")
    model = BitNetForCausalLM(config).eval()
    if form != "latent":
        model.pack(embeddings="float emb" not in form)
    tensors = model.state_dict()
    again = BitNetForCausalLM.from_tensors(config, tensors)
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids), model(ids))
    assert {name: type(module) for name, module in again.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    assert not again.training
    for name, tensor in again.state_dict().items():
        assert tensor.data_ptr() == tensors[name].data_ptr(), name


def test_tensors_that_are_not_of_the_configuration() -> None:
    tensors = BitNetForCausalLM(TINY).state_dict()
    norm = "model.norm.weight"
    for wrong, message in (
        ({name: value for name, value in tensors.items() if name != norm}, norm),
        (tensors | {"model.extra": torch.ones(1)}, r"model\.extra"),
        (tensors | {norm: torch.ones(3)}, norm),
        ({norm: torch.ones(3)}, "layers and only 1 tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            BitNetForCausalLM.from_tensors(TINY, wrong)
    with pytest.raises(ValueError, match=r"no place for a module model\.layers\.9"):
        BitNetForCausalLM.from_tensors(TINY, tensors, {"model.layers.9": torch.nn.Identity()})
