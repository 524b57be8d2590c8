"""Models in GGUF files: ternary types, and what cannot be written or read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitnet import kernels
from bitnet.kernels import reference
from bitnet.model import BitNetForCausalLM, PackedLinear, bit_linears
from bitnet.quant import quantize_ternary, unpack_codes
from bitnet.quant.i2s import pack_i2_s, unpack_i2_s
from bitnet.storage.gguf import read as gguf_read
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFError, GGUFFile, TensorToWrite, write_file
from bitnet.storage.gguf.read import read_ternary
from bitnet.storage.gguf.write import architecture
from bitnet.storage.source import open_source
from tests.builders import tiny_model
from tests.storage.builders import SHAPE, gguf_model, rewritten

EXACT = ["TQ2_0", "TQ1_0", "F16", "BF16", "F32", "I2_S"]


def projections(model: BitNetForCausalLM) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scale of every projection, from a latent or packed model."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            found[name] = (
                (module.codes(), module.weight_scale.view(()))
                if isinstance(module, PackedLinear)
                else quantize_ternary(module.weight.detach())
            )
    return found


# Ternary models


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize(
    ("kind", "sub_norm"),
    # bitnet.cpp, whose type I2_S is, has no architecture without sub-norms
    [(kind, sub_norm) for kind in EXACT for sub_norm in (True, False) if sub_norm or kind != "I2_S"],
)
def test_codes_and_scales_come_back_exactly(tmp_path, kind, sub_norm, packed):
    model = gguf_model(sub_norm=sub_norm, tie_word_embeddings=sub_norm)
    expected = {name: (codes.clone(), scale.clone()) for name, (codes, scale) in projections(model).items()}
    head = {n: p.detach().clone() for n, p in model.named_parameters() if "norm" in n or "embed" in n or "head" in n}
    if packed:
        model.pack(embeddings=False)
    gguf_write.write(model, tmp_path / "x.gguf", kind, embedding_type="F32")
    back = open_source(tmp_path / "x.gguf").model()
    assert back.config == model.config.replace(head_dim=64, quantizer="ternary")
    assert back.is_packed
    for name, (codes, scale) in projections(back).items():
        assert torch.equal(codes, expected[name][0]), name
        assert scale == expected[name][1], name
    for name, value in head.items():
        assert torch.equal(dict(back.named_parameters())[name], value), name


@pytest.mark.parametrize("kind", ["TQ2_0", "F16", "I2_S"])
def test_a_matrix_is_quantized_once(tmp_path, monkeypatch, kind):
    seen = []

    def counted(weight, quantizer):
        seen.append(weight.data_ptr())
        return reference.quantize_weight(weight, quantizer)

    monkeypatch.setattr(kernels, "quantize_weight", counted)
    model = gguf_model()
    gguf_write.write(model, tmp_path / "x.gguf", kind)
    assert sorted(seen) == sorted(layer.weight.data_ptr() for _, layer in bit_linears(model))


def test_reading_and_writing_again_gives_the_same_file(tmp_path):
    gguf_write.write(gguf_model(), tmp_path / "a.gguf", "TQ1_0", embedding_type="F16")
    gguf_write.write(open_source(tmp_path / "a.gguf").model(), tmp_path / "b.gguf", "TQ1_0", embedding_type="F16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_logits_of_a_read_model_are_the_packed_model_s(tmp_path):
    model = gguf_model(hidden_act="relu2").pack(embeddings=False)
    gguf_write.write(model, tmp_path / "x.gguf", "I2_S", embedding_type="F32")
    ids = torch.arange(60).view(2, 30)
    assert GGUFFile(tmp_path / "x.gguf").architecture == "bitnet-b1.58"
    assert torch.equal(open_source(tmp_path / "x.gguf").model()(ids), model(ids))


def test_binary_weights_are_ternary_ones_without_zeros(tmp_path):
    model = gguf_model(quantizer="binary").pack(embeddings=False)
    gguf_write.write(model, tmp_path / "x.gguf", "TQ2_0", embedding_type="F32")
    back = open_source(tmp_path / "x.gguf").model()
    assert back.config.quantizer == "ternary"
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(back(ids), model(ids))


def test_an_int8_embedding_is_written_as_the_floats_it_stands_for(tmp_path):
    model = gguf_model(tie_word_embeddings=False, sub_norm=False).pack()
    gguf_write.write(model, tmp_path / "x.gguf", "TQ2_0", embedding_type="F32")
    back = open_source(tmp_path / "x.gguf").model()
    ids = torch.arange(64)
    assert torch.equal(back.model.embed_tokens(ids), model.model.embed_tokens(ids))
    head = model.lm_head
    assert torch.equal(back.lm_head.weight, unpack_codes(head.packed_weight, 8, head.in_features) * head.weight_scale)


def literal_i2_s(codes: np.ndarray, block: int) -> np.ndarray:
    """The loop of bitnet.cpp's quantizer over one matrix: 128-blocks on x86, 64-blocks on Arm."""
    flat, step = codes.ravel() + 1, block // 4
    out = np.zeros(flat.size // 4, np.uint8)
    for i in range(flat.size // block):
        for j in range(block):
            out[i * step + j % step] |= flat[i * block + j] << (6 - 2 * (j // step))
    return out


@pytest.mark.parametrize(("layout", "block"), [("x86", 128), ("arm", 64)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (3, 256), (5, 384)])
def test_i2_s_has_bitnet_cpp_s_bytes(layout, block, rows, columns):
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    data = pack_i2_s(codes, 0.125, layout)
    assert np.array_equal(data[:-32].numpy(), literal_i2_s(codes.numpy(), block))
    assert data[-32:-28].view(torch.float32).item() == 0.125
    assert not data[-28:].any()
    back, scale = unpack_i2_s(data, (rows, columns), layout)
    assert torch.equal(back, codes)
    assert scale == 0.125


def test_i2_s_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="no multiple of 128"):
        pack_i2_s(torch.zeros(2, 64, dtype=torch.int8), 1.0)
    with pytest.raises(ValueError, match="layout 'mips' is unknown"):
        pack_i2_s(torch.zeros(2, 128, dtype=torch.int8), 1.0, "mips")
    with pytest.raises(ValueError, match="code 3"):
        unpack_i2_s(torch.full((64 + 32,), 255, dtype=torch.uint8), (2, 128))
    with pytest.raises(ValueError, match=r"uint8 \[96\]"):
        unpack_i2_s(torch.zeros(64, dtype=torch.uint8), (2, 128))


def test_i2_s_of_an_arm_file_is_read_on_request(tmp_path):
    model = gguf_model()
    gguf_write.write(model, tmp_path / "x.gguf", "I2_S", embedding_type="F32")
    whole = bytearray((tmp_path / "x.gguf").read_bytes())
    for name, info in GGUFFile(tmp_path / "x.gguf").tensors.items():
        if info.type == "I2_S":
            codes, scale = unpack_i2_s(
                torch.frombuffer(whole, dtype=torch.uint8)[info.start :][: info.nbytes], info.shape
            )
            whole[info.start : info.start + info.nbytes] = pack_i2_s(codes, scale, "arm").numpy().tobytes()
            assert name.startswith("blk.")
    (tmp_path / "y.gguf").write_bytes(whole)
    expected = projections(model)
    file = GGUFFile(tmp_path / "y.gguf")
    arm = gguf_read.read_model(file, gguf_read.read_config(file), i2_s="arm")
    for name, (codes, scale) in projections(arm).items():
        assert torch.equal(codes, expected[name][0])
        assert scale == expected[name][1]


def one_tensor(path: Path, kind: str, data: np.ndarray, shape: tuple[int, int], arch: str = "llama") -> GGUFFile:
    write_file(path, {"general.architecture": arch}, [TensorToWrite("w.weight", shape, kind, lambda: data)])
    return GGUFFile(path)


def tq2_rows(scales: list[float], codes: list[int]) -> np.ndarray:
    """TQ2_0 blocks of one repeated code each."""
    parts = []
    for scale, code in zip(scales, codes, strict=True):
        parts += [np.full(64, 0x55 * code, np.uint8), np.array([scale], np.float16).view(np.uint8)]
    return np.concatenate(parts)


def test_a_block_scale_is_the_scale_where_all_blocks_agree(tmp_path):
    file = one_tensor(tmp_path / "x.gguf", "TQ2_0", tq2_rows([0.5, 0.0, 0.5], [2, 2, 0]), (3, 256))
    packed, scale = read_ternary(file, "w")
    codes = unpack_codes(packed, 2, 256)
    assert scale == 0.5
    # A block with scale 0 holds zeros, whatever its codes say.
    assert [row.unique().tolist() for row in codes] == [[1], [0], [-1]]


@pytest.mark.parametrize(
    ("scales", "codes"),
    [([0.5, 0.25], [2, 0]), ([1.0, 1.0], [2, 3]), ([float("nan"), 1.0], [0, 1]), ([float("inf")] * 2, [0, 1])],
    ids=["two scales", "code 3", "NaN", "infinite"],
)
def test_blocks_that_are_not_ternary_with_one_scale_stay_floats(tmp_path, scales, codes):
    assert read_ternary(one_tensor(tmp_path / "x.gguf", "TQ2_0", tq2_rows(scales, codes), (2, 256)), "w") is None


def test_floats_are_ternary_only_where_that_is_meant(tmp_path):
    weight = torch.tensor([[0.0, 0.25, -0.25, 0.25]])
    data = weight.half().view(torch.uint8).numpy().ravel()
    found = read_ternary(one_tensor(tmp_path / "a.gguf", "F16", data, (1, 4), "bitnet"), "w")
    assert found is not None
    assert unpack_codes(found[0], 2, 4).tolist() == [[0, 1, -1, 1]]
    assert found[1] == 0.25
    assert read_ternary(one_tensor(tmp_path / "b.gguf", "F16", data, (1, 4), "llama"), "w") is None
    other = torch.tensor([[0.0, 0.25, -0.5, 0.25]]).half().view(torch.uint8).numpy().ravel()
    assert read_ternary(one_tensor(tmp_path / "c.gguf", "F16", other, (1, 4), "bitnet"), "w") is None


# What cannot be written or read


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"hidden_act": "relu2"}, "TQ2_0", "SiLU whatever.*I2_S for bitnet.cpp"),
        ({"hidden_act": "relu2", "quantizer": "none"}, "F16", "SiLU whatever.*Hugging Face"),
        ({"tie_word_embeddings": False}, "TQ2_0", "not tied.*Hugging Face"),
        ({"head_dim": 32}, "TQ2_0", "128 wide and hidden_size is 256"),
        ({}, "Q4_0", "quantize ternary weights again; choose TQ2_0"),
        ({"quantizer": "none"}, "TQ2_0", "weights are floats.*choose F16"),
        ({"quantizer": "int8"}, "F16", "a scale for each row.*quantizer none"),
        ({"quantizer": "int4"}, "TQ2_0", "a scale for each row"),
        ({"sub_norm": False}, "I2_S", "no sub-norms.*choose TQ2_0"),
        (
            {"intermediate_size": 384},
            "TQ2_0",
            "ffn_down has rows of 384 weights, no multiple of TQ2_0's 256; choose F16",
        ),
        ({"intermediate_size": 192}, "I2_S", "rows of 192 weights, no multiple of I2_S's 128"),
        ({"intermediate_size": 48, "quantizer": "none"}, "Q8_0", "rows of 48 weights.*choose F16"),
        ({}, "Q9_9", "'Q9_9' is unknown; choose one of F32"),
    ],
)
def test_what_a_target_cannot_express_is_refused_with_the_alternative(tmp_path, changes, kind, message):
    with pytest.raises(ValueError, match=message):
        gguf_write.write(BitNetForCausalLM(SHAPE.replace(**changes)), tmp_path / "x.gguf", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({}, "TQ2_0", "bitnet"), ({}, "I2_S", "bitnet"), ({"hidden_act": "relu2"}, "I2_S", "bitnet-b1.58"),
        ({"quantizer": "none"}, "F16", "bitnet"), ({"quantizer": "none", "sub_norm": False}, "Q4_K", "llama"),
        ({"sub_norm": False, "tie_word_embeddings": False, "head_dim": 32}, "TQ1_0", "llama"),
    ],
)  # fmt: skip
def test_architecture(changes, kind, expected):
    assert architecture(SHAPE.replace(**changes), kind) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture is 'gemma'; bitnet, "),
        ({"general.architecture": 7}, "architecture is ''"),
        ({"llama.block_count": 1000000000}, "announces 1000000000 layers"),
        ({"llama.block_count": 3}, "announces 3 layers and has 20 tensors"),
        ({"llama.block_count": 1}, "tensors are not of this model, among them blk.1"),
        ({"llama.block_count": "2"}, "block_count is '2'; it must be a positive integer"),
        ({"llama.attention.head_count": None}, "head_count is None"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 3}, "does not divide|and the metadata say"),
        ({"llama.embedding_length": 512}, "and the metadata say"),
        ({"llama.context_length": 1 << 31}, r"max_position_embeddings is 2147483648; it must be"),
        ({"llama.context_length": 1 << 17}, "context_length is 131072, more than"),
        ({"llama.context_length": 1 << 20}, "max_position_embeddings 1048576 would take a table of"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32 and heads are 64"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon is 'x'; it must be a number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"llama.rope.freq_base": -1.0}, "rope_theta is -1.0"),
        ({"llama.hidden_activation": "gelu"}, "'gelu' is unknown"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.feed_forward_length": [512, 512]}, "feed_forward_length is"),
    ],
)
def test_metadata_that_this_model_does_not_have_are_refused(tmp_path, values, message):
    gguf_write.write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F16")
    with pytest.raises(GGUFError, match=message) as caught:
        open_source(rewritten(tmp_path / "x.gguf", values)).model()
    assert "x.new" in str(caught.value)


