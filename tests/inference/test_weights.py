"""Weights of every format on the native kernels: the numbers that the format defines, the same bits everywhere."""

import pytest
import torch
from torch import Tensor, nn

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.weights import float_table, matrix_of, of_blocks, stored
from bitnet.kernels.cpu import native
from bitnet.kernels.cpu.matrices import NativeMatrix, linear
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.compound import AffineLinear, ScaledBlockLinear, TritPlanesLinear
from bitnet.model.quantized import StaticInt8Linear
from bitnet.model.weight_only import BlockEmbedding, BlockLinear, FloatLinear, GroupLinear, NF4Linear, StoredLayer
from bitnet.quant.blocks import READ_ONLY, TYPES, dequantize_blocks, iquants
from bitnet.quant.float4 import quantize_float4
from bitnet.quant.grouped import Grid, QuantizedWeight, round_to_nearest
from bitnet.quant.hqq import hqq_quantize
from bitnet.quant.trit_planes import quantize_planes
from tests.builders import random_ids

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")
FLOATS = ("float32", "float16", "bfloat16", "float8")


def shuffled(quantized: QuantizedWeight) -> QuantizedWeight:
    """The same weight with its input channels in another order, as act-order leaves them."""
    order = torch.randperm(quantized.codes.shape[1], generator=torch.Generator().manual_seed(0))
    return QuantizedWeight(
        quantized.codes[:, order], quantized.scale, quantized.zero_point, quantized.g_idx[order], quantized.bits
    )


def grouped(bits: int, group: int, *, act_order: bool = False, awq: bool = False, columns: int = 288) -> GroupLinear:
    quantized = round_to_nearest(torch.randn(32, columns), Grid(bits), group)
    return GroupLinear.from_quantized(
        shuffled(quantized) if act_order else quantized,
        torch.randn(32),
        input_scale=torch.rand(columns) + 0.5 if awq else None,
    )


def scaled_blocks() -> ScaledBlockLinear:
    layer = ScaledBlockLinear(128, 40)
    layer.data, of_tensor = quantize_float4(torch.randn(40, 128), "NVFP4")
    layer.tensor_scale = torch.tensor([of_tensor])
    return layer


