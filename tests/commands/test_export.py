"""bitnet export and quantize as a user runs them: round trips between all forms, and refusals."""

import json
import re
from pathlib import Path

import pytest
import torch

from bitnet.__main__ import main
from bitnet.inference.loading import open_model
from bitnet.kernels import blocks
from bitnet.model import BitNetForCausalLM, ModelConfig, PackedLinear
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.hf import gptq
from bitnet.storage.safetensors import load_tensors
from bitnet.storage.source import open_source
from bitnet.tokenizer import train_tokenizer
from bitnet.training.checkpoint import save_checkpoint
from bitnet.training.optimizer import OptimConfig, Optimizer
from tests.builders import save_run

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
TEXT = "".join(f"The {i}th line says that {i} is followed by {i + 1}.\n" for i in range(800))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one checkpoint: `ternary`, `float`, `plain` (float without sub-norms), `narrow` (that, half as wide)."""
    root = tmp_path_factory.mktemp("export")
    (root / "text.txt").write_text(TEXT)
    tokenizer = train_tokenizer([TEXT], 300, threads=1)
    shapes = {
        "ternary": CONFIG,
        "float": CONFIG.replace(quantizer="none"),
        "plain": CONFIG.replace(quantizer="none", sub_norm=False),
        "narrow": CONFIG.replace(quantizer="none", sub_norm=False, hidden_size=128, intermediate_size=128),
    }
    for name, config in shapes.items():
        torch.manual_seed(0)
        model = BitNetForCausalLM(config.replace(vocab_size=tokenizer.vocab_size))
        save_checkpoint(
            root / name, model=model, optimizer_state=Optimizer(model, OptimConfig()).state(), state={"step": 1},
            config={"model": json.loads(json.dumps(model.config.__dict__))}, tokenizer=tokenizer.model_proto, best=True,
        )  # fmt: skip
    return root


def codes(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scale of every ternary matrix of a model, quantized now if it holds latent floats."""
    model = open_source(path).model()
    model.pack(embeddings=False)
    return {n: (m.codes(), m.weight_scale) for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def equal(a: Path, b: Path) -> None:
    first, second = codes(a), codes(b)
    assert list(first) == list(second)
    assert len(first) == 14
    for name in first:
        assert torch.equal(first[name][0], second[name][0]), name
        assert torch.equal(first[name][1].view(-1), second[name][1].view(-1)), name


def embedding(path: Path) -> torch.Tensor:
    return open_source(path).model().model.embed_tokens.weight


def test_codes_and_scales_survive_a_round_trip_through_every_form(folder: Path, tmp_path: Path) -> None:
    steps = [
        ("a", ["--to", "hf"]), ("b", ["--to", "hf", "--form", "packed-inverse"]), ("c.gguf", ["--to", "gguf"]),
        ("d", ["--to", "hf"]), ("e.gguf", ["--to", "gguf", "--type", "TQ1_0"]),
        ("f.gguf", ["--to", "gguf", "--type", "I2_S"]), ("g", []),
    ]  # fmt: skip
    source = folder / "ternary"
    for name, options in steps:
        assert main(["export", str(source), str(tmp_path / name), *options]) == 0
        equal(folder / "ternary", tmp_path / name)
        source = tmp_path / name
    ids = open_source(folder / "ternary").tokenizer.encode(TEXT[:200])
    assert open_source(tmp_path / "g").tokenizer.encode(TEXT[:200]) == ids
    assert open_source(tmp_path / "f.gguf").tokenizer.encode(TEXT[:200]) == ids


def test_latent_weights_and_embeddings_survive_as_floats(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder / "ternary"), str(tmp_path / "m"), "--to", "hf", "--form", "master"]) == 0
    before, after = (open_source(p).model().state_dict() for p in (folder / "ternary", tmp_path / "m"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["export", str(folder / "ternary"), str(tmp_path / "p"), "--to", "hf"]) == 0
    assert torch.equal(embedding(tmp_path / "p"), embedding(folder / "ternary"))


def test_a_float_model_becomes_gguf_blocks_that_runs_here(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder / "plain"), str(tmp_path / "q.gguf"), "--to", "gguf", "--type", "Q5_K"]) == 0
    before, after = (open_source(path).model().model.layers[1].mlp for path in (folder / "plain", tmp_path / "q.gguf"))
    for name in ("gate_proj", "down_proj"):
        weight = getattr(before, name).weight.detach()
        stored = blocks.dequantize(blocks.quantize(weight, "Q5_K"), "Q5_K")
        assert torch.equal(getattr(after, name).weight, stored)
    assert open_model(tmp_path / "q.gguf")(torch.arange(20)[None]).isfinite().all()


