"""Quantized layers, and the quantization of whole models after training."""

import copy
import functools
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitnet import kernels
from bitnet.model import BitNetForCausalLM, PackedEmbedding, PackedLinear
from bitnet.model.compound import AffineLinear, OutlierInt8Linear, ScaledBlockLinear, TritPlanesLinear
from bitnet.model.quantized import (
    StaticInt8Linear,
    build_quantized,
    describe_quantized,
    model_bits,
)
from bitnet.model.weight_only import BlockEmbedding, BlockLinear, FloatEmbedding, FloatLinear, GroupLinear, NF4Linear
from bitnet.ptq import drivers
from bitnet.ptq.drivers import Options, measure_importance
from bitnet.ptq.methods import BLOCK_TYPES, IMPORTANT_TYPES, METHODS, quantize_model
from bitnet.ptq.walk import STAGES
from bitnet.quant.gptq import HessianSum
from bitnet.quant.grouped import Grid, round_to_nearest
from bitnet.storage.gguf import names as gguf_names
from tests.ptq.builders import SHAPES, float_model, ids, logits, projections, relative_error


def options_of(method: str) -> Options:
    """Whose groups are small: 3 bits a weight are fewer than 2-bit codes with their scales have."""
    return replace(QUICK, target_bits=3.2) if method == "mixed-3" else QUICK


KINDS = {
    "fp16": FloatLinear, "bf16": FloatLinear, "fp8": FloatLinear, "nf4": NF4Linear, "w8a8-dynamic": PackedLinear,
    "w4a8-dynamic": PackedLinear, "w8a8-static": StaticInt8Linear, "smoothquant": StaticInt8Linear,
    "hqq-8": AffineLinear, "hqq-4": AffineLinear, "hqq-3": AffineLinear, "hqq-2": AffineLinear,
    "ptqtp": TritPlanesLinear, "mxfp4": BlockLinear, "gptq-mxfp4": BlockLinear, "nvfp4": ScaledBlockLinear,
    "gptq-nvfp4": ScaledBlockLinear, "llm-int8": OutlierInt8Linear, "rotated-w4a8": PackedLinear,
}  # fmt: skip
OF_EACH_KIND = [*{kind: name for name, kind in reversed(KINDS.items())}.values(), "rtn-int4", "awq", "rotated-w4a8"]
BLOCK_METHODS = [method for method in METHODS if method.startswith("gguf")]
PLAIN_METHODS = [method for method in METHODS if method not in BLOCK_METHODS]
UNROTATED = [method for method in PLAIN_METHODS if not METHODS[method].rotated]
REPEATED = {  # by the same driver with another number
    "hqq-8", "hqq-4", "hqq-2", "autoround-4", "autoround-3", "mixed-4", "mixed-5", "mxfp4", "gptq-nvfp4",
    "rotated-rtn-int3", "rotated-gptq-3",
}  # fmt: skip
QUICK = Options(progress=False, group_size=32, damping=0.01, tuning_steps=8)


@functools.cache
def quantized(method: str, shape: str) -> BitNetForCausalLM:
    """The float model of a shape, quantized once for all tests that only look at it."""
    return quantize_model(float_model(**SHAPES[shape]), method, ids(), options_of(method))


# Whole models


