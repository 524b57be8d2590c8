"""Texts that keep to a JSON schema: which tokens may come next, from the llguidance library.

`Grammars(tokenizer).json_schema(schema)` makes a grammar once; each text that keeps to it has a matcher of its own.
"""

import json
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.serving.errors import ApiError, invalid
from bitnet.tokenizer import BaseTokenizer

SPACES: Any = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?"}  # else a model may go on with spaces forever
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Grammars:
    """The grammars of one model's tokens."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def json_schema(self, schema: dict[str, Any], param: str) -> Callable[[], "GrammarMatcher"]:
        """Makes matchers of a JSON schema. Raises ApiError for one that is none or is not supported."""
        matcher = self._compiled(json.dumps(schema), param)
        return lambda: GrammarMatcher(matcher.deep_copy(), self._tokenizer)

    def _compile(self, schema: str, param: str) -> Any:
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=SPACES)
            matcher = LLMatcher(self._tokens, grammar)
        except ValueError as error:
            raise invalid(f"the JSON schema cannot be kept to: {error}", param) from error
        if matcher.is_error():
            raise invalid(f"the JSON schema cannot be kept to: {matcher.get_error()}", param)
        return matcher

    @cached_property
    def _tokens(self) -> Any:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise ApiError(
                501, "this server has no llguidance for JSON schemas; run pip install -e '.[serve]' in the clone"
            ) from error
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)))


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        pieces = [(i, tokenizer.surface_bytes(i)) for i in range(tokenizer.vocab_size)]
        self._tokenizer = tokenizer
        # Without an end of text a text ends with its grammar; llguidance wants a token for it, which no model draws.
        self.eos_token_id = len(pieces) if tokenizer.eos_id is None else tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        # A token without bytes, or that is never drawn, is no way to go on; under a name of its own no text has it.
        nameless = tokenizer.unused.union(i for i, piece in pieces if not piece)
        self.tokens = [f"<|token {i}|>".encode() if i in nameless else piece for i, piece in pieces]
        self.special_token_ids = sorted(nameless.union(tokenizer.specials.values(), [self.eos_token_id]))
        if tokenizer.eos_id is None:
            self.tokens.append(b"<|end of text|>")

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class GrammarMatcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, tokenizer: BaseTokenizer) -> None:
        self._matcher = matcher
        known = tokenizer.vocab_size + (tokenizer.eos_id is None)  # as `_Vocabulary` has them
        self._words = np.zeros(-(-known // 32), dtype=np.int32)
        self._size = tokenizer.drawable.vocab_size
        self._ends = list(tokenizer.eos_ids)

    def mask(self) -> Tensor:
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little", count=self._size)
        mask = torch.from_numpy(bits).bool()
        mask[self._ends] = self._matcher.is_accepting()
        if not bool(mask.any()):
            raise ValueError("the JSON schema leaves no token of this model to go on with")
        return mask

    def take(self, token_id: int) -> None:
        if token_id in self._ends:
            return
        if not self._matcher.consume_token(token_id):
            raise ValueError(f"the grammar does not take token {token_id}: {self._matcher.get_error()}")

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())
