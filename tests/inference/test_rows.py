"""Rows of any lengths that share a model: what a row computes is what the model computes for it alone."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel
from bitnet.inference.rows import CacheFullError, PlainRows, rows_of
from bitnet.kernels.cpu import native
from bitnet.model import BitNetForCausalLM
from tests.builders import packed_model
from tests.inference.builders import BASE
from tests.kernels.builders import NOT_BUILT


def torch_model() -> LanguageModel:
    torch.manual_seed(0)
    return BitNetForCausalLM(BASE).eval()


def native_model() -> LanguageModel:
    if not native.instruction_sets():
        pytest.skip(NOT_BUILT)
    return Engine.from_model(packed_model(BASE), cache_dtype="float32")


MODELS: dict[str, Callable[[], LanguageModel]] = {"torch": torch_model, "native": native_model}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return MODELS[request.param]()


def alone(model: LanguageModel, ids: list[int]) -> Tensor:
    """Logits `[T, V]` of one text in one call."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def test_random_schedules_give_what_each_text_gives_alone(model: LanguageModel) -> None:
    """Rows join, are forked, cut and closed in any order, with pieces of any length."""
    draw, rows = random.Random(1), rows_of(model)
    cache = rows.new_cache(tokens=400)
    texts: list[tuple] = []  # (row, ids)
    checked = 0
    for _ in range(25):
        if len(texts) < 6 and draw.random() < 0.5:
            texts.append((cache.new_row(), []))
        if texts and draw.random() < 0.25:
            row, ids = draw.choice(texts)
            length = draw.randint(0, len(ids))
            texts.append((row.fork(length), ids[:length]))
        if texts and draw.random() < 0.2:
            row, ids = draw.choice(texts)
            del ids[draw.randint(0, len(ids)) :]
            row.truncate(len(ids))
        if len(texts) > 5 or (texts and draw.random() < 0.1):
            texts.pop(draw.randrange(len(texts)))[0].close()
        chosen = draw.sample(texts, draw.randint(0, len(texts)))
        pieces = [[draw.randrange(50) for _ in range(draw.choice((1, 1, 2, 19)))] for _ in chosen]
        step = [(row, new) for (row, ids), new in zip(chosen, pieces, strict=True) if len(ids) + len(new) <= 128]
        every = draw.random() < 0.3
        logits = rows.step(step, every=True) if every else rows.step(step)
        assert len(logits) == len(step)
        for (row, new), found in zip(step, logits, strict=True):
            ids = next(ids for other, ids in texts if other is row)
            ids += new
            assert row.length == len(ids)
            expected = alone(model, ids)[-len(new) :] if every else alone(model, ids)[-1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked > 30
    assert cache.free_tokens <= 416 - max(len(ids) for _, ids in texts)
    for row, _ in texts:
        row.close()
        row.close()
    assert cache.free_tokens in (400, 416)  # whole blocks


def test_a_step_that_is_refused_changes_nothing(model: LanguageModel) -> None:
    rows = rows_of(model)
    cache, other = rows.new_cache(tokens=160), rows.new_cache(tokens=16)
    row, long, foreign, closed = cache.new_row(), cache.new_row(), other.new_row(), cache.new_row()
    closed.close()
    rows.step([(row, [1, 2, 3]), (long, [1] * 120)])
    free = cache.free_tokens
    for step, message in (
        ([(row, [4]), (row, [5])], "twice"),
        ([(row, [4]), (foreign, [5])], "different caches"),
        ([(row, [4]), (closed, [5])], "closed"),
        ([(row, [])], "no tokens"),
        ([(row, [4, 50])], "token id 50 is outside the vocabulary .0 to 49."),
        ([(row, [-1])], "token id -1"),
        ([(row, [4]), (long, [1] * 9)], "128 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            rows.step(step)
    with pytest.raises(CacheFullError, match="room for"):
        rows.step([(row, [4]), (cache.new_row(), [1] * 100)])
    for length in (-1, 4):
        with pytest.raises(ValueError, match=f"length is {length} and the row has 3"):
            row.truncate(length)
        with pytest.raises(ValueError, match=f"length is {length} and the row has 3"):
            row.fork(length)
    with pytest.raises(ValueError, match="tokens is 0"):
        rows.new_cache(tokens=0)
    assert (row.length, long.length, cache.free_tokens) == (3, 120, free)
    torch.testing.assert_close(rows.step([(row, [7])])[0], alone(model, [1, 2, 3, 7])[-1], rtol=1e-4, atol=1e-5)
    assert rows.step([]).shape == (0, 50)
    assert rows.step([], every=True) == []


def test_every_model_has_rows() -> None:
    assert isinstance(rows_of(torch_model()), PlainRows)