@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_every_method_quantizes_every_projection_and_little_else(method) -> None:
    original, model = float_model(), quantized(method, "sub-norms")
    kind = KINDS.get(method, GroupLinear)
    assert {type(module) for _, module in projections(model)} == {kind}
    assert len(list(projections(model))) == 14
    sixteen_bit = method in ("fp16", "bf16")
    assert isinstance(model.model.embed_tokens, FloatEmbedding if sixteen_bit else nn.Embedding)
    if not sixteen_bit and method in UNROTATED:
        assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert 0 < relative_error(model, original) < 1
    nominal, effective = model_bits(model)
    assert nominal == METHODS[method].bits or method.startswith("mixed")
    assert nominal <= effective <= nominal + (3 if method == "llm-int8" else 2.1)  # groups of 32, 64 columns


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        *((name, "sub-norms") for name in UNROTATED if not (METHODS[name].int8_activations or name in REPEATED)),
        *(("awq", shape) for shape in SHAPES),
        ("fp16", "grouped queries"),
    ],
)
def test_weight_only_models_are_the_float_model_of_the_dequantized_weights(method, shape) -> None:
    model = quantized(method, shape)
    twin = float_model(**SHAPES[shape])
    with torch.no_grad():
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if "norm" in k}, strict=False)
        for name, module in projections(model):
            weight = module.dequantize()
            if getattr(module, "input_scale", None) is not None:
                weight = weight / module.input_scale
            twin.get_submodule(name).weight.copy_(weight)
        if METHODS[method].bits == 16:
            twin.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
            if twin.lm_head is not None:
                twin.lm_head.weight.copy_(model.lm_head.weight)
    assert torch.allclose(logits(model), logits(twin), atol=1e-4)


