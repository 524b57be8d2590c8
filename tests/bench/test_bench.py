"""The benchmark as a command: its tables and JSON, the gate that stops it, peers that are scripts, wrong arguments."""

import json
import stat
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bitnet import kernels
from bitnet.__main__ import main
from bitnet.bench import cpu as cpu_module
from bitnet.bench import cpu_gate
from bitnet.bench import plan as plan_module
from bitnet.bench.cpu_gate import check_engine
from bitnet.bench.plan import fitting_twins
from bitnet.bench.random_models import LOGIT_STD, float_twin, random_tensors, ternary_weights
from bitnet.inference.cpu_engine import Engine
from bitnet.kernels import cpu
from bitnet.kernels.cpu import native
from bitnet.model import PRESETS, BitNetForCausalLM, bit_linears
from bitnet.quant import unpack_codes
from bitnet.storage.folders import TOKENIZER, resolve, save_packed
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.source import open_source
from tests.builders import save_run

TINY = PRESETS["tiny"]
needs_native = pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")
SPEEDS = ("tok/s", "GOPS", "GB/s")


def quick(*arguments: str | Path) -> int:
    return main(["bench", "--quick", "--threads", "1", "--repeat", "1", *map(str, arguments)])


def script(path: Path, body: str) -> Path:
    """An executable Python script that stands in for llama-bench."""
    path.write_text(f"#!{sys.executable}\nimport json, sys\n" + textwrap.dedent(body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_native
def test_a_quick_run_prints_its_tables_and_writes_the_same_numbers(tmp_path, capsys):
    sets = native.instruction_sets()[-2:]
    path = tmp_path / "result.json"
    arguments = ["--kernels", "--twins", "--batch", "2", "1", "--isa", *sets, "--repeat", "3", "--json", str(path)]
    assert main(["bench", "--quick", "--threads", "1", *arguments]) == 0
    captured = capsys.readouterr()
    titles = ("gate green", "Limits", "Products", "tiny, float32 cache", "Generation", "Float twins", "note: random")
    places = [captured.out.index(title) for title in titles]
    assert places == sorted(places)
    assert "Peers" not in captured.out
    assert "float32 twin: 1 threads, batch 2" in captured.err

    result = json.loads(path.read_text())
    assert result["machine"].keys() >= {"cpu", "date", "torch", "threads", "instruction_sets"}
    assert result["options"]["threads"] == [1]
    assert result["options"]["isa"] == sets
    assert any("--quick" in note for note in result["notes"])
    (limits,) = result["limits"]
    assert limits.keys() == {"threads", "memory", *native.instruction_sets()}

    shapes = set(TINY.projections().values())
    assert len(result["kernels"]) == len(sets) * 2 * len(shapes)
    for row in result["kernels"]:
        assert row["limit_share"] == pytest.approx(row["gbs"] / limits["memory"], rel=1e-3)
        assert row["peak_512_share"] == pytest.approx(row["gops_512"] / limits[row["isa"]], rel=1e-3)

    assert [(row["isa"], row["batch"]) for row in result["generation"]] == [(isa, b) for isa in sets for b in (2, 1)]
    for row in result["generation"]:
        assert 0 < row["prefill"]["min"] <= row["prefill"]["median"] <= row["prefill"]["max"]
        assert row["gops"] == pytest.approx(row["prefill"]["median"] * 2 * ternary_weights(TINY) / 1e9, rel=1e-3)
        assert row["peak_share"] == pytest.approx(row["gops"] / limits[row["isa"]], rel=1e-3)
        assert row["limit_share"] == pytest.approx(row["gbs"] / limits["memory"], rel=1e-3)
    double, single = result["generation"][:2]
    assert single["batch_ratio"] == 1
    assert double["batch_ratio"] == pytest.approx(double["decode"]["median"] / single["decode"]["median"], rel=1e-3)
    weights = result["model"][0]["weights_mb"]
    assert (
        weights < single["gbs"] / single["decode"]["median"] * 1e3 < 1.6 * weights
    )  # and the cache of 33 to 40 tokens
    # No order between them here: what earlier tests of this process have freed goes back to the system at any time.
    assert weights < min(result["model"][0]["imported_mb"], result["model"][0]["peak_mb"], single["peak_mb"])

    assert [(row["twin"], row["batch"]) for row in result["twins"]] == [
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in (2, 1)
    ]
    ratio = double["decode"]["median"] / result["twins"][0]["decode"]["median"]
    assert result["twins"][0]["decode_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert result["peers"] == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_of_ones_own(tmp_path, capsys, tokenizer, packed):
    folder = save_run(tmp_path / "run", BitNetForCausalLM(TINY), tokenizer)
    if packed:
        checkpoint = resolve(folder)
        folder = tmp_path / "packed"
        save_packed(folder, open_source(checkpoint).model().pack(), (checkpoint / TOKENIZER).read_bytes())
    assert quick(folder, "--new", "3", "--cache", "int8", "--json", tmp_path / "out.json") == 0
    assert f"{folder}, int8 cache" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["generation"]) == 1
    assert not any("random weights" in note for note in result["notes"])


def test_without_the_native_library_the_reference_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "_tables", dict)
    kernels.native_available.cache_clear()
    try:
        assert quick("--kernels", "--new", "2", "--json", tmp_path / "out.json") == 0
    finally:
        kernels.native_available.cache_clear()
    out, err = capsys.readouterr()
    assert err.count("note: the native CPU kernels were not built") == 1
    assert "the native kernels are missing or switched off: the torch reference ran" in out
    assert "Limits" not in out
    assert "Products" not in out
    (row,) = json.loads((tmp_path / "out.json").read_text())["generation"]
    assert row["isa"] == "reference"
    assert row["decode"]["median"] > 0
    assert row["limit_share"] is row["peak_share"] is None


@needs_native
def test_a_wrong_kernel_prints_no_speed(monkeypatch, tmp_path, capsys):
    right = cpu.integer_matmul

    def wrong(x, weights):
        sums = right(x, weights)
        if native.kernels().name == b"scalar" and len(x) > 64:  # forgets a part of long inputs
            sums[64:] = 0
        return sums

    monkeypatch.setattr(cpu, "integer_matmul", wrong)
    assert quick("--json", tmp_path / "out.json") == 1
    out = capsys.readouterr().out
    assert "gate RED" in out
    assert "scalar, two_bit, 513 x 64 x 200" in out
    assert "1 x 16 x 64" not in out
    assert not any(speed in out for speed in SPEEDS)
    assert not (tmp_path / "out.json").exists()


@needs_native
@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [(None, 1e-2, "logits are off by"), ({"scalar"}, 1e-6, "scalar, base3: the engine's logits have other bits")],
)
def test_a_wrong_engine_prints_no_speed(monkeypatch, capsys, sets, error, message):
    right = Engine.__call__

    def wrong(self, *arguments, **options):
        logits = right(self, *arguments, **options)
        name = native.kernels().name.decode()
        return logits * (1 + error) if sets is None or name in sets else logits

    monkeypatch.setattr(Engine, "__call__", wrong)
    assert quick() == 1
    out = capsys.readouterr().out
    assert "gate RED" in out
    assert message in out
    assert not any(speed in out for speed in SPEEDS)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_gate_is_green_with_every_cache(dtype):
    assert list(check_engine(dtype)) == []


