"""Continuous batching: the same texts whatever runs beside them, shared beginnings, limits, fairness, leaving early."""

import dataclasses
import random
import threading
from functools import partial

import pytest
import torch

from bitnet.inference.generation import generate
from bitnet.inference.options import SamplingConfig
from bitnet.inference.text_model import TextModel
from bitnet.kernels.cpu import native
from bitnet.serving import scheduler as scheduling
from bitnet.serving.errors import ApiError
from bitnet.serving.jobs import Generation, Piece, PromptScores
from bitnet.serving.prefix import BLOCK, PrefixCache
from bitnet.serving.queue import FairQueue
from bitnet.serving.server import Application, Settings
from tests.builders import tiny_model
from tests.inference.builders import AlwaysDrafts
from tests.kernels.builders import NOT_BUILT
from tests.oracles import require
from tests.serving.builders import Bench, Source, seeded, text_model

require("prometheus_client")
NATIVE = pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT)


@pytest.fixture(scope="module")
def model(tokenizer):
    return text_model(tokenizer)


def test_no_tokens_are_none_and_not_all(model):
    with pytest.raises(ValueError, match="cache_tokens is 0; give a positive number"):
        Application([("tiny", model)], Settings(port=0, cache_tokens=0))
    with pytest.raises(ValueError, match="--max-body is 0; give a positive number"):
        Settings(port=0, body_bytes=0)


def test_a_context_that_a_model_does_not_have_is_told(model, caplog):
    application = Application([("tiny", model)], Settings(port=0, cache_tokens=4096, context=100_000))
    assert application.models.find("tiny").context == 512
    assert "tiny has 512 positions, fewer than --context 100000" in caplog.text
    caplog.clear()
    Application([("tiny", model)], Settings(port=0, cache_tokens=4096, context=512))
    assert not caplog.text


def test_settings_of_a_model_that_every_request_would_fail_on(tokenizer):
    broken = text_model(tokenizer)
    broken.source.sampling = {"top_p": 1.5}
    with pytest.raises(ValueError, match=r"tiny: what its files say .* is out of range: top_p is 1\.5; give"):
        Application([("tiny", broken)], Settings(port=0, cache_tokens=4096))


def test_numbers_that_are_none_are_told_wherever_they_are(tokenizer):
    """Of a prompt's scores and a text's vector they went out as NaN, which no JSON has, and into lm_eval's results."""
    broken = tiny_model(vocab_size=tokenizer.vocab_size)
    broken.pack()
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    bench = Bench(TextModel(broken, Source(tokenizer)))  # type: ignore[arg-type]
    asked = [
        Generation((5, 6, 7), 0, scores_from=1),
        Generation((5, 6, 7), 2),
        Generation((5, 6), 0, scores_from=1, count=2),
    ]
    jobs = [bench.submit(each) for each in asked]
    vector = bench.scheduler.embed([5, 6])
    bench.run()
    assert [[str(event) for event in bench.of(job)] for job in jobs] == [[scheduling.NOT_FINITE]] * 3
    with pytest.raises(ApiError, match="not finite"):
        vector.result()
    assert bench.scheduler.counts[:2] == (0, 0)


def choice(seed: int, **changes: float) -> dict:
    return {"sampling": SamplingConfig(temperature=0.9, top_p=0.95, **changes), "seed": seed}


def test_a_text_is_that_of_the_decode_loop(model):
    prompt, tokenizer = model.encode("def wrap("), model.source.tokenizer
    wanted = [
        int(ids[0])
        for ids in generate(
            model.model, torch.tensor([prompt]), max_new_tokens=30, sampling=SamplingConfig(0.9, top_p=0.95), seed=5,
            eos_id=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size,
        )
    ]  # fmt: skip
    bench = Bench(model)
    job = bench.submit(Generation(tuple(prompt), 30, **choice(5)))
    bench.run()
    assert job.samples[0].ids[len(prompt) :] == wanted
    assert prompt == list(job.generation.prompt)


@pytest.mark.parametrize("drafts", [0, pytest.param(7, marks=NATIVE)])
def test_texts_do_not_depend_on_what_runs_beside_them(model, monkeypatch, drafts):
    monkeypatch.setattr(scheduling, "PIECE", 16)  # so that prompts are read in several passes
    vocab_size = model.source.tokenizer.vocab_size
    prompts = seeded(24, 1, 100, vocab_size)
    prompts[5] = prompts[4][:20] + prompts[5][:20]  # beginnings in common
    prompts[9] = prompts[4]
    generations = [
        Generation(
            p, 1 + i % 20, **choice(i, frequency_penalty=0.5 * (i % 2)), count=1 + (i % 5 == 0), alternatives=i % 3
        )
        for i, p in enumerate(prompts)
    ]
    generations += [repeating(i, vocab_size) for i in range(12)]
    wanted = [alone(model, generation) for generation in generations]
    bench = Bench(model, SomeDrafts(drafts) if drafts else None, parallel=9)
    jobs = []
    for number, generation in enumerate(generations):
        jobs.append(bench.submit(generation, client=str(number % 3)))
        for _ in range(number % 4):
            bench.scheduler.step()
    bench.run()
    assert [bench.pieces(job) for job in jobs] == [pieces for pieces, _ in wanted]
    assert [[s.new_tokens for s in job.samples] for job in jobs] == [counts for _, counts in wanted]
    metrics = bench.scheduler.metrics
    read, accepted = metrics.draft_tokens._value.get(), metrics.accepted_tokens._value.get()
    assert read > accepted > metrics.drafts._value.get() / 4 > 0 if drafts else read == accepted == 0


