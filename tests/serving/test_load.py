"""The scripts that put a server under load: they run, and see a text that is another and memory that grows."""

import asyncio
import importlib
import json
import os
import sys

import pytest

from tests import ROOT, oracles

oracles.require("httpx")


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("serve_load"), importlib.import_module("serve_soak")
        for name in ("serve_load", "serve_soak"):
            sys.modules.pop(name)


def test_load_is_measured_and_texts_are_compared(scripts, address, monkeypatch, capsys):
    load, _ = scripts
    options = load.Options(streams=(1, 3), requests=2, prompt_tokens=12, new_tokens=5, checked=4, shared=3)
    peers = [load.Peer("one", address, True), load.Peer("other", address, False)]
    size = load.vocabulary_of(address)
    runs = asyncio.run(load.measure(peers, options, size))
    assert [(run.server, run.streams, run.tokens) for run in runs] == [
        ("one", 1, 40), ("other", 1, 40), ("one", 3, 30), ("other", 3, 30)
    ]  # fmt: skip
    assert all(run.tokens_per_second > 0 and run.first_p95 >= run.first_median > 0 for run in runs)
    assert not any(run.different for run in runs)
    prompts = [load.prompt_of(options, number, size) for number in range(8)]
    assert {tuple(prompt[:3]) for prompt in prompts} == {tuple(prompts[0][:3])}
    assert len({tuple(prompt) for prompt in prompts}) == 8
    original = load.prompt_of
    calls = iter(range(1000))
    monkeypatch.setattr(load, "prompt_of", lambda *given: original(*given)[: 6 + next(calls) % 5])  # never the same
    assert any(run.different for run in asyncio.run(load.measure(peers[:1], options, size)))


def test_load_of_a_file_of_conversations(scripts, address, tmp_path):
    load, _ = scripts
    file = tmp_path / "prompts.jsonl"
    lines = [{"kind": kind, "messages": [{"role": "user", "content": f"Say {kind}"}]} for kind in "abab"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = load.Options(streams=(2,), requests=1, new_tokens=5, checked=2, prompts=file, kind="a")
    with_template, without = load.Peer("one", address, True), load.Peer("other", address, True, chats=False)
    first, second = asyncio.run(load.measure([with_template, with_template], options, 500))
    assert 0 < first.tokens <= 8 * 5
    assert (first.different, second.different) == (0, 0)
    assert load.asked_of(without, options, 3, 500) == {"prompt": "Say a"}
    _, other = asyncio.run(load.measure([with_template, without], options, 500))
    assert other.different, "with and without drafts, texts are compared in this way"
    for kind in ("code", "quotation", "free"):
        assert len(load.conversations(ROOT / "benchmarks" / "prompts.jsonl", kind)) == 6


def test_a_soak_sees_other_texts_and_growth(scripts, served, monkeypatch, capsys):
    _, soak = scripts
    if not os.path.exists("/proc/self/status"):
        pytest.skip("memory is read from /proc")
    address, application = served
    monkeypatch.setattr(soak, "TURNS", 12)
    monkeypatch.setattr(soak, "LOOK", 0.2)
    options, found = soak.Options(minutes=0.02, clients=3), soak.Found()
    asyncio.run(soak.soak(address, os.getpid(), options, found))
    assert sum(found.counts.values()) >= 3
    assert (found.different, found.errors) == ([], [])
    assert all(size > 1 << 20 for _, size in found.memory)
    (model,) = application.models
    assert model.scheduler.counts[0] == 0
    monkeypatch.setattr(soak, "stream", lambda client, turn, leaves: soak.ask(client, turn))  # of another form
    monkeypatch.setattr(soak.random.Random, "random", lambda self: 0.1)
    asyncio.run(soak.soak(address, os.getpid(), options, found))
    assert found.different
    flat = [(float(at), 1000) for at in range(100)]
    assert soak.growth(flat) == 0
    assert soak.growth([(at, size + int(at)) for at, size in flat]) > soak.GROWTH
