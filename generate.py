"""Continue a text with a model, or talk to it.

python generate.py runs/demo --prompt "Once upon a time"

python generate.py runs/demo --prompt "def " --samples 3 --seed 1

cat story.txt | python generate.py runs/demo --max-new-tokens 50

python generate.py runs/demo --interactive

python generate.py SmolLM2-135M-Instruct.gguf --chat --interactive

python generate.py runs/demo --prompts prompts.jsonl --out answers.jsonl

The text goes to standard output, notes and the closing line of speeds to standard error. That line names the seed (the
same seed gives the same text) and why the text ends there: stop (an end-of-text token or --stop), length
(--max-new-tokens), context (the model's positions are full) or interrupted.
"""

import dataclasses
import io
import re
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bitnet.__main__ import execute
from bitnet.inference.options import TextOptions

if TYPE_CHECKING:
    from bitnet.inference.text_model import TextModel
    from bitnet.tokenizer import ChatTemplate

# torch takes seconds to import, so it and whatever imports it come after the arguments have been read.


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run folder of train.py, one checkpoint of it, a folder of packed weights (bitnet export), a GGUF file, a
    Hugging Face folder, or the name of a model on the hub."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of a run folder."""
    prompt: str = "-"
    """Text to continue; - reads it from standard input and leaves out one newline at its end."""
    interactive: bool = False
    """Read prompts line by line; an empty line continues the last text. Ctrl-C stops a text, Ctrl-D ends. Every text
    adds 1 to the seed."""
    chat: bool = False
    """The prompt is a message, and the model answers it: for models with a chat template. With --interactive it is a
    conversation, whose oldest turns are forgotten where the model's context is full; /reset starts a new one."""
    system: str | None = None
    """With --chat: a system message, which stands before the conversation."""
    samples: int = 1
    """Texts to generate from the prompt, as one batch; each has the seed after the one before."""
    prompts: Path | None = None
    """A file of JSON lines, {"prompt": "text"} or {"messages": [...]}, each with options of its own where it has them
    ({"prompt": "x", "temperature": 0}): the texts go to --out."""
    out: Path | None = None
    """Where the texts of --prompts go, a line each. What it holds already is not written again."""
    rows: int = 16
    """With --prompts: texts that are written side by side."""
    echo: bool = True
    """Print the prompt in front of the text (never when interactive or in a chat)."""
    text: Annotated[TextOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=TextOptions
    )
    pack: bool = True
    """Run on packed weights; --no-pack runs the float weights that training fake-quantizes."""
    backend: Literal["auto", "native", "reference"] = "auto"
    """What multiplies packed weights: the native CPU engine, or plain torch; auto takes the engine if it was built."""
    gpu_layers: int | None = None
    """Of a packed model larger than the GPU's memory: so many of its layers run there, the others on the CPU."""
    cache: Literal["float32", "float16", "int8", "fp8", "int4"] | None = None
    """Of keys and values in the engines, by itself float32 in the native one and bfloat16 on a GPU: fewer bits read
    less. fp8 (E4M3) is on a GPU alone, int4 in torch."""
    activations: Literal["int8", "int16", "float"] | None = None
    """In the native engine, of weights with group scales: int8 by groups, int16 by groups (by itself, for integer
    codes of at most 6 bits), or float, exact to the format."""
    embeddings: Literal["int8", "float16"] | None = None
    """In the native engine, of a float embedding and head: int8 by itself for ternary models, float16 is exact."""
    prompt_lookup_num_tokens: int = 0
    """In the native engine, of the longest draft by which a text goes on where it repeats its prompt or itself: faster
    for code and quotations, and the same text. 0 drafts nothing."""
    lora: Path | None = None
    """A LoRA adapter of the model's weights: its folder, or a run of train.py with --lora."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights, activations and cache, with --no-pack and of float models."""
    threads: int | None = None
    """CPU threads; torch's own choice unless given."""


