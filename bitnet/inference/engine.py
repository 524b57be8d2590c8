"""What every engine is to those that use it, and what the engines share."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from bitnet.kernels import GROUP_SIZES
from bitnet.kernels.triton import limits
from bitnet.model import ModelConfig

NOT_FINITE = -2
"""In place of a token drawn from logits that are not finite."""


class LanguageModel(Protocol):
    """What `generate` asks of a model: `BitNetForCausalLM` and the engines have it."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, batch_size: int, max_length: int) -> Any: ...

    def weight_bytes(self) -> int: ...

    def __call__(self, input_ids: Tensor, cache: Any = None, *, last_only: bool = False) -> Tensor: ...


def beyond_kernels(config: ModelConfig) -> list[str]:
    """Names of what this model computes and the Triton engine does not: it runs in torch on a GPU, layer by layer."""
    found = [name for name in ("qkv_bias", "qk_norm") if getattr(config, name)]
    found += ["scales of groups"] if config.quantizer in GROUP_SIZES else []
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_width
    sizes = (
        ("hidden_size", config.hidden_size, limits.MAX_WIDTH),
        ("intermediate_size", config.intermediate_size, limits.MAX_WIDTH),
        ("width of all heads", heads * width, limits.MAX_WIDTH),
        ("vocab_size", config.vocab_size, limits.MAX_ROWS),
        ("values of heads that share keys", limits.head_values(heads, groups, width), limits.MAX_HEAD_VALUES),
    )
    return found + [f"{name} {size:,} (at most {most:,})" for name, size, most in sizes if size > most]


def check_ids(config: ModelConfig, smallest: int, largest: int) -> None:
    """Raise ValueError unless token ids from `smallest` to `largest` are of the vocabulary."""
    if smallest < 0 or largest >= config.vocab_size:
        raise ValueError(
            f"token id {smallest if smallest < 0 else largest} is outside the vocabulary (0 to "
            f"{config.vocab_size - 1}); encode the prompt with the model's own tokenizer"
        )


def build_exactly(
    build: Callable[[Callable[..., Tensor]], None], tensor: Callable[[str], Tensor], names: Iterable[str] | None
) -> None:
    """Call `build(checked)`, where `checked(name, *shape)` is the tensor of that name and shape. Raises ValueError for
    another shape, and for names that were not asked for."""
    seen: set[str] = set()

    def checked(name: str, *shape: int) -> Tensor:
        seen.add(name)
        value = tensor(name)
        if list(value.shape) != list(shape):
            raise ValueError(f"{name} is {list(value.shape)} and the configuration says {list(shape)}")
        return value

    build(checked)
    left = sorted(set(names or ()) - seen)
    if left:
        raise ValueError(f"{len(left)} tensors are not of this configuration: {', '.join(left[:3])}")
