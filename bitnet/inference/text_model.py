"""A model as a Python object: text in, text out.

    model = bitnet.load("runs/demo")
    text = model.generate("The people of the United States", max_new_tokens=50, seed=1)
    print(text, text.stop_reason, text.prompt_tokens, text.new_tokens)
    for piece in model.stream("My fellow citizens"):
        print(piece, end="", flush=True)
    for text in model.generate_many(["One", "Two words", [1, 2, 3]], seed=1):    side by side, as fast as one batch
        print(text)
    print(model.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0))

The keyword arguments are those of generate.py, with its defaults: the fields of `TextOptions`. What is not given of
temperature, top_k, top_p, min_p and repetition_penalty is what the model's generation_config.json or GGUF file says.
"""

import operator
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypedDict, TypeGuard, Unpack, cast

from bitnet.inference.adapters import put_on, take_off
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel
from bitnet.inference.generation import (
    GenerationStats,
    TextStream,
    check_vocab_size,
    draw_texts,
    limit_new_tokens,
)
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.inference.loading import open_model
from bitnet.inference.lookup import PromptLookup
from bitnet.inference.memory import Memory
from bitnet.inference.options import SamplingConfig, TextOptions
from bitnet.inference.sampling import Drawn, RowSampler
from bitnet.inference.split_engine import SplitEngine
from bitnet.machine import DTYPES, pick_device
from bitnet.storage.adapters import load_adapter
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
    presence_penalty: float
    frequency_penalty: float
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
    drawn: list[Drawn] | None = None
    """Of each of `token_ids` the log-probabilities, where they were asked for."""

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    def __str__(self) -> str:
        return self.text


@dataclass
class Writing:
    """One text to write: the token ids before it, and how it goes on."""

    ids: list[int]
    options: TextOptions
    sampling: SamplingConfig
    continues: bool = True
    """The text goes on in the last word of `ids`; else it is one of its own, as an answer is."""


class OpenText:
    """A text that is being written: what draws its tokens, and what they have come to."""

    def __init__(self, model: LanguageModel, tokenizer: BaseTokenizer, text: Writing, logprobs: int | None) -> None:
        """`logprobs`: see `RowSampler`. A text without a seed gets one of its own. Raises ValueError as `generate`."""
        options = text.options
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        vocab_size, unused = tokenizer.drawable
        check_vocab_size(model.config, vocab_size)
        self.ids, self.room = text.ids, limit_new_tokens(model.config, len(text.ids), options.max_new_tokens)
        self.sampler = RowSampler(
            text.sampling, seed, text.ids, vocab_size=vocab_size, unused=unused, logprobs=logprobs
        )
        self.completion = Completion(len(text.ids), seed, drawn=None if logprobs is None else [])
        self._last: StopReason = "length" if self.room == options.max_new_tokens else "context"
        self._stream = TextStream(tokenizer, options.stop, prompt=text.ids if text.continues else ())

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: a stop string or an end-of-text token was met."""
        return self._stream.finished

    def push(self, drawn: Drawn | None) -> str:
        """The piece of text that a token makes certain; None and what comes behind the end are left out."""
        completion = self.completion
        if self.finished or drawn is None:
            return ""
        piece = self._stream.push(drawn.token)
        completion.token_ids.append(drawn.token)
        if completion.drawn is not None:
            completion.drawn.append(drawn)
        completion.text += piece
        if self.finished:
            completion.stop_reason = "stop"
        return piece

    def close(self) -> str:
        """What was held back, and the reason to stop."""
        piece = self._stream.close()
        self.completion.text += piece
        self.completion.stop_reason = self.completion.stop_reason or self._last
        return piece


class CompletionBatch:
    """Several texts, written together: an iterator over their next pieces.

    `completions` and `stats` hold what there is so far, also after an interruption.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: BaseTokenizer,
        texts: Sequence[Writing],
        *,
        logprobs: int | None = None,
        memory: Memory | None = None,
    ) -> None:
        """`logprobs`, `memory`: see `RowSampler` and `draw_texts`. Raises ValueError as `generate`."""
        self.stats = GenerationStats()
        self._texts = [OpenText(model, tokenizer, text, logprobs) for text in texts]
        self.completions = [text.completion for text in self._texts]
        ids, rooms = [text.ids for text in self._texts], [text.room for text in self._texts]
        samplers, memory = [text.sampler for text in self._texts], memory if len(texts) == 1 else None
        self._steps = draw_texts(model, ids, samplers, rooms, tokenizer.eos_ids, self.stats, memory)

    def __iter__(self) -> Iterator[list[str]]:
        """The next pieces, one string a completion, perhaps ""; the last ones are what had been held back."""
        for step in self._steps:
            yield [text.push(drawn) for text, drawn in zip(self._texts, step, strict=True)]
            if all(text.finished for text in self._texts):
                return
        yield [text.close() for text in self._texts]


