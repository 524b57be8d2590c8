"""benchmarks/quantizers.py on a tiny matrix: its table, and its gate, which lets no wrong number through."""

import json

import pytest
import torch

from benchmarks import quantizers
from bitnet.quant.grouped import round_to_nearest
from tests.oracles import ggml


def run(tmp_path, kinds=("Q4_K", "IQ4_NL")) -> int:
    return quantizers.run(
        quantizers.Options(
            rows=32,
            columns=256,
            calibrated=(32, 64),
            rounds=1,
            seconds=1e-4,
            threads=1,
            kinds=kinds,
            out=tmp_path / "speeds.json",
        )
    )


def test_every_quantizer_has_a_speed(tmp_path, capsys):
    assert run(tmp_path) == 0
    result = json.loads((tmp_path / "speeds.json").read_text())
    assert (result["rows"], result["columns"], result["threads"]) == (32, 256, 1)
    assert all(rate > 0 for row in result["rates"] for rate in row["mweights_per_s"].values())
    printed = capsys.readouterr().out
    for row in result["rates"]:
        assert f"| {row['type']} |" in printed
        assert "importance" not in row or {"ggml", "torch, better"} <= row["mweights_per_s"].keys()
    names = {row["type"] for row in result["rates"]}
    assert names == {"Q4_K", "IQ4_NL", *quantizers.LINEAR, "GPTQ, 4 bits", "GPTQ, 4 bits, as published", "AWQ, 4 bits"}
    assert all(0 < error <= 1 for error in result["error_ratio"].values())


def other_bytes(x, kind, importance, path=None):
    data = theirs(x, kind, importance)
    data[-1, -1] ^= 1
    return data


def nudged(x):
    codes, scale = ternary(x)
    codes[0, 0] = -codes[0, 0] if codes[0, 0] else 1
    return codes, scale


theirs, ternary = ggml.quantize, quantizers.quantize_ternary
WRONG = {
    "not ggml's bytes": (quantizers.ggml, "quantize", other_bytes, "bytes are not ggml's"),
    "a dequantizer": (quantizers.ggml, "dequantize", lambda data, kind: torch.zeros(1), "dequantizer differs"),
    "a worse search": (
        quantizers, "weighted_error", lambda x, data, kind, weight: torch.rand(len(data)), "worse than ggml's"
    ),
    "ternary": (quantizers, "quantize_ternary", nudged, "absmean ternary: 1 weights"),
    "NF4": (quantizers, "dequantize_nf4", lambda weight: torch.zeros(16, 256), "NF4.* weights are not"),
    "GPTQ": (quantizers, "gptq_quantize", lambda w, h, grid, **_: round_to_nearest(w, quantizers.Grid(2), 32), "GPTQ"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_number_stops_it(tmp_path, capsys, monkeypatch, wrong):
    module, name, replacement, message = WRONG[wrong]
    monkeypatch.setattr(module, name, replacement)
    assert run(tmp_path, kinds=("Q4_0",)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message.split(".*")[0] in printed.err
    assert not (tmp_path / "speeds.json").exists()


def test_a_matrix_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="multiples of 256"):
        quantizers.run(quantizers.Options(columns=100))
    with pytest.raises(ValueError, match="'Q9_K' is unknown"):
        run(tmp_path, kinds=("Q9_K",))
