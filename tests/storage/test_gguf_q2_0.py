"""Q2_0 and Q1_0 files: ternary models out and back, in llama.cpp, in both block sizes, with scales a group."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.inference.generation import SamplingConfig, generate
from bitnet.inference.loading import open_model
from bitnet.kernels import blocks, native_available
from bitnet.model import BitNetForCausalLM, bit_linears
from bitnet.model.compound import ScaledBlockLinear
from bitnet.model.linear import codes_and_scale
from bitnet.model.quantized import build
from bitnet.model.weight_only import BlockLinear
from bitnet.quant.blocks import ternary
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import NUMBERS, TYPES, GGUFError, GGUFFile
from bitnet.storage.source import open_source
from tests.oracles.llama import LlamaModel, quantize
from tests.storage.builders import SHAPE, gguf_model, rewritten
from tests.vocabularies import stdlib_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "bitnet": {}, "llama": {"sub_norm": False, "tie_word_embeddings": False},
    "qwen2": {"sub_norm": False, "qkv_bias": True}, "qwen3": {"sub_norm": False, "qk_norm": True, "head_dim": 32},
}  # fmt: skip
IDS = torch.arange(260, 300)


def write(model: BitNetForCausalLM, path: Path, kind: str, **options: Any) -> float:
    return gguf_write.write(model, path, kind, tokenizer=stdlib_tokenizer(SHAPE.vocab_size), **options)


def floats_of(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """The float model of the weights that a ternary one computes with."""
    plain = BitNetForCausalLM(model.config.replace(quantizer="none")).eval()
    state = dict(model.state_dict())
    for name, module in bit_linears(model):
        codes, scale = codes_and_scale(module)
        state[f"{name}.weight"] = codes * scale
    plain.load_state_dict(state)
    return plain


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.mark.parametrize(("kind", "quantizer"), [("Q2_0", "ternary"), ("Q2_0", "binary"), ("Q1_0", "binary")])
@pytest.mark.parametrize("shape", SHAPES)
def test_models_trained_here_run_in_llama_cpp(tmp_path: Path, shape: str, kind: str, quantizer: str) -> None:
    """As close to the model's weights as llama.cpp's own 8-bit activations allow, and back with the same codes."""
    torch.manual_seed(1)
    model = gguf_model(quantizer=quantizer, **SHAPES[shape])
    rounded = write(model, tmp_path / "x.gguf", kind, embedding_type="F32")
    assert 1e-6 < rounded < 2**-11
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.architecture == shape
    assert {info.type for info in file.tensors.values()} == {"F32", kind}
    assert not any(name.endswith(".scale") for name in file.tensors)
    with torch.no_grad(), LlamaModel(tmp_path / "x.gguf", 64) as loaded:
        theirs, ours = torch.tensor(loaded.logits(IDS.tolist())), floats_of(model)(IDS[None])[0]
    assert distance(theirs, ours) < 0.03

    back = open_source(tmp_path / "x.gguf").model()
    assert back.config.quantizer == "ternary"
    norms = model.state_dict()
    for name, module in bit_linears(model):
        codes, scale = codes_and_scale(module)
        found, stored = codes_and_scale(back.get_submodule(name))
        assert torch.equal(found, codes)
        assert float(stored) == float(scale.half())
        norm = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}.get(name.rpartition(".")[2])
        if norm and model.config.sub_norm:  # has what the rounding took
            key = f"{name.rpartition('.')[0]}.{norm}.weight"
            product = back.state_dict()[key] * stored.view(1)
            torch.testing.assert_close(product, norms[key] * scale.view(1), rtol=3e-7, atol=0)
    opened, packed = open_model(tmp_path / "x.gguf"), model.pack()
    with torch.no_grad():  # as it was trained: 8 bits a token, and an INT8 table
        assert opened.config.quantizer == "ternary"
        assert distance(opened(IDS[None])[0], packed(IDS[None])[0]) < 0.05


def test_what_the_types_do_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="codes are 0; Q1_0 holds -1 and 1, use Q2_0"):
        write(gguf_model(), tmp_path / "x.gguf", "Q1_0")
    model = gguf_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e9)
    with pytest.raises(ValueError, match="which float16 does not hold; choose another type than Q2_0"):
        write(model, tmp_path / "x.gguf", "Q2_0")
    assert not list(tmp_path.iterdir())


def test_files_that_llama_cpp_quantized_are_read(tmp_path: Path) -> None:
    """Group scales: a float model here, of the very weights."""
    for number, kind in ((40, "Q1_0"), (41, "Q2_0")):
        write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F32")
        quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", number)
        file = GGUFFile(tmp_path / "y.gguf")
        assert file.tensors["blk.0.ffn_up.weight"].type == kind
        model = open_source(tmp_path / "y.gguf").model()
        assert model.config.quantizer == "none"
        with torch.no_grad(), LlamaModel(tmp_path / "y.gguf", 64) as loaded:
            assert distance(model(IDS[None])[0], torch.tensor(loaded.logits(IDS.tolist()))) < 0.05


def grouped(weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ternary codes int8 and a scale, a float16, for each group of a row."""
    codes = torch.randint(-1, 2, weight.shape, dtype=torch.int8, generator=generator)
    scales = (0.02 + 0.05 * torch.rand(len(weight), weight.shape[1] // size, generator=generator)).half().float()
    return codes, scales


@pytest.mark.parametrize(("kind", "number"), [("Q2_0", 42), ("PQ2_0", 142), ("PQ2_0", 42)])
def test_qwen3_with_group_scales_opens_and_generates(tmp_path: Path, monkeypatch: Any, kind: str, number: int) -> None:
    """What people run: ternary projections, embedding and head with a scale for each 64 or 128 weights. PrismML's older
    files call their blocks of 128 Q2_0, with the same number as llama.cpp's of 64."""
    size = TYPES[NUMBERS[kind]][1]
    model = gguf_model(quantizer="none", tie_word_embeddings=False, **SHAPES["qwen3"])
    generator = torch.Generator().manual_seed(0)
    rows = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                codes, scales = grouped(parameter, size, generator)
                parameter.copy_(codes * scales.repeat_interleave(size, 1))
                rows[name] = ternary.pack_rows(codes, scales, kind)
    monkeypatch.setitem(NUMBERS, kind, number)
    monkeypatch.setitem(TYPES, number, (kind, size, 18 if size == 64 else 34))  # for the writer
    write(model, tmp_path / "x.gguf", kind, embedding_type=kind)
    monkeypatch.undo()
    file = GGUFFile(tmp_path / "x.gguf")
    assert {info.type for info in file.tensors.values()} == {"F32", kind}
    assert bytes(file.data("token_embd.weight")) == bytes(rows["model.embed_tokens.weight"].flatten().tolist())
    exact = "float" if native_available() else None  # torch is
    back = open_model(tmp_path / "x.gguf", activations=exact)
    with torch.no_grad():
        expected = model(IDS[None])[0]
        assert distance(back(IDS[None])[0], expected) < 1e-5
        if kind == "Q2_0":
            with LlamaModel(tmp_path / "x.gguf", 64) as loaded:
                assert distance(torch.tensor(loaded.logits(IDS.tolist())), expected) < 0.05
    texts = [
        torch.cat(list(generate(each, IDS[None], max_new_tokens=16, sampling=SamplingConfig(0.0), seed=0)))
        for each in (back, model)
    ]
    assert torch.equal(*texts)


def test_sizes_that_fit_neither_block_are_refused(tmp_path: Path) -> None:
    write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "Q2_0")
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[:-4096])
    with pytest.raises(GGUFError, match="truncated or damaged"):
        GGUFFile(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_four_bit_floats_are_read_from_files(tmp_path: Path, monkeypatch: Any, kind: str) -> None:
    write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F32")
    _, size, nbytes = TYPES[NUMBERS[kind]]
    made: dict[str, Tensor] = {}

    def random_blocks(entries: list[Any]) -> list[Any]:
        for index, entry in enumerate(entries):
            if "ffn" in entry.name and len(entry.shape) == 2:
                data = torch.randint(0, 256, (entry.shape[0], entry.shape[1] // size, nbytes), dtype=torch.uint8)
                data[..., : 1 if kind == "MXFP4" else 4] = 122 if kind == "MXFP4" else 24  # scales of about 1 / 32
                made[entry.name] = blocks.dequantize(data.flatten(1), kind)
                entries[index] = type(entry)(entry.name, entry.shape, kind, lambda d=data: d.flatten().numpy())
        return entries

    path = rewritten(tmp_path / "x.gguf", tensors=random_blocks)
    model = open_source(path).model()
    assert len(made) == 6
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, made["blk.1.ffn_up.weight"])
    stored = open_source(path).stored()
    assert stored is not None
    layer = stored.model.layers[1].mlp.up_proj
    assert isinstance(layer, BlockLinear)
    assert layer.data.dtype == torch.uint8
    with torch.inference_mode():
        torch.testing.assert_close(open_model(path)(IDS[None]), model(IDS[None]), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), LlamaModel(path, 64) as loaded:
        assert distance(model(IDS[None])[0], torch.tensor(loaded.logits(IDS.tolist()))) < 0.05


@pytest.mark.parametrize("kind", ["Q4_0", "NVFP4", "Q1_0"])
def test_a_factor_beside_blocks_is_read_and_stays_beside_them(tmp_path: Path, kind: str) -> None:
    write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F32")
    _, size, nbytes = TYPES[NUMBERS[kind]]

    def with_factor(entries: list[Any]) -> list[Any]:
        index = next(i for i, entry in enumerate(entries) if entry.name == "blk.1.ffn_up.weight")
        entry = entries[index]
        data = torch.randint(0, 256, (entry.shape[0], entry.shape[1] // size, nbytes), dtype=torch.uint8)
        data[..., : 4 if kind == "NVFP4" else 2] = 24  # scales
        entries[index] = type(entry)(entry.name, entry.shape, kind, lambda: data.flatten().numpy())
        factor = torch.full((1,), 0.37).view(torch.uint8).numpy()
        return [*entries, type(entry)("blk.1.ffn_up.scale", (1,), "F32", lambda: factor)]

    path = rewritten(tmp_path / "x.gguf", tensors=with_factor)
    stored, model = open_source(path).stored(), open_source(path).model()
    assert stored is not None
    layer = stored.model.layers[1].mlp.up_proj
    assert isinstance(layer, ScaledBlockLinear)
    assert torch.equal(layer.weight, model.model.layers[1].mlp.up_proj.weight)
    again = build(layer.description())
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.weight, layer.weight)
    with torch.inference_mode():
        torch.testing.assert_close(open_model(path)(IDS[None]), model(IDS[None]), rtol=1e-4, atol=1e-4)