def test_a_peer_runs_in_turn_with_ours(monkeypatch, tmp_path, capsys):
    log, model = tmp_path / "log", tmp_path / "model.gguf"
    model.write_text("weights")
    binary = script(
        tmp_path / "llama-bench",
        f"""
        open({str(log)!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")
        print("load: noise", file=sys.stderr)
        rate = 100.0 * len(open({str(log)!r}).readlines())
        print("a line of a build that is noisy on standard output too")
        print(json.dumps([{{"n_prompt": 20, "n_gen": 0, "avg_ts": rate, "samples_ts": [rate]}},
                          {{"n_prompt": 0, "n_gen": 4, "avg_ts": rate / 4}}]))
        """,
    )
    events = []
    for name in ("run_peer", "generate_once"):
        function = getattr(cpu_module, name)
        monkeypatch.setattr(cpu_module, name, lambda *a, f=function, n=name: events.append((n, a)) or f(*a))
    arguments = ["--prompt", "20", "--new", "4", "--peer", f"fake={binary}:{model}", "--json", tmp_path / "out.json"]
    assert quick(*arguments, "--repeat", "3") == 0
    expected = ["-m", str(model), "-p", "20", "-n", "4", "-t", "1", "-r", "1", "-o", "json"]
    assert [json.loads(line) for line in log.read_text().splitlines()] == [expected] * 3

    (row,) = json.loads((tmp_path / "out.json").read_text())["peers"]
    assert row["prefill_peer"] == {"median": 200, "min": 100, "max": 300}
    assert row["decode_peer"] == {"median": 50, "min": 25, "max": 75}
    for part in ("prefill", "decode"):
        ratio = row[f"{part}_ours"]["median"] / row[f"{part}_peer"]["median"]
        assert row[f"{part}_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert "200 (100..300)" in capsys.readouterr().out

    first = [name for name, _ in events].index("run_peer")
    rounds = events[first:]
    assert [name for name, _ in rounds] == ["run_peer", *["generate_once"] * 3] * 3
    measured = [(len(prompt), new) for name, (_, _, prompt, new, *_) in rounds if name == "generate_once"]
    assert measured == [(1, 1), (20, 0), (1, 4)] * 3  # warm up, prefill, and decoding from an empty cache as the peer


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('a\\nb\\ncannot read the model', file=sys.stderr); sys.exit(3)", "exit code 3:\na\nb\ncannot read the"),
        ("print('usage: llama-bench')", "no llama-bench JSON"),
        ("print(json.dumps([{'n_prompt': 1}]))", "no llama-bench JSON"),
        ("print(json.dumps([]))", "no llama-bench JSON"),
    ],
)
def test_a_failing_peer_is_reported_and_the_rest_goes_on(tmp_path, capsys, body, message):
    binary = script(tmp_path / "peer", body)
    assert quick("--new", "2", "--peer", f"broken={binary}:{binary}", "--json", tmp_path / "out.json") == 1
    captured = capsys.readouterr()
    assert f"peer broken failed: {message}" in captured.err
    assert "Traceback" not in captured.err
    assert "decode tok/s" in captured.out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["generation"]
    assert message in result["peers"][0]["error"]


