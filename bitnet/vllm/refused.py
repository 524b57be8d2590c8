"""What vLLM gets in the place of the quantization method where this plugin cannot run: a reason."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


def refused_config(reason: str) -> type[QuantizationConfig]:
    """A quantization method that raises ValueError with the reason when a model asks for it."""

    class Refused(QuantizationConfig):
        @classmethod
        def get_name(cls) -> Any:
            return "bitnet"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Refused":
            raise ValueError(reason)

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
            raise ValueError(reason)

    return Refused
