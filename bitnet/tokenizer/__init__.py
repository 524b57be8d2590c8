"""Text <-> token ids, behind one interface (`BaseTokenizer`): sentencepiece, tokenizer.json, GGUF; chat templates.

`load_tokenizer` takes a folder or a file, `from_gguf_metadata` what a GGUF file says; `train_tokenizer` makes one.
"""

import os
from pathlib import Path

from bitnet.tokenizer.base import BaseTokenizer, StreamDecoder
from bitnet.tokenizer.chat import ChatTemplate, chat_template_of_gguf, find_chat_template
from bitnet.tokenizer.gguf import from_gguf_metadata
from bitnet.tokenizer.huggingface import HuggingFaceTokenizer
from bitnet.tokenizer.sentencepiece import Tokenizer, train_tokenizer

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
        for kind in (HuggingFaceTokenizer, Tokenizer):
            if (path / kind.file_name).is_file():
                return kind.load(path / kind.file_name)
        raise ValueError(f"{path} holds no tokenizer.json and no tokenizer.model; copy the model's tokenizer there")
    return HuggingFaceTokenizer.load(path) if path.suffix == ".json" else Tokenizer.load(path)
