"""A model for EleutherAI's lm-evaluation-harness (lm_eval): log-likelihoods and texts, many at once.

    results = run_tasks(bitnet.load("runs/demo"), ["arc_easy"])

Requests go through the scheduler of the server (`bitnet/serving/scheduler.py`), so the continuations of one context
share it, and a score here is the one that `lm_eval --model local-completions` gets from `bitnet serve`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bitnet.inference.options import SamplingConfig
from bitnet.inference.rows import default_cache_tokens
from bitnet.inference.text_model import TextModel, load
from bitnet.serving.errors import ApiError
from bitnet.serving.jobs import Event, Generation, Job, Limits, Piece, PromptScores
from bitnet.serving.metrics import Metrics, ModelMetrics
from bitnet.serving.scheduler import Scheduler
from bitnet.tokenizer.chat import require

__all__ = ["BitnetLM", "load", "run_tasks"]
DEFAULT_NEW_TOKENS = 256  # lm_eval's own
_WRITING = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}


class BitnetLM(TemplateLM):
    """`model` as lm_eval asks for it."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = model.source.tokenizer
        limits = Limits(
            model.positions,
            default_cache_tokens(model.model.config, model.positions),
            queue=2**31,
            queue_seconds=math.inf,
            request_seconds=math.inf,
        )
        self._events: dict[Job, list[Event]] = {}
        self._scheduler = Scheduler(
            model.model, self._tokenizer, limits, self._collect, ModelMetrics(Metrics(), "evaluation")
        )

    @property
    def eot_token_id(self) -> int:
        found = self._tokenizer.eos_id
        return self._tokenizer.drawable.vocab_size - 1 if found is None else found

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return require(self._model.source.chat_template, "the model").source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return require(self._model.source.chat_template, "the model").render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, special tokens counting as such, as with lm_eval's own models."""
        ids, bos = self._tokenizer.encode(string, special=True), self._tokenizer.bos_id
        wanted = self._tokenizer.adds_bos and add_special_tokens is not False and bos is not None
        return [bos, *ids] if wanted and ids[:1] != [bos] else ids  # type: ignore[list-item]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether each of its tokens is the likeliest."""
        generations = []
        for (_, continuation), context_ids, ids in requests:
            if not ids:
                raise ValueError(f"the continuation {continuation!r} has no tokens to be scored")
            whole = (context_ids + ids)[-self._model.positions :]
            first = len(whole) - len(ids)
            if first < 1:
                raise ValueError(f"a continuation of {len(ids)} tokens leaves no context in {self._model.positions}")
            generations.append(Generation(tuple(whole), 0, alternatives=1, scores_from=first))
        found = []
        for (_, _, ids), events in zip(requests, self._run(generations), strict=True):
            scores = next(event.scores for event in events if isinstance(event, PromptScores))
            greedy = all(score.best[0][0] == token for score, token in zip(scores, ids, strict=True))
            found.append((sum(score.logprob for score in scores), greedy))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's positions that do not overlap."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(
                ids, prefix_token=self.prefix_token_id, max_seq_len=self._model.positions - 1, context_len=1
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the task's stop strings."""
        generations = []
        for number, request in enumerate(requests):
            context, options = request.args
            if unknown := sorted(set(options) - _WRITING):
                raise ValueError(f"the task asks for {', '.join(unknown)} in its generation, which is not supported")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            sampled = options.get("do_sample", options.get("temperature", 0) > 0)
            sampling = SamplingConfig(
                temperature=options.get("temperature", 1.0) if sampled else 0.0,
                top_p=options.get("top_p", 1.0),
                top_k=options.get("top_k", 0),
                min_p=options.get("min_p", 0.0),
            )
            count = options.get("max_gen_toks", DEFAULT_NEW_TOKENS)
            if count >= self._model.positions:  # of whose question nothing would be left
                raise ValueError(
                    f"the task asks for texts of up to {count} tokens, and the model has {self._model.positions} "
                    "positions for question and text; take a task of shorter answers"
                )
            ids = self.tok_encode(context)[count - self._model.positions :]
            stop = tuple(text for text in until if text)
            # A task that draws several texts asks the same several times.
            generations.append(Generation(tuple(ids), count, sampling, seed=number, stop=stop))
        return [
            "".join(event.text for event in events if isinstance(event, Piece)) for events in self._run(generations)
        ]

    def _run(self, generations: Sequence[Generation]) -> list[list[Event]]:
        """What came of each. Raises ValueError where one failed."""
        jobs = [Job(generation) for generation in generations]
        for job in jobs:
            self._events[job] = []
            self._scheduler.submit(job)
        while self._scheduler.step():
            pass
        found = [self._events.pop(job) for job in jobs]
        for error in (event for events in found for event in events if isinstance(event, ApiError)):
            raise ValueError(error.message)
        return found

    def _collect(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            self._events[job].append(event)


def run_tasks(
    model: TextModel,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Results of lm_eval by task: {"acc,none": 0.5, "acc_stderr,none": ...}.

    folder: with more tasks (YAML files); shots: examples in front, the task's own number unless given; limit: examples
    of each task. Raises ValueError for a task that is not known.
    """
    # lm_eval's own thousands of files are only read for a task that the folder does not have.
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else TaskManager()
    if folder and not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=str(folder))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"lm_eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    found = simple_evaluate(
        BitnetLM(model), tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
        bootstrap_iters=1000,
    )  # fmt: skip
    assert found is not None
    return dict(found["results"])
