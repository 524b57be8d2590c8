"""Text <-> token ids, behind one interface (`BaseTokenizer`): sentencepiece, tokenizer.json, GGUF; chat templates.

`load_tokenizer` takes a folder or a file, `from_gguf_metadata` what a GGUF file says; `train_tokenizer` makes one.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from bitnet.tokenizer.added import CONFIG, added_tokens, read_settings, suppressed_ids
from bitnet.tokenizer.base import BaseTokenizer, Drawable, StreamDecoder
from bitnet.tokenizer.chat import ChatTemplate, chat_template_of_gguf, find_chat_template
from bitnet.tokenizer.gguf_read import from_gguf_metadata
from bitnet.tokenizer.huggingface import HuggingFaceTokenizer, end_ids
from bitnet.tokenizer.sentencepiece import Tokenizer, train_tokenizer, with_added_tokens

__all__ = [
    "BaseTokenizer",
    "ChatTemplate",
    "Drawable",
    "HuggingFaceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "chat_template_of_gguf",
    "end_ids",
    "find_chat_template",
    "from_gguf_metadata",
    "load_tokenizer",
    "read_settings",
    "train_tokenizer",
]


def load_tokenizer(
    path: str | os.PathLike[str], *, own: bool = False, config: Mapping[str, object] | None = None
) -> BaseTokenizer:
    """The tokenizer in a file, or in a model's folder: tokenizer.json, or else tokenizer.model.

    Either has the tokens that other files of the folder add to it. In our `own` folders a tokenizer.model is legacy
    unless a file says otherwise. `config` is what the folder's config.json holds, where it has been read already.
    Raises ValueError for anything else.
    """
    path = Path(path)
    kinds: tuple[type[HuggingFaceTokenizer] | type[Tokenizer], ...] = (HuggingFaceTokenizer, Tokenizer)
    if path.is_file() and path.name == Tokenizer.file_name:  # what lies beside it belongs to it
        path, kinds = path.parent, (Tokenizer,)
    if not path.is_dir():
        return HuggingFaceTokenizer.load(path) if path.suffix == ".json" else Tokenizer.load(path)
    found = next((kind for kind in kinds if (path / kind.file_name).is_file()), None)
    if found is HuggingFaceTokenizer:
        return HuggingFaceTokenizer.load(path, config)
    if found is Tokenizer:
        file, settings = path / Tokenizer.file_name, read_settings(path / CONFIG)
        config = read_settings(path / "config.json") if config is None else config
        tokenizer = Tokenizer.load(
            file,
            adds_bos=settings.get("add_bos_token") is not False,
            legacy=settings.get("legacy") is not False if own else settings.get("legacy") is True,
        )
        proto = with_added_tokens(tokenizer.model_proto, added_tokens(path), config.get("vocab_size"), str(file))
        ends, unused = tuple(end_ids(path, config)), suppressed_ids(path)
        return Tokenizer(
            proto, str(file), adds_bos=tokenizer.adds_bos, legacy=tokenizer.legacy, ends=ends, unused=unused
        )
    raise ValueError(f"{path} holds no tokenizer.json and no tokenizer.model; copy the model's tokenizer there")
