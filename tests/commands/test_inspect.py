"""bitnet inspect: every kind of file, as text and as JSON."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitnet.__main__ import main
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.quant import quantize_ternary
from bitnet.storage.folders import save_packed
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.hf import write as hf_write
from tests.builders import save_run

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(CONFIG).eval()


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def tensor(result: dict, name: str) -> dict:
    return next(row for row in result["tensors"] if row["name"] == name)


def expected(model: BitNetForCausalLM, name: str) -> tuple[float, float]:
    """Scale and share of zeros of a projection."""
    codes, scale = quantize_ternary(model.get_submodule(name).weight.detach())
    return float(scale), float((codes == 0).float().mean())


GGUF = "GGUF version 3"
KINDS = {
    "TQ2_0": (lambda folder, model: gguf_write.write(model, folder, "TQ2_0", embedding_type="F16"), 66 / 32, GGUF),
    "TQ1_0": (lambda folder, model: gguf_write.write(model, folder, "TQ1_0", embedding_type="F16"), 54 / 32, GGUF),
    "I2_S": (lambda folder, model: gguf_write.write(model, folder, "I2_S"), 2, GGUF),
    "F16": (lambda folder, model: gguf_write.write(model, folder, "F16"), 16, GGUF),
    "packed": (lambda folder, model: save_packed(folder, model.pack(), b""), 2, "packed model"),
    "hf packed": (lambda folder, model: hf_write.write(model, folder, "packed"), 2, "Hugging Face model, packed"),
    "hf inverse": (lambda folder, model: hf_write.write(model, folder, "packed-inverse"), 2,
                   "Hugging Face model, packed-inverse"),
    "hf master": (lambda folder, model: hf_write.write(model, folder, "master"), 32, "Hugging Face model, master"),
    "run": (save_run, 32, "run"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_zeros_of_every_kind(tmp_path, capsys, model, kind):
    write, bits, title = KINDS[kind]
    wanted = {layer: expected(model, f"model.layers.{layer}.mlp.down_proj") for layer in (0, 1)}
    projections = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    total = model.num_parameters()
    path = tmp_path / "model"
    write(path, model)
    result = shown(capsys, path)
    assert result["kind"] == title
    assert result["ternary_parameters"] == projections
    assert result["parameters"] == total
    for layer, (scale, zeros) in wanted.items():
        names = [r["name"] for r in result["tensors"] if "down" in r["name"] and f".{layer}." in r["name"]]
        assert len(names) == 1
        row = tensor(result, names[0])
        assert row["shape"] == [256, 512]
        assert row["scale"] == pytest.approx(scale, rel=1e-6)
        assert row["zeros"] == pytest.approx(zeros)
        assert row["bits_per_weight"] == pytest.approx(bits, abs=0.01)  # a scale or two on top
    assert sum(t["parameters"] for t in result["types"].values()) == total
    assert sum(t["bytes"] for t in result["types"].values()) == result["bytes"]
    assert result["bits_per_weight"] == pytest.approx(8 * result["bytes"] / total)


def test_a_quantized_model_is_counted_by_its_projections(tmp_path, capsys, model):
    """All tensors of a projection are one, whatever they are called."""
    from dataclasses import asdict

    state = {n: v for n, v in model.state_dict().items() if "_proj" not in n}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            rows, columns = module.weight.shape
            state[f"{name}.codes"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            state[f"{name}.scales"] = torch.zeros(rows, columns // 64, dtype=torch.float16)
    save_file(state, tmp_path / "model.safetensors")
    about = {"model": asdict(CONFIG.replace(quantizer="none")), "quantization": {"method": "rtn-int4", "modules": {}}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    result = shown(capsys, tmp_path)
    assert result["kind"] == "quantized model"
    assert result["parameters"] == model.num_parameters()
    row = tensor(result, "model.layers.1.mlp.down_proj")
    assert (row["type"], row["shape"], row["bits_per_weight"]) == ("rtn-int4", [256, 512], 4.25)


def test_text(tmp_path, capsys, model):
    gguf_write.write(model, tmp_path / "x.gguf", "TQ2_0", embedding_type="F16")
    assert main(["inspect", str(tmp_path / "x.gguf")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("GGUF version 3: 1,")
    assert "parameters are ternary" in lines[1]
    scale, zeros = expected(model, "model.layers.1.self_attn.k_proj")
    row = next(line for line in lines if line.startswith("blk.1.attn_k.weight")).split()
    assert row[1:] == ["TQ2_0", "128", "x", "256", "2.06", f"{scale:.6g}", f"{zeros:.1%}"]
    assert ["general.architecture", "bitnet"] in [line.split() for line in lines]
    assert max(map(len, lines)) <= 120


def test_what_is_no_number_has_a_name(tmp_path, capsys, model):
    """JSON has no NaN and no infinity, and readers of JSON refuse them."""
    gguf_write.write(model, tmp_path / "x.gguf", "I2_S")
    data = bytearray((tmp_path / "x.gguf").read_bytes())
    for key, value in (("bitnet.rope.freq_base", math.inf), ("bitnet.attention.layer_norm_rms_epsilon", math.nan)):
        place = data.index(key.encode()) + len(key) + 4  # behind the key and the type of its value
        data[place : place + 4] = struct.pack("<f", value)
    (tmp_path / "x.gguf").write_bytes(data)
    about = shown(capsys, tmp_path / "x.gguf")["about"]
    assert (about["bitnet.rope.freq_base"], about["bitnet.attention.layer_norm_rms_epsilon"]) == ("inf", "nan")

    hf_write.write(model, tmp_path / "hf", form="packed")
    weights = tmp_path / "hf" / "model.safetensors"
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(load_file(weights) | {f"{name}_scale": torch.tensor([math.nan])}, weights)
    assert tensor(shown(capsys, tmp_path / "hf"), name)["scale"] == "nan"
    assert main(["inspect", str(tmp_path / "hf")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert row.split()[-2] == "nan"


def test_codes_are_counted(tmp_path, capsys, model):
    gguf_write.write(model, tmp_path / "x.gguf", "TQ1_0", embedding_type="F16")
    result = shown(capsys, tmp_path / "x.gguf", "--histogram", "blk.0.ffn_up.weight")
    codes, _ = quantize_ternary(model.model.layers[0].mlp.up_proj.weight.detach())
    assert [(b["low"], b["count"]) for b in result["histogram"]] == [
        (value, int((codes == value).sum())) for value in (-1, 0, 1)
    ]


def test_floats_are_counted_in_bins(tmp_path, capsys):
    weight = torch.randn(64, 64)
    save_file({"w": weight, "n": torch.ones(5), "empty": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    result = shown(capsys, tmp_path / "x.safetensors", "--histogram", "w")
    assert result["kind"] == "safetensors"
    assert sum(b["count"] for b in result["histogram"]) == weight.numel()
    middle = result["histogram"][8]
    assert middle["count"] == int(((weight >= middle["low"]) & (weight < middle["high"])).sum())
    assert shown(capsys, tmp_path / "x.safetensors", "--histogram", "n")["histogram"] == [
        {"low": 1.0, "high": 1.0, "count": 5}
    ]
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--histogram", "empty"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--histogram", "w"]) == 0
    assert capsys.readouterr().out.count("#") > 40


def test_what_is_no_finite_number_is_counted_too(tmp_path, capsys):
    inf, nan = math.inf, math.nan
    tensors = {
        "some": torch.tensor([1.0, nan, 2.0, inf, -inf, nan]), "none": torch.full((3, 2), nan),
        "wide": torch.tensor([3e38, -3e38, 0.0]), "small": torch.tensor([1.4e-45, 4.2e-45]),
        "complex": torch.ones(2, dtype=torch.complex64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")

    def bins(name: str) -> list[tuple[object, int]]:
        assert main(["inspect", str(tmp_path / "x.safetensors"), "--histogram", name]) == 0
        assert name in capsys.readouterr().out
        found = shown(capsys, tmp_path / "x.safetensors", "--histogram", name)["histogram"]
        assert sum(b["count"] for b in found) == tensors[name].numel()
        return [(b["low"], b["count"]) for b in found if b["count"]]

    assert bins("some")[2:] == [("-inf", 1), ("inf", 1), ("nan", 2)]
    assert bins("none") == [("nan", 6)]
    assert [count for _, count in bins("wide")] == [1, 1, 1]
    assert [count for _, count in bins("small")] == [1, 1]
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--histogram", "complex"]) == 2
    assert "complex has complex numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "does not exist"),
        (b"hello", [], "begins with b'hell'"),
        (b"GGUF", [], "is no GGUF file"),
        (b"GGUF\3\0\0\0" + bytes(16), ["--histogram", "w"], "has no tensor 'w'"),
    ],
)
def test_errors(tmp_path, capsys, content, arguments, message):
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_safetensors_file(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    assert "is not a complete safetensors file" in capsys.readouterr().err


def test_a_strangers_names_steer_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x.\n\x1b[31m\u202e": torch.zeros(2)}, tmp_path / "w.safetensors", {"made\x1b[2J": "by\r\x07"})
    for extra in ([], ["--histogram", "x.\n\x1b[31m\u202e"]):
        assert main(["inspect", str(tmp_path / "w.safetensors"), *extra]) == 0
        text = capsys.readouterr().out
        assert r"x.\n\x1b[31m\u202e" in text
        assert all(letter.isprintable() or letter == "\n" for letter in text)