LAYERS: dict[str, object] = {
    **{kind: lambda kind=kind: BlockLinear.from_linear(nn.Linear(768, 40), kind, torch.ones(768)) for kind in TYPES},
    **{dtype: lambda dtype=dtype: FloatLinear.from_linear(nn.Linear(75, 33), dtype) for dtype in FLOATS},
    "nf4": lambda: NF4Linear.from_linear(nn.Linear(192, 20)),
    "nf4 without double": lambda: NF4Linear.from_linear(nn.Linear(192, 20), double_quant=False),
    "rtn 4 of 96": lambda: grouped(4, 96),
    "rtn 2 of 8": lambda: grouped(2, 8),
    "rtn 3 of 48": lambda: grouped(3, 48),
    "rtn 8 of 16": lambda: grouped(8, 16),
    "rtn 4 of a row": lambda: grouped(4, -1, columns=72),
    "act-order 4": lambda: grouped(4, 32, act_order=True),
    "act-order 3": lambda: grouped(3, 144, act_order=True),
    "hqq 4": lambda: AffineLinear.from_quantized(hqq_quantize(torch.randn(32, 288), 4, 96), torch.randn(32)),
    "hqq 3 of 48": lambda: AffineLinear.from_quantized(hqq_quantize(torch.randn(40, 288), 3, 48)),
    "hqq 2 of a row": lambda: AffineLinear.from_quantized(hqq_quantize(torch.randn(32, 80), 2, -1)),
    "two planes": lambda: TritPlanesLinear.from_quantized(quantize_planes(torch.randn(40, 288), 96), torch.randn(40)),
    "two planes of 48": lambda: TritPlanesLinear.from_quantized(quantize_planes(torch.randn(20, 144), 48)),
    "nvfp4": scaled_blocks,
    "awq 4": lambda: grouped(4, 32, awq=True),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_four_bit_floats_are_the_formats(kind: str) -> None:
    columns, each = 256, READ_ONLY[kind]
    data = torch.randint(256, (40, columns // each.block_size, each.bytes), dtype=torch.uint8)
    data[..., :1] = torch.randint(118, 128, data[..., :1].shape, dtype=torch.uint8)
    x = torch.randn(9, columns)
    expected = x.double() @ dequantize_blocks(data.view(40, -1), kind).double().T
    for activations, bound in (("float", 2e-6), ("int16", 4e-5), ("int8", 1e-2)):
        y = linear(matrix_of(of_blocks(data.view(40, -1), kind, columns, activations)), x)
        assert float((y - expected).norm() / expected.norm()) < bound


def exact(layer: StoredLayer, x: Tensor) -> Tensor:
    divisor, bias = getattr(layer, "input_scale", None), getattr(layer, "bias", None)
    x = x.double() if divisor is None else x.double() / divisor.double()
    return x @ layer.dequantize().double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_the_formats_on_every_instruction_set_for_any_number_of_tokens(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()  # type: ignore[operator]
    x = torch.randn(37, layer.in_features)
    expected = exact(layer, x)
    for activations, bound in (("float", 2e-6), ("int16", 4e-5), ("int8", 1e-2)):
        matrix, seen = matrix_of(stored(layer, activations)), []
        for isa in native.instruction_sets():
            with native.use_instruction_set(isa):
                seen.append(linear(matrix, x))
                for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19):
                    assert torch.equal(linear(matrix, x[:count]), seen[-1][:count]), (isa, count)
        assert all(torch.equal(y, seen[0]) for y in seen)
        assert float((seen[0] - expected).norm() / expected.norm()) < bound


def test_static_activations_are_the_layers_own_integers() -> None:
    torch.manual_seed(0)
    layer = StaticInt8Linear.from_linear(nn.Linear(100, 40), torch.tensor([0.02]), torch.tensor([-7]))
    x = torch.randn(9, 100)
    torch.testing.assert_close(linear(matrix_of(stored(layer)), x), layer(x), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_visible() -> None:
    layer = BlockLinear.from_linear(nn.Linear(64, 32), "Q4_0")
    x = torch.randn(8, 64)
    x[3, 40] = torch.nan
    for activations in ("float", "int16", "int8"):
        y = linear(matrix_of(stored(layer, activations)), x)
        assert y[3].isnan().all()
        assert y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_memory_is_little_more_than_the_file() -> None:
    for kind in TYPES:
        layer = BlockLinear(1024, 64, block_type=kind)
        # Vectors of a codebook lie there as codes of 4 bits, one a weight.
        bytes_in_memory = NativeMatrix.nbytes(stored(layer).form, 64)
        assert bytes_in_memory <= (4.7 / 8 * 1024 * 64 if kind in iquants.BITS else 1.15 * layer.weight_bytes()), kind


CONFIG = ModelConfig(
    vocab_size=70, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, sub_norm=False, quantizer="none",
)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3"])
def test_a_model_of_mixed_types_is_the_torch_model(tied: bool, shape: str) -> None:
    torch.manual_seed(0)
    config = CONFIG.replace(tie_word_embeddings=tied, qkv_bias=shape == "qwen2", qk_norm=shape == "qwen3")
    model = BitNetForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                value.normal_(1.0 if "norm" in name else 0.0, 0.3)
            else:
                value.mul_(4)
    # As mixtures do it: more bits for the values, gate and up of two types.
    kinds = {"v_proj": "Q6_K", "gate_proj": "Q5_K", "down_proj": "Q6_K"}
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, BlockLinear.from_linear(module, kinds.get(child, "Q4_K")))
    ids = random_ids(config, 2, 11)
    expected = model(ids).detach()
    engine = Engine.from_model(model, activations="float")
    assert float((engine(ids) - expected).norm() / expected.norm()) < 1e-5
    cache = engine.new_cache(2, 11)
    assert torch.equal(torch.cat([engine(part, cache) for part in ids.split([7, 1, 3], 1)], 1), engine(ids))
    changed = Engine.from_model(model, activations="int8")(ids)
    assert 1e-6 < float((changed - expected).norm() / expected.norm()) < 0.05


def test_an_embedding_in_blocks_serves_as_the_head() -> None:
    model = BitNetForCausalLM(CONFIG).eval()
    table = BlockEmbedding(256, 70, block_type="Q4_0")
    table.data = BlockLinear.from_linear(nn.Linear(256, 70, bias=False), "Q4_0").data
    model.model.embed_tokens = table
    ids = random_ids(CONFIG, 1, 9)
    torch.testing.assert_close(Engine.from_model(model, activations="float")(ids), model(ids).detach())


def test_a_16_bit_embedding_is_exact_to_its_source() -> None:
    weight = torch.randn(40, 32)
    assert float_table(weight.bfloat16().float(), "float16").form.codec == "bfloat16"
    assert float_table(weight.half().float(), "float16").form.codec == "float16"
    ids = random_ids(CONFIG, 1, 9)
    model = BitNetForCausalLM(CONFIG.replace(quantizer="ternary", sub_norm=True)).eval()
    for value in model.parameters():
        value.data = value.data.bfloat16().float()
    expected = model.pack(embeddings=False)(ids).detach()
    engine = Engine.from_model(model, embeddings="float16")
    torch.testing.assert_close(engine(ids), expected)
    assert engine.weight_bytes() < Engine.from_model(model).weight_bytes()
    model.pack()
    with pytest.raises(ValueError, match="stored as PackedEmbedding, not in floats; leave embeddings out"):
        Engine.from_model(model, embeddings="float16")


@pytest.mark.parametrize(
    ("kind", "takes"), [("Q4_K", "int16"), ("Q6_K", "int16"), ("Q8_0", "float"), ("IQ4_NL", "float")]
)
def test_codes_of_at_most_six_bits_take_int16_by_themselves(kind: str, takes: str) -> None:
    layer = BlockLinear.from_linear(nn.Linear(256, 32), kind)
    assert stored(layer, "auto").form.activations == takes
    x = torch.randn(5, 256)
    assert torch.equal(linear(matrix_of(stored(layer, "auto")), x), linear(matrix_of(stored(layer, takes)), x))
