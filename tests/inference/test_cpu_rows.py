"""Rows of the native engine: the same bits in any company, from any thread, and after a fork."""

import os
import random
import threading
import time

import pytest
import torch
from torch import Tensor

from bitnet.inference import cpu_rows
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.cpu_rows import BLOCK, CACHE_DTYPES, CacheFullError
from bitnet.inference.generation import generate
from bitnet.inference.sampling import SamplingConfig
from bitnet.kernels.cpu import native
from tests.builders import packed_model
from tests.inference.builders import BASE, CONFIGS, ON_NATIVE_KERNELS

ISAS = native.instruction_sets()
STEPS, TEXTS = (200, 200) if os.environ.get("BITNET_LONG") == "1" else (6, 4)  # of each of eight threads
pytestmark = ON_NATIVE_KERNELS


def engine_of(name: str, **options: str) -> Engine:
    return Engine.from_model(packed_model(CONFIGS[name]), **options)


def random_schedule(engine: Engine, texts: list[Tensor], seed: int) -> list[Tensor]:
    """Logits `[T, V]` of every text, run as rows that join when they like, in pieces, some of them on from a fork."""
    draw, rows = random.Random(seed), engine.rows
    cache = rows.new_cache(4096)
    running = [(cache.new_row(), ids.tolist(), []) for ids in texts]
    while any(ids for _, ids, _ in running):
        chosen = draw.sample(running, draw.randint(1, len(running)))
        step = [(row, ids[: draw.choice((1, 1, 2, 3, 7, 40))]) for row, ids, _ in chosen if ids]
        every = rows.step(step, every=True)
        for (row, piece), logits in zip(step, every, strict=True):
            index = next(i for i, (other, _, _) in enumerate(running) if other is row)
            _, ids, found = running[index]
            found.append(logits)
            assert len(logits) == len(piece)
            if draw.random() < 0.2:  # the text goes on in a row that shares what is there
                other = row.fork()
                rows.step([(row, [1])])
                row.close()
                row = other
            running[index] = (row, ids[len(piece) :], found)
    for row, _, _ in running:
        row.close()
    assert cache.free_tokens == 4096
    return [torch.cat(found) for _, _, found in running]


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("name", ["base", "one kv head of six", "odd sizes", "int8, untied"])
def test_random_schedules_give_the_bits_of_each_text_alone(
    name: str, cache_dtype: str, set_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    engine = engine_of(name, cache_dtype=cache_dtype)
    texts = [torch.randint(CONFIGS[name].vocab_size, (length,)) for length in (1, 5, 33, 64, 100)]
    expected = [engine(ids[None])[0] for ids in texts]
    for seed, (isa, threads, chunk) in enumerate(
        (isa, threads, chunk) for isa in ISAS for threads, chunk in ((1, 512), (2, 23), (3, 512))
    ):
        torch.set_num_threads(threads)
        monkeypatch.setattr(cpu_rows, "MAX_CHUNK", chunk)
        with native.use_instruction_set(isa):
            found = random_schedule(engine, texts, seed)
        for text, alone in zip(found, expected, strict=True):
            assert torch.equal(text, alone), (isa, threads, chunk)


def test_forks_do_not_see_each_other() -> None:
    engine = engine_of("base")
    cache = engine.rows.new_cache(40 * BLOCK)
    trunk = cache.new_row()
    ids = torch.randint(50, (BLOCK + 5,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.rows.step([(trunk, ids)])
    free = cache.free_tokens
    branches = [trunk.fork(length) for length in (BLOCK + 5, BLOCK + 5, BLOCK, BLOCK + 2, 7, 0)]
    assert cache.free_tokens == free  # a fork takes nothing until it goes on
    assert trunk.nbytes == branches[0].nbytes > 0
    found = engine.rows.step([(trunk, [1, 2]), *((row, [3 + i, 4]) for i, row in enumerate(branches))])
    for i, row in enumerate([trunk, *branches]):
        kept = ids[: row.length - 2] + ([1, 2] if i == 0 else [2 + i, 4])
        alone = cache.new_row()
        assert torch.equal(engine.rows.step([(alone, kept)])[0], found[i]), i
        alone.close()
    trunk.truncate(BLOCK + 1)  # in the midst of a block that nobody else has by now
    again = engine.rows.step([(trunk, [9])])[0]
    alone = cache.new_row()
    assert torch.equal(engine.rows.step([(alone, [*ids[: BLOCK + 1], 9])])[0], again)
    for row in (trunk, alone, *branches):
        row.close()
    assert cache.free_tokens == 40 * BLOCK


def test_a_full_cache_takes_nothing() -> None:
    engine = engine_of("base")
    cache = engine.rows.new_cache(2 * BLOCK)
    row, other = cache.new_row(), cache.new_row()
    engine.rows.step([(row, [1] * (BLOCK + 1))])
    branch = row.fork()
    for step in ([(row, [1]), (other, [1])], [(branch, [1])], [(row, [1] * BLOCK)]):
        with pytest.raises(CacheFullError, match="close rows or make it larger"):
            engine.rows.step(step)
    assert (row.length, branch.length, other.length, cache.free_tokens) == (BLOCK + 1, BLOCK + 1, 0, 0)
    branch.close()
    expected = engine(torch.tensor([[1] * (BLOCK + 2)]), engine.new_cache(1, 100), last_only=True)
    close = Engine.from_model(packed_model(BASE), cache_dtype="float16")
    assert torch.equal(engine.rows.step([(row, [1])])[0], close(torch.tensor([[1] * (BLOCK + 2)]))[0, -1])
    torch.testing.assert_close(expected[0, 0], close(torch.tensor([[1] * (BLOCK + 2)]))[0, -1], rtol=0.05, atol=0.05)


def in_threads(count: int, work) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_eight_threads_on_one_engine_are_exact() -> None:
    engine = engine_of("base")
    torch.manual_seed(2)
    texts = [torch.randint(50, (1, 3 + 11 * number)) for number in range(8)]
    expected = [engine(ids) for ids in texts]
    cache = engine.rows.new_cache(8 * 128)
    halves = Engine.from_model(packed_model(BASE), cache_dtype="float16")
    rows_expected = [halves(ids)[0] for ids in texts]

    def work(number: int) -> None:
        ids = texts[number]
        for _ in range(STEPS):  # caches of their own ...
            own = engine.new_cache(1, 128)
            parts = [engine(piece, own) for piece in ids.split(7, dim=1)]
            assert torch.equal(torch.cat(parts, 1), expected[number])
        for _ in range(STEPS):  # ... and rows of one cache, whose steps are joined
            row = cache.new_row()
            parts = [engine.rows.step([(row, piece)], every=True)[0] for piece in map(Tensor.tolist, ids[0].split(5))]
            assert torch.equal(torch.cat(parts), rows_expected[number])
            row.close()

    in_threads(8, work)
    assert cache.free_tokens == 8 * 128


def test_eight_threads_write_the_texts_of_each_alone() -> None:
    engine = engine_of("base")
    samplings = [SamplingConfig(temperature=0.0 if number == 0 else 0.9, top_p=0.95) for number in range(8)]
    prompts = [[[1 + token % 40 for token in range(1 + 5 * number)]] for number in range(8)]

    def text(number: int, turn: int) -> list[int]:
        length = 3 + (5 * number + turn % 4) % 17
        ids = generate(engine, prompts[number], max_new_tokens=length, sampling=samplings[number], seed=turn % 4)
        return [int(step) for step in ids]

    expected = [[text(number, turn) for turn in range(4)] for number in range(8)]
    assert all(len({tuple(ids[:3]) for ids in expected[number]}) > 1 for number in range(1, 8))  # seeds matter

    def work(number: int) -> None:
        for turn in range(TEXTS):
            assert text(number, turn) == expected[number][turn % 4], (number, turn)

    in_threads(8, work)


def test_an_error_in_a_step_reaches_its_threads_and_no_other_step() -> None:
    engine = engine_of("base")
    cache = engine.rows.new_cache(1024)
    original, failing = engine.forward, [True]

    def forward(*arguments) -> None:
        if failing:
            raise MemoryError("no memory")
        original(*arguments)

    engine.forward = forward  # type: ignore[method-assign]

    def work(number: int) -> None:
        with pytest.raises(MemoryError):
            engine.rows.step([(cache.new_row(), [1, 2, number])])

    in_threads(4, work)
    failing.clear()
    assert engine.rows.step([(cache.new_row(), [1, 2])]).isfinite().all()


def test_what_a_failed_step_has_taken_counts_for_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("base")
    cache = engine.rows.new_cache(4 * BLOCK)
    row, other = cache.new_row(), cache.new_row()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "forward", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.rows.step([(row, [1] * 3 * BLOCK)])
    with pytest.raises(CacheFullError):
        engine.rows.step([(row, [1]), (other, [1] * 2 * BLOCK)])
    assert engine.rows.step([(row, [1] * 3 * BLOCK), (other, [1] * BLOCK)]).isfinite().all()
    row.close()
    other.close()
    assert cache.free_tokens == 4 * BLOCK


@pytest.mark.parametrize("chosen", [False, True])
def test_who_is_interrupted_while_waiting_leaves_no_rows_behind(chosen: bool, monkeypatch) -> None:
    """What it was given belongs to its caller again, who may close it while a pass of another thread runs."""
    engine = engine_of("base")
    cache, original = engine.rows.new_cache(1024), engine.forward
    first, second = cache.new_row(), cache.new_row()
    meeting, running, go_on, ended = engine.meeting, threading.Event(), threading.Event(), []

    def forward(*arguments) -> None:
        running.set()
        assert go_on.wait(30)
        original(*arguments)
        ended.append(time.monotonic())

    engine.forward = forward  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: engine.rows.step([(first, [1, 2])]))
    wait, main = meeting.changed.wait, threading.current_thread()
    interrupted = []

    def begin() -> None:
        thread.start()
        meeting.changed.release()
        assert running.wait(30)
        meeting.changed.acquire()

    def interrupted_wait(timeout=None):
        if threading.current_thread() is not main or interrupted:
            return wait(timeout)
        if chosen:
            meeting.passing = False
            begin()  # with both
        interrupted.append(1)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(meeting.changed, "wait", interrupted_wait)
    meeting.passing = chosen  # somebody's, in whose end the other thread comes
    if not chosen:
        with meeting.changed:
            begin()
    with pytest.raises(KeyboardInterrupt):
        engine.rows.step([(second, [3, 4])])
    left = time.monotonic()
    assert all(job.rows[0][0] is first for job in meeting.jobs)
    if chosen:
        assert ended
        assert ended[0] <= left  # not while its row is read
    second.close()
    go_on.set()
    thread.join(30)
    assert first.length == 2
    first.close()
    assert cache.free_tokens == 1024
    assert engine.rows.step([(cache.new_row(), [1])]).isfinite().all()


def test_adapters_are_put_on_between_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read where they are while a pass runs."""
    engine = engine_of("base")
    original = engine._model.attach
    running, go_on, seen = threading.Event(), threading.Event(), list[str]()
    forward = engine.forward

    def slow(*arguments) -> None:
        running.set()
        assert go_on.wait(30)
        forward(*arguments)
        seen.append("pass")

    monkeypatch.setattr(engine, "forward", slow)
    monkeypatch.setattr(engine._model, "attach", lambda adapters: (seen.append("adapters"), original(adapters)))
    row = engine.rows.new_cache(64).new_row()
    threads = [
        threading.Thread(target=lambda: engine.rows.step([(row, [1, 2])])),
        threading.Thread(target=lambda: engine.attach({})),
    ]
    threads[0].start()
    assert running.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert seen == ["pass", "adapters"]


def test_an_interrupted_wait_for_company_leaves_the_way_free(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("base")
    row, found = engine.rows.new_cache(64).new_row(), []

    def interrupted(ready, timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.meeting.changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.rows.step([(row, [1, 2])])
    thread = threading.Thread(target=lambda: found.append(engine.rows.step([(row, [1, 2])])), daemon=True)
    thread.start()
    thread.join(20)
    assert found
    assert row.length == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_on(set_threads: None) -> None:
    torch.set_num_threads(3)
    engine, ids = engine_of("base"), torch.arange(1, 41)[None]
    expected = engine(ids)
    engine.rows.step([(engine.rows.new_cache(64).new_row(), [1])])
    for _ in range(3):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                row = engine.rows.new_cache(64).new_row()
                same = torch.equal(engine(ids), expected)
                status = 0 if same and engine.rows.step([(row, [1])]).isfinite().all() else 2
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert torch.equal(engine(ids), expected)
