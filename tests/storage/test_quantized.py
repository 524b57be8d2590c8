"""Models that were quantized after training, adapters, and weights that are no numbers, in the forms of others."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitnet.model import BitNetForCausalLM
from bitnet.model.lora import fingerprint, merge
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import METHODS, quantize_model
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.read import holds_ternary
from bitnet.storage.hf import gptq
from bitnet.storage.hf import write as hf_write
from bitnet.storage.source import open_source
from tests.builders import tiny_model
from tests.storage.builders import gguf_model

QUICK = Options(progress=False, group_size=32, damping=0.01, tuning_steps=2, target_bits=4.5)
PLAIN = {"quantizer": "none", "sub_norm": False}
LIKE_A_LINEAR = [
    "fp16", "bf16", "fp8", "nf4", "rtn-int4", "awq", "gptq-4", "hqq-4", "ptqtp", "mxfp4", "nvfp4", "gguf-q4_k_m",
    "gptq-ternary", "rotated-rtn-int4",
]  # fmt: skip
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


@functools.cache
def quantized(method: str) -> BitNetForCausalLM:
    """A model with fewer keys than queries and no sub-norms, as Llama's: nothing takes AWQ's factors of o_proj."""
    torch.manual_seed(0)
    model = gguf_model(**PLAIN)
    calibration = torch.randint(0, 400, (8, 64), generator=torch.Generator().manual_seed(1))
    return quantize_model(model, method, calibration, QUICK)


@torch.no_grad()
def logits(model: BitNetForCausalLM) -> Tensor:
    return model.eval()(IDS)


def divergence(a: BitNetForCausalLM, b: BitNetForCausalLM) -> float:
    p, q = (logits(each).double().log_softmax(-1) for each in (a, b))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", LIKE_A_LINEAR)
def test_folders_for_transformers_have_the_weights_as_floats(tmp_path: Path, method: str) -> None:
    """They had none of the projections, and transformers began with random ones."""
    hf_write.write(quantized(method), tmp_path / "m", "master")
    again = open_source(tmp_path / "m").model()
    assert divergence(quantized(method), again) < 1e-6
    assert "of few bits" in (tmp_path / "m" / "README.md").read_text() or method in ("fp16", "bf16", "fp8")


@pytest.mark.parametrize("method", ["w8a8-static", "smoothquant", "llm-int8"])
def test_integer_activations_are_not_dropped(tmp_path: Path, method: str) -> None:
    assert method in METHODS
    with pytest.raises(ValueError, match=r"multiplies INT8 activations .* quantize weights alone"):
        hf_write.write(quantized(method), tmp_path / "m", "master")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["awq", "rtn-int4", "nf4", "fp16"])
def test_gguf_files_have_what_a_layer_multiplies_by(tmp_path: Path, method: str) -> None:
    """AWQ's factor of a layer that nothing stands in front of was left out."""
    model = quantized(method)
    scaled = [module for module in model.modules() if getattr(module, "input_scale", None) is not None]
    assert bool(scaled) == (method == "awq")
    gguf_write.write(model, tmp_path / "m.gguf", "F32")
    assert divergence(model, open_source(tmp_path / "m.gguf").model()) < 1e-6


def test_gptq_folders_have_16_bit_tables_as_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = Options(progress=False, group_size=32, embeddings="float16")
    model = quantize_model(tiny_model("none"), "rtn-int4", options=options)
    gptq.write(model, tmp_path / "m", {})
    assert torch.equal(logits(open_source(tmp_path / "m").model()), logits(model))


@pytest.mark.parametrize("kind", ["F16", "F32", "TQ2_0", "I2_S"])
def test_a_ternary_file_is_ternary_whatever_it_is_written_in(tmp_path: Path, kind: str) -> None:
    """As floats it was taken for a float model by fine-tuning and by the engine, and for a ternary one by torch."""
    shape = {"hidden_act": "silu"} if kind == "TQ2_0" else {}
    gguf_write.write(gguf_model(**shape), tmp_path / "ternary.gguf", kind)
    source = open_source(tmp_path / "ternary.gguf")
    assert source.file is not None
    assert holds_ternary(source.file)
    assert source.model().config.quantizer == "ternary"
    gguf_write.write(gguf_model(**PLAIN), tmp_path / "float.gguf", "F32")
    file = open_source(tmp_path / "float.gguf").file
    assert file is not None
    assert not holds_ternary(file)


@pytest.mark.parametrize("place", ["model.embed_tokens", "model.norm", "model.layers.1.input_layernorm"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_never_written(tmp_path: Path, place: str, value: float) -> None:
    """Only those of projections were looked at."""

    def broken(quantizer: str) -> BitNetForCausalLM:
        model = tiny_model(quantizer)
        with torch.no_grad():
            model.get_submodule(place).weight.view(-1)[3] = value
        return model

    message = f"{place} has NaN or infinite weights; did the model's training diverge"
    for embeddings in (True, False):
        with pytest.raises(ValueError, match=message):
            broken("ternary").pack(embeddings=embeddings)
    with pytest.raises(ValueError, match=message):
        quantize_model(broken("none"), "rtn-int4", options=QUICK)
    for quantizer, form in (("none", "master"), ("ternary", "packed")):
        with pytest.raises(ValueError, match=message):
            hf_write.write(broken(quantizer), tmp_path / "m", form)
    for quantizer in ("none", "ternary"):
        with pytest.raises(ValueError, match="its weights are NaN or infinite"):
            gguf_write.write(broken(quantizer), tmp_path / "m.gguf", "F16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("quantizer", "kind"), [("none", "F32"), ("ternary", "F32"), ("ternary", "F16")])
def test_an_adapter_knows_its_base_in_any_file(tmp_path: Path, quantizer: str, kind: str) -> None:
    model = gguf_model(**(PLAIN if quantizer == "none" else {}))
    gguf_write.write(model, tmp_path / "m.gguf", kind)
    assert fingerprint(open_source(tmp_path / "m.gguf").frozen()) == fingerprint(model)


def test_adapters_may_have_a_rank_above_a_weights_rows() -> None:
    """PEFT trains such, where keys have few heads."""
    model, name = tiny_model("none", num_key_value_heads=1), "model.layers.0.self_attn.k_proj"
    rows, columns = model.get_submodule(name).weight.shape
    rank = rows + 8
    down, up = torch.randn(rank, columns) / columns, torch.randn(rows, rank) / rank
    merged, lost = merge(model, {name: (down, up)})
    assert lost == 0
    torch.testing.assert_close(
        merged.get_submodule(name).weight.detach(), model.get_submodule(name).weight.detach() + up @ down
    )


def test_a_merge_that_leaves_zeros_alone_keeps_the_scale(tmp_path: Path) -> None:
    model, name = tiny_model(), "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight.zero_()
    model.pack(embeddings=False)
    rows, columns = model.get_submodule(name).out_features, model.get_submodule(name).in_features
    adapter = torch.full((1, columns), 1e-6), torch.full((rows, 1), 1e-3)
    merged, _ = merge(model, {name: adapter})
    assert torch.equal(merged.get_submodule(name).weight_scale, model.get_submodule(name).weight_scale)
    hf_write.write(merged, tmp_path / "m", "packed")
    assert torch.equal(logits(open_source(tmp_path / "m").model()), logits(merged))
