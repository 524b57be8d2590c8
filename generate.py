"""Continue a text with a model, or talk to it.

python generate.py runs/demo --prompt "Once upon a time"

python generate.py runs/demo --prompt "def " --samples 3 --seed 1

cat story.txt | python generate.py runs/demo --max-new-tokens 50

python generate.py runs/demo --interactive

python generate.py SmolLM2-135M-Instruct.gguf --chat --interactive

The text goes to standard output, notes and the closing line of speeds to standard error. That line names the seed; the
same seed gives the same text.
"""

import os
import re
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from bitnet.inference.generation import SamplingConfig
    from bitnet.storage.source import OpenModel
    from bitnet.tokenizer import ChatTemplate

# torch takes seconds to import, so it and whatever imports it come after the arguments have been read.


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run folder of train.py, one checkpoint of it, a folder of packed weights (python -m bitnet export), a GGUF
    file, a Hugging Face folder, or the name of a model on the hub."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of a run folder."""
    prompt: str = "-"
    """Text to continue; - reads it from standard input and leaves out one newline at its end."""
    interactive: bool = False
    """Read prompts line by line; an empty line continues the last text. Ctrl-C stops a text, Ctrl-D ends."""
    chat: bool = False
    """The prompt is a message, and the model answers it: for models with a chat template. With --interactive it is a
    conversation, whose oldest turns are forgotten where the model's context is full; /reset starts a new one."""
    system: str | None = None
    """With --chat: a system message, which stands before the conversation."""
    max_new_tokens: int = 200
    """Most tokens to generate."""
    samples: int = 1
    """Texts to generate from the prompt, as one batch."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 from all."""
    top_p: float = 0.95
    """Sample from the most likely tokens that hold this share of the probability; 1 from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one; 0 leaves out none."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred become less likely."""
    seed: int | None = None
    """Start of the random numbers; without one it is random and printed. Interactively every text adds 1 to it."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End the text before this string; may be given several times. \\n, \\r, \\t and \\\\ are understood."""
    echo: bool = True
    """Print the prompt in front of the text (never when interactive or in a chat)."""
    pack: bool = True
    """Run on packed weights; --no-pack runs the float weights that training fake-quantizes."""
    backend: Literal["auto", "native", "reference"] = "auto"
    """What multiplies packed weights: the native CPU engine, or plain torch; auto takes the engine if it was built."""
    cache: Literal["float32", "float16", "int8"] = "float32"
    """Of keys and values in the native engine: fewer bits read less in long texts."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights, activations and cache, with --no-pack and of float models."""
    threads: int | None = None
    """CPU threads; torch's own choice unless given."""


def run(options: Options) -> None:
    check(options)

    from bitnet.kernels import use_backend

    with use_backend(options.backend):
        write(options)


def write(options: Options) -> None:
    prompt = None if options.interactive else read_prompt(options.prompt)
    stop = [unescape(string) for string in options.stop]
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed

    import torch

    from bitnet.inference.generation import SamplingConfig
    from bitnet.inference.loading import open_model
    from bitnet.machine import DTYPES, pick_device
    from bitnet.tokenizer.chat import require

    sampling = SamplingConfig(
        options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty
    )
    if sampling.greedy and options.samples > 1:
        note(f"temperature 0 is greedy: all {options.samples} samples will be the same")
    device = pick_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    opened = open_model(
        options.model, which=options.checkpoint, device=device, pack=options.pack, cache_dtype=options.cache,
        dtype=DTYPES[options.dtype],
    )  # fmt: skip
    writer = Writer(options, opened, sampling, stop)
    if options.chat:
        chat(writer, Conversation(require(opened.chat_template, opened.folder), options.system), prompt, seed)
    elif prompt is not None:
        writer.complete(opened.tokenizer.encode(prompt, bos=opened.tokenizer.adds_bos), seed, prompt)
    else:
        continue_lines(writer, seed)


