"""Prompt look-up: the same texts with and without, drafts that follow a repetition, and when none is run."""

import random

import pytest
import torch

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.generation import GenerationStats, draw_texts
from bitnet.inference.lookup import PromptLookup, Repeats
from bitnet.inference.memory import Memory
from bitnet.inference.options import SamplingConfig
from bitnet.inference.sampling import Drawn, RowSampler
from bitnet.inference.text_model import TextModel
from bitnet.kernels.cpu import native
from tests.builders import packed_model
from tests.inference.builders import CONFIGS, ON_NATIVE_KERNELS, AlwaysDrafts
from tests.interleaved import between_instructions

pytestmark = ON_NATIVE_KERNELS


def write(
    engine: Engine, lookup: PromptLookup, prompt: list[int], how: SamplingConfig, memory: Memory | None = None
) -> tuple[list[Drawn | None], GenerationStats]:
    sampler = RowSampler(how, 3, prompt, vocab_size=engine.config.vocab_size, logprobs=2)
    stats = GenerationStats()
    steps = draw_texts(engine, [prompt], [sampler], [40], [], stats, memory or Memory(lookup))
    return [step[0] for step in steps], stats


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_texts_are_the_same_with_and_without(cache: str) -> None:
    engine = Engine.from_model(packed_model(CONFIGS["base"]), cache_dtype=cache)
    prompt, passes = [5, 6, 7, 8, 5, 6, 7, 9, 3, 5, 6], []
    for how in (
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=0.05),
        SamplingConfig(1.0, top_p=0.9, presence_penalty=1.0),
        SamplingConfig(1.0, repetition_penalty=1.3, logit_bias={7: 5.0, 8: 5.0}),
    ):
        expected, without = write(engine, PromptLookup(0), prompt, how)
        drawn, stats = write(engine, AlwaysDrafts(7), prompt, how)
        assert drawn == expected  # log-probabilities too
        assert stats.decode_tokens == without.decode_steps == without.decode_tokens == 39
        assert stats.bytes_read < without.bytes_read or stats.decode_steps == 39
        passes.append(stats.decode_steps)
    assert min(passes) < 30  # some drafts were right


def test_what_a_text_leaves_is_what_it_said() -> None:
    # A text that ends within a draft leaves no token of it to the next one.
    engine = Engine.from_model(packed_model(CONFIGS["base"]))
    prompt, how = [5, 6, 7, 8, 5, 6], SamplingConfig(temperature=0)
    memory = Memory(AlwaysDrafts(7))
    for _ in range(3):
        expected, _ = write(engine, PromptLookup(0), prompt, how)
        drawn, _ = write(engine, memory.lookup, prompt, how, memory)
        assert drawn == expected
        prompt = [*prompt, *(one.token for one in expected[:11] if one), 4, 5, 6]


def test_two_threads_may_want_what_is_left_at_once() -> None:
    """Between any two instructions of one another takes it."""
    engine, ids = Engine.from_model(packed_model(CONFIGS["base"])), [5, 6, 7, 8]
    memory, scratch = Memory(PromptLookup(0)), native.Scratch()
    taken = list[int]()

    def take() -> None:
        row, known, weights = memory.take(engine, ids, 8)
        taken.append(known)
        engine.rows.step([(row, ids[known:])])
        memory.put(row, ids, weights)

    take()
    assert between_instructions(take, Memory.take.__code__, memory._kept.clear) > 20
    assert {*taken} == {0, 3}  # it was there for some

    def use() -> None:
        with scratch.piece(8) as address:
            assert address

    use()
    assert between_instructions(use, native.Scratch.piece.__wrapped__.__code__, scratch._free.clear) > 10


def test_a_draft_is_what_followed_the_last_time() -> None:
    draw = random.Random(0)
    for _ in range(50):
        repeats, ids = Repeats(), list[int]()
        for _ in range(60):
            repeats.push(token := draw.randrange(3))
            ids.append(token)
            if not repeats.match:
                assert not any(ids[i : i + 2] == ids[-2:] for i in range(len(ids) - 2))
                continue
            at, match = repeats.at, repeats.match
            assert match >= 2
            assert ids[at - match : at] == ids[len(ids) - match :]
            draft = repeats.draft(9)
            assert len(draft) == 9
            assert draft[: len(ids) - at] == ids[at : at + 9]
            assert all(draft[i] == draft[i - (len(ids) - at)] for i in range(len(ids) - at, 9))


def length(lookup: PromptLookup, match: int, room: int) -> int:
    """Of one text's draft."""
    return lookup.draft_lengths([(match, room)])[0]


def test_drafts_are_run_where_they_pay() -> None:
    lookup = PromptLookup(15)
    assert length(lookup, 9, 15) == 0  # no pass was measured
    for seconds in (1.0, 1.1, 0.9):
        lookup.measured(1, 0, seconds)
    assert length(lookup, 0, 15) == 0
    for _ in range(200):
        lookup.count(16, True)
        lookup.count(2, False)
    assert length(lookup, 2, 15) == 0
    assert length(lookup, 16, 15) == 15
    assert length(lookup, 16, 5) == 3  # a pass of four tokens
    assert length(lookup, 16, 0) == 0
    for _ in range(9):
        lookup.measured(1, 15, 20.0)
        lookup.measured(1, 7, 2.0)
    assert length(lookup, 16, 15) == 7
    for size in (2, 4, 8):
        for _ in range(9):
            lookup.measured(1, size - 1, size + 0.5)
    assert length(lookup, 16, 15) == 0
    for _ in range(9 * 256):
        lookup.measured(1, 0, 1.0)
    assert length(lookup, 16, 15) == 15  # what was slow long ago is tried again
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens is 64; give"):
        PromptLookup(64)


def test_texts_side_by_side_share_a_pass() -> None:
    lookup = PromptLookup(15)
    for _ in range(400):
        lookup.count(16, True)
        lookup.count(4, True)
        lookup.count(4, False)
        lookup.count(2, False)
    texts = [(16, 20), (2, 20), (0, 20), (16, 2)]
    assert lookup.draft_lengths(texts) == [0, 0, 0, 0]  # nothing is known of passes of four texts
    lookup.measured(4, 0, 1.0)
    lookup.measured(1, 15, 50.0)
    # The likeliest tokens fill a size, each text no further than it has room.
    assert lookup.draft_lengths(texts) == [13, 0, 0, 2]
    for _ in range(3):
        lookup.measured(4, 15, 5.0)
    assert lookup.draft_lengths(texts) == [5, 0, 0, 2]
    # Half of a text's drafts are wrong: it gets what remains of a size.
    lookup.measured(3, 0, 1.0)
    assert lookup.draft_lengths([(4, 20), (16, 2), (0, 20)]) == [1, 2, 0]
    for size in (1, 3, 7, 15):
        for _ in range(9):
            lookup.measured(3, size, (3 + size) / 3)  # as long as one by one
    assert lookup.draft_lengths([(4, 20), (16, 2), (0, 20)]) == [0, 0, 0]
    assert lookup.draft_lengths([]) == []


def test_models_elsewhere_have_none() -> None:
    torch.manual_seed(0)
    model = packed_model(CONFIGS["base"])
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens 5 is of the native CPU engine"):
        TextModel(model, None, 5)  # type: ignore[arg-type]
