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
from bitnet.serving.streams import unless_gone


async def embed(model: ServedModel, body: EmbeddingBody, http: HttpRequest) -> Response:
    """Raises ApiError for a model whose engine has no hidden states, and as `Scheduler.embed`."""
    if hidden_states_of(model.text_model.model) is None:
        raise ApiError(
            501, f"{model.name!r} runs on an engine that gives logits alone; embeddings need one of the CPU, or torch",
            param="model", code="no_embeddings",
        )  # fmt: skip
    texts = [ids for _, ids in prompts_of(model, body.input, "input")]
    futures: list[Future[Tensor]] = []
    try:
        for ids in texts:
            futures.append(model.scheduler.embed(ids))
        vectors: list[Tensor] = await unless_gone(http, _all(futures))
    finally:  # of a request that one text has ended, no other is computed, by the time it is answered
        for future in futures:
            future.cancel()
    count = sum(map(len, texts))
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format == "base64")}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Json({"object": "list", "model": model.name, "data": data, "usage": usage})


async def _all(futures: list[Future[Tensor]]) -> list[Tensor]:
    try:
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]
            raise
        raise ApiError(503, "the server has shut down", code="shutting_down") from None


def _encoded(vector: Tensor, base64_wanted: bool) -> str | list[float]:
    numbers = vector.numpy().astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode() if base64_wanted else numbers.tolist()
