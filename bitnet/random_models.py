"""Models with random weights for benchmarks: real shapes whose numbers nobody trained."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.transformer import rope_tables
from bitnet.quant import packed_width

LOGIT_STD = 3.0
"""Standard deviation of the logits, about that of a trained model."""


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's ternary matrices."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_width
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    return {
        "q_proj": (queries, C), "k_proj": (keys, C), "v_proj": (keys, C), "o_proj": (C, queries), "gate_proj": (F, C),
        "up_proj": (F, C), "down_proj": (C, F),
    }  # fmt: skip


def random_tensors(config: ModelConfig) -> Callable[[str], Tensor]:
    """Tensors of a packed ternary model by name, for an engine: random codes, in every layer the same ones."""
    C, shapes = config.hidden_size, projections(config)
    generator = torch.Generator().manual_seed(0)
    # A byte is four fields of 0, 1 or 2.
    bytes_of_codes = (torch.cartesian_prod(*[torch.arange(3)] * 4) @ torch.tensor([1, 4, 16, 64])).to(torch.uint8)
    size = max(N * packed_width(K, 2) for N, K in shapes.values())
    codes = bytes_of_codes[torch.randint(81, (size,), generator=generator)]

    def tensor(name: str) -> Tensor:
        *_, module, kind = name.split(".")
        if module in shapes:
            N, K = shapes[module]
            return torch.full((1, 1), 0.02) if kind == "weight_scale" else codes[: N * packed_width(K, 2)].view(N, -1)
        if kind == "weight_scale":  # embedding or head; uniform bytes have a standard deviation of 74
            return torch.full((config.vocab_size, 1), LOGIT_STD / math.sqrt(C) / 74)
        if kind == "packed_weight":
            return torch.randint(256, (config.vocab_size, packed_width(C, 8)), dtype=torch.uint8, generator=generator)
        sub_norms = {"attn_sub_norm": shapes["o_proj"][1], "ffn_sub_norm": shapes["down_proj"][1]}
        return torch.ones(sub_norms.get(module, C))

    return tensor


def float_twin(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> BitNetForCausalLM:
    """A float model of this shape, filled from one tile of random numbers: drawing all of them would take minutes."""
    with torch.device("meta"):
        model = BitNetForCausalLM(config.replace(quantizer="none")).to(dtype)
    model.to_empty(device=device).eval()
    model.model.cos, model.model.sin = (table.to(device) for table in rope_tables(config))
    tile = torch.empty(2**20 + 7).normal_(generator=torch.Generator().manual_seed(0))  # a prime: no two rows are alike
    tile = tile.to(device)
    for name, parameter in model.named_parameters():
        is_table = "embed_tokens" in name or "lm_head" in name
        scaled = (tile * (LOGIT_STD / math.sqrt(config.hidden_size) if is_table else 0.02)).to(dtype)
        for part in parameter.data.view(-1).split(len(tile)):
            part.copy_(scaled[: len(part)] if parameter.dim() > 1 else torch.ones(1))
    return model
