"""The models that a server has: opened once, each under a name that tells nothing of the machine."""

import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.inference.options import SamplingConfig
from bitnet.inference.text_model import TextModel, load
from bitnet.serving.errors import ApiError, invalid
from bitnet.serving.grammar import Grammars
from bitnet.serving.scheduler import Scheduler
from bitnet.tokenizer import BaseTokenizer, ChatTemplate


@dataclass
class ServedModel:
    """A model under its name."""

    name: str
    text_model: TextModel
    context: int
    default_new_tokens: int
    scheduler: Scheduler
    created: int

    def __post_init__(self) -> None:
        self.tokenizer: BaseTokenizer = self.text_model.source.tokenizer
        self.template: ChatTemplate | None = self.text_model.source.chat_template
        self.own_sampling = self.text_model.source.sampling
        """What the model's makers say of how its tokens are chosen."""
        try:
            SamplingConfig(**self.own_sampling)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"{self.name}: what its files say of how tokens are drawn is out of range: {error}"
            ) from error
        self.grammars = Grammars(self.tokenizer)
        identity = f"{self.text_model.model.config}{self.tokenizer.fingerprint}"
        self.fingerprint = "bitnet-" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    def card(self) -> dict[str, object]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "bitnet",
            "max_model_len": self.context,
            "chat": self.template is not None,
            "tools": self.template is not None and self.template.reads("tools"),
        }

    def check_ids(self, ids: list[int], param: str) -> list[int]:
        """Token ids of a client. Raises ApiError for one that the model does not have."""
        if max(ids) >= self.tokenizer.vocab_size:
            raise invalid(f"token id {max(ids)} is outside the vocabulary of {self.tokenizer.vocab_size}", param)
        return ids

    def encode(self, text: str, param: str, *, special: bool = True) -> list[int]:
        """Token ids of a text as a prompt. Raises ApiError for one that has none."""
        tokenizer = self.tokenizer
        try:
            ids = tokenizer.encode(text, bos=special and tokenizer.adds_bos)
        except ValueError as error:
            raise invalid(str(error), param) from error
        # An empty prompt is the beginning of any text.
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if not ids and special and start is not None:
            ids = [start]
        if not ids and special:
            raise invalid("the prompt has no tokens; give some text", param)
        return ids

    def require_template(self) -> ChatTemplate:
        if self.template is None:
            raise invalid(
                f"the model {self.name!r} has no chat template: it is a base model; use /v1/completions", "model"
            )
        return self.template


class Models:
    """All models of a server, by name."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of this name, or the only one. Raises ApiError for one that is not here."""
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name is None:
            raise invalid(f"several models are served; name one of {', '.join(self._models)}", "model")
        if name not in self._models:
            raise ApiError(
                404, f"the model {name[:100]!r} is not served here; /v1/models lists what is", param="model",
                code="model_not_found",
            )  # fmt: skip
        return self._models[name]


def named(given: str) -> tuple[str, str]:
    """Name and path of an argument: NAME=PATH, or a path, of which the last part is the name."""
    name, equals, path = given.partition("=")
    if equals and re.fullmatch(r"[\w.:-]+", name):
        return name, path
    last = Path(given).resolve()
    stem = last.stem if last.suffix == ".gguf" else last.name
    return re.sub(r"[^\w.:-]", "-", stem) or "model", given


def open_all(given: tuple[str, ...], **options: Any) -> list[tuple[str, TextModel]]:
    """Every model by name, with options of `bitnet.load`. Raises ValueError for two of one name, and as that."""
    names = [named(argument) for argument in given]
    if not names:
        raise ValueError("no model was given; name a folder of train.py, a model of any kind, or NAME=PATH")
    for name in {name for name, _ in names}:
        paths = [path for other, path in names if other == name]
        if len(paths) > 1:
            raise ValueError(f"{' and '.join(paths)} would both be called {name!r}; give NAME=PATH for one of them")
    return [(name, load(path, **options)) for name, path in names]


def now() -> int:
    """Seconds since 1970, as OpenAI's objects carry them."""
    return int(time.time())
