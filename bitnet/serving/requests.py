"""What a client may send: OpenAI's bodies, each field with its range. A field that is not here is refused by name.

Fields beyond OpenAI's, as other servers have them: top_k, min_p, repetition_penalty, ignore_eos. What changes no text
(user, metadata, prompt_cache_key, ...) is taken and not used. None means left out.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from bitnet.inference.options import SamplingConfig
from bitnet.serving.errors import invalid
from bitnet.tokenizer import Drawable

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = str | Annotated[list[str], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _off(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]
"""What can only be declined. (A literal False would take 0 too.)"""


class Body(BaseModel):
    """A JSON object of a request, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    """A last chunk with the counts of tokens."""
    include_obfuscation: Off | None = None


class Writing(Body):
    """How a text is written."""

    model: str | None = None
    """A name of /v1/models; may be left out where one model is served."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _streams(self) -> "Writing":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is of stream: true; leave it out")
        return self

    def sampling(self, drawable: Drawable, own: Mapping[str, float]) -> SamplingConfig:
        """How tokens are chosen. What the request is silent about is as the model's own generation_config.json says
        (`own`), else OpenAI's default. Raises ApiError for a biased token that is none."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        last = drawable.vocab_size - 1
        if bias and max(bias) > last:
            raise invalid(f"logit_bias names token {max(bias)} and the last one is {last}", "logit_bias")
        if unused := set(bias).intersection(drawable.unused):
            raise invalid(f"logit_bias names token {min(unused)}, which is unused and never drawn", "logit_bias")
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingConfig(**{**own, **given, "logit_bias": bias})

    @property
    def chosen_seed(self) -> int:
        """The request's, or one that nobody knows."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed % 2**63

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Writing):
    """POST /v1/completions"""

    prompt: Prompts
    """A text, token ids, or a list of either."""
    max_tokens: int | None = Field(default=None, ge=0)
    """16 unless given; 0 with echo scores a text."""
    echo: bool | None = None
    """Give the prompt back, in front of the text, and with logprobs the log-probabilities of its tokens."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=128)
    suffix: None = None
    """Not supported: this server's models have no tokens for filling in."""

    @model_validator(mode="after")
    def _samples(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of is {self.best_of} and n is {self.n or 1}; it must be at least n")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of chooses among finished texts; leave out stream")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str
    """A JSON object as text."""


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What answers hold and a client sends back.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)

    @property
    def text(self) -> str:
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class Schema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: Schema


class ChatBody(Writing):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = Field(default=None, discriminator="type")
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: Off | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one thing; give one of them")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice asks for a tool and there are no tools")
        return self


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    """Not supported: a vector has as many numbers as the model's layers."""
    user: str | None = None


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseSchema(Body):
    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseText(Body):
    format: TextFormat | ObjectFormat | ResponseSchema | None = Field(default=None, discriminator="type")


class ResponseBody(Body):
    """POST /v1/responses, as far as a plain chat goes: nothing is stored, so the whole conversation is the input."""

    model: str | None = None
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    text: ResponseText | None = None
    stream: bool | None = None
    store: Off | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    truncation: Literal["disabled"] | None = None


class TokenizeBody(Body):
    """POST /tokenize: the token ids of a text as a prompt of it has them, or of messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    """Put the begin-of-text token in front of a prompt where the model wants it."""

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