class SomeDrafts(AlwaysDrafts):
    """Of any lengths, whatever passes cost."""

    draw = random.Random(0)

    def draft_lengths(self, texts):
        return [self.draw.randint(0, most) for most in super().draft_lengths(texts)]


def repeating(index: int, vocab_size: int) -> Generation:
    """A text that soon repeats itself, of every kind."""
    how = (
        SamplingConfig(temperature=0),
        SamplingConfig(0.8, logit_bias={40: 30.0, 41: 30.0}, repetition_penalty=1.1),
        SamplingConfig(0.9, top_p=0.9, logit_bias={50: 20.0, 51: 20.5, 52: 20.0}, presence_penalty=0.1),
        SamplingConfig(0.7, top_k=2, frequency_penalty=0.2),
    )[index % 4]
    stop = ("x", "yz", ":") if index % 3 == 0 else ()
    return Generation(
        (40, 41, 50, 51, 52, 40, 41, 50), 30 + index, how, seed=index, count=1 + index % 2, stop=stop,
        ends=index % 5 > 0, alternatives=(None, 0, 2)[index % 3],
        grammar=partial(Alternating, vocab_size) if index % 6 == 1 else None,
    )  # fmt: skip


class Alternating:
    """A grammar: two even ids, then two odd ones, and 20 tokens in all."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.taken = vocab_size, 0

    def mask(self) -> torch.Tensor:
        allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
        allowed[self.taken // 2 % 2 :: 2] = True
        return allowed

    def take(self, token_id: int) -> None:
        assert token_id % 2 == self.taken // 2 % 2
        self.taken += 1

    @property
    def complete(self) -> bool:
        return self.taken == 20


@NATIVE
def test_a_text_that_ends_within_a_draft_leaves_what_it_said(model):
    plain, bench = Bench(model), Bench(model, AlwaysDrafts(15))
    asked = dataclasses.replace(repeating(2, 0), count=1, stop=())
    first, second = plain.submit(asked), bench.submit(asked)
    for one in (plain, bench):
        one.run()
    assert bench.scheduler.metrics.accepted_tokens._value.get() > 0
    turn = Generation((*first.samples[0].ids, 60), 20, **choice(1))
    first, second = plain.submit(turn), bench.submit(turn)
    failing = [bench.submit(dataclasses.replace(asked, seed=at, grammar=partial(Failing, at))) for at in range(4, 20)]
    left = bench.submit(dataclasses.replace(asked, max_new_tokens=200))
    for _ in range(8):
        bench.scheduler.step()
    bench.scheduler.cancel(left)
    for one in (plain, bench):
        one.run()
    assert bench.pieces(second) == plain.pieces(first)
    assert second.cached_tokens == first.cached_tokens > 0
    assert all(bench.of(job)[-1].status == 500 for job in failing)
    kept = bench.scheduler._prefixes._rows.values()
    assert all(row.length == len(known) for row, known in kept)
    assert bench.scheduler._reserved == 0


@NATIVE
def test_no_draft_is_longer_than_what_is_still_to_come(model):
    for tokens, most in ((2, 0), (3, 1)):  # behind the first token; the last one needs no pass
        bench = Bench(model, AlwaysDrafts(15))
        bench.submit(dataclasses.replace(repeating(2, 0), count=1, max_new_tokens=tokens))
        bench.run()
        assert bench.scheduler.metrics.draft_tokens._value.get() == most


class Failing:
    """A grammar that cannot go on behind so many tokens."""

    complete = False

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def mask(self) -> None:
        if self.left == 0:
            raise ValueError("no token may come next")

    def take(self, token_id: int) -> None:
        self.left -= 1


@NATIVE
def test_drafts_are_chosen_by_measured_times(model):
    drafting = TextModel(model.model, model.source, 7)
    (served,), lookup = Application([("tiny", drafting)], Settings(port=0, cache_tokens=1000)).models, drafting.lookup
    assert served.scheduler._lookup is lookup
    bench = Bench(model, lookup)
    jobs = [bench.submit(repeating(i, 0)) for i in (0, 2, 3)]
    bench.run()
    assert [bench.pieces(job) for job in jobs] == [alone(model, repeating(i, 0))[0] for i in (0, 2, 3)]
    assert {texts for texts, _ in lookup._seconds} == {1, 2, 3, 4}
    assert all(seconds > 0 for known in lookup._seconds.values() for seconds in known)


def alone(model: TextModel, generation: Generation) -> tuple[list[list[Piece]], list[int]]:
    """The pieces of each sample, and its tokens' number."""
    bench = Bench(model)
    job = bench.submit(generation)
    bench.run()
    return bench.pieces(job), [sample.new_tokens for sample in job.samples]