def continue_lines(writer: "Writer", seed: int) -> None:
    """Continue the lines of an interactive session, each or, with an empty one, the last text."""
    tokenizer, ids = writer.opened.tokenizer, list[int]()
    while (line := read_line()) is not None:
        if line:
            ids = tokenizer.encode(line, bos=tokenizer.adds_bos)
        elif not ids:
            continue
        # A text that is continued again and again keeps its second half, so that there is always room.
        ids = ids if line else ids[-(writer.positions // 2) :]
        try:
            writer.complete(ids, seed)
            ids = writer.ids
        except KeyboardInterrupt:
            pass
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            ids = []
        seed += 1


def chat(writer: "Writer", conversation: "Conversation", prompt: str | None, seed: int) -> None:
    """Answer one message, or those of an interactive session."""
    if prompt is not None:
        writer.answer(conversation.ask(prompt, writer.positions - 1), seed)
        return
    room = writer.positions - min(writer.options.max_new_tokens, writer.positions // 2)
    while (line := read_line()) is not None:
        if line.strip() == "/reset":
            conversation.reset()
            note("a new conversation")
        elif line.strip():
            try:
                writer.answer(conversation.ask(line, room), seed)
            except KeyboardInterrupt:  # what was written so far is the answer
                pass
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                conversation.messages.pop()
                continue
            conversation.messages.append({"role": "assistant", "content": writer.text})
            seed += 1


class Conversation:
    """The messages so far, as token ids that fit a model."""

    def __init__(self, template: "ChatTemplate", system: str | None) -> None:
        self.template = template
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        self.messages = []

    def ask(self, message: str, room: int) -> list[int]:
        """The ids of the conversation with one more message, the oldest turns left out until `room` tokens hold it.

        The last message stays whatever its length; ValueError, from the template, with the message already added.
        """
        self.messages.append({"role": "user", "content": message})
        ids = self.template.encode(self.system + self.messages)
        while len(ids) > room and len(self.messages) > 2:
            del self.messages[:2]
            ids = self.template.encode(self.system + self.messages)
        return ids


class Writer:
    """Prints what a model writes, with a closing line of speeds."""

    def __init__(self, options: Options, opened: "OpenModel", sampling: "SamplingConfig", stop: Sequence[str]) -> None:
        self.options, self.opened, self.sampling, self.stop = options, opened, sampling, stop
        self.positions = opened.model.config.max_position_embeddings
        self.ids: list[int] = []
        """Of the last prompt and its first text, as far as it came."""
        self.text = ""
        """The first text."""

    def complete(self, ids: list[int], seed: int, prompt: str = "") -> None:
        """Print `samples` continuations of a prompt's ids, behind its text if that is to be seen."""
        self._write(ids, ids, prompt if self.options.echo else "", seed)

    def answer(self, ids: list[int], seed: int) -> None:
        """Print `samples` answers to a conversation's ids. An answer is a text of its own and continues no word."""
        self._write(ids, [], "", seed)
        self.text = self.text.strip()

    def _write(self, ids: list[int], before: list[int], shown: str, seed: int) -> None:
        import torch

        from bitnet.inference.generation import GenerationStats, TextStream, generate, limit_new_tokens

        options, tokenizer, model = self.options, self.opened.tokenizer, self.opened.model
        count = limit_new_tokens(model.config, len(ids), options.max_new_tokens)
        if count < options.max_new_tokens:
            note(
                f"generating at most {count} tokens, not {options.max_new_tokens}: "
                f"the prompt takes {len(ids)} of the model's {self.positions} positions"
            )
        stats = GenerationStats()
        steps = generate(
            model, torch.tensor([ids] * options.samples), max_new_tokens=count, sampling=self.sampling, seed=seed,
            eos_id=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size, stats=stats,
        )  # fmt: skip
        streams = [TextStream(tokenizer, self.stop, prompt=before) for _ in range(options.samples)]
        printer = Printer(shown, options.samples)
        self.ids, self.text = list(ids), ""

        def show(pieces: list[str], finished: list[bool]) -> None:
            self.text += pieces[0]
            printer.add(pieces)
            printer.show(finished)

        try:
            for step in steps:
                tokens = step.tolist()
                self.ids.append(tokens[0])
                show(
                    [stream.push(token) for stream, token in zip(streams, tokens, strict=True)],
                    [stream.finished for stream in streams],
                )
                if all(stream.finished for stream in streams):
                    break
            show([stream.close() for stream in streams], [True] * len(streams))
        finally:  # Ctrl-C too
            printer.end_line()
            print(f"{stats} | seed {seed}", file=sys.stderr)


class Printer:
    """Prints the texts of a batch one behind the other, each under a header, the one in front as it comes."""

    def __init__(self, text: str, samples: int) -> None:
        self.text, self.samples, self.current = text, samples, 0
        self.pending = [""] * samples
        self.line_open = False
        self.write(self.header())

    def header(self) -> str:
        return f"--- sample {self.current + 1} ---\n{self.text}" if self.samples > 1 else self.text

    def add(self, pieces: list[str]) -> None:
        self.pending = [old + new for old, new in zip(self.pending, pieces, strict=True)]

    def show(self, finished: list[bool]) -> None:
        while self.current < self.samples:
            self.write(self.pending[self.current])
            self.pending[self.current] = ""
            if not finished[self.current]:
                return
            self.current += 1
            if self.current < self.samples:
                self.end_line()
                self.write(self.header())

    def write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self.line_open = not text.endswith("\n")

    def end_line(self) -> None:
        if self.line_open:
            self.write("\n")


def check(options: Options) -> None:
    if options.samples < 1:
        raise ValueError(f"--samples is {options.samples}; generate at least 1")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads is {options.threads}; give at least 1")
    if options.interactive and options.prompt != "-":
        raise ValueError("--prompt and --interactive exclude each other; enter the prompt in the session")
    if options.system is not None and not options.chat:
        raise ValueError("--system is part of a conversation; give --chat too")
    if options.interactive and options.samples > 1:
        raise ValueError(f"--samples {options.samples} does not go with --interactive; leave one of them out")


def read_prompt(prompt: str) -> str:
    if prompt == "-":
        if sys.stdin.isatty():
            note("type the prompt and end it with Ctrl-D, or give --prompt TEXT or --interactive")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on standard input is not UTF-8 text ({error}); convert it first") from None
        prompt = re.sub(r"\r?\n\Z", "", prompt)
    if not prompt:
        raise ValueError("the prompt is empty; give some text, with --prompt TEXT or on standard input")
    return prompt


def read_line() -> str | None:
    """A line of the interactive session, or None at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None


def unescape(text: str) -> str:
    """A shell hands over a backslash and an n where a newline is meant."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t"}.get(match[1], match[1]), text)


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="generate.py", args=arguments, description=__doc__)
    with suppress(AttributeError):  # a terminal that lacks a character gets a "?", not a traceback
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has had enough, as in | head; keep the interpreter's last flush quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