def test_a_peer_that_is_no_program_is_reported(tmp_path, capsys):
    text = tmp_path / "model.gguf"
    text.write_text("weights")
    assert quick("--new", "2", "--peer", f"broken={text}:{text}") == 1
    assert "peer broken failed: [Errno" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "preset 'huge' is unknown; choose one of tiny, demo"),
        (["--isa", "sse9"], "sse9"),
        (["nowhere"], "nowhere does not exist"),
        (["nowhere", "--preset", "tiny"], "leave out --preset tiny"),
        (["--batch", "4", "0"], "--batch is (4, 0); give at least 1"),
        (["--batch"], "--batch is (); give at least 1"),
        (["--threads", "0"], "--threads is (0,); give at least 1"),
        (["--threads", "1", "9999"], "--threads is (1, 9999); give at most 1024"),
        (["--repeat", "0"], "--repeat is 0; give at least 1"),
        (["--prompt", "0"], "--prompt is 0; give at least 1"),
        (["--prompt", "120", "--new", "8"], "exceed tiny's 128 positions"),
        (["--new", "500"], "exceed tiny's 128 positions"),
        (["--json", "no/such/folder/out.json"], "no/such/folder"),
        (["--peer", "llama"], "--peer llama is not NAME=BINARY:MODEL"),
        (["--peer", "llama=no-such-bench:no.gguf"], "no-such-bench and no.gguf cannot be found"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(cpu_module, "passes_gate", lambda *_: pytest.fail("it ran"))
    assert quick(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


@needs_native
@pytest.mark.parametrize("kind", [None, "Q4_K_M"])
def test_a_model_of_any_format_runs_on_the_engine(tmp_path, capsys, monkeypatch, tokenizer, kind):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "sub_norm": False}
    torch.manual_seed(0)
    model = BitNetForCausalLM(TINY.replace(quantizer="none", **sizes)).eval()
    path = tmp_path / "m.gguf"
    if kind is None:
        path = save_run(tmp_path / "run", model, tokenizer)
    else:
        gguf_write.write(model, path, kind, tokenizer=tokenizer)
    options = ["--activations", "int8", "--new", "2", "--json", tmp_path / "out.json"]
    assert quick(path, *options, "--isa", *native.instruction_sets()[-2:]) == 0
    assert "gate green" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["generation"]
    assert [row["isa"] for row in rows] == native.instruction_sets()[-2:]
    assert quick(path, "--kernels") == 2
    assert "--kernels times the products of ternary weights" in capsys.readouterr().err
    right = cpu_gate.linear
    monkeypatch.setattr(cpu_gate, "linear", lambda matrix, x: right(matrix, x) + (native.kernels().name == b"scalar"))
    assert quick(path, *options) == 1
    assert "self_attn.q_proj" in capsys.readouterr().out


def test_twins_must_fit_memory(monkeypatch, capsys):
    parameters = BitNetForCausalLM(TINY).num_parameters()
    monkeypatch.setattr(plan_module, "available_memory", lambda: 1000)
    assert quick("--twins") == 2
    assert "the bfloat16 twin takes 0.00 GB, above 80 % of the 0.00 GB available" in capsys.readouterr().err
    monkeypatch.setattr(plan_module, "available_memory", lambda: 4 * parameters)
    assert fitting_twins(TINY) == ("bfloat16",)
    assert "the float32 twin takes" in capsys.readouterr().err
    monkeypatch.setattr(plan_module, "available_memory", lambda: 5.1 * parameters)
    assert fitting_twins(TINY) == ("float32", "bfloat16")


@pytest.mark.parametrize("tied", [True, False])
def test_random_tensors_are_those_of_a_packed_model(tied):
    config = TINY.replace(tie_word_embeddings=tied, sub_norm=tied)
    model = BitNetForCausalLM(config)
    assert ternary_weights(config) == sum(layer.weight.numel() for _, layer in bit_linears(model))
    tensor = random_tensors(config)
    tensors = {name: tensor(name) for name in model.pack().state_dict()}
    packed = BitNetForCausalLM.from_tensors(config, tensors)  # raises for another shape
    for name, (_, columns) in config.projections().items():
        codes = unpack_codes(tensors[f"model.layers.0.{name}.packed_weight"], 2, columns)
        assert codes.unique().tolist() == [-1, 0, 1]
    with torch.inference_mode():
        assert packed(torch.arange(9)[None]).std() == pytest.approx(LOGIT_STD, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_twin_is_a_usable_model(dtype):
    twin = float_twin(TINY.replace(tie_word_embeddings=False), dtype)
    fresh = BitNetForCausalLM(TINY)
    assert twin.device.type == "cpu"
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype}
    assert torch.equal(twin.model.cos, fresh.model.cos)
    assert torch.equal(twin.model.sin, fresh.model.sin)
    assert torch.equal(twin.model.norm.weight, torch.ones_like(twin.model.norm.weight))
    with torch.inference_mode():
        assert twin(torch.arange(9)[None]).float().std() == pytest.approx(LOGIT_STD, rel=0.3)


def test_interrupting_is_quiet_and_settings_come_back(monkeypatch, capsys):
    def interrupt(*_):
        assert torch.get_num_threads() == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_module, "passes_gate", interrupt)
    assert main(["bench", "--quick", "--threads", "1", "2"]) == 130
    assert torch.get_num_threads() == 1
    assert "Traceback" not in capsys.readouterr().err
