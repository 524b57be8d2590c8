"""Continuous batching: requests join and leave one model's passes while others run.

Every pass feeds one token to each text that is being written and, beside them, pieces of prompts that are still to be
read (chunked prefill), so that nobody's next token waits for somebody's long prompt. Prompts are read in the order in
which they were admitted.

While no prompt is read, a text may carry a draft of its next tokens (`bitnet/inference/lookup.py`), where the measured
times of passes say that it pays. Tokens are drawn one by one as ever, each from the logits behind the one before, and
at the first that is not the draft's the row forgets the rest: grammars, penalties, scores and stop strings see what
they always see, and nothing but a row ever goes back.

A request is admitted when there is a place for each of its samples and memory for its longest possible texts; what was
admitted therefore always ends, and nothing is ever thrown out to make room. Its samples share the prompt. Rows of
finished texts stay as beginnings for others (`bitnet/serving/prefix.py`) until their memory is wanted.

What a text becomes depends on its own request alone: an engine that promises equal bits reads a prompt in pieces of any
size and goes on from shared beginnings; for any other model (`PlainRows`) the pieces of a prompt always end at the same
places and no row is shared.

`submit` and `cancel` may be called by any thread, everything else by the one that runs the engine.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from bitnet.inference.engine import LanguageModel
from bitnet.inference.lookup import PromptLookup
from bitnet.inference.rows import CacheFullError, PlainRows, Row, Step, rows_of
from bitnet.inference.sampling import draw_rows, without
from bitnet.inference.scoring import Score, embedding, score
from bitnet.serving.errors import ApiError, invalid
from bitnet.serving.jobs import SLACK, Event, Job, Limits, Piece, PromptScores, Sample
from bitnet.serving.metrics import ModelMetrics
from bitnet.serving.prefix import PrefixCache
from bitnet.serving.queue import FairQueue
from bitnet.tokenizer import BaseTokenizer

LOG = logging.getLogger("bitnet.serving")
PIECE = 64
"""Tokens of prompts that one pass reads while others write, or twice as many as texts are being written: a pass that
takes long anyway takes a little longer, and those who wait for their first token wait fewer passes."""
ALONE = 512
"""The same while nobody writes."""
NOT_FINITE = "the model's numbers are not finite: its training diverged or its dtype overflows"


class Scheduler:
    """The passes of one model."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: BaseTokenizer,
        limits: Limits,
        post: Callable[[list[tuple[Job, Event]]], None],
        metrics: ModelMetrics,
        wake: Callable[[], None] = lambda: None,
        lookup: PromptLookup | None = None,
    ) -> None:
        """`post` gets what every pass gave, on the engine's thread; `wake` is called when there is new work; `lookup`,
        for an engine that promises equal bits, drafts."""
        self.limits, self.metrics = limits, metrics
        self._tokenizer, self._post, self._wake = tokenizer, post, wake
        self._unused = torch.tensor(sorted(tokenizer.unused)) if tokenizer.unused else None
        self._model, self._rows = model, rows_of(model)
        self._shared = not isinstance(self._rows, PlainRows)
        self._lookup = lookup or PromptLookup(0)
        assert self._shared or not self._lookup.tokens
        self._cache = self._rows.new_cache(limits.cache_tokens)
        self._prefixes = PrefixCache()
        self._queue: FairQueue[Job] = FairQueue()
        self._running: list[Sample] = []
        self._reserved = 0
        self._outbox: list[tuple[Job, Event]] = []
        self._lock = threading.Lock()
        self._inbox: list[Job] = []
        self._texts: deque[tuple[list[int], Future[Tensor]]] = deque()
        self._draining = False

    # Any thread

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError where it can never run, where too many wait, and when the server is going."""
        generation, limits = job.generation, self.limits
        total = len(generation.prompt) + generation.max_new_tokens
        if total > limits.context:
            raise invalid(
                f"the prompt has {len(generation.prompt)} tokens and {generation.max_new_tokens} are asked for; "
                f"together at most {limits.context} fit the model's context here",
                generation.limited_by, "context_length_exceeded",
            )  # fmt: skip
        if generation.count > limits.parallel:
            raise invalid(
                f"{generation.count} samples are more than the {limits.parallel} that run at once here",
                generation.counted_by,
            )
        if (need := job.need(self._shared)) > limits.cache_tokens:
            raise invalid(
                f"the request may need memory for {need} tokens and this server has it for {limits.cache_tokens}; ask "
                "for fewer samples or tokens",
                generation.limited_by, "context_length_exceeded",
            )  # fmt: skip
        if (generation.alternatives or 0) > (known := self._tokenizer.drawable.number):
            raise invalid(f"{generation.alternatives} likely tokens are asked for and there are {known}", "logprobs")
        with self._lock:
            if self._draining:
                raise ApiError(503, "the server is shutting down; ask again later", code="shutting_down")
            if len(self._inbox) + len(self._queue) >= limits.queue:
                raise ApiError(429, f"{limits.queue} requests wait already; ask again later", code="queue_full")
            self._inbox.append(job)
        self._wake()

    def room(self, prompt: int, count: int) -> int:
        """Tokens that each of so many samples behind a prompt may have, so that `submit` takes it; below 1: none."""
        prompts = (prompt + SLACK) * (1 if self._shared else count)
        return min(self.limits.context - prompt, (self.limits.cache_tokens - prompts) // count - SLACK)

    def embed(self, ids: list[int]) -> "Future[Tensor]":
        """The vector of a text, computed between two passes. Raises ApiError as `submit` does."""
        self.check_text(ids)
        future: Future[Tensor] = Future()
        with self._lock:
            if self._draining:
                raise ApiError(503, "the server is shutting down; ask again later", code="shutting_down")
            if len(self._texts) >= self.limits.queue:
                raise ApiError(429, f"{self.limits.queue} texts wait already; ask again later", code="queue_full")
            self._texts.append((ids, future))
        self._wake()
        return future

    def check_text(self, ids: list[int]) -> None:
        """Raise ApiError for a text that has no place here."""
        if len(ids) > self.limits.context:
            raise invalid(f"a text has {len(ids)} tokens; at most {self.limits.context} fit here", "input")

    def cancel(self, job: Job) -> None:
        """Stop working for a job, whose client has gone."""
        job.cancelled = True
        self._wake()

    def drain(self) -> None:
        """Take no more jobs, and send the waiting ones away; those that run go on."""
        with self._lock:
            self._draining = True
        self._wake()

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Samples that run, jobs that wait, free tokens of the cache, kept beginnings: for a gauge, not exact."""
        return len(self._running), len(self._queue) + len(self._inbox), self._cache.free_tokens, len(self._prefixes)

    # The engine's thread

    def step(self) -> bool:
        """One pass over what is to be read and written; False where there was nothing to do."""
        self._receive()
        self._dismiss()
        self._admit()
        passed = self._embed_one() or bool(self._running)
        if self._running:
            plan = self._plan()
            drafted = any(len(ids) > 1 for sample, ids in plan if not sample.reading)
            scored = [drafted or self._wants_all(sample) for sample, _ in plan]
            for every in (False, True):
                # A job that has failed in the first part has no rows any more.
                if part := [
                    one for one, wanted in zip(plan, scored, strict=True) if wanted == every and not one[0].job.done
                ]:
                    self._pass(part, every)
        if self._outbox:
            self._post(self._outbox)
            self._outbox = []
        return passed

    def close(self) -> None:
        """Take nothing more, and end everything at once."""
        self.drain()
        self.abort(ApiError(503, "the server has shut down", code="shutting_down"))

    def abort(self, error: ApiError) -> None:
        """End everything at once with an error."""
        self._receive()
        while self._texts:
            self._texts.popleft()[1].cancel()
        for job in self._jobs(self._running):
            self._fail(job, error)
        for job in self._queue.remove(lambda job: True):
            self._outbox.append((job, error))
        if self._outbox:
            self._post(self._outbox)
            self._outbox = []

    def _embed_one(self) -> bool:
        """Compute the next vector that somebody still waits for."""
        while self._texts:
            ids, future = self._texts.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    vector = embedding(self._model, ids)
                    if not bool(vector.isfinite().all()):
                        raise ApiError(500, NOT_FINITE)
                    future.set_result(vector)
                    self.metrics.prompt_tokens.inc(len(ids))
                except Exception as error:  # for whom it was computed
                    future.set_exception(error)
                return True
        return False

    def _receive(self) -> None:
        with self._lock:  # also while they are between the two: who comes counts them all
            for job in self._inbox:
                self._queue.push(job.client, job)
            self._inbox = []

    def _dismiss(self) -> None:
        """Send away whoever has gone or has waited too long."""
        now, limits = time.monotonic(), self.limits
        self.metrics.cancelled.inc(len(self._queue.remove(lambda job: job.cancelled)))
        longest = min(limits.queue_seconds, limits.request_seconds)
        for job in self._queue.remove(lambda job: self._draining or now - job.arrived > longest):
            self._outbox.append(
                (job, ApiError(503, "the server is shutting down; ask again later", code="shutting_down"))
                if self._draining
                else (job, ApiError(503, f"the request waited {longest:g} s for a place; ask again later", code="busy"))
            )
        for job in self._jobs(self._running):
            if job.cancelled:
                self.metrics.cancelled.inc()
                self._leave(job)
            elif now - job.arrived > limits.request_seconds:
                self._fail(
                    job,
                    ApiError(
                        504, f"the answer took longer than {limits.request_seconds:g} s", code="deadline_exceeded"
                    ),
                )

    def _admit(self) -> None:
        while (job := self._queue.peek()) is not None:
            need = job.need(self._shared)
            # Those to come of jobs whose prompt is being read have their places.
            coming = sum(job.generation.count - len(job.samples) for job in self._jobs(self._running))
            if len(self._running) + coming + job.generation.count > self.limits.parallel:
                return
            if self._reserved + need > self.limits.cache_tokens:
                return
            self._queue.pop()
            self._reserved += need
            job.reserved = need
            self.metrics.queue_seconds.observe(time.monotonic() - job.arrived)
            # Samples that share their prompt are made when the first has read it.
            for index in range(1 if self._shared else job.generation.count):
                self._start(job, index, self._first_row(job))

    def _first_row(self, job: Job) -> Row:
        if self._shared:
            # What is scored must be read: the token before it is the last whose logits are not needed.
            row = self._prefixes.fork(job.generation.prompt[: job.generation.scores_from])
            if row is not None:
                job.cached_tokens = row.length
                self.metrics.cached_tokens.inc(row.length)
                return row
        return self._cache.new_row()

    def _start(self, job: Job, index: int, row: Row) -> Sample:
        sample = Sample(job, index, row, self._tokenizer, self._lookup)
        job.samples.append(sample)
        self._running.append(sample)
        return sample

    def _plan(self) -> list[tuple[Sample, list[int]]]:
        """Who reads which tokens in this pass."""
        plan = [(sample, sample.ids[-1:]) for sample in self._running if not sample.reading]
        if len(plan) == len(self._running):
            return self._with_drafts(plan) if self._lookup.tokens else plan
        room = max(PIECE, 2 * len(plan)) if plan else ALONE
        for sample in self._running:
            if sample.reading and room > 0:
                start, scores_from = sample.row.length, sample.job.generation.scores_from
                end = start + min(sample.pending, room) if self._shared else min(start + PIECE, len(sample.ids))
                if scores_from is not None and start < scores_from - 1:
                    end = min(end, scores_from - 1)  # up to there the last logits are enough
                plan.append((sample, sample.ids[start:end]))
                room -= end - start
        return plan

    def _with_drafts(self, plan: list[tuple[Sample, list[int]]]) -> list[tuple[Sample, list[int]]]:
        """Texts that are all being written, with the drafts that pay. Beside a prompt there are none: who waits for a
        first token would wait for them too."""
        rooms = [sample.job.generation.max_new_tokens - sample.new_tokens for sample, _ in plan]
        drafters = [sample.drafter for sample, _ in plan if sample.drafter is not None]
        drafts = self._lookup.begin(list(zip(drafters, rooms, strict=True)))
        self.metrics.drafts.inc(sum(bool(draft) for draft in drafts))
        self.metrics.draft_tokens.inc(sum(map(len, drafts)))
        return [(sample, ids + draft) for (sample, ids), draft in zip(plan, drafts, strict=True)]

    @staticmethod
    def _jobs(samples: Iterable[Sample]) -> list[Job]:
        return list(dict.fromkeys(sample.job for sample in samples))

    @staticmethod
    def _wants_all(sample: Sample) -> bool:
        scores_from = sample.job.generation.scores_from
        return scores_from is not None and sample.reading and sample.row.length >= scores_from - 1

    @torch.inference_mode()
    def _pass(self, part: Sequence[tuple[Sample, list[int]]], every: bool) -> None:
        started = time.perf_counter()
        try:
            logits = self._step([(sample.row, ids) for sample, ids in part], every)
        except Exception:  # whatever an engine can raise must not end the others' server
            LOG.exception("a pass of the model failed")
            for job in self._jobs(sample for sample, _ in part):
                self._fail(job, ApiError(500, "the model failed on this request; the server's log says why"))
            return
        seconds = time.perf_counter() - started
        self.metrics.pass_seconds.observe(seconds)
        self.metrics.pass_rows.observe(len(part))
        if self._lookup.tokens and all(sample.new_tokens for sample, _ in part):
            self._lookup.measured(len(part), sum(len(ids) - 1 for _, ids in part), seconds)
        ready: list[Sample] = []
        behind: list[Tensor] = []  # of each the logits `[t, V]` behind its last token and those of its draft
        for (sample, ids), out in zip(part, logits, strict=True):
            if sample.job.done:  # with another sample of it
                continue
            self._queue.charge(sample.job.client, len(ids))
            if sample.row.length <= sample.prompt_length:
                self.metrics.prompt_tokens.inc(len(ids))
            drawing = self._read(sample, len(ids), out)
            ready += drawing
            out = out.reshape(-1, out.shape[-1])
            behind += [out if sample.new_tokens else out[-1:]] * len(drawing)
        if isinstance(logits, Tensor) and ready == [sample for sample, _ in part]:
            self._draw(ready, logits)
            return
        place = 0
        while ready:
            self._draw(ready, torch.stack([out[place] for out in behind]))
            left = [index for index, sample in enumerate(ready) if sample.ahead and sample in self._running]
            ready, behind, place = [ready[index] for index in left], [behind[index] for index in left], place + 1

    def _step(self, steps: Step, every: bool) -> Tensor | list[Tensor]:
        """Logits of a pass; what is kept for others gives way to it."""
        while True:
            try:
                return self._rows.step(steps, every=True) if every else self._rows.step(steps)
            except CacheFullError:
                if not self._prefixes.drop():
                    raise

    def _read(self, sample: Sample, read: int, logits: Tensor) -> list[Sample]:
        """Whose next token is drawn from the logits behind a pass: `[V]` behind the last token read, or `[read, V]`
        while a prompt is scored."""
        if sample.new_tokens:
            return [sample]
        generation = sample.job.generation
        if logits.dim() == 2:
            start = sample.row.length - read
            wanted = sample.ids[start + 1 : sample.row.length + 1]
            if wanted:
                own = logits[: len(wanted), : self._tokenizer.vocab_size]
                if self._unused is not None:
                    own = without(own, self._unused.to(own.device))
                found = score(own, wanted, generation.alternatives or 0)
                if not all(math.isfinite(each.logprob) for each in found):
                    self._fail(sample.job, ApiError(500, NOT_FINITE))
                    return []
                sample.scores += found
        return [] if sample.pending else self._begin(sample)

    def _begin(self, first: Sample) -> list[Sample]:
        """The prompt is read: give its scores, let the other samples begin from it, and others from its blocks."""
        job, generation = first.job, first.job.generation
        if generation.scores_from is not None and first.index == 0:
            self._outbox.append((job, PromptScores(first.scores)))
        samples = [first]
        if self._shared and first.index == 0:
            self._prefixes.keep(first.row.fork(), first.ids)
            samples += [self._start(job, index, first.row.fork()) for index in range(1, generation.count)]
        if generation.max_new_tokens:
            return samples
        for sample in samples:
            self._finish(sample, Piece(sample.index, "", [], "length"))
        return []

    def _draw(self, samples: list[Sample], logits: Tensor) -> None:
        """The next token of each, under logits `[n, V or more]`."""
        for sample in samples:
            if sample.matcher is not None:
                try:
                    sample.sampler.allowed = sample.matcher.mask()
                except ValueError as error:
                    self._fail(sample.job, ApiError(500, str(error)))
        if any(sample.job.done for sample in samples):
            left = [index for index, sample in enumerate(samples) if not sample.job.done]
            samples, logits = [samples[index] for index in left], logits[left]
        for sample, drawn in zip(samples, draw_rows([sample.sampler for sample in samples], logits), strict=True):
            if sample.job.done:
                continue
            try:
                if not drawn.finite:
                    raise ValueError(NOT_FINITE)
                self._write(sample, drawn.token, None if drawn.logprob is None else Score(drawn.logprob, drawn.top))
            except ValueError as error:
                self._fail(sample.job, ApiError(500, str(error)))

    def _write(self, sample: Sample, token: int, found: Score | None) -> None:
        job, now = sample.job, time.monotonic()
        if sample.new_tokens:
            self.metrics.token_seconds.observe(now - sample.last_token_at)
        else:
            self.metrics.first_token_seconds.observe(now - job.arrived)
        sample.last_token_at = now
        self.metrics.new_tokens.inc()
        piece = sample.take(token, found)
        self.metrics.accepted_tokens.inc(sample.ahead)
        if piece.finish:
            self._finish(sample, piece)
        elif piece.text or piece.tokens:
            self._outbox.append((job, piece))

    def _finish(self, sample: Sample, piece: Piece) -> None:
        job = sample.job
        self._outbox.append((job, piece))
        self._running.remove(sample)
        self._release(sample)
        if len(job.samples) == job.generation.count and not any(other.job is job for other in self._running):
            self._done(job)

    def _release(self, sample: Sample) -> None:
        if sample.drafter is not None and sample.drafter.ahead:  # in the midst of a draft
            sample.drafter.forget()
        if self._shared and sample.row.length:
            self._prefixes.keep(sample.row, sample.ids)
        else:
            sample.row.close()

    def _fail(self, job: Job, error: ApiError) -> None:
        self._outbox.append((job, error))
        self._leave(job)

    def _leave(self, job: Job) -> None:
        """Take a job out of the passes."""
        mine = [sample for sample in self._running if sample.job is job]
        self._running = [sample for sample in self._running if sample.job is not job]
        for sample in mine:
            self._release(sample)
        if mine:
            self._done(job)

    def _done(self, job: Job) -> None:
        job.done = True
        self._reserved -= job.reserved
        self._queue.finished(job.client)
