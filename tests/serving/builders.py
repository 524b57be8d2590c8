"""A tiny model behind a real server, and a scheduler without one."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.lookup import PromptLookup
from bitnet.inference.text_model import TextModel
from bitnet.kernels.cpu import native
from bitnet.serving.jobs import Event, Generation, Job, Limits, Piece
from bitnet.serving.metrics import Metrics, ModelMetrics
from bitnet.serving.scheduler import Scheduler
from bitnet.serving.server import Application, Server, Settings, listen
from bitnet.tokenizer import BaseTokenizer, ChatTemplate
from tests.builders import tiny_model

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ bos_token + message.role + ': ' + message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)


class Source:
    """What a server asks of a model's files."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self.tokenizer, self.path, self.sampling = tokenizer, "secret/place", {"temperature": 0.9}
        self.chat_template = ChatTemplate(TOOL_TEMPLATE, tokenizer, "the chat template in secret/place")


def text_model(tokenizer: BaseTokenizer, positions: int = 512) -> TextModel:
    """The tiny model, on the native engine where it was built."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=positions).pack()
    # The Python API's cache holds floats of 32 bits, and its texts are compared with the server's.
    engine = Engine.from_model(model, cache_dtype="float32") if native.instruction_sets() else model
    return TextModel(engine, Source(tokenizer))  # type: ignore[arg-type]


@contextmanager
def running(model: TextModel, **changes: object) -> Iterator[tuple[str, Application]]:
    """The address of a server that has the model under the name "tiny"."""
    settings = Settings(port=0, **{"cache_tokens": 16384, **changes})  # type: ignore[arg-type]
    application = Application([("tiny", model)], settings)
    server = Server(application, settings)
    listener: socket.socket = listen(settings)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", application
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class Bench:
    """A scheduler whose events are collected here."""

    def __init__(self, model: TextModel, lookup: PromptLookup | None = None, **limits: object) -> None:
        self.events: list[tuple[Job, Event]] = []
        defaults = {"context": model.positions, "cache_tokens": 16384}
        self.scheduler = Scheduler(
            model.model, model.source.tokenizer, Limits(**{**defaults, **limits}),  # type: ignore[arg-type]
            self.events.extend, ModelMetrics(Metrics(), "tiny"), lookup=lookup,
        )  # fmt: skip

    def submit(self, generation: Generation, client: str = "") -> Job:
        job = Job(generation, client)
        self.scheduler.submit(job)
        return job

    def run(self) -> None:
        while self.scheduler.step():
            pass

    def of(self, job: Job) -> list[Event]:
        return [event for other, event in self.events if other is job]

    def pieces(self, job: Job) -> list[list[Piece]]:
        """What came to each sample of a job."""
        pieces = [event for event in self.of(job) if isinstance(event, Piece)]
        return [[piece for piece in pieces if piece.index == index] for index in range(job.generation.count)]

    def texts(self, job: Job) -> list[str]:
        """What each sample of a job has written."""
        return ["".join(piece.text for piece in pieces) for pieces in self.pieces(job)]

    def alone(self, model: TextModel, generation: Generation) -> list[str]:
        bench = Bench(model)
        job = bench.submit(generation)
        bench.run()
        return bench.texts(job)


def seeded(count: int, low: int, high: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens and lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, vocab_size, (n,), generator=generator).tolist()) for n in lengths]
