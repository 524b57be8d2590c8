"""Small float models to quantize, and how far the quantized ones are from them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM, ModelConfig

SHAPES = {
    "sub-norms": {},
    "no sub-norms": {"sub_norm": False},
    "grouped queries": {"sub_norm": False, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "biases and head norms": {"sub_norm": False, "qkv_bias": True, "qk_norm": True},
}


def float_model(**changes: object) -> BitNetForCausalLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, quantizer="none", initializer_range=0.08,
    )  # fmt: skip
    model = BitNetForCausalLM(config.replace(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.exp(0.5 * torch.randn_like(parameter)))
    return model.eval()


def ids(rows: int = 12, length: int = 48, seed: int = 1) -> Tensor:
    return torch.randint(0, 160, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: BitNetForCausalLM, seed: int = 2) -> Tensor:
    return model(ids(4, 32, seed))


def relative_error(model: BitNetForCausalLM, original: BitNetForCausalLM) -> float:
    expected = logits(original)
    return float((logits(model) - expected).norm() / expected.norm())


def projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name.endswith("_proj"))
