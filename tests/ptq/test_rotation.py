"""Rotations: the model computes what it did before, and outliers are gone."""

import copy

import pytest
import torch

from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.ptq.rotation import rotate
from tests.ptq.builders import SHAPES, float_model, logits, relative_error


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotated_model_computes_what_it_did(shape: str) -> None:
    original = float_model(**SHAPES[shape])
    with torch.no_grad():
        for name, value in original.named_parameters():
            if name.endswith("bias"):
                value.normal_()
        model = copy.deepcopy(original)
        rotate(model)
    torch.testing.assert_close(logits(model), logits(original), atol=1e-4, rtol=1e-4)
    assert model.lm_head is not None
    assert not model.config.tie_word_embeddings
    layer, before = model.model.layers[0], original.model.layers[0]
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert not torch.allclose(layer.get_submodule(name).weight, before.get_submodule(name).weight, atol=1e-2), name


def test_outliers_are_spread_and_four_bits_suffice() -> None:
    original = float_model(sub_norm=False)
    with torch.no_grad():  # a residual channel far above the others, as trained models have them
        original.model.embed_tokens.weight[:, 7] *= 30
        for layer in original.model.layers:
            layer.self_attn.o_proj.weight[7] *= 30
            layer.mlp.down_proj.weight[7] *= 30
    quick = Options(progress=False)
    plain, rotated = (
        quantize_model(copy.deepcopy(original), name, options=quick) for name in ("w4a8-dynamic", "rotated-w4a8")
    )
    assert relative_error(rotated, original) < 0.8 * relative_error(plain, original)
