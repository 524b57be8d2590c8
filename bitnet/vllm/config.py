"""The quantization method `bitnet` of vLLM: what a folder's config.json asks for, and which layer gets which method.

    quantization_config   as in bitnet/storage/hf/read.py: packed, packed-inverse, or latent floats (online)
    projections           packed ternary codes, INT8 activations                  bitnet/vllm/linear.py
    embedding and head    INT8, as in our engine, or the model's own floats       bitnet/vllm/embedding.py
    what can be drawn     rows of the head with a token of their own              bitnet/vllm/drawable.py

The second choice is vLLM's `--additional-config '{"bitnet": {"embeddings": "float"}}'`.
"""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from bitnet.storage.hf.config import Form, parse_form
from bitnet.vllm.drawable import FloatEmbeddingMethod, unused_ids
from bitnet.vllm.embedding import Int8EmbeddingMethod
from bitnet.vllm.linear import TernaryLinearMethod

EMBEDDINGS = ("int8", "float")
CLASSES = ("BitNetForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Model classes whose layers were compared with this project's engine."""


class BitNetConfig(QuantizationConfig):
    """The form of a folder's weights, and the methods of its layers."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.embeddings = "int8"

    @classmethod
    def get_name(cls) -> Any:
        return "bitnet"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # int8 matrix instructions

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BitNetConfig":
        """Raises ValueError for a quantization_config that is not understood."""
        return cls(parse_form(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse, with the reason, what would not run or would not be exact."""
        classes = getattr(hf_config, "architectures", None) or []
        if not set(classes) & set(CLASSES):
            raise ValueError(f"{model_name} is of the class {classes}; ternary models here are {', '.join(CLASSES)}")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding):
            method = Int8EmbeddingMethod if self._options()["embeddings"] == "int8" else FloatEmbeddingMethod
            return method(unused_ids(get_current_vllm_config().model_config))
        if isinstance(layer, LinearBase):
            return TernaryLinearMethod(self.form)
        if isinstance(layer, Attention):
            return None
        raise ValueError(f"{prefix} is a {type(layer).__name__}, which has no ternary form here")

    @staticmethod
    def _options() -> dict[str, Any]:
        config = get_current_vllm_config()
        if config.lora_config is not None and config.parallel_config.tensor_parallel_size > 1:
            raise ValueError(
                "LoRA adds float sums of every process to a ternary product that is summed exactly; run it with "
                "--tensor-parallel-size 1, or merge the adapter before the export"
            )
        given = config.additional_config.get("bitnet", {}) if isinstance(config.additional_config, dict) else {}
        options = {"embeddings": "int8"} | given
        if set(options) != {"embeddings"} or options["embeddings"] not in EMBEDDINGS:
            raise ValueError(
                f"additional_config has bitnet {given!r}; it may hold embeddings, one of {', '.join(EMBEDDINGS)}"
            )
        return options

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        # vLLM drops biases that a layer has no place for; these have one, or are refused.
        return WeightsMapper(orig_to_new_suffix={".bias": ".stored_bias"})
