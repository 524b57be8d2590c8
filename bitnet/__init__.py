"""bitnet: train, compare and run BitNet b1.58 language models.

The layer for other people's models is here; everything else is imported from its module.
"""

from bitnet.model.linear import BitLinear, PackedLinear, pack, replace_linear

__all__ = ["BitLinear", "PackedLinear", "pack", "replace_linear"]
__version__ = "0.1.0"
