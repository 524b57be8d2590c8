"""Hugging Face folders with their weights as they are stored: 16-bit floats, and GPTQ and AWQ folders of other makers.

The folders are made here, code by code, as the layouts are defined; the oracle is the float model of the weights that
they stand for.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import open_model
from bitnet.kernels import use_backend
from bitnet.kernels.cpu import native
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.weight_only import FloatLinear, GroupLinear
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.contents import open_contents
from bitnet.storage.hf import gptq
from bitnet.storage.hf.write import config_of
from bitnet.storage.safetensors import save_tensors
from bitnet.storage.source import open_source
from tests.builders import tiny_model

needs_native = pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")
CONFIG = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, quantizer="none", sub_norm=False, tie_word_embeddings=False,
    initializer_range=0.3,
)  # fmt: skip
IDS = torch.tensor([[3, 9, 4, 1, 77, 5]])
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def float_model(**changes: object) -> BitNetForCausalLM:
    torch.manual_seed(0)
    model = BitNetForCausalLM(CONFIG.replace(**changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def save(folder: Path, model: BitNetForCausalLM, tensors: dict[str, Tensor], quantization: object = None) -> None:
    folder.mkdir()
    config = config_of(model, "master")
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder / "model.safetensors", tensors)


def words(values: list[int], bits: int) -> list[int]:
    """Values as a little-endian stream of bits, in signed 32-bit words."""
    stream = sum(value << bits * index for index, value in enumerate(values))
    count = len(values) * bits // 32
    found = [stream >> 32 * index & 0xFFFFFFFF for index in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def awq_words(values: list[int]) -> list[int]:
    return words([values[8 * (i // 8) + AWQ_COLUMNS[i % 8]] for i in range(len(values))], 4)


def quantized(model: BitNetForCausalLM, method: str, bits: int, size: int, version: int, order: bool) -> dict:
    """Tensors of a checkpoint; the model's weights become what they stand for."""
    tensors = {name: value.half() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        N, K = module.weight.shape
        groups = 1 if size == -1 else -(-K // size)
        g_idx = torch.arange(K) // (K if size == -1 else size)
        if order:
            g_idx = g_idx[torch.randperm(K, generator=generator)]
        codes = torch.randint(2**bits, (N, K), generator=generator)
        zeros = torch.randint(1, 2**bits - 1, (N, groups), generator=generator)
        scales = (torch.rand(N, groups, generator=generator) * 0.4 / 2**bits).half()
        module.weight.data = (codes - zeros[:, g_idx]) * scales.float()[:, g_idx]
        del tensors[f"{name}.weight"]
        if method == "gptq":
            qweight = torch.tensor([words(row, bits) for row in codes.tolist()]).t()
            stored = (zeros - (2 - version)).t().tolist()
            qzeros = torch.tensor([words(row, bits) for row in stored])
            tensors[f"{name}.g_idx"] = g_idx.int()
        else:
            qweight = torch.tensor([awq_words(row) for row in codes.t().tolist()])
            qzeros = torch.tensor([awq_words(row) for row in zeros.t().tolist()])
        tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"] = qweight.int().contiguous(), qzeros.int().contiguous()
        tensors[f"{name}.scales"] = scales.t().contiguous()
    return tensors


def check(folder: Path, model: BitNetForCausalLM) -> None:
    """Both engines give the logits of the float model, whose other tensors are rounded as in the folder."""
    for name, value in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            value.copy_(value.half().float())
    with torch.inference_mode():
        expected = model(IDS)
        with use_backend("reference"):
            torch.testing.assert_close(open_model(folder)(IDS), expected, rtol=1e-4, atol=1e-4)
        if native.instruction_sets():
            engine = open_model(folder, activations="float")
            assert isinstance(engine, Engine)
            torch.testing.assert_close(engine(IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "size", "version", "order"),
    [(2, 32, 1, False), (3, 64, 1, True), (4, 32, 2, True), (4, -1, 1, False), (8, 48, 1, False)],
)
def test_gptq_folders_of_others(tmp_path: Path, bits: int, size: int, version: int, order: bool) -> None:
    model = float_model()
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order, "sym": False, "damp_percent": 0.01,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "lm_head": False, "meta": {"quantizer": ["x:1"]},
    }  # fmt: skip
    save(tmp_path / "m", model, quantized(model, "gptq", bits, size, version, order), settings)
    check(tmp_path / "m", model)


def test_awq_folders_of_others(tmp_path: Path) -> None:
    model = float_model(qkv_bias=True)
    settings = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True,
        "modules_to_not_convert": ["model.layers.1.mlp"],
    }  # fmt: skip
    floats = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" in name}
    floats = {name: value.half() for name, value in floats.items()}
    tensors = quantized(model, "awq", 4, 32, 2, False)
    for name, value in floats.items():  # these modules stay floats
        model.get_parameter(name).data = value.float()
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{name.removesuffix('.weight')}.{part}"]
    save(tmp_path / "m", model, tensors | floats, settings)
    check(tmp_path / "m", model)
    with open_contents(tmp_path / "m") as contents:
        kinds = {entry.name: entry.type for entry in contents.entries}
    assert kinds["model.layers.0.mlp.up_proj"] == "awq"


