"""Text <-> token ids, behind one interface (`BaseTokenizer`): sentencepiece, tokenizer.json, GGUF; chat templates.

`load_tokenizer` takes a folder or a file, `from_gguf_metadata` what a GGUF file says; `train_tokenizer` makes one.
"""

import os
from pathlib import Path

from bitnet.tokenizer.base import BaseTokenizer, StreamDecoder
from bitnet.tokenizer.chat import ChatTemplate, chat_template_of_gguf, find_chat_template
from bitnet.tokenizer.gguf import from_gguf_metadata
from bitnet.tokenizer.huggingface import TOKENIZER_JSON, HuggingFaceTokenizer
from bitnet.tokenizer.sentencepiece import Tokenizer, train_tokenizer

TOKENIZER_MODEL = "tokenizer.model"

__all__ = [
    "BaseTokenizer", "ChatTemplate", "HuggingFaceTokenizer", "StreamDecoder", "Tokenizer", "chat_template_of_gguf",
    "find_chat_template", "from_gguf_metadata", "load_tokenizer", "train_tokenizer",
]  # fmt: skip


def load_tokenizer(path: str | os.PathLike[str]) -> BaseTokenizer:
    """The tokenizer in a file, or in a model's folder: tokenizer.json, or else tokenizer.model.

    The former comes first: it knows tokens that were added to a model later. Raises ValueError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        if (path / TOKENIZER_JSON).is_file():
            return HuggingFaceTokenizer.load(path)
        if not (path / TOKENIZER_MODEL).is_file():
            raise ValueError(
                f"{path} holds no {TOKENIZER_JSON} and no {TOKENIZER_MODEL}; copy the model's tokenizer there"
            )
        return Tokenizer.load(path / TOKENIZER_MODEL)
    return HuggingFaceTokenizer.load(path) if path.suffix == ".json" else Tokenizer.load(path)