def test_sample_i_is_the_text_of_seed_plus_i(model):
    bench, prompt = Bench(model), seeded(1, 40, 41, 500)[0]
    job = bench.submit(Generation(prompt, 12, **choice(7), count=3))
    alone = [bench.submit(Generation(prompt, 12, **choice(7 + i))) for i in range(3)]
    bench.run()
    assert bench.texts(job) == [bench.texts(one)[0] for one in alone]
    assert len({*bench.texts(job)}) == 3


@NATIVE
def test_samples_and_turns_share_what_was_read(model):
    bench, prompt = Bench(model), seeded(1, 64, 65, 500)[0]
    metrics = bench.scheduler.metrics

    def read() -> float:
        return metrics.prompt_tokens._value.get()

    first = bench.submit(Generation(prompt, 8, **choice(1), count=4))
    bench.run()
    assert read() == 64, "four samples read their prompt once"
    turn = (*first.samples[0].ids, 5, 6, 7)
    second = bench.submit(Generation(turn, 8, **choice(2)))
    bench.run()
    # The row lacks the last token of the first answer, which nothing was drawn behind.
    assert second.cached_tokens == 64 + 8 - 1
    assert read() == 64 + 4
    assert bench.texts(second) == bench.alone(model, Generation(turn, 8, **choice(2)))


def test_what_is_kept_gives_way_to_what_runs(model):
    bench = Bench(model, cache_tokens=600)
    prompts = seeded(12, 100, 120, 500)
    jobs = [bench.submit(Generation(p, 10, **choice(i))) for i, p in enumerate(prompts)]
    bench.run()
    assert all(isinstance(bench.of(job)[-1], Piece) for job in jobs)
    assert bench.texts(jobs[-1]) == bench.alone(model, Generation(prompts[-1], 10, **choice(11)))


def test_scores_of_a_prompt_are_the_models(model):
    bench, prompt = Bench(model), seeded(1, 100, 101, 500)[0]
    job = bench.submit(Generation(prompt, 1, **choice(1), alternatives=2, scores_from=1))
    bench.run()
    scores = bench.of(job)[0]
    assert isinstance(scores, PromptScores)
    logits = model.model(torch.tensor([prompt]))[0, :, : model.source.tokenizer.vocab_size]
    logprobs = logits.log_softmax(-1)
    wanted = logprobs[torch.arange(99), torch.tensor(prompt[1:])]
    torch.testing.assert_close(torch.tensor([s.logprob for s in scores.scores]), wanted, rtol=0, atol=1e-5)
    assert [s.best[0][0] for s in scores.scores] == logits[:-1].argmax(-1).tolist()


def test_stop_strings_and_their_tokens(model):
    bench, prompt = Bench(model), seeded(1, 9, 10, 500)[0]
    plain = Generation(prompt, 20, **choice(3), alternatives=0)
    text = bench.alone(model, plain)[0]
    stop = text[6:9]
    job = bench.submit(dataclasses.replace(plain, stop=(stop,)))
    bench.run()
    events = [event for event in bench.of(job) if isinstance(event, Piece)]
    tokens = [token for event in events for token in event.tokens]
    assert bench.texts(job) == [text[: text.find(stop)]]
    assert events[-1].finish == "stop"
    assert all(token.start < text.find(stop) for token in tokens)


def test_a_job_that_left_runs_no_more(model):
    bench = Bench(model)
    job = bench.submit(Generation(seeded(1, 9, 10, 500)[0], 100, **choice(3)))
    other = bench.submit(Generation(seeded(1, 9, 10, 500)[0], 5, **choice(3)))
    bench.scheduler.step()
    bench.scheduler.cancel(job)
    bench.run()
    assert job.samples[0].new_tokens == 1
    assert other.samples[0].new_tokens == 5
    assert bench.scheduler._reserved == 0