def test_blocks_by_importance_are_exported_as_they_are(folder: Path, tmp_path: Path) -> None:
    quantized, file = tmp_path / "q", tmp_path / "q.gguf"
    arguments = [str(folder / "plain"), str(quantized), "--method", "gguf-iq2_xxs", "--text", str(folder / "text.txt")]
    assert main(["quantize", *arguments, "--calibration-tokens", "512"]) == 0
    assert main(["export", str(quantized), str(file), "--to", "gguf", "--type", "IQ2_XXS"]) == 0
    module, written = open_source(quantized).model().model.layers[1].mlp.down_proj, GGUFFile(file)
    assert written.tensors["blk.1.ffn_down.weight"].type == "IQ2_XXS"
    assert written.data("blk.1.ffn_down.weight").tolist() == module.data.flatten().tolist()
    assert open_model(file)(torch.arange(20)[None]).isfinite().all()


def test_gptq_is_written_in_the_layout_of_its_checkpoints(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder / "narrow"), str(tmp_path / "q"), "--method", "gptq-4", "--text", str(folder / "text.txt")]
    assert main(["quantize", *arguments, "--calibration-tokens", "512", "--group-size", "64"]) == 0
    assert main(["export", str(tmp_path / "q"), str(tmp_path / "hf"), "--to", "gptq"]) == 0
    assert "INT4 codes in groups of 64, quantized after training" in (tmp_path / "hf" / "README.md").read_text()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    about = config["quantization_config"]
    assert (config["model_type"], about["bits"], about["group_size"], about["sym"]) == ("llama", 4, 64, False)
    # Ends of a text and the tokenizer as transformers reads them, like any other folder for it.
    assert main(["export", str(folder / "narrow"), str(tmp_path / "floats"), "--to", "hf"]) == 0
    files = {path.name for path in (tmp_path / "floats").iterdir()}
    assert files == {path.name for path in (tmp_path / "hf").iterdir()}
    for name in files - {"config.json", "README.md", "model.safetensors"}:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "floats" / name).read_bytes()
    assert config["eos_token_id"] == 2
    tensors = load_tensors(tmp_path / "hf" / "model.safetensors")
    module = open_source(tmp_path / "q").model().model.layers[1].mlp.down_proj
    stem = "model.layers.1.mlp.down_proj"
    # An independent reader of the layout: eight codes to a word of qweight along K, of qzeros along N, zero - 1.
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    q = (tensors[f"{stem}.qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1)
    zero = (tensors[f"{stem}.qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1
    groups = tensors[f"{stem}.g_idx"].long()
    weight = (q - zero[groups]) * tensors[f"{stem}.scales"].float()[groups]
    assert torch.equal(weight.t(), module.dequantize())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("float", [], "has no packed form"),
        ("float", ["--to", "gptq"], "is no group-quantized layer"),
        ("ternary", ["--to", "gguf", "--type", "Q4_K"], "would quantize ternary weights again"),
        ("ternary", ["--to", "gguf", "--type", "Q9"], "'Q9' is unknown"),
        (
            "plain",
            ["--to", "gguf", "--type", "IQ2_XS"],
            "IQ2_XS needs the importance of the columns: calibrate on text",
        ),
        ("ternary", ["--form", "master"], "--form master has no effect on --to packed"),
        ("ternary", ["--to", "hf", "--type", "F16"], "--type F16 has no effect on --to hf"),
        ("nothing", [], "does not exist"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, source: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder / source), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq-4"], "no 'data' section"),
        (["--method", "gptq-7"], "'gptq-7' is unknown"),
        ([], "--list has the names"),
        (["--method", "rtn-int4", "--group-size", "100"], "group_size 100 does not divide"),
        (
            ["--method", "gptq-ternary", "--symmetric", "--text", "TEXT"],
            "symmetric by themselves; leave --symmetric out",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(folder / "text.txt") if option == "TEXT" else option for option in options]
    assert main(["quantize", str(folder / "plain"), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_known_before_the_work(folder: Path, tmp_path: Path, capsys) -> None:
    """A link to nowhere too, which only the renaming at the end met."""
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for command in (["export"], ["quantize", "--method", "nf4"]):
        assert main([command[0], str(folder / "plain"), str(tmp_path / "out"), *command[1:]]) == 2
        assert "already exists" in capsys.readouterr().err


def test_folders_on_the_way_are_made(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "er" / "m.gguf"
    assert main(["export", str(folder / "plain"), str(path), "--to", "gguf", "--type", "F16"]) == 0
    assert path.is_file()


def test_the_published_gptq_may_have_zero_points_of_0(tmp_path: Path) -> None:
    """As one large weight in a group gives, in 2 bits; it ended in the midst of the work."""
    tokenizer = train_tokenizer([TEXT], 300, threads=1)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "sub_norm": False}
    model = BitNetForCausalLM(CONFIG.replace(quantizer="none", vocab_size=tokenizer.vocab_size, **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter[1, 5] = 1.3
    base, text = save_run(tmp_path / "base", model, tokenizer), tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--calibration-tokens", "512", "--group-size", "32", "--method", "gptq-2"]
    assert main(["quantize", str(base), str(tmp_path / "q"), *options, "--algorithm", "original"]) == 0
    assert main(["export", str(tmp_path / "q"), str(tmp_path / "hf"), "--to", "gptq"]) == 0
    ids = torch.randint(0, 300, (1, 32))
    with torch.no_grad():
        wanted, found = (open_source(tmp_path / name).model()(ids) for name in ("q", "hf"))
    assert torch.equal(wanted, found)


def test_the_list_of_methods_and_a_packed_source(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["quantize", "--list"]) == 0
    assert "gptq-4" in capsys.readouterr().out
    assert main(["quantize", str(folder / "ternary"), str(tmp_path / "out"), "--method", "rtn-int4"]) == 2
    assert "trained with ternary weights" in capsys.readouterr().err


@pytest.mark.parametrize(("group_size", "written"), [(64, 64), (-1, -1), (128, None)])
def test_gptq_groups_that_are_whole_rows_of_some_layers(tmp_path: Path, group_size: int, written: int | None) -> None:
    """Rows of 64 and of 128: a group of 64 is all of the one and half of the other."""
    changes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = ModelConfig(vocab_size=64, num_hidden_layers=1, quantizer="none", sub_norm=False, **changes)
    options = Options(progress=False, group_size=group_size)
    if written is None:
        with pytest.raises(ValueError, match="does not divide the 64 input channels"):
            quantize_model(BitNetForCausalLM(config), "rtn-int4", options=options)
        return
    gptq.write(quantize_model(BitNetForCausalLM(config), "rtn-int4", options=options), tmp_path / "q", {})
    about = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert about["group_size"] == written
    scales = {name: tensor.shape[0] for name, tensor in load_tensors(tmp_path / "q" / "model.safetensors").items()}
    stem = "model.layers.0.mlp"
    groups = scales[f"{stem}.gate_proj.scales"], scales[f"{stem}.down_proj.scales"]
    assert groups == ((1, 2) if written == 64 else (1, 1))


def test_what_a_type_rounds_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder / "ternary"), str(tmp_path / "a.gguf"), "--to", "gguf", "--type", "Q2_0"]) == 0
    found = re.search(r"Q2_0: the scales of the matrices were rounded to 16 bits, by (\S+) of", capsys.readouterr().out)
    assert found
    assert 0 < float(found[1]) < 2**-11
    for name, (before, scale) in codes(folder / "ternary").items():
        after, rounded = codes(tmp_path / "a.gguf")[name]
        assert torch.equal(before, after)
        assert float(rounded) == float(scale.half())
    assert main(["export", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), "--to", "gguf"]) == 0
    assert "rounded" not in capsys.readouterr().out  # TQ2_0 keeps the scale beside


def facts(path: Path) -> list[object]:
    """What a model's files say of its texts."""
    source = open_source(path)
    tokenizer, template = source.tokenizer, source.chat_template
    said = [tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids, set(tokenizer.specials), tokenizer.vocab_size]
    return [*said, template and template.source, source.sampling]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_what_the_files_beside_a_tokenizer_say_is_carried_on(folder: Path, tmp_path: Path, file: str) -> None:
    """Of a Hugging Face folder: ends of a text in config.json, special pieces, no begin of text, a token without a
    row, a template in chat_template.json, and how tokens are drawn."""
    start = tmp_path / "start"
    assert main(["export", str(folder / "plain"), str(start), "--to", "hf"]) == 0
    if file == "tokenizer.model":
        (start / "tokenizer.json").unlink()
    special = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    rows, tokenizer = open_source(start).config.vocab_size, open_source(start).tokenizer
    piece = next(piece for piece in map(tokenizer.id_to_piece, range(259, rows)) if len(piece) > 1)
    changes = {
        "config.json": {"eos_token_id": [2, 291], "pad_token_id": 0},
        "tokenizer_config.json": {"add_bos_token": False, "additional_special_tokens": [{"content": piece, **special}]},
        "added_tokens.json": {"<pad>": rows},
        "chat_template.json": {"chat_template": "{{ messages[0]['content'] }}"},
        "generation_config.json": {"eos_token_id": 2, "do_sample": True, "temperature": 0.25},
    }
    for name, values in changes.items():
        path = start / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    expected = facts(start)
    assert expected[1:3] == [False, (2, 291)]
    assert piece in expected[3]  # type: ignore[operator]
    assert expected[-2:] == ["{{ messages[0]['content'] }}", {"temperature": 0.25}]
    outs: dict[str, list[str]] = {"hf": [], "gguf": ["--type", "F16"]}
    for to, options in outs.items():
        assert main(["export", str(start), str(tmp_path / to), "--to", to, *options]) == 0
        assert facts(tmp_path / to) == expected, to
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == ([2, 291], 0)
    assert main(["quantize", str(start), str(tmp_path / "quantized"), "--method", "rtn-int8"]) == 0
    assert facts(tmp_path / "quantized") == expected
    assert main(["export", str(tmp_path / "gguf"), str(tmp_path / "again"), "--to", "hf"]) == 0
    assert facts(tmp_path / "again") == expected