def test_errors_come_in_the_order_of_the_formats() -> None:
    original = float_model()
    errors = {method: relative_error(quantized(method, "sub-norms"), original) for method in PLAIN_METHODS}
    for finer, coarser in [
        ("fp16", "bf16"), ("bf16", "fp8"), ("bf16", "rtn-int8"), ("rtn-int8", "rtn-int4"), ("rtn-int4", "rtn-int3"),
        ("rtn-int3", "rtn-int2"), ("gptq-8", "gptq-4"), ("gptq-4", "gptq-3"), ("gptq-3", "gptq-2"),
        ("gptq-2", "gptq-ternary"), ("nf4", "rtn-int3"), ("awq", "rtn-int3"), ("w8a8-dynamic", "rtn-int4"),
        ("w8a8-static", "rtn-int4"), ("smoothquant", "rtn-int4"), ("w4a8-dynamic", "rtn-int2"),
        *((f"gptq-{bits}", f"rtn-int{bits}") for bits in (8, 4, 3, 2)),
        ("hqq-8", "hqq-4"), ("hqq-4", "hqq-3"), ("hqq-3", "hqq-2"), ("autoround-4", "autoround-3"),
        ("autoround-3", "autoround-2"), ("mixed-5", "mixed-4"),
        ("mixed-4", "mixed-3"), ("mixed-3", "rtn-int2"), ("ptqtp", "gptq-ternary"), ("gptq-mxfp4", "mxfp4"),
        ("gptq-nvfp4", "nvfp4"), ("nvfp4", "mxfp4"), ("llm-int8", "rtn-int4"), ("rotated-gptq-4", "rotated-rtn-int4"),
        ("rotated-gptq-3", "rotated-rtn-int3"),
    ]:  # fmt: skip
        assert errors[finer] < errors[coarser], f"{finer}: {errors[finer]}, {coarser}: {errors[coarser]}"


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        *((method, "sub-norms") for method in PLAIN_METHODS if method not in REPEATED),
        *((method, "grouped queries") for method in OF_EACH_KIND),
        ("fp16", "no sub-norms"),
    ],
)
def test_saved_models_come_back_to_the_last_bit(method, shape, tmp_path) -> None:
    model = quantized(method, shape)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "quantization.json").write_text(json.dumps(describe_quantized(model, method)))

    description = json.loads((tmp_path / "quantization.json").read_text())
    assert description["method"] == method
    again = build_quantized(model.config, description, load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(again), logits(model))
    assert model_bits(again) == model_bits(model)
    assert again.weight_bytes() == model.weight_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_gptq_calibrates_each_layer_on_the_quantized_ones_before_it(shape, monkeypatch) -> None:
    seen: list[Tensor] = []

    def spy(weight: Tensor, hessian: Tensor, grid: Grid, *, group_size: int, **options: object):
        seen.append(hessian)
        return round_to_nearest(weight, grid, group_size)

    monkeypatch.setattr(drivers, "gptq_quantize", spy)
    model = quantize_model(float_model(**SHAPES[shape]), "gptq-3", ids(), QUICK)
    # In the finished model, the inputs of every projection are those that it was calibrated on.
    sums = {}
    for name, module in projections(model):
        sums[name] = total = HessianSum(module.in_features)
        module.register_forward_pre_hook(lambda _, args, total=total: total.update(args[0]))
    with torch.no_grad():
        for batch in ids().split(8):
            model(batch)
    order = [f"model.layers.{layer}.{name}" for layer in range(2) for names in STAGES for name in names]
    assert len(seen) == len(order) == 14
    for name, hessian in zip(order, seen, strict=True):
        assert torch.allclose(hessian, sums[name].matrix(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_folding_scales_does_not_change_the_float_model(shape, method, monkeypatch) -> None:
    original = float_model(**SHAPES[shape])
    model = copy.deepcopy(original)
    factors = []

    def factor(weights: list[Tensor], statistic: Tensor, *rest: object) -> Tensor:
        factors.append(torch.exp(torch.randn(len(statistic))))
        return factors[-1]

    if method == "awq":  # the projections stay float, behind the factor that could not be folded

        class Plain(FloatLinear):
            def _scaled(self, x: Tensor) -> Tensor:
                return x / self.input_scale

        def keep(linear: nn.Linear, quantized: object, options: object, input_scale: Tensor | None) -> nn.Module:
            layer = Plain.from_linear(linear, "float32")
            layer.input_scale = torch.ones(1) if input_scale is None else input_scale
            return layer

        monkeypatch.setattr(drivers, "awq_scale", lambda *arguments: (factor(*arguments), 0.5))
        monkeypatch.setattr(drivers, "group_linear", keep)
    else:
        monkeypatch.setattr(drivers, "smooth_scale", factor)
        monkeypatch.setattr(
            drivers.StaticInt8Linear, "from_linear", lambda linear, *_: FloatLinear.from_linear(linear, "float32")
        )
    quantize_model(model, method, ids(), replace(QUICK, calibration="minmax"))
    assert len(factors) == 8
    assert torch.allclose(logits(model), logits(original), atol=1e-3)
    assert not torch.equal(
        model.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight
    )


def test_awq_keeps_the_factor_that_nothing_can_take() -> None:
    model = quantize_model(float_model(**SHAPES["grouped queries"]), "awq", ids(), QUICK)
    kept = {name.rpartition(".")[2] for name, module in projections(model) if module.input_scale is not None}
    assert kept == {"o_proj"}
    model = quantize_model(float_model(), "awq", ids(), QUICK)
    assert all(module.input_scale is None for _, module in projections(model))


def test_smoothing_helps_static_int8_where_a_channel_is_an_outlier() -> None:
    original = float_model()
    with torch.no_grad():
        for layer in original.model.layers:
            layer.input_layernorm.weight[3] *= 50
            layer.post_attention_layernorm.weight[5] *= 50
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[:, 3] /= 50
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[:, 5] /= 50
    errors = {
        name: relative_error(
            quantize_model(copy.deepcopy(original), method, ids(), replace(QUICK, **options)), original
        )
        for name, method, options in (
            ("static", "w8a8-static", {}),
            ("smooth", "smoothquant", {}),
            ("smooth, dynamic", "smoothquant", {"activations": "dynamic"}),
            ("dynamic", "w8a8-dynamic", {}),
        )
    }
    assert errors["smooth"] < 0.5 * errors["static"]
    assert errors["smooth, dynamic"] < 0.5 * errors["dynamic"]


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy"])
def test_static_scales_come_from_the_calibration(calibration) -> None:
    original = float_model()
    model = quantize_model(copy.deepcopy(original), "w8a8-static", ids(40), replace(QUICK, calibration=calibration))
    assert relative_error(model, original) < 0.15
    layer = model.model.layers[0].self_attn
    assert torch.equal(layer.q_proj.activation_scale, layer.v_proj.activation_scale)
    inputs: list[Tensor] = []
    hook = original.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        original(ids(40))
    hook.remove()
    low, high = float(inputs[0].min()), float(inputs[0].max())
    scale = float(layer.q_proj.activation_scale)
    if calibration == "minmax":
        assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    else:
        assert scale <= (high - low) / 255 * 1.001


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_shrink_on_request(dtype, tied) -> None:
    original = float_model(tie_word_embeddings=tied)
    model = quantize_model(copy.deepcopy(original), "rtn-int8", options=replace(QUICK, embeddings=dtype))
    assert isinstance(model.model.embed_tokens, PackedEmbedding if dtype == "int8" else FloatEmbedding)
    assert relative_error(model, original) < 0.03
    description = json.loads(json.dumps(describe_quantized(model, "rtn-int8")))
    again = build_quantized(model.config, description, model.state_dict())
    assert torch.equal(logits(again), logits(model))
    labels = ids(2, 16)
    assert model.loss(labels[:, :-1], labels[:, 1:]).isfinite()


# GGUF blocks


def block_model(**changes: object) -> BitNetForCausalLM:
    return float_model(**{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, **changes})


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_gguf_methods_store_the_bytes_of_the_quantizer(method, tmp_path) -> None:
    original = block_model(tie_word_embeddings=False)
    calibration = ids() if METHODS[method].needs_calibration else None
    model = quantize_model(copy.deepcopy(original), method, calibration, options=QUICK)
    kind, config = method.removeprefix("gguf-").upper(), model.config
    if kind in (*BLOCK_TYPES, *IMPORTANT_TYPES):
        types = {name: kind for name, _ in projections(model)}
        assert isinstance(model.model.embed_tokens, nn.Embedding)
    else:
        names = dict([*gguf_names.projection_names(config), *gguf_names.table_names(config)])
        shapes = {f"{names[n]}.weight": tuple(original.get_submodule(n).weight.shape) for n in names}
        from bitnet.quant.blocks import mixtures

        found = mixtures.tensor_types(kind, shapes)
        types = {ours: found[f"{theirs}.weight"] for ours, theirs in names.items()}
        assert isinstance(model.model.embed_tokens, BlockEmbedding)
        assert len(types) == 9
        assert len(set(types.values())) > 1
    for name, block_type in types.items():
        module, weight = model.get_submodule(name), original.get_submodule(name).weight.detach()
        assert module.block_type == block_type
        if calibration is None:
            assert torch.equal(module.data, kernels.blocks.quantize(weight, block_type)), name
        assert torch.equal(module.dequantize(), kernels.blocks.dequantize(module.data, block_type))
        assert module.bits_per_weight()[1] == 8 * module.data.shape[1] / module.in_features
    most = 1.4 if kind == "Q1_0" else 1.2 if METHODS[method].bits < 4 else 0.4  # Q1_0 has the signs alone
    assert relative_error(model, original) < most
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    description = json.loads(json.dumps(describe_quantized(model, method)))
    again = build_quantized(config, description, load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(again), logits(model))
    assert METHODS[method].bits <= model_bits(model)[1]


def test_gguf_importance_is_the_mean_square_of_the_float_inputs() -> None:
    original, seen = block_model(num_hidden_layers=2), {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in projections(original)
    ]
    with torch.no_grad():
        original(ids())
    for hook in hooks:
        hook.remove()
    model = quantize_model(copy.deepcopy(original), "gguf-q4_k", ids(), QUICK)
    known = replace(QUICK, importance=measure_importance(original, ids(), QUICK))
    again = quantize_model(copy.deepcopy(original), "gguf-q4_k", ids(), known)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    plain = quantize_model(copy.deepcopy(original), "gguf-q4_k", options=QUICK)
    weighted, unweighted = 0.0, 0.0
    for name, module in projections(model):
        importance = torch.cat(seen[name]).flatten(0, 1).square().mean(0)
        weight = original.get_submodule(name).weight.detach()
        weighted += float(((module.dequantize() - weight).square() * importance).sum())
        unweighted += float(((plain.get_submodule(name).dequantize() - weight).square() * importance).sum())
    assert weighted < 0.98 * unweighted


@pytest.mark.parametrize("method", ["gguf-q4_k", "gguf-q4_0"])
def test_gguf_compatible_blocks_are_ggmls_and_no_better(method) -> None:
    original, kind = block_model(), method.removeprefix("gguf-").upper()
    ours, theirs = (
        quantize_model(copy.deepcopy(original), method, options=replace(QUICK, compatible=compatible))
        for compatible in (False, True)
    )
    for name, module in projections(theirs):
        weight = original.get_submodule(name).weight.detach()
        assert torch.equal(module.data, kernels.blocks.quantize(weight, kind, compatible=True))
        errors = [(m.dequantize() - weight).square().sum() for m in (ours.get_submodule(name), module)]
        assert errors[0] < errors[1]


def test_gguf_errors_are_named() -> None:
    with pytest.raises(ValueError, match=r"Q4_K has blocks of 256, which do not divide the input channels of model"):
        quantize_model(float_model(), "gguf-q4_k", options=QUICK)
    with pytest.raises(ValueError, match=r"16 tokens; give at least 128"):
        quantize_model(block_model(), "gguf-q4_k", ids(2, 8), QUICK)
    with pytest.raises(ValueError, match=r"'Q9_K' is unknown"):
        BlockLinear(256, 4, block_type="Q9_K")


# Bad input


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("int4", {}, r"'int4' is unknown; choose one of fp16"),
        ("gptq-4", {"ids": None}, r"gptq-4 needs calibration text"),
        ("awq", {"ids": ids(2, 8)}, r"16 tokens; give at least 128"),
        ("w8a8-static", {"ids": ids().float()}, r"float32 \[12, 48\]; give int64"),
        ("w8a8-static", {"ids": ids().flatten()}, r"\[576\]; give int64 \[B, T\]"),
        ("smoothquant", {"ids": ids(2, 80)}, r"80 tokens and the model takes 64"),
        ("gptq-4", {"ids": ids() + 100}, r"vocabulary ends at 159"),
        ("gptq-4", {"group_size": 128}, r"group_size 128 does not divide the 64 input channels of model.layers.0"),
        ("rtn-int4", {"group_size": 48}, r"group_size 48"),
        ("rtn-int4", {"embeddings": "int3"}, r"'int3' are unknown"),
        ("smoothquant", {"activations": "some"}, r"'some' are unknown"),
        ("smoothquant", {"alpha": 2.0}, r"alpha is 2"),
        ("w8a8-static", {"calibration": "guess"}, r"'guess'"),
        ("gptq-4", {"algorithm": "quick"}, r"'quick'"),
        ("rtn-int4", {"version": 3}, r"version is 3"),
        ("hqq-4", {"symmetric": True}, r"HQQ has no zero points"),
        ("ptqtp", {"group_size": 48}, r"group_size 48 does not divide"),
        ("autoround-4", {"tuning_steps": 0}, r"tuning_steps is 0"),
        ("autoround-4", {"ids": None}, r"autoround-4 needs calibration text"),
        ("llm-int8", {"outlier_threshold": -1.0}, r"outlier_threshold is -1"),
        ("mixed-4", {"target_bits": 2.2}, r"a target of 2\.2 bits is below the 2\.\d\d of 2-bit codes with scales"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(method, changes, message) -> None:
    options = replace(QUICK, **{name: value for name, value in changes.items() if name != "ids"})
    with pytest.raises(ValueError, match=message):
        quantize_model(float_model(), method, changes.get("ids", ids()), options)


@pytest.mark.parametrize("method", ["mxfp4", "gptq-nvfp4"])
def test_four_bit_floats_refuse_rows_that_their_blocks_do_not_fill(method) -> None:
    with pytest.raises(
        ValueError, match=r"FP4 has blocks of \d+, which do not divide the input channels of model\.lay"
    ):
        quantize_model(float_model(intermediate_size=72), method, ids(), QUICK)


def test_outlier_channels_stay_in_16_bits_and_none_is_w8a8() -> None:
    original = float_model()
    with torch.no_grad():
        original.model.layers[0].input_layernorm.weight[3] *= 100
    found = quantize_model(copy.deepcopy(original), "llm-int8", ids(), replace(QUICK, outlier_threshold=20.0))
    assert found.model.layers[0].self_attn.q_proj.outliers.tolist() == [3]
    assert found.model.layers[1].mlp.up_proj.outliers.tolist() == []
    plain = quantize_model(copy.deepcopy(original), "w8a8-dynamic", options=QUICK)
    assert relative_error(found, original) < 0.5 * relative_error(plain, original)
    never = quantize_model(copy.deepcopy(original), "llm-int8", ids(), replace(QUICK, outlier_threshold=1e9))
    assert torch.equal(logits(never), logits(plain))


def test_learned_rounding_lowers_the_error_of_the_first_block() -> None:
    original, text = float_model(), ids()
    errors = {}
    with torch.no_grad():
        embedded = original.model.embed_tokens(text)
        positions = original.model.cos[:48], original.model.sin[:48]
        expected = original.model.layers[0](embedded, *positions, None)
        for method in ("rtn-int3", "autoround-3"):
            model = quantize_model(copy.deepcopy(original), method, text, replace(QUICK, tuning_steps=40))
            found = model.model.layers[0](embedded, *positions, None)
            errors[method] = float((found - expected).norm())
    assert errors["autoround-3"] < 0.95 * errors["rtn-int3"]


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="group_sizes"):
        Options(group_sizes=32)


def test_models_that_cannot_be_quantized_are_named() -> None:
    with pytest.raises(ValueError, match="trained with ternary weights"):
        quantize_model(float_model(quantizer="ternary"), "rtn-int4", options=QUICK)
    with pytest.raises(ValueError, match="packed or quantized already"):
        quantize_model(quantize_model(float_model(), "nf4", options=QUICK), "rtn-int4", options=QUICK)
    broken = float_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    before = copy.deepcopy(broken)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj has NaN"):
        quantize_model(broken, "rtn-int4", options=QUICK)
    assert {type(m) for _, m in projections(broken)} == {type(m) for _, m in projections(before)}
    with pytest.raises(ValueError, match="3 bits wants multiples of 32"):
        quantize_model(float_model(intermediate_size=80), "rtn-int3", options=replace(QUICK, group_size=16))
    model, layer = float_model(), {"kind": "FloatLinear", "in_features": 64, "out_features": 96}
    with pytest.raises(ValueError, match=r"no place for a module model\.layers\.7\.mlp\.up_proj"):
        build_quantized(model.config, {"modules": {"model.layers.7.mlp.up_proj": layer}}, model.state_dict())


def test_too_little_text_for_gptq_warns() -> None:
    model = float_model(intermediate_size=256)
    with pytest.warns(
        RuntimeWarning, match=r"144 calibration tokens are fewer than 4 for each of the 256 channels.*give 1,024"
    ):
        quantize_model(model, "gptq-4", ids(3), QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(float_model(), "gptq-4", ids(11), QUICK)


def test_gptq_chooses_its_damping_on_held_out_tokens(monkeypatch) -> None:
    chosen: list[float | None] = []
    original, choices = drivers.gptq_quantize, iter([0.3, None, 0.1, 0.03] * 2)

    def choose(weight: Tensor, fitted: Tensor, held_out: Tensor, grid: Grid, **options: object) -> float | None:
        assert fitted.shape == held_out.shape == (weight.shape[1],) * 2
        assert not torch.equal(fitted, held_out)
        return next(choices)

    def spy(*arguments: object, damping: float | None, **options: object):
        chosen.append(damping)
        return original(*arguments, damping=damping, **options)

    monkeypatch.setattr(drivers, "choose_damping", choose)
    monkeypatch.setattr(drivers, "gptq_quantize", spy)
    model = quantize_model(float_model(), "gptq-4", ids(), replace(QUICK, damping=None))
    assert chosen == [0.3, 0.3, 0.3, 0.1, 0.1, 0.03] * 2  # o_proj was rounded
    rounded = quantize_model(float_model(), "rtn-int4", options=QUICK)
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(model.get_submodule(name).qweight, rounded.get_submodule(name).qweight)
    chosen.clear()
    quantize_model(float_model(), "gptq-4", ids(), replace(QUICK, damping=None, algorithm="original"))
    assert chosen == [None] * 14