def test_limits_are_named(model):
    bench = Bench(model, parallel=2, queue=2, cache_tokens=600)
    for generation, words in (
        (Generation((5,) * 450, 100), "512 fit"),
        (Generation((5,), 1, count=3), "3 samples"),
        (Generation((5,) * 100, 60), None),
        (Generation((5,) * 100, 60, stop=("x",)), None),
        (Generation((5,), 1), "2 requests wait"),
    ):
        if words is None:
            bench.submit(generation)
        else:
            with pytest.raises(ApiError, match=words):
                bench.submit(generation)
    with pytest.raises(ApiError, match="need memory"):
        Bench(model, cache_tokens=100).submit(Generation((5,), 50))


@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (1, 3, 1, 3, 3), (2, 4, 1, 1)])
def test_samples_to_come_have_their_places(model, counts):
    """Those of a prompt that is being read counted as one, and others took the places of the rest."""
    bench, most = Bench(model, parallel=4), 0
    jobs = [
        bench.submit(Generation(prompt, 8, **choice(3), count=count))
        for prompt, count in zip(seeded(len(counts), 9, 10, 500), counts, strict=True)
    ]
    while bench.scheduler.step():
        most = max(most, bench.scheduler.counts[0])
    assert most <= 4
    assert [len(job.samples) for job in jobs] == list(counts)


def test_requests_on_their_way_to_the_queue_are_counted(model):
    """Another request comes while the engine's thread moves one from the door to the queue."""
    bench = Bench(model, queue=1)
    push, refused = bench.scheduler._queue.push, list[str]()

    def late():
        try:
            bench.submit(Generation((5,), 1))
        except ApiError as error:
            refused.append(error.code)

    def slow_push(client, job):
        thread.start()
        thread.join(0.2)
        push(client, job)

    bench.scheduler._queue.push = slow_push
    bench.submit(Generation((5,), 1))
    thread = threading.Thread(target=late)
    bench.scheduler._receive()
    thread.join()
    assert refused == ["queue_full"]
    assert bench.scheduler.counts[1] == 1


def test_late_requests_and_a_server_that_ends(model):
    bench = Bench(model, request_seconds=1e-9, queue_seconds=1e-9)
    job = bench.submit(Generation((5, 6), 50))
    bench.run()
    assert bench.of(job)[-1].code == "busy"
    bench = Bench(model, parallel=1)
    first, second = bench.submit(Generation((5, 6), 5)), bench.submit(Generation((5, 6), 5))
    bench.scheduler.step()
    bench.scheduler.drain()
    bench.run()
    assert bench.of(first)[-1].finish == "length"
    assert bench.of(second)[-1].code == "shutting_down"
    with pytest.raises(ApiError, match="shutting down"):
        bench.submit(Generation((5, 6), 5))


def test_a_pass_that_fails_ends_its_jobs_alone(model, monkeypatch, caplog):
    bench = Bench(model)
    job = bench.submit(Generation((5, 6), 50))
    bench.scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr(bench.scheduler._rows, "step", lambda *args, **kwargs: 1 / 0)
        bench.scheduler.step()
    assert bench.of(job)[-1].status == 500
    assert "ZeroDivisionError" in caplog.text
    after = bench.submit(Generation((5, 6), 5))
    bench.run()
    assert bench.of(after)[-1].finish == "length"


def test_the_queue_is_fair_between_clients():
    queue = FairQueue()
    for number in range(4):
        queue.push("greedy", f"greedy {number}")
    queue.push("modest", "modest 0")
    order = []
    while len(queue):
        item = queue.pop()
        order.append(item)
        queue.charge(item.split()[0], 10 if "greedy" in item else 1)
    assert order[1] == "modest 0"
    for item in order:
        queue.finished(item.split()[0])
    queue.push("new", 1)
    assert queue._served == {"new": 0.0}, "a client that has left is forgotten"


class FakeRow:
    def __init__(self, length: int) -> None:
        self.length, self.closed = length, False

    def fork(self, length: int | None = None) -> "FakeRow":
        return FakeRow(self.length if length is None else length)

    def close(self) -> None:
        self.closed = True


def test_prefixes_by_hash_and_by_token():
    cache, ids = PrefixCache(), tuple(range(100))
    first, second = FakeRow(50), FakeRow(90)
    cache.keep(first, ids)
    cache.keep(second, (*ids[:40], *range(500, 560)))
    assert cache.fork(ids).length == 50
    assert cache.fork((*ids[:40], 500, 501, 9)).length == 42
    assert cache.fork((*ids[:10], 7)) is None, f"less than a block of {BLOCK}"
    assert cache.fork(ids[:50]).length == 49, "the last token is always read"
    shorter = FakeRow(32)
    cache.keep(shorter, ids)
    assert shorter.closed, "nothing in it is new"
    cache.fork(ids)
    assert cache.drop()
    assert second.closed, "the least recently used goes first"
    assert not first.closed
    assert cache.fork((*ids[:40], 500, 501, 9)).length == 40
    assert cache.drop()
    assert not cache.drop()
    assert not cache._places
