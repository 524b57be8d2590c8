"""benchmarks/beside_peers.py with peers that answer at once: its rows, ratios and ends; the files that it makes."""

import json
import sys

import pytest
import torch

from benchmarks import beside_peers
from bitnet.bench.random_models import write_random_gguf
from bitnet.inference.loading import open_model
from bitnet.kernels import use_backend
from bitnet.kernels.cpu import native

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="the native kernels were not built")

BENCH = """#!{python}
import json, sys
after = lambda name: sys.argv[sys.argv.index(name) + 1]
rows = [dict(n_prompt=int(count), n_gen=0, avg_ts=10.0) for count in after("-p").split(",")]
rows += [dict(n_prompt=0, n_gen=int(after("-n")), avg_ts=0.5)]
print("warming up", json.dumps(rows))
"""
BATCHED = (
    "#!/bin/sh\necho '|   128 |     16 |    4 |    192 |    1.0 |   128.00 |    2.0 |    48.00 |    3.0 |    70.0 |'\n"
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["q4_k_m", "bf16", "q2_0", "ternary"])
def test_files_of_random_weights_open_on_the_engine_and_give_the_logits_of_their_floats(tmp_path, case):
    sizes = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    config, kind = beside_peers.CASES[case].config.replace(**sizes, **heads), beside_peers.CASES[case].kind
    write_random_gguf(tmp_path / "m.gguf", config, kind)
    ids = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with use_backend("reference"):
            expected = open_model(tmp_path / "m.gguf")(ids)
        logits = open_model(tmp_path / "m.gguf", activations="float")(ids)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_everybody_has_a_turn_and_the_file_says_how_many_times_faster_ours_is(tmp_path, monkeypatch, capsys):
    for name, text in (("llama-bench", BENCH.format(python=sys.executable)), ("llama-batched-bench", BATCHED)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(beside_peers, "gate", lambda run: [])
    monkeypatch.setattr(beside_peers, "ROWS", (4,))
    options = ["--files", tmp_path / "files", "--out", tmp_path / "out.json", "--minutes", 5, "--rounds", 2]
    arguments = ["beside_peers.py", "--llama", tmp_path, *options, "--cases", "ternary", "q2_0", "--quick"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    assert beside_peers.main() == 0
    results = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["case"], row["engine"], row["quantity"]): row for row in results["rows"]}
    assert {engine for _, engine, _ in rows} == {"ours", "ours int8", "ours int16", "llama.cpp"}
    assert rows["ternary", "llama.cpp", "rows 4"]["rates"] == [48.0, 48.0]
    own = rows["ternary", "ours", "rows 4"]
    assert len(own["rates"]) == 2
    assert own["ratio"] == pytest.approx(own["median"] / 48)
    assert len(rows["ternary", "llama.cpp", "prefill 128"]["rates"]) == 1
    assert ("ternary", "llama.cpp", "prefill 16") not in rows
    # A slow peer's short prompt is what ours is compared with.
    own = rows["q2_0", "ours int8", "prefill 64"]
    assert rows["q2_0", "llama.cpp", "prefill 16"]["median"] == 10
    assert own["ratio"] == pytest.approx(own["median"] / 10)
    assert rows["q2_0", "ours int16", "decode 8"]["share"] > 0
    assert "ours" in capsys.readouterr().out


def test_a_peer_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "llama-bench").write_text("#!/bin/sh\necho no such type >&2\nexit 3\n")
    (tmp_path / "llama-bench").chmod(0o755)
    monkeypatch.setattr(beside_peers, "gate", lambda run: [])
    options = ["--files", tmp_path, "--out", tmp_path / "out.json", "--minutes", 5, "--rounds", 2, "--quick"]
    monkeypatch.setattr(
        sys, "argv", list(map(str, ["beside_peers.py", "--llama", tmp_path, *options, "--cases", "q4_0"]))
    )
    assert beside_peers.main() == 1
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["failed"] == ["q4_0, llama.cpp: exit code 3: no such type"]
    assert {row["engine"] for row in results["rows"]} == {"ours int8", "ours int16"}


def test_on_a_red_gate_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(beside_peers, "check_products", lambda config: ["avx2: 3 sums differ"])
    monkeypatch.setattr(beside_peers, "check_engine", lambda dtype: [])
    options = ["--files", tmp_path, "--out", tmp_path / "out.json", "--minutes", 5, "--cases", "ternary"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["beside_peers.py", *options])))
    assert beside_peers.main() == 1
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == []
    assert "RED" in capsys.readouterr().out
