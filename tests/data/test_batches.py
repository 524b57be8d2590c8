"""bitnet.data.batches: windows, mixtures, the thread that reads ahead."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import train as trainer
from bitnet.__main__ import main
from bitnet.data.batches import BatchSampler, Prefetcher, interleave
from bitnet.data.corpus import Corpus, mixed, open_corpora
from bitnet.data.mixture import MAX_BLOCK, counts_of, tokenize_mixture
from bitnet.data.tokens import TokenArray
from bitnet.evaluation.loss import evaluate
from bitnet.evaluation.texts import calibration_sequences, held_out_windows
from bitnet.storage.safetensors import CheckpointError
from bitnet.tokenizer import train_tokenizer
from bitnet.training import config as recipes
from bitnet.training.reporter import read_metrics
from bitnet.training.step import Trainer
from tests.builders import configuration
from tests.faults import stop_after


def tokens_of(count: int, parts: int = 3, first: int = 0) -> TokenArray:
    return TokenArray(np.array_split(np.arange(first, first + count, dtype=np.uint16), parts))


def sampler_of(tokens: TokenArray, context: int, batch_size: int, seed: int) -> BatchSampler:
    return BatchSampler({"a": tokens}, context, batch_size, seed)


def test_batches_are_windows_with_labels_one_token_on():
    sampler = sampler_of(tokens_of(1000), context=16, batch_size=4, seed=0)
    input_ids, labels = sampler.batch(3)
    assert input_ids.shape == labels.shape == (4, 16)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, input_ids + 1)  # the stream counts up
    assert torch.equal(input_ids, input_ids[:, :1] + torch.arange(16))


@pytest.mark.parametrize(("count", "context"), [(1000, 16), (1000, 7), (130, 32), (33, 32), (65, 32), (64, 32)])
def test_each_window_once_per_epoch(count, context):
    sampler = sampler_of(tokens_of(count), context, batch_size=1, seed=5)
    windows = sampler.windows["a"].windows_per_epoch
    assert windows == max(1, (count - 1) // context - 1)
    orders = []
    for epoch in range(3):
        starts = [int(sampler.batch(epoch * windows + i)[0][0, 0]) for i in range(windows)]
        assert np.array_equal(np.diff(sorted(starts)), [context] * (windows - 1))  # disjoint, no gap, none twice
        assert min(starts) >= 0
        assert max(starts) + context + 1 <= count
        orders.append(starts)
    if windows > 3:
        assert orders[0] != orders[1] != orders[2]
        assert orders[0] != sorted(orders[0])


def test_offset_lets_every_token_be_seen():
    sampler = sampler_of(tokens_of(50), context=16, batch_size=1, seed=0)
    labels = Counter(sampler.batch(step)[1][0, i].item() for step in range(200) for i in range(16))
    assert set(labels) == set(range(1, 50))


def test_resume_by_step_and_determinism():
    make = lambda seed: sampler_of(tokens_of(2000), context=8, batch_size=6, seed=seed)  # noqa: E731
    running = make(1)
    batches = [running.batch(step) for step in range(100)]
    resumed = make(1)
    for step in (99, 57, 58, 0, 41):  # in any order
        assert torch.equal(resumed.batch(step)[0], batches[step][0])
    assert not torch.equal(make(2).batch(0)[0], batches[0][0])


def test_ranks_and_micro_batches_are_slices_of_the_step():
    sampler = sampler_of(tokens_of(500), context=8, batch_size=12, seed=3)
    whole = sampler.batch(9)
    for world in (1, 2, 3, 12):
        parts = [sampler.batch(9, rank, world) for rank in range(world)]
        for side in (0, 1):
            assert torch.equal(torch.cat([part[side] for part in parts]), whole[side])
    for rank, world in ((0, 5), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="batch_size"):
            sampler.batch(0, rank, world)
    with pytest.raises(ValueError, match="step is -1"):
        sampler.batch(-1)


def test_batch_larger_than_the_corpus_runs_into_the_next_epochs():
    sampler = sampler_of(tokens_of(40), context=16, batch_size=10, seed=0)
    assert sampler.windows["a"].windows_per_epoch == 1
    input_ids, _ = sampler.batch(0)
    assert input_ids.shape == (10, 16)
    assert len(set(input_ids[:, 0].tolist())) > 1  # each epoch has its own offset


def test_order_is_made_once_per_epoch(monkeypatch):
    made = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    sampler = sampler_of(tokens_of(10_000), context=8, batch_size=4, seed=7)
    for step in range(2 * sampler.windows["a"].windows_per_epoch // 4):
        sampler.batch(step)
    assert made == [[7, 0], [7, 1]]


def test_corpus_shorter_than_a_context():
    with pytest.raises(ValueError, match=r"has 32 tokens.*context 32 needs 33.*at most 31, or more text"):
        sampler_of(tokens_of(32), context=32, batch_size=1, seed=0)
    assert sampler_of(tokens_of(33), context=32, batch_size=1, seed=0).batch(5)[0].shape == (1, 32)
    for context, batch_size in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match="both must be at least 1"):
            sampler_of(tokens_of(32), context, batch_size, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        sampler_of(tokens_of(32), 4, 1, seed=-1)
    with pytest.raises(ValueError, match="no tokens"):
        sampler_of(TokenArray([]), 4, 1, seed=0)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], (1,)),
        ([0.3], (1,)),
        ([0.7, 0.3], (7, 3)),
        ([2, 4, 6], (1, 2, 3)),
        ([0.5, 0.25], (2, 1)),
        ([0.333, 0.667], (333, 667)),
        ([1e-3, 2.5], (1, 2500)),
        ([123456789, 987654321], (7282, 58254)),
        ([1, 1e9, 1e9], (1, 32768, 32767)),
    ],
)
def test_counts_are_the_ratio_of_the_weights(weights, counts):
    assert counts_of(weights) == counts


def test_rounded_counts_fill_the_block():
    rng = random.Random(0)
    for _ in range(50):
        weights = [rng.random() ** rng.choice([1, 8]) for _ in range(rng.randint(2, 9))]
        counts = counts_of(weights)
        assert sum(counts) == MAX_BLOCK
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight / sum(weights) * MAX_BLOCK) <= len(weights)
            assert count >= 1
    for bad in ([], [1, 0], [1, -1], [math.inf], [math.nan, 1]):
        with pytest.raises(ValueError, match="positive"):
            counts_of(bad)


def test_every_prefix_of_a_mixture_has_its_proportions():
    rng = random.Random(1)
    cases = [[1], [1, 1], [7, 3], [1, 2500], [333, 667], [1, 1, 1, 1, 996]]
    for counts in cases + [[rng.randint(1, 60) for _ in range(rng.randint(2, 9))] for _ in range(60)]:
        order = interleave(counts)
        given = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)  # [L, corpora]
        exact = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / sum(counts)
        assert (given >= np.floor(exact - 1e-9)).all(), counts
        assert (given <= np.ceil(exact + 1e-9)).all(), counts
        assert given[-1].tolist() == counts


def test_a_mixture_is_the_windows_of_each_corpus_in_its_own_order():
    streams = {name: tokens_of(count, first=10_000 * i) for i, (name, count) in enumerate({"a": 500, "b": 90}.items())}
    mixture = BatchSampler(streams, 8, 6, seed=4, counts=(2, 1))
    starts = torch.cat([mixture.batch(step)[0][:, 0] for step in range(60)])
    for i, (name, share) in enumerate({"a": 240, "b": 120}.items()):
        alone = sampler_of(streams[name], 8, 1, seed=4)
        mine = starts[(starts // 10_000) == i]
        assert mine.tolist() == [int(alone.batch(n)[0][0, 0]) for n in range(share)]
    assert [mixture.sample(n) for n in range(4)] == [("a", 0), ("a", 1), ("b", 0), ("a", 2)]
    assert mixture.epochs(60) == {"a": 240 / 61, "b": 120 / 10}
    again = BatchSampler(streams, 8, 6, seed=4, counts=(2, 1))
    for step in (59, 3, 40):  # nothing but the step number is needed
        assert torch.equal(again.batch(step)[0][:, 0], starts[6 * step : 6 * step + 6])
        parts = [again.batch(step, rank, 3)[0] for rank in range(3)]
        assert torch.equal(torch.cat(parts), mixture.batch(step)[0])


def test_bad_mixtures():
    with pytest.raises(ValueError, match=r"corpus 'b' has 3 tokens"):
        BatchSampler({"a": tokens_of(50), "b": tokens_of(3)}, 8, 1, 0, (1, 1))
    for counts in ((1,), (1, 0), (1, 1, 1)):
        with pytest.raises(ValueError, match="counts are"):
            BatchSampler({"a": tokens_of(50), "b": tokens_of(50)}, 8, 1, 0, counts)


def made(name: str, documents: list[str]) -> Corpus:
    return Corpus(name, lambda: iter(documents), lambda: json.dumps(documents))


def test_corpora_have_weights_and_names_of_their_own(tmp_path):
    for place in ("x/t.txt", "y/t.txt", "odd=2", "w=3/t.txt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(f"text of {place}")
    at = lambda place: str(tmp_path / place)  # noqa: E731
    corpora, weights = open_corpora([at("x/t.txt=0.7"), at("y/t.txt=3"), at("odd=2"), at("w=3/t.txt=1e-1"), "stdlib"])
    assert list(corpora) == ["t", "t-2", "odd-2", "t-3", "stdlib"]
    assert weights == (0.7, 3.0, 1.0, 0.1, 1.0)
    assert next(corpora["t-2"].documents()) == "text of y/t.txt"
    one, weights = open_corpora(at("x/t.txt"))
    assert (list(one), weights) == (["t"], (1.0,))
    for specs, message in (
        ([at("x/t.txt=0")], "the weight of corpus .*t.txt' is 0"),
        ([at("x/t.txt=-1")], "is -1: give a positive"),
        ([at("x/t.txt=nan")], "is nan"),
        ([at("x/t.txt=half")], "there is no file"),
        ([at("x/t.txt=1"), at("x/t.txt=2")], "holds the documents of another one"),
        ([], "no corpus is given"),
    ):
        with pytest.raises(ValueError, match=message):
            open_corpora(specs)


def test_mixed_documents_are_in_the_ratio_of_the_weights():
    long, short = made("long", ["a" * 10] * 300), made("short", ["b" * 5] * 20)
    both = mixed([long, short], [0.75, 0.25])
    assert both.name == "long+short"
    documents = list(both.documents())
    assert documents.count("a" * 10) >= 300  # each was read to its end
    for end in range(50, len(documents), 50):
        share = sum(len(d) for d in documents[:end] if d[0] == "a") / sum(map(len, documents[:end]))
        assert share == pytest.approx(0.75, abs=15 / sum(map(len, documents[:end])))
    assert mixed([long], [3.0]) is long
    prints = [mixed(c, w).fingerprint() for c, w in (([long, short], [3, 1]), ([long, short], [1, 1]), ([long], [1]))]
    assert len({*prints, both.fingerprint()}) == 4
    with pytest.raises(ValueError, match="'blank' holds no text"):
        list(mixed([long, made("blank", [" "])], [1, 1]).documents())


@pytest.fixture
def second(tmp_path) -> Path:
    folder = tmp_path / "numbers"
    folder.mkdir()
    for part in range(30):
        (folder / f"{part:02}.txt").write_text(" ".join(str((part * 7 + i) ** 2) for i in range(60)))
    return folder


def mixture_run(tmp_path: Path, corpora: tuple[Path, Path], weights: tuple[float, float], **changes):
    specs = tuple(f"{place}={weight}" for place, weight in zip(corpora, weights, strict=True))
    data = recipes.DataConfig(corpus=specs, cache=str(tmp_path / "data"))
    return configuration(tmp_path, corpora[0], data=data, **changes)


def test_a_run_on_a_mixture(tmp_path, corpus, second, monkeypatch, capsys):
    config = mixture_run(tmp_path, (corpus, second), (0.75, 0.25))
    run = trainer.train(config)
    assert "data      0.75 animals + 0.25 numbers: " in capsys.readouterr().out
    assert recipes.TrainConfig.from_dict(json.loads((run.folder / "config.json").read_text())) == run.config
    assert [run.feed.sampler.sample(n)[0] for n in range(4)].count("numbers") == 1

    # The validation loss is the mean by share, and each corpus's is that of the corpus alone.
    row = [row for row in read_metrics(run.folder / "metrics.jsonl") if "whole_val_loss" in row][-1]
    each = {
        name: evaluate(run.model, data.split("val"), context=32, bytes_per_token=data.bytes_per_token("val"))
        for name, data in run.feed.mixture.corpora.items()
    }
    for name, result in each.items():
        assert row[f"whole_val_loss/{name}"] == pytest.approx(result.loss, rel=1e-5)
    mean = 0.75 * each["animals"].loss + 0.25 * each["numbers"].loss
    assert row["whole_val_loss"] == pytest.approx(mean, rel=1e-5)
    splits = {name: data.meta["splits"]["val"] for name, data in run.feed.mixture.corpora.items()}
    size = sum(  # the first token of a split, which stands for no text, is never predicted
        share * splits[name]["bytes"] / (splits[name]["tokens"] - 1) for name, share in run.feed.mixture.shares.items()
    )
    assert row["whole_val_bits_per_byte"] == pytest.approx(mean / math.log(2) / size, rel=1e-5)

    # A resumed run goes on in the same order.
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    stop_after(monkeypatch, 3)
    assert trainer.train(broken).progress.step == 3
    monkeypatch.undo()
    trainer.train(broken, resume=True)
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("run", "broken")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8

    # A corpus or a weight that has changed is refused.
    with pytest.raises(CheckpointError, match="corpus has changed"):
        trainer.prepare(mixture_run(tmp_path, (corpus, second), (0.5, 0.5), steps=20), resume=True)
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), "--device", "cpu", "--dtype", "float32"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["animals", "numbers"]
    (second / "00.txt").write_text("nothing but this")
    with pytest.raises(CheckpointError, match="corpus has changed"):
        trainer.prepare(dataclasses.replace(config, steps=20), resume=True)


def test_windows_for_comparisons_are_taken_by_share(tmp_path):
    corpora = {name: made(name, [f"{name} {i} " * 9 for i in range(100)]) for name in ("left", "right")}
    tokenizer = train_tokenizer(mixed(list(corpora.values()), [3, 1]).documents(), 290)
    mixture = tokenize_mixture(corpora, (0.75, 0.25), tokenizer, tmp_path)
    texts = [tokenizer.decode(ids[0].tolist()) for ids, _ in held_out_windows(mixture, 16, 8)]
    assert [("left" in text, "right" in text) for text in texts] == [(True, False)] * 6 + [(False, True)] * 2
    texts = [tokenizer.decode(ids) for ids in calibration_sequences(mixture, 16, 16 * 12).tolist()]
    assert [("left" in text, "right" in text) for text in texts] == [(True, False)] * 9 + [(False, True)] * 3
    with pytest.raises(ValueError, match="calibration needs 16 tokens or more"):
        calibration_sequences(mixture, 16, 10)


def test_mixtures_on_the_command_line(tmp_path):
    config, *_ = trainer.parse(["--preset", "tiny", "--data.corpus", "a.txt=0.7", "b=0.3", "--steps", "5"])
    assert config.data.corpus == ("a.txt=0.7", "b=0.3")
    assert trainer.parse(["--preset", "tiny", "--data.corpus", "sotu"])[0].data.corpus == "sotu"


def threads_ahead() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("prefetcher")}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_reading_ahead_gives_what_is_asked_for(depth):
    before, loaded = threads_ahead(), []
    ahead = Prefetcher(lambda n: loaded.append(n) or n * n, depth)
    order = [*range(5), 3, 4, 100, 101, 2, 2, *range(50, 60)]  # on, back, far ahead, the same again
    for n in order:
        assert ahead[n] == n * n
    deadline = time.time() + 300
    while depth and loaded[-1] < 59 + depth and time.time() < deadline:
        time.sleep(0.001)
    assert loaded[-1] == 59 + depth  # in the meantime
    ahead.close()
    assert threads_ahead() == before
    if depth:
        assert len(loaded) < len(order) + 6 * (depth + 1)  # each once, but for the jumps
        assert ahead[7] == 49  # as new
        assert len(threads_ahead() - before) == 1
    ahead.close()
    ahead.close()
    assert threads_ahead() == before


def test_a_thread_is_ahead_while_the_caller_works():
    second = threading.Event()
    ahead = Prefetcher(lambda n: second.set() if n == 1 else None)
    ahead[0]
    assert second.wait(300)
    ahead.close()


def test_an_exception_reaches_whoever_asks_for_the_number():
    def load(n: int) -> int:
        if n == 2:
            raise OSError("the shard is gone")
        return n

    ahead = Prefetcher(load)
    assert [ahead[0], ahead[1]] == [0, 1]
    with pytest.raises(OSError, match="the shard is gone"):
        ahead[2]
    assert ahead[3] == 3
    ahead.close()


def test_an_interrupt_while_waiting_is_raised_at_once():
    release, main_thread = threading.Event(), threading.get_ident()

    def load(n: int) -> int:
        if not release.is_set():
            signal.pthread_kill(main_thread, signal.SIGINT)
            release.wait(300)
        return n

    ahead = Prefetcher(load, 1)
    # A process that a shell has started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ahead[1]
    finally:
        signal.signal(signal.SIGINT, before)
    start = time.perf_counter()
    release.set()
    assert ahead[1] == 1
    ahead.close()
    assert time.perf_counter() - start < 100


def test_reading_ahead_changes_nothing_and_leaves_no_thread(tmp_path, corpus, second, monkeypatch):
    read = []
    original = BatchSampler.batch

    def batch(self, step, rank=0, world=1):
        read.append(threading.current_thread() is threading.main_thread())
        return original(self, step, rank, world)

    monkeypatch.setattr(BatchSampler, "batch", batch)
    before, found = threads_ahead(), []
    for depth in (0, 2):
        config = mixture_run(
            tmp_path, (corpus, second), (0.6, 0.4), micro_batches=2, out=str(tmp_path / str(depth)), on_nan="rewind"
        )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch=depth))
        with monkeypatch.context() as patch:
            bad = [6]
            forward_backward = Trainer.forward_backward

            def poisoned(self, step, bad=bad, inner=forward_backward):
                loss = inner(self, step)
                if step in bad:
                    bad.clear()
                    return loss * math.nan
                return loss

            patch.setattr(Trainer, "forward_backward", poisoned)
            read.clear()
            run = trainer.train(config)
        assert all(read) == (depth == 0)
        assert any(read) == (depth == 0)
        assert run.progress.data_shift == 3
        rows = read_metrics(run.folder / "metrics.jsonl")
        found.append([{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows])
        assert threads_ahead() == before
    assert found[0] == found[1]

    def broken(self, step, rank=0, world=1):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(BatchSampler, "batch", broken)
    with pytest.raises(OSError, match="Input/output"):
        trainer.train(dataclasses.replace(config, out=str(tmp_path / "broken")))
    assert threads_ahead() == before
    with pytest.raises(ValueError, match=r"data\.prefetch is -1"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch=-1))