def test_tensors_that_this_model_does_not_have_are_refused(tmp_path):
    gguf_write.write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F16")
    bias = TensorToWrite("blk.0.attn_q.bias", (256,), "F32", lambda: np.zeros(1024, np.uint8))
    strange = TensorToWrite("blk.0.attn_q.weight", (256, 256), "PTQ1_0", lambda: np.zeros(512 * 28, np.uint8))
    changes = {
        "attn_q.bias; biases, experts": lambda entries: [*entries, bias],
        "blk.1.ffn_norm.weight is missing": lambda entries: [e for e in entries if e.name != "blk.1.ffn_norm.weight"],
        "attn_q.weight is PTQ1_0, which has no dequantizer": lambda entries: [
            strange if e.name == strange.name else e for e in entries
        ],
    }
    for message, change in changes.items():
        with pytest.raises(GGUFError, match=message):
            open_source(rewritten(tmp_path / "x.gguf", tensors=change)).model()


@pytest.mark.parametrize("place", ["model.embed_tokens", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize(("value", "message"), [(1e5, "a weight of 100000 is beyond F16"), (float("nan"), "are NaN")])
def test_weights_that_a_type_does_not_hold_are_refused(tmp_path, place, value, message):
    model = tiny_model("none")
    weight = model.get_submodule(place).weight
    with torch.no_grad():
        weight[3, 3] = value
    with pytest.raises(ValueError, match=rf"^(token_embd|blk.1.ffn_down).weight: .*{message}"):
        gguf_write.write(model, tmp_path / "model.gguf", "F16")
    assert not list(tmp_path.iterdir())
    if value == value:
        gguf_write.write(model, tmp_path / "model.gguf", "BF16")
        assert (
            open_source(tmp_path / "model.gguf").model().get_submodule(place).weight[3, 3]
            == torch.tensor(value).bfloat16()
        )


def test_ternary_weights_without_a_scale_are_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^blk.0.ffn_up.weight: its weights are NaN"):
        gguf_write.write(model, tmp_path / "model.gguf", "F16")
