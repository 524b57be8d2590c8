"""A model as a Python object: text in, text out.

    model = bitnet.load("runs/demo")
    text = model.generate("The people of the United States", max_new_tokens=50, seed=1)
    print(text, text.stop_reason, text.prompt_tokens, text.new_tokens)
    for piece in model.stream("My fellow citizens"):
        print(piece, end="", flush=True)
    print(model.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0))

The keyword arguments are those of generate.py, with its defaults: the fields of `TextOptions`. What is not given of
temperature, top_k, top_p, min_p and repetition_penalty is what the model's generation_config.json or GGUF file says.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict, TypeGuard, Unpack, cast

import torch

from bitnet.inference.engine import LanguageModel
from bitnet.inference.generation import GenerationStats, TextStream, generate, limit_new_tokens
from bitnet.inference.loading import open_model
from bitnet.inference.options import SamplingConfig, TextOptions
from bitnet.machine import DTYPES, pick_device
from bitnet.storage.source import Source, open_source
from bitnet.tokenizer import BaseTokenizer
from bitnet.tokenizer.chat import require

StopReason = Literal["stop", "length", "context"]
Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


class TextArguments(TypedDict, total=False):
    """The fields of `TextOptions`, as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]


@dataclass
class Completion:
    """A text that a model wrote, or has written so far."""

    prompt_tokens: int
    seed: int
    """Gives the same text again."""
    text: str = ""
    """Without the prompt and without the string that stopped it."""
    token_ids: list[int] = field(default_factory=list)
    """Of the text, the tokens that stopped it included."""
    stop_reason: StopReason | None = None
    """stop: an end-of-text token or a stop string; length: max_new_tokens; context: the model's positions are full;
    None: not ended yet."""

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    def __str__(self) -> str:
        return self.text


class CompletionBatch:
    """Several completions of one prompt, written together: an iterator over their next pieces of text.

    `completions` and `stats` hold what there is so far, also after an interruption.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: BaseTokenizer,
        ids: Sequence[int],
        before: Sequence[int],
        options: TextOptions,
        sampling: SamplingConfig,
        count: int,
    ) -> None:
        """`before`: the part of the ids that the text continues, see `TextStream`. Raises ValueError as `generate`."""
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        room = limit_new_tokens(model.config, len(ids), options.max_new_tokens)
        self.stats = GenerationStats()
        self.completions = [Completion(len(ids), seed) for _ in range(count)]
        self._last: StopReason = "length" if room == options.max_new_tokens else "context"
        self._streams = [TextStream(tokenizer, options.stop, prompt=before) for _ in range(count)]
        self._steps = generate(
            model,
            torch.tensor([list(ids)] * count),
            max_new_tokens=room,
            sampling=sampling,
            seed=seed,
            eos_id=tokenizer.eos_ids,
            vocab_size=tokenizer.vocab_size,
            stats=self.stats,
        )

    def __iter__(self) -> Iterator[list[str]]:
        """The next pieces, one string a completion, perhaps ""; the last ones are what had been held back."""
        for step in self._steps:
            yield [self._push(i, token) for i, token in enumerate(step.tolist())]
            if all(stream.finished for stream in self._streams):
                return
        yield [self._close(i) for i in range(len(self._streams))]

    def _push(self, i: int, token: int) -> str:
        stream, completion = self._streams[i], self.completions[i]
        if stream.finished:
            return ""
        piece = stream.push(token)
        completion.token_ids.append(token)
        completion.text += piece
        if stream.finished:
            completion.stop_reason = "stop"
        return piece

    def _close(self, i: int) -> str:
        completion, piece = self.completions[i], self._streams[i].close()
        completion.text += piece
        completion.stop_reason = completion.stop_reason or self._last
        return piece


class CompletionStream(Iterator[str]):
    """The pieces of one text, as soon as they are certain; `completion` and `stats` hold what there is so far."""

    def __init__(self, batch: CompletionBatch) -> None:
        self.completion, self.stats = batch.completions[0], batch.stats
        self._pieces = (piece for (piece,) in batch if piece)

    def __next__(self) -> str:
        return next(self._pieces)


class TextModel:
    """A model that writes text: what `bitnet.load` gives."""

    def __init__(self, model: LanguageModel, source: Source) -> None:
        self.model, self.source = model, source

    @property
    def positions(self) -> int:
        """Most tokens of prompt and text together."""
        return self.model.config.max_position_embeddings

    def generate(self, prompt: Prompt, **options: Unpack[TextArguments]) -> Completion:
        """Continue a text, token ids, or the messages of a conversation; options as in `TextOptions`.

        Raises ValueError for a prompt that leaves no room and for options out of range.
        """
        return _whole(self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Unpack[TextArguments]) -> CompletionStream:
        """The same, piece by piece."""
        return CompletionStream(self.batch(prompt, TextOptions(**options)))  # type: ignore[arg-type]

    def chat(self, messages: str | Sequence[Message], **options: Unpack[TextArguments]) -> Completion:
        """The answer to a conversation, [{"role": "user", "content": "..."}, ...], or to one message.

        Raises ValueError for a model without a chat template, and as `generate`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        answer = self.generate(messages, **options)
        answer.text = answer.text.strip()
        return answer

    def batch(
        self, prompt: Prompt, options: TextOptions, count: int = 1, *, answer: bool | None = None
    ) -> CompletionBatch:
        """`count` completions of one prompt, written together.

        `answer`: they are texts of their own and continue no word of the prompt; unless given, those of messages are.
        """
        ids = self.encode(prompt)
        answer = _is_conversation(prompt) if answer is None else answer
        sampling = options.sampling(self.source.sampling)
        before = () if answer else ids
        return CompletionBatch(self.model, self.source.tokenizer, ids, before, options, sampling, count)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that the model sees."""
        tokenizer = self.source.tokenizer
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, bos=tokenizer.adds_bos)
        if _is_conversation(prompt):
            return require(self.source.chat_template, self.source.path).encode(prompt)
        return [int(token) for token in cast("Sequence[int]", prompt)]


def load(
    path: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str = "auto",
    dtype: str = "float32",
    cache: str | None = None,
    pack: bool = True,
) -> TextModel:
    """Open any model: a run, a packed or quantized folder, a Hugging Face folder or hub name, a GGUF file.

    checkpoint:  of a run folder, "best" or "last".
    device:      cpu, cuda, cuda:1, ...; auto takes a GPU when there is one.
    dtype:       of weights, activations and cache of a model that runs in floats.
    cache:       of keys and values in the native CPU engine: float32 (None), float16 or int8.
    pack:        False runs a run's float weights, fake-quantized as in training.

    Raises ValueError or OSError, naming what is wrong with the path.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    run_on = pick_device(device)
    source = open_source(path, which=checkpoint)
    model = open_model(source, device=run_on, pack=pack, cache_dtype=cache, dtype=DTYPES[dtype])
    _ = source.tokenizer, source.sampling  # what is wrong with them is said here, not at the first text
    return TextModel(model, source)


def _is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _whole(stream: CompletionStream) -> Completion:
    for _ in stream:
        pass
    return stream.completion
