"""Models that were trained ternary with a scale for each 64 or 128 columns: packed folders, GGUF, GPTQ's layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.loading import open_model
from bitnet.kernels.cpu import native
from bitnet.model import BitNetForCausalLM, bit_linears
from bitnet.model.linear import PackedLinear, codes_and_scale
from bitnet.quant.gptq_layout import unpack_gptq
from bitnet.storage.contents import open_contents, report
from bitnet.storage.folders import save_packed
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFError, GGUFFile
from bitnet.storage.gguf.names import QUANTIZER
from bitnet.storage.hf import gptq
from bitnet.storage.hf import write as hf_write
from bitnet.storage.safetensors import load_tensors
from bitnet.storage.source import open_source
from tests.oracles.llama import LlamaModel
from tests.storage.builders import SHAPE, gguf_model, rewritten
from tests.vocabularies import stdlib_tokenizer

IDS = torch.arange(260, 300)[None]


def model_of(quantizer: str = "ternary-g64", **changes: Any) -> BitNetForCausalLM:
    torch.manual_seed(0)
    return gguf_model(quantizer=quantizer, **changes)


def write(model: BitNetForCausalLM, path: Path, kind: str) -> float:
    return gguf_write.write(model, path, kind, tokenizer=stdlib_tokenizer(SHAPE.vocab_size), embedding_type="F32")


def assert_same_codes(model: BitNetForCausalLM, back: BitNetForCausalLM) -> None:
    assert back.config.quantizer == model.config.quantizer
    for name, module in bit_linears(model):
        found = back.get_submodule(name)
        assert isinstance(found, PackedLinear)
        for ours, theirs in zip(codes_and_scale(module), codes_and_scale(found), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("quantizer", "kind", "shape"),
    [
        ("ternary-g64", "Q2_0", {}),
        ("ternary-g128", "PQ2_0", {}),
        ("ternary-g128", "Q2_0", {"sub_norm": False, "tie_word_embeddings": False}),  # rotary rows in another order
        ("ternary-g64", "F16", {"sub_norm": False}),
    ],
)
def test_gguf_files_hold_codes_and_scales_exactly(tmp_path: Path, quantizer: str, kind: str, shape: dict) -> None:
    model = model_of(quantizer, **shape)
    assert write(model, tmp_path / "x.gguf", kind) == 0  # nothing was rounded
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata[QUANTIZER] == quantizer
    assert not any(name.endswith(".scale") for name in file.tensors)
    source = open_source(tmp_path / "x.gguf")
    assert_same_codes(model, source.model())
    latent = source.latent()
    assert_same_codes(model, latent.pack(embeddings=False))
    opened = open_model(tmp_path / "x.gguf", embeddings="float16")
    with torch.no_grad():
        expected = model(IDS)  # 8 bits a token, as in training: some of other codes by another order of additions
        assert (opened(IDS) - expected).norm() < 0.05 * expected.norm()
        if kind == "PQ2_0":  # not in mainline
            return
        plain = model_of("none", **shape)
        state = {f"{name}.weight": each.dequantize() for name, each in _stored(model).items()}
        plain.load_state_dict({**model.state_dict(), **state})
        with LlamaModel(tmp_path / "x.gguf", 64) as loaded:
            theirs = torch.tensor(loaded.logits(IDS[0].tolist()))
        assert (theirs - plain(IDS)[0]).norm() < 0.03 * plain(IDS).norm()


def _stored(model: BitNetForCausalLM) -> dict[str, Any]:
    return {name: gptq._of_groups(module) for name, module in bit_linears(model)}


def test_files_that_do_not_hold_what_they_say_are_refused_or_read_as_floats(tmp_path: Path) -> None:
    model = model_of("ternary-g64")
    for kind in ("TQ2_0", "I2_S", "BF16", "PQ2_0", "Q4_0"):
        with pytest.raises(ValueError, match=r"ternary-g64 has a float16 scale for each 64 weights.*choose Q2_0"):
            write(model, tmp_path / "x.gguf", kind)
    write(model, tmp_path / "x.gguf", "Q2_0")
    for value, message in (("ternary-g128", "does not hold ternary codes with a scale for each 128"), ("fp7", "fp7")):
        with pytest.raises(GGUFError, match=message):
            open_source(rewritten(tmp_path / "x.gguf", {QUANTIZER: value})).model()
    unmarked = rewritten(tmp_path / "x.gguf", {QUANTIZER: None})
    assert open_source(unmarked).model().config.quantizer == "none"


@pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")
@pytest.mark.parametrize("quantizer", ["ternary-g64", "ternary-g128"])
def test_packed_folders_run_on_the_native_engine(tmp_path: Path, quantizer: str) -> None:
    model = model_of(quantizer, intermediate_size=320, tie_word_embeddings=False)  # whose last group of 128 is short
    with torch.no_grad():
        expected = model.pack()(IDS)
    save_packed(tmp_path / "p", model, stdlib_tokenizer(SHAPE.vocab_size).files())
    opened = open_model(tmp_path / "p")
    assert isinstance(opened, Engine)
    assert opened.kernel == "native int8"
    logits = opened(IDS)
    assert (logits - expected).norm() < 0.02 * expected.norm()
    cache = opened.new_cache(1, 64)
    steps = torch.cat([opened(IDS[:, i : i + 1], cache) for i in range(IDS.shape[1])], dim=1)
    assert torch.equal(steps, logits)  # a token does not depend on the others
    back = open_source(tmp_path / "p").model()
    layer = back.model.layers[0].mlp.down_proj
    assert layer.weight_scale.dtype == torch.float16
    assert list(layer.weight_scale.shape) == [256, -(-320 // layer.group_size)]


def test_inspect_counts_zeros_of_groups(tmp_path: Path) -> None:
    model = model_of("ternary-g64")
    write(model, tmp_path / "x.gguf", "Q2_0")
    zeros = [int((codes_and_scale(module)[0] == 0).sum()) for _, module in bit_linears(model)]
    save_packed(tmp_path / "p", model.pack(), stdlib_tokenizer(SHAPE.vocab_size).files())
    for path in (tmp_path / "x.gguf", tmp_path / "p"):
        with open_contents(path) as contents:
            found = report(contents)
        total = sum(row["parameters"] for row in found["tensors"] if "zeros" in row)
        assert found["ternary_parameters"] == total == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
        assert found["zeros"] == pytest.approx(sum(zeros) / total)


def test_gptqs_layout_holds_codes_and_scales_exactly(tmp_path: Path) -> None:
    for form in ("packed", "master"):
        with pytest.raises(ValueError, match=r"one scale a matrix and the quantizer is 'ternary-g64'.*--to gptq"):
            hf_write.write(model_of("ternary-g64"), tmp_path / "x", form)
    model = model_of("ternary-g64")
    weights = {name: codes_and_scale(module) for name, module in bit_linears(model)}
    for name, made in (("run", model), ("packed", model_of("ternary-g64").pack())):
        gptq.write(made, tmp_path / name, {})
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["model_type"] == "bitnet"
        assert config["quantization_config"]["group_size"] == 64
        tensors = load_tensors(tmp_path / name / "model.safetensors")
        for layer, (codes, scale) in weights.items():
            parts = {part: tensors.pop(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
            found = unpack_gptq(parts, 2, 1)
            assert torch.equal(found.codes.to(torch.int8) - 1, codes)
            assert torch.equal(found.scale.float(), scale)
        assert {name for name in tensors if not name.endswith("norm.weight")} == {"model.embed_tokens.weight"}
        assert tensors["model.embed_tokens.weight"].dtype == torch.float32


@pytest.mark.parametrize(("quantizer", "kind"), [("ternary-g64", "Q2_0"), ("ternary-g128", "PQ2_0")])
def test_files_of_others_with_scales_of_groups_are_trained_on_from_their_codes(
    tmp_path: Path, quantizer: str, kind: str
) -> None:
    """Absmean of ternary floats would shrink them; told the groups, training begins with the file's very weights."""
    model = model_of(quantizer)
    write(model, tmp_path / "x.gguf", kind)
    source = open_source(rewritten(tmp_path / "x.gguf", {QUANTIZER: None}))
    latent = source.latent(quantizer)
    assert latent.config.quantizer == "none"  # the training's configuration says what becomes of it
    for name, layer in bit_linears(latent):
        layer.quantizer = quantizer
        for ours, theirs in zip(codes_and_scale(model.get_submodule(name)), codes_and_scale(layer), strict=True):
            assert torch.equal(ours, theirs), name
    plain = source.model().model.layers[0].mlp.up_proj.weight
    assert torch.equal(source.latent("int8").model.layers[0].mlp.up_proj.weight, plain)
