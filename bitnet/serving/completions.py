"""POST /v1/completions: a text goes on."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitnet.serving.answers import Json, Usage, event, head, legacy_logprobs, legacy_of_tokens, offsets
from bitnet.serving.errors import ApiError, invalid
from bitnet.serving.jobs import Generation, Piece, PromptScores, Token
from bitnet.serving.models import ServedModel
from bitnet.serving.requests import CompletionBody
from bitnet.serving.streams import events, requests_of, stream, unless_gone
from bitnet.serving.worker import Request

DEFAULT_TOKENS = 16
MAX_PROMPTS = 128


def prompts_of(model: ServedModel, given: Any, param: str, most: int) -> list[tuple[str | None, list[int]]]:
    """Every prompt of a request, of which there may be `most`, as text, where it was one, and as token ids."""
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(several) > most:
        raise invalid(f"{len(several)} texts are more than the {most} of one request; ask more than once", param)
    return [
        (one, model.encode(one, param)) if isinstance(one, str) else (None, model.check_ids(one, param))
        for one in several
    ]


class Completions:
    """One request: its jobs, and how its answer is put together."""

    def __init__(self, model: ServedModel, body: CompletionBody, http: HttpRequest) -> None:
        self.model, self.body, self.http = model, body, http
        self.count = body.n or 1
        most = min(MAX_PROMPTS, model.scheduler.limits.queue)  # of more, one would always find the queue full
        self.prompts = prompts_of(model, body.prompt, "prompt", most)
        samples = max(self.count, body.best_of or 0)
        if body.max_tokens == 0 and not body.echo:
            raise invalid("max_tokens is 0, which only echo makes sense of; ask for at least 1", "max_tokens")

        def new_tokens(prompt: list[int]) -> int:
            most = max(1, min(DEFAULT_TOKENS, model.scheduler.room(len(prompt), samples)))
            return most if body.max_tokens is None else body.max_tokens

        seed = body.chosen_seed
        alternatives = body.logprobs
        if samples > self.count and alternatives is None:
            alternatives = 0  # to choose by
        generations = [
            Generation(
                tuple(ids),
                new_tokens(ids),
                sampling=body.sampling(model.tokenizer.drawable, model.own_sampling),
                seed=seed + number * samples,  # else equal prompts would have equal texts
                count=samples,
                stop=body.stops,
                alternatives=alternatives,
                scores_from=1 if body.echo and body.logprobs is not None else None,
                ends=not body.ignore_eos,
                limited_by="prompt" if body.max_tokens is None else "max_tokens",
                counted_by="n" if samples == self.count else "best_of",
            )
            for number, (_, ids) in enumerate(self.prompts)
        ]
        self.requests: list[Request] = requests_of(generations, http)
        self.usage = Usage(self.requests)
        self.head = head("text_completion", "cmpl", model)
        self.echoes = [self._echo(number) for number in range(len(self.prompts))] if body.echo else []

    def _echo(self, number: int) -> tuple[str, list[int]]:
        text, ids = self.prompts[number]
        decoded, starts = offsets(self.model.tokenizer, ids)
        return (decoded if text is None else text), starts

    async def answer(self) -> Response:
        return Json(await unless_gone(self.http, self._whole()))

    async def _whole(self) -> dict[str, Any]:
        texts: dict[tuple[int, int], str] = {}
        tokens: dict[tuple[int, int], list[Token]] = {}
        finishes: dict[tuple[int, int], str | None] = {}
        scores: dict[int, PromptScores] = {}
        async for number, one in events(self.model, self.requests):
            if isinstance(one, PromptScores):
                scores[number] = one
            elif isinstance(one, Piece):
                key = number, one.index
                texts[key] = texts.get(key, "") + one.text
                tokens.setdefault(key, []).extend(one.tokens)
                finishes[key] = one.finish
        choices: list[dict[str, Any]] = []
        for number, request in enumerate(self.requests):
            keys = [(number, index) for index in range(request.generation.count)]
            if len(keys) > self.count:  # best_of: those of the highest log-probability a token
                keys.sort(key=lambda key: -_mean(tokens[key]))
                keys = keys[: self.count]
            for key in keys:
                logprobs = self._logprobs(number, scores.get(number), tokens[key])
                choices.append(self._choice(len(choices), self._before(number) + texts[key], logprobs, finishes[key]))
        return self.head | {"choices": choices, "usage": self.usage.body()}

    async def chunks(self) -> AsyncIterator[bytes]:
        body = self.body
        options = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}
        begun: set[tuple[int, int]] = set()
        scores: dict[int, PromptScores] = {}
        async for number, one in events(self.model, self.requests):
            if isinstance(one, PromptScores):
                scores[number] = one
            elif isinstance(one, Piece):
                key = number, one.index
                before = "" if key in begun else self._before(number)
                logprobs = self._logprobs(
                    number, None if key in begun else scores.get(number), one.tokens, key in begun
                )
                begun.add(key)
                choice = self._choice(number * self.count + one.index, before + one.text, logprobs, one.finish)
                yield event(self.head | {"choices": [choice]} | options)
        if options:
            yield event(self.head | {"choices": [], "usage": self.usage.body()})

    def _before(self, number: int) -> str:
        return self.echoes[number][0] if self.echoes else ""

    def _logprobs(
        self, number: int, scores: PromptScores | None, tokens: list[Token], begun: bool = False
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        tokenizer, offset = self.model.tokenizer, len(self._before(number))
        written = legacy_of_tokens(tokenizer, tokens, offset)
        if not self.echoes or begun or scores is None:
            return written
        ids = self.prompts[number][1]
        read = legacy_logprobs(tokenizer, ids, [None, *scores.scores], self.echoes[number][1])
        return {key: read[key] + written[key] for key in read}

    @staticmethod
    def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _mean(tokens: list[Token]) -> float:
    values = [token.score.logprob for token in tokens if token.score is not None]
    return sum(values) / len(values) if values else -float("inf")


async def complete(model: ServedModel, body: CompletionBody, http: HttpRequest) -> Response:
    """Raises ApiError for what cannot be asked of this model."""
    if body.echo and body.best_of is not None and body.best_of > (body.n or 1) and body.max_tokens == 0:
        raise ApiError(400, "best_of chooses among texts and max_tokens is 0; leave it out", param="best_of")
    completions = await asyncio.to_thread(Completions, model, body, http)  # others are served while it is encoded
    return await stream(http, completions.chunks()) if body.stream else await completions.answer()
