"""GGUF files: `read` a model from one, `write` one, or look at its metadata.

The container is in `gguf_file.py`, names and row order in `gguf_names.py`, the two directions in `gguf_read.py` and
`gguf_write.py`, the tokenizer in `gguf_vocabulary.py`.
"""

from bitnet.interop.gguf_file import GGUFError, GGUFFile
from bitnet.interop.gguf_read import read, read_metadata
from bitnet.interop.gguf_vocabulary import vocabulary
from bitnet.interop.gguf_write import write

__all__ = ["GGUFError", "GGUFFile", "read", "read_metadata", "vocabulary", "write"]
