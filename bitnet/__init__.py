"""bitnet: train, compare and run BitNet b1.58 language models.

The layer for other people's models and the model that writes text are here; everything else is imported from its
module. Nothing is imported before it is used: the layer needs torch, numpy and einops, the command line starts without.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnet.inference.text_model import TextModel, load
    from bitnet.model.linear import BitLinear, PackedLinear, pack, replace_linear

__all__ = ["BitLinear", "PackedLinear", "TextModel", "load", "pack", "replace_linear"]
__version__ = "0.1.0"

_HOMES = dict.fromkeys(("BitLinear", "PackedLinear", "pack", "replace_linear"), "bitnet.model.linear")
_HOMES |= dict.fromkeys(("TextModel", "load"), "bitnet.inference.text_model")


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitnet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