class CompletionStream(Iterator[str]):
    """The pieces of one text, as soon as they are certain; `completion` and `stats` hold what there is so far."""

    def __init__(self, batch: CompletionBatch) -> None:
        self.completion, self.stats = batch.completions[0], batch.stats
        self._pieces = (piece for (piece,) in batch if piece)

    def __next__(self) -> str:
        return next(self._pieces)


class TextModel:
    """A model that writes text: what `bitnet.load` gives."""

    def __init__(self, model: LanguageModel, source: Source, prompt_lookup_num_tokens: int = 0) -> None:
        """`prompt_lookup_num_tokens`: see `load`."""
        self.model, self.source = model, source
        if prompt_lookup_num_tokens and not isinstance(model, Engine):
            raise ValueError(
                f"prompt_lookup_num_tokens {prompt_lookup_num_tokens} is of the native CPU engine, where drafts change "
                "no text, and this model runs elsewhere; leave it out"
            )
        self._memory = Memory(PromptLookup(prompt_lookup_num_tokens))
        self.adapter: Path | None = None
        """The LoRA adapter that it writes with."""

    @property
    def lookup(self) -> PromptLookup:
        """What is known of its drafts."""
        return self._memory.lookup

    @property
    def kernel(self) -> str:
        """What multiplies: "native int8", "native int16" or "native float", by the activations, "triton" or "torch"."""
        if isinstance(self.model, Engine):
            return self.model.kernel
        return "triton" if isinstance(self.model, GpuEngine) else "torch"

    @property
    def made_of(self) -> tuple[Path, Path | None]:
        """Where the model is from, and its adapter."""
        return Path(self.source.path), self.adapter

    @property
    def positions(self) -> int:
        """Most tokens of prompt and text together."""
        return self.model.config.max_position_embeddings

    def warm_up(self) -> None:
        """Compile what a GPU needs, now and with a progress bar instead of at the first text; elsewhere nothing.

        It starts processes: a script calls it below `if __name__ == "__main__":`.
        """
        if isinstance(self.model, (GpuEngine, SplitEngine)):
            self.model.warm_up()

    def generate(self, prompt: Prompt, *, logprobs: int | None = None, **options: Unpack[TextArguments]) -> Completion:
        """Continue a text, token ids, or the messages of a conversation; options as in `TextOptions`.

        `logprobs`: `Completion.drawn` then has the log-probability of every token and of so many of the likeliest. On
        the native engine a prompt that begins like the last text is read from there on. Raises ValueError for a prompt
        that leaves no room and for options out of range.
        """
        return _whole(self.stream(prompt, logprobs=logprobs, **options))

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        options: Sequence[TextOptions] | None = None,
        *,
        logprobs: int | None = None,
        **same: Unpack[TextArguments],
    ) -> list[Completion]:
        """Continue prompts of any lengths together, each with its own options or all with the same.

        With one seed for all, prompt i has seed + i. A text is what `generate` gives with its seed: on the native
        engine to the last token, elsewhere as far as the model's rounding does not depend on its company.
        """
        if options is not None and (same or len(options) != len(prompts)):
            raise ValueError(
                f"there are {len(prompts)} prompts and {len(options)} options; give one for each, or names"
            )
        if options is None:
            options = _numbered(TextOptions(**same), len(prompts))  # type: ignore[arg-type]
        texts = [
            Writing(self.encode(prompt), how, how.sampling(self.source.sampling), not is_conversation(prompt))
            for prompt, how in zip(prompts, options, strict=True)
        ]
        if not texts:
            return []
        batch = CompletionBatch(self.model, self.source.tokenizer, texts, logprobs=logprobs)
        for _ in batch:
            pass
        return batch.completions

    def stream(
        self, prompt: Prompt, *, logprobs: int | None = None, **options: Unpack[TextArguments]
    ) -> CompletionStream:
        """The same as `generate`, piece by piece."""
        how = TextOptions(**options)  # type: ignore[arg-type]
        text = Writing(self.encode(prompt), how, how.sampling(self.source.sampling), not is_conversation(prompt))
        tokenizer, memory = self.source.tokenizer, self._memory
        return CompletionStream(CompletionBatch(self.model, tokenizer, [text], logprobs=logprobs, memory=memory))

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
        """`count` completions of one prompt, written together; number i has seed + i.

        `answer`: they are texts of their own and continue no word of the prompt; unless given, those of messages are.
        """
        ids = self.encode(prompt)
        answer = is_conversation(prompt) if answer is None else answer
        sampling = options.sampling(self.source.sampling)
        texts = [Writing(ids, how, sampling, not answer) for how in _numbered(options, count)]
        return CompletionBatch(self.model, self.source.tokenizer, texts, memory=self._memory)

    def load_lora(self, path: str | Path) -> None:
        """Write with a LoRA adapter from now on, in the place of the one before. Raises ValueError for one of other
        weights, which are read for that, and on a GPU for a model that was opened without one."""
        adapter = load_adapter(path)
        adapter.check(self.source.frozen(), self.source.path)
        put_on(self.model, adapter)
        self._memory.forget()  # what the other weights have read
        self.adapter = adapter.path

    def unload_lora(self) -> None:
        """Write as the base again."""
        take_off(self.model)
        self._memory.forget()
        self.adapter = None

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that the model sees."""
        tokenizer = self.source.tokenizer
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, bos=tokenizer.adds_bos)
        if is_conversation(prompt):
            return require(self.source.chat_template, self.source.path).encode(prompt)
        try:
            return [operator.index(token) for token in cast("Sequence[int]", prompt)]
        except TypeError:
            raise TypeError(f"a prompt is a text, token ids or messages, and this one is {prompt!r:.60}") from None


def load(
    path: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str = "auto",
    dtype: str = "float32",
    cache: str | None = None,
    gpu_layers: int | None = None,
    pack: bool = True,
    activations: str | None = None,
    embeddings: str | None = None,
    lora: str | Path | None = None,
    prompt_lookup_num_tokens: int = 0,
) -> TextModel:
    """Open any model: a run, a packed or quantized folder, a Hugging Face folder or hub name, a GGUF file.

    checkpoint:  of a run folder, "best" or "last".
    device:      cpu, cuda, cuda:1, ...; auto takes a GPU when there is one.
    dtype:       of weights, activations and cache of a model that runs in floats.
    cache:       of keys and values: float32 (None), float16 or int8 in the native CPU engine, these, bfloat16 (None) or
                 fp8 on a GPU; int4 runs in torch.
    gpu_layers:  of a packed model larger than the GPU's memory, so many layers there and the others on the CPU.
    pack:        False runs a run's float weights, fake-quantized as in training.
    activations: int8, int16 or float, of weights with group scales in the native CPU engine.
    embeddings:  int8 or float16, of a float embedding and head there; None: int8 for ternary models, else as stored.
    lora:        a LoRA adapter of these weights: its folder, or a run with --lora.
    prompt_lookup_num_tokens: in the native CPU engine, of the longest draft by which one text, or those of a server or
                 of a file of prompts, go on where they repeat a prompt or themselves (`bitnet/inference/lookup.py`):
                 faster, and the same texts; 0: none.

    Raises ValueError or OSError, naming what is wrong with the path.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    run_on = pick_device(device)
    source = open_source(path, which=checkpoint)
    engine = {"cache_dtype": cache, "activations": activations, "embeddings": embeddings}
    adapter = None if lora is None else load_adapter(lora)
    model = open_model(
        source, device=run_on, pack=pack, dtype=DTYPES[dtype], gpu_layers=gpu_layers, lora=adapter, **engine
    )
    _ = source.tokenizer, source.sampling  # what is wrong with them is said here, not at the first text
    opened = TextModel(model, source, prompt_lookup_num_tokens)
    opened.adapter = None if adapter is None else adapter.path
    return opened


def _numbered(options: TextOptions, count: int) -> list[TextOptions]:
    """The options of so many texts, their seeds one behind the other."""
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    return [replace(options, seed=(seed + i) % 2**63 if i and seed >= 0 else seed + i) for i in range(count)]


def is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is messages, not a text or token ids."""
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
    )


def _whole(stream: CompletionStream) -> Completion:
    for _ in stream:
        pass
    return stream.completion
