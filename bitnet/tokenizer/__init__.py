"""Text <-> token ids, behind one interface (`BaseTokenizer`): sentencepiece, tokenizer.json, GGUF; chat templates.

`load_tokenizer` takes a folder or a file, `from_gguf_metadata` what a GGUF file says; `train_tokenizer` makes one.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from bitnet.tokenizer.base import BaseTokenizer, StreamDecoder
from bitnet.tokenizer.chat import ChatTemplate, chat_template_of_gguf, find_chat_template
from bitnet.tokenizer.gguf_read import from_gguf_metadata
from bitnet.tokenizer.huggingface import HuggingFaceTokenizer, end_ids, read_settings
from bitnet.tokenizer.sentencepiece import Tokenizer, train_tokenizer

__all__ = [
    "BaseTokenizer",
    "ChatTemplate",
    "HuggingFaceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "chat_template_of_gguf",
    "find_chat_template",
    "from_gguf_metadata",
    "load_tokenizer",
    "train_tokenizer",
]


def load_tokenizer(
    path: str | os.PathLike[str], *, own: bool = False, config: Mapping[str, object] | None = None
) -> BaseTokenizer:
    """The tokenizer in a file, or in a model's folder: tokenizer.json, or else tokenizer.model.

    The former comes first: it knows tokens that were added to a model later. In our `own` folders it is the latter, of
    which the former was made: it tells a U+2581 in a text from a space. `config` is what the folder's config.json
    holds, where it has been read already. Raises ValueError for anything else.
    """
    path = Path(path)
    if not path.is_dir():
        return HuggingFaceTokenizer.load(path) if path.suffix == ".json" else Tokenizer.load(path)
    found = [kind for kind in (HuggingFaceTokenizer, Tokenizer) if (path / kind.file_name).is_file()]
    if found and found[-1 if own else 0] is HuggingFaceTokenizer:
        return HuggingFaceTokenizer.load(path, config)
    if found:
        adds_bos = read_settings(path / "tokenizer_config.json").get("add_bos_token") is not False
        return Tokenizer.load(path / Tokenizer.file_name, adds_bos=adds_bos, ends=tuple(end_ids(path, config)))
    raise ValueError(f"{path} holds no tokenizer.json and no tokenizer.model; copy the model's tokenizer there")
