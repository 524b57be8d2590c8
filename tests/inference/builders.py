"""Small models of every shape that an engine must run."""

from collections.abc import Sequence

import pytest

from bitnet.inference.lookup import PromptLookup
from bitnet.kernels.cpu import native
from bitnet.model import ModelConfig
from tests.kernels.builders import NOT_BUILT

ON_NATIVE_KERNELS = [
    pytest.mark.usefixtures("poisoned_memory", "automatic_choices"),
    pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT),
]
"""Marks of tests of the native engine."""

BASE = ModelConfig(
    vocab_size=50, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
CHANGES: dict[str, dict] = {
    "base": {},
    "relu2": {"hidden_act": "relu2"},
    "no sub-norms": {"sub_norm": False},
    "relu2, no sub-norms": {"hidden_act": "relu2", "sub_norm": False},
    "untied": {"tie_word_embeddings": False},
    "MHA": {"num_key_value_heads": 4},
    "one kv head of six": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16},
    "head_dim 2": {"head_dim": 2, "intermediate_size": 17},
    "head_dim 80": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80},
    "odd sizes": {"hidden_size": 33, "intermediate_size": 67, "vocab_size": 97, "head_dim": 6},
    "multiples of 64": {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "head_dim": 32},
    "binary": {"quantizer": "binary"},
    "int4": {"quantizer": "int4"},
    "groups of 64": {"quantizer": "ternary-g64", "hidden_size": 160, "tie_word_embeddings": False},
    "groups of 128": {"quantizer": "ternary-g128", "hidden_size": 104, "intermediate_size": 300, "head_dim": 26},
    "int8, untied": {"quantizer": "int8", "tie_word_embeddings": False, "hidden_act": "relu2"},
}
CONFIGS = {name: BASE.replace(**changes) for name, changes in CHANGES.items()}


class AlwaysDrafts(PromptLookup):
    """Whatever passes cost."""

    def draft_lengths(self, texts: Sequence[tuple[int, int]]) -> list[int]:
        return [min(self.tokens, room) if match else 0 for match, room in texts]
