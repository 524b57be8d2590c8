"""Text <-> token ids."""

from bitnet.tokenizer.base import BaseTokenizer, StreamDecoder
from bitnet.tokenizer.sentencepiece import Tokenizer, train_tokenizer

__all__ = ["BaseTokenizer", "StreamDecoder", "Tokenizer", "train_tokenizer"]
