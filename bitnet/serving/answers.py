"""What every answer is made of: tokens with their log-probabilities, counts, chunks of a stream."""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from bitnet.inference.scoring import Score
from bitnet.serving.jobs import Job, Token
from bitnet.serving.models import ServedModel, now
from bitnet.tokenizer import BaseTokenizer, StreamDecoder

DONE = b"data: [DONE]\n\n"


class Json(JSONResponse):
    """An answer. Half of a pair of UTF-16, which a client may send in names and metadata and is told again, has no
    UTF-8: it goes back as JSON's escape, which it was."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


def event(body: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(body).encode() + b"\n\n"


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def head(kind: str, prefix: str, model: ServedModel) -> dict[str, Any]:
    """What every object of an answer begins with."""
    return {
        "id": new_id(f"{prefix}-"),
        "object": kind,
        "created": now(),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


class Usage:
    """Tokens that requests took so far."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def body(self) -> dict[str, Any]:
        prompt = sum(len(job.generation.prompt) for job in self._jobs)
        # What was written, those tokens included that end a text and are none of it.
        written = sum(sample.new_tokens for job in self._jobs for sample in job.samples)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in self._jobs)},
        }


def token_text(tokenizer: BaseTokenizer, token_id: int) -> str:
    """A token as text: a special one by its name, bytes that are no character as "bytes:\\xe2"."""
    surface = tokenizer.surface_bytes(token_id)
    if not surface:
        return tokenizer.id_to_piece(token_id)
    try:
        return surface.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in surface)


def token_bytes(tokenizer: BaseTokenizer, token_id: int) -> list[int]:
    return list(tokenizer.surface_bytes(token_id))


def legacy_logprobs(
    tokenizer: BaseTokenizer, ids: Sequence[int], scores: Sequence[Score | None], starts: Sequence[int]
) -> dict[str, Any]:
    """Log-probabilities as /v1/completions gives them; None for a text's first token, which nothing predicts."""
    tops: list[dict[str, float] | None] = []
    for score in scores:
        best = None if score is None else [(token_text(tokenizer, i), value) for i, value in score.best]
        tops.append(None if best is None else dict(reversed(best)))  # of equal texts the likelier counts
    return {
        "tokens": [token_text(tokenizer, i) for i in ids],
        "token_logprobs": [None if score is None else score.logprob for score in scores],
        "top_logprobs": [None if top is None else dict(sorted(top.items(), key=lambda x: -x[1])) for top in tops],
        "text_offset": list(starts),
    }


def legacy_of_tokens(tokenizer: BaseTokenizer, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    ids, scores = [token.id for token in tokens], [token.score for token in tokens]
    return legacy_logprobs(tokenizer, ids, scores, [offset + token.start for token in tokens])


def chat_logprobs(tokenizer: BaseTokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Log-probabilities as /v1/chat/completions gives them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": logprob,
            "bytes": token_bytes(tokenizer, token_id),
        }

    return [
        entry(token.id, token.score.logprob)
        | {"top_logprobs": [entry(token_id, value) for token_id, value in token.score.best]}
        for token in tokens
        if token.score is not None and not token.ends
    ]


def offsets(tokenizer: BaseTokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of some ids, and where each one's begins."""
    decoder, text, starts = StreamDecoder(tokenizer), "", []
    for token_id in ids:
        starts.append(len(text))
        text += decoder.push(token_id)
    return text + decoder.flush(), starts