def test_gptq_folders_of_ours_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_model(tiny_model("none"), "rtn-int4", options=Options(group_size=32, progress=False))
    gptq.write(model, tmp_path / "m", {})
    again = open_source(tmp_path / "m").model()
    with torch.inference_mode():
        assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(ValueError, match="was quantized after training and cannot be trained"):
        open_source(tmp_path / "m").latent()


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_folders_stay_16_bits_and_give_the_bits_of_their_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = float_model(qkv_bias=True).to(dtype)
    save(tmp_path / "m", model, dict(model.state_dict()))
    stored = open_source(tmp_path / "m").stored()
    assert stored is not None
    layers = [module for module in stored.modules() if isinstance(module, FloatLinear)]
    assert {layer.stored.dtype for layer in layers} == {dtype}
    assert not any(isinstance(module, nn.Linear) for module in stored.modules())
    engine = open_model(tmp_path / "m")
    whole = Engine.from_model(open_source(tmp_path / "m").model())
    with torch.inference_mode():
        assert torch.equal(engine(IDS), whole(IDS))
    assert engine.weight_bytes() < 0.6 * whole.weight_bytes()


def spoiled(model: BitNetForCausalLM, change: str) -> tuple[dict, dict]:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    tensors = quantized(model, "gptq", 4, 32, 1, False)
    layer = "model.layers.0.mlp.up_proj"
    if change == "bias":
        tensors[f"{layer}.bias"] = torch.ones(128).half()
    elif change == "zero":
        tensors[f"{layer}.qzeros"] = tensors[f"{layer}.qzeros"] | 15
    elif change == "group":
        tensors[f"{layer}.g_idx"] = tensors[f"{layer}.g_idx"] + 1
    elif change == "scales":
        tensors[f"{layer}.scales"] = tensors[f"{layer}.scales"].float() * 1e9
    elif change == "shape":
        tensors[f"{layer}.qweight"] = tensors[f"{layer}.qweight"][:-1].contiguous()
    elif change == "lack":
        del tensors[f"{layer}.scales"]
    else:
        tensors["model.layers.0.mlp.other_proj.qweight"] = torch.zeros(1, dtype=torch.int32)
    return tensors, settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bias", r"up_proj\.bias"),
        ("zero", "zero point of 0 minus 1, of which readers make 0 or 16"),
        ("group", r"up_proj\.g_idx names groups beyond the 2"),
        ("scales", r"up_proj\.scales do not fit float16"),
        ("shape", r"up_proj\.qweight is \[7, 128\] and .* says \[8, 128\]"),
        ("lack", r"lacks 1 tensors .*, model\.layers\.0\.mlp\.up_proj\.scales among them"),
        ("more", r"no place for, such as model\.layers\.0\.mlp\.other_proj\.qweight"),
    ],
)
def test_damaged_group_folders_are_refused(tmp_path: Path, change: str, message: str) -> None:
    model = float_model()
    save(tmp_path / "m", model, *spoiled(model, change))
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "m")


def test_zero_biases_of_old_gptq_folders_are_none(tmp_path: Path) -> None:
    model = float_model()
    tensors = quantized(model, "gptq", 4, 32, 1, False)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128).half()
    save(tmp_path / "m", model, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    layer = open_source(tmp_path / "m").model().get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, GroupLinear)
    assert layer.bias is None
    check(tmp_path / "m", model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 5}, "bits 5; of gptq there are 2, 3, 4, 8"),
        ({"quant_method": "awq", "bits": 8}, "bits 8; of awq there are 4"),
        ({"quant_method": "gptq", "bits": True}, "bits True"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, "lm_head True, which is not understood"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}}, "dynamic .*, which is not understood"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
    ],
)
def test_schemes_that_are_not_understood_are_refused_by_name(tmp_path: Path, settings: dict, message: str) -> None:
    save(tmp_path / "m", float_model(), {}, settings)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "m")
