"""POST /v1/embeddings: the mean of a model's last layer over each text.

A causal model was not trained for this: the vectors compare texts roughly, and only with others of the same model.
"""

import asyncio
import base64
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor

from bitnet.inference.scoring import hidden_states_of
from bitnet.serving.answers import Json
from bitnet.serving.completions import prompts_of
from bitnet.serving.errors import ApiError
from bitnet.serving.models import ServedModel
from bitnet.serving.requests import EmbeddingBody
from bitnet.serving.scheduler import Scheduler
from bitnet.serving.streams import unless_gone

MAX_TEXTS = 2048
"""Of one request, as OpenAI's."""
WAITING = 16
"""Texts of a request that are in the queue."""


async def embed(model: ServedModel, body: EmbeddingBody, http: HttpRequest) -> Response:
    """Raises ApiError for a model whose engine has no hidden states, and as `Scheduler.embed`."""
    if hidden_states_of(model.text_model.model) is None:
        raise ApiError(
            501, f"{model.name!r} runs on an engine that gives logits alone; embeddings need one of the CPU, or torch",
            param="model", code="no_embeddings",
        )  # fmt: skip
    prompts = await asyncio.to_thread(prompts_of, model, body.input, "input", MAX_TEXTS)
    texts = [ids for _, ids in prompts]
    for ids in texts:  # before the first is computed
        model.scheduler.check_text(ids)
    longest = model.scheduler.limits.request_seconds
    try:
        async with asyncio.timeout(longest):
            vectors = await unless_gone(http, _vectors(model.scheduler, texts))
    except TimeoutError:
        raise ApiError(504, f"the answer took longer than {longest:g} s", code="deadline_exceeded") from None
    count = sum(map(len, texts))
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format == "base64")}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Json({"object": "list", "model": model.name, "data": data, "usage": usage})


async def _vectors(scheduler: Scheduler, texts: list[list[int]]) -> list[Tensor]:
    """Of all texts, a few at a time, so that one request leaves room in the queue."""
    vectors: list[Tensor] = []
    waiting = min(WAITING, scheduler.limits.queue)
    for start in range(0, len(texts), waiting):
        futures: list[Future[Tensor]] = []
        try:
            for ids in texts[start : start + waiting]:
                futures.append(scheduler.embed(ids))
            vectors += await asyncio.gather(*map(asyncio.wrap_future, futures))
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            raise ApiError(503, "the server has shut down", code="shutting_down") from None
        finally:  # of a request that one text has ended, no other is computed, by the time it is answered
            for future in futures:
                future.cancel()
    return vectors


def _encoded(vector: Tensor, base64_wanted: bool) -> str | list[float]:
    numbers = vector.numpy().astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode() if base64_wanted else numbers.tolist()