def run(options: Options) -> None:
    check(options)
    stop = tuple(unescape(string) for string in options.text.stop)
    options = dataclasses.replace(options, text=dataclasses.replace(options.text, stop=stop))
    prompt = None if options.interactive or options.prompts else read_prompt(options.prompt)

    from bitnet.inference.text_model import load
    from bitnet.kernels import use_backend
    from bitnet.machine import use_threads
    from bitnet.tokenizer.chat import require

    use_threads(options.threads)
    with use_backend(options.backend):
        model = load(
            options.model,
            checkpoint=options.checkpoint,
            device=options.device,
            dtype=options.dtype,
            cache=options.cache,
            gpu_layers=options.gpu_layers,
            pack=options.pack,
            activations=options.activations,
            embeddings=options.embeddings,
            lora=options.lora,
            prompt_lookup_num_tokens=options.prompt_lookup_num_tokens,
        )
        model.warm_up()
        if options.text.sampling(model.source.sampling).greedy:
            given = [name for name in ("top_k", "top_p", "min_p") if getattr(options.text, name) is not None]
            if given:
                whose = "" if options.text.temperature == 0 else ", as the model's own settings say,"
                names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
                note(f"temperature 0{whose} is greedy: {names} change nothing; give --temperature too")
            if options.samples > 1:
                note(f"temperature 0 is greedy: all {options.samples} samples will be the same")
        if options.prompt_lookup_num_tokens and options.samples > 1:
            note("--prompt-lookup-num-tokens is of single texts and --prompts; samples are written without drafts")
        writer = Writer(options, model)
        if options.interactive and isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is one error, not the end
        if options.prompts is not None and options.out is not None:
            from bitnet.inference.batch import write_answers

            write_answers(model, options.prompts, options.out, options.text, writer.seed, options.rows)
        elif options.chat:
            template = require(model.source.chat_template, model.source.path)
            chat(writer, Conversation(template, options.system), prompt)
        elif prompt is not None:
            writer.write(model.encode(prompt), prompt if options.echo else "")
        else:
            continue_lines(writer)


def continue_lines(writer: "Writer") -> None:
    """Continue the lines of an interactive session, each or, with an empty one, the last text."""
    ids = list[int]()
    while (line := read_line()) is not None:
        if not line and not ids:
            continue
        try:
            # A text that is continued again and again keeps its second half, so that there is always room.
            writer.write(writer.model.encode(line) if line else ids[-(writer.model.positions // 2) :])
        except KeyboardInterrupt:  # the text goes on from what was written so far
            pass
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        ids = writer.ids
        writer.seed += 1


def chat(writer: "Writer", conversation: "Conversation", prompt: str | None) -> None:
    """Answer one message, or those of an interactive session."""
    positions = writer.model.positions
    if prompt is not None:
        writer.write(conversation.ask(prompt, positions - 1), answer=True)
        return
    room = positions - min(writer.options.text.max_new_tokens, positions // 2)
    while (line := read_line()) is not None:
        if line.strip() == "/reset":
            conversation.messages.clear()
            note("a new conversation")
        elif line.strip():
            before = list(conversation.messages)
            try:
                writer.write(conversation.ask(line, room), answer=True)
            except KeyboardInterrupt:  # what was written so far is the answer
                pass
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                conversation.messages[:] = before  # also the turns that were left out for this one
                continue
            conversation.messages.append({"role": "assistant", "content": writer.text.strip()})
            writer.seed += 1


class Conversation:
    """The messages so far, as token ids that fit a model."""

    def __init__(self, template: "ChatTemplate", system: str | None) -> None:
        self.template = template
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []

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

    def __init__(self, options: Options, model: "TextModel") -> None:
        self.options, self.model = options, model
        seed = options.text.seed
        self.seed = secrets.randbelow(2**31) if seed is None else seed
        self.ids: list[int] = []
        """Of the last prompt and its first text, as far as it came."""
        self.text = ""
        """The first text."""

    def write(self, ids: list[int], shown: str = "", *, answer: bool = False) -> None:
        """Print `samples` completions of a prompt's ids, each behind `shown`; an answer continues no word of it."""
        options, positions = self.options, self.model.positions
        text = dataclasses.replace(options.text, seed=self.seed)
        batch = self.model.batch(ids, text, options.samples, answer=answer)
        wanted, room = text.max_new_tokens, positions - len(ids)
        if room < wanted:
            note(
                f"generating at most {room} tokens, not {wanted}: the prompt takes {positions - room} of the model's "
                f"{positions} positions"
            )
        printer = Printer(shown, options.samples)
        try:
            for pieces in batch:
                printer.add(pieces)
                printer.show([completion.stop_reason is not None for completion in batch.completions])
        finally:  # Ctrl-C too
            printer.end_line()
            reasons = sorted({completion.stop_reason or "interrupted" for completion in batch.completions})
            print(
                f"{batch.stats} | {self.model.kernel} | seed {self.seed} | stop reason {', '.join(reasons)}",
                file=sys.stderr,
            )
            self.ids, self.text = ids + batch.completions[0].token_ids, batch.completions[0].text


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
    options.text.sampling({})  # refuses what is out of range, before a model is read
    if options.samples < 1:
        raise ValueError(f"--samples is {options.samples}; generate at least 1")
    if (options.prompts is None) != (options.out is None):
        raise ValueError("--prompts and --out belong together; give both or neither")
    if options.rows < 1:
        raise ValueError(f"--rows is {options.rows}; write at least 1 text at a time")
    if options.prompts is not None:
        given = {"--prompt": options.prompt != "-", "--interactive": options.interactive, "--chat": options.chat}
        given |= {"--system": options.system is not None, "--samples": options.samples > 1}
        if others := [name for name, there in given.items() if there]:
            raise ValueError(f"--prompts has all prompts in its file; leave out {' and '.join(others)}")
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
    return execute(sys.modules[__name__], "generate.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
