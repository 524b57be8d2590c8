"""Rows that no block of 128 or 256 divides, as those of 576 of SmolLM2: every method goes from the float model to the
engine, or names what does not divide."""

import copy
import os
from pathlib import Path

import pytest
import torch

from bitnet import kernels
from bitnet.inference.loading import open_model
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import METHODS, quantize_model
from bitnet.storage.folders import save_quantized
from tests.ptq.builders import float_model, ids, logits

LONG = os.environ.get("BITNET_LONG") == "1"
SHAPE = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 3,
         "num_key_value_heads": 1, "sub_norm": False}  # fmt: skip
CHOSEN = [method for method in METHODS if LONG or not METHODS[method].needs_calibration]


@pytest.mark.parametrize("method", CHOSEN)
def test_rows_of_three_times_64(method: str, tmp_path: Path) -> None:
    original, kind = float_model(**SHAPE), method.removeprefix("gguf-").upper()
    size = kernels.blocks.TYPES[kind].block_size if kind in kernels.blocks.TYPES else 32
    calibration = ids() if METHODS[method].needs_calibration else None
    embeddings = "int8" if METHODS[method].int8_activations else "float16"  # as a comparison stores them
    options = Options(progress=False, group_size=64, damping=0.01, tuning_steps=8, embeddings=embeddings)
    if 64 % size:
        with pytest.raises(ValueError, match=f"{kind} has blocks of {size}, which do not divide the input channels of"):
            quantize_model(original, method, calibration, options)
        return
    model = quantize_model(copy.deepcopy(original), method, calibration, options)
    save_quantized(model, tmp_path / "model", method, {})
    with torch.inference_mode():
        found = open_model(tmp_path / "model")(ids(4, 32, 2))
    assert float((found - logits(model)).norm() / logits(model).norm()) < 2e-2
