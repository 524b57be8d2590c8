"""Mixtures to a target: bits by the sensitivity of each layer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitnet.model import BitNetForCausalLM
from bitnet.model.quantized import model_bits
from bitnet.ptq import mixture
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.ptq.walk import STAGES
from tests.ptq.builders import float_model, ids

QUICK = Options(progress=False, group_size=32, damping=0.01)


def test_mixtures_keep_their_target_and_layers_differ() -> None:
    for target in (3.2, 4.5):
        model = quantize_model(float_model(), "mixed-3", ids(), replace(QUICK, target_bits=target))
        assert target - 0.5 < model_bits(model)[1] <= target
        bits = [[layer.get_submodule(name).bits for name in names] for layer in model.model.layers for names in STAGES]
        assert all(len(set(stage)) == 1 for stage in bits)  # what shares an input
        assert len({stage[0] for stage in bits}) > 1


@torch.no_grad()
def test_rows_that_no_text_has_do_not_decide_on_a_mixture() -> None:
    padded = float_model(vocab_size=192, tie_word_embeddings=False)
    padded.lm_head.weight[160:] *= 8  # likelier than any token
    plain = float_model(tie_word_embeddings=False)
    plain.load_state_dict({
        name: value[:160] if name in ("lm_head.weight", "model.embed_tokens.weight") else value
        for name, value in padded.state_dict().items()
    })  # fmt: skip
    units = [(layer, names) for layer in range(2) for names in STAGES]

    def sensitivities(model: BitNetForCausalLM, unused: Tensor | None = None) -> list[float]:
        return list(mixture._divergences(model, ids(), units, replace(QUICK, unused=unused)).values())

    wanted = sensitivities(plain)
    assert sensitivities(padded, torch.arange(160, 192)) == pytest.approx(wanted, rel=1e-3)
    assert sensitivities(padded) != pytest.approx(wanted, rel=0.5)
