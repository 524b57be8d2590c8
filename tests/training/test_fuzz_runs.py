"""Damaged and hostile run folders, comparisons, data folders, templates and tokenizer files: an error of ours, at once.

Mutations as in tests/storage/test_fuzz_files.py, and the cases that users and attackers found.
"""

import contextlib
import dataclasses
import json
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import train as trainer
from bitnet.data.chats import TokenizedChats, tokenize_chats
from bitnet.data.corpus import open_corpus
from bitnet.data.tokens import TokenizedCorpus
from bitnet.data.tokens_write import tokenize_corpus
from bitnet.evaluation.table import Row, Table, write
from bitnet.evaluation.twins import find_twins
from bitnet.storage.hf.card import origin_of
from bitnet.storage.json_files import METRICS_LINE, load_record, read_metrics
from bitnet.storage.source import open_source
from bitnet.tokenizer import ChatTemplate, chat_worker, load_tokenizer
from bitnet.training import checkpoint
from bitnet.training.config import TrainConfig
from bitnet.training.optimizer import Optimizer
from tests.builders import configuration, tiny_model
from tests.conversations import CHATML, EVERYTHING, LLAMA2, LLAMA3
from tests.fuzzing import MANY, VALUES, bounded, fuzz, mutate, outcome, prepare_file, prepare_json
from tests.vocabularies import byte_tokenizer

DEEP = "[" * 100_000
FINGERPRINT = "abc"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run as train.py leaves it, of two checkpoints."""
    config = configuration(tmp_path, tmp_path / "corpus", out=str(tmp_path / "run"))
    model = tiny_model(vocab_size=300, max_position_embeddings=32, num_hidden_layers=1)
    config = dataclasses.replace(config, model=model.config)
    optimizer = Optimizer(model, config.optim)
    for step in (4, 8):
        checkpoint.save_checkpoint(
            tmp_path / "run", model=model, optimizer_state=optimizer.state(), best=step == 4, keep=2,
            state=checkpoint.Progress(step=step, best_loss=2.5, history=[(2.5, 1.0)] * 3).state(FINGERPRINT, None),
            config=dataclasses.asdict(config), tokenizer=byte_tokenizer().files(),
        )  # fmt: skip
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    rows = [{"step": step, "loss": 3.0 - step / 10, "val_loss": 2.5} for step in range(1, 9)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def go_on(run: Path) -> None:
    """What `train.py --resume`, `generate.py`, `bitnet evaluate` and the exports read of a run."""
    config = trainer.parse(["--resume", str(run)]).config
    folder, _ = checkpoint.newest_good(run)
    checkpoint.check_model(folder, config.model)
    with torch.device("meta"):
        model = trainer.BitNetForCausalLM(config.model)
    state = load_record(folder / "state.json", checkpoint.State)
    if state.data != FINGERPRINT:
        raise ValueError("the corpus has changed")
    del model
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] <= state.step]
    assert all(isinstance(row.get("loss", 0.0), (float, int, type(None))) for row in rows)
    source = open_source(run)
    source.model()
    origin_of(source.path, source.settings)
    find_twins(run)


def last(run: Path) -> Path:
    return run / "checkpoints" / "step-00000008"


@pytest.mark.parametrize("name", ["index.json", "state.json", "checksums.json", "config.json", "run/config.json"])
def test_run_folders(run, name, capsys):
    path = run / "checkpoints" / name if name == "index.json" else last(run) / name
    path = run / "config.json" if name == "run/config.json" else path
    if name in ("state.json", "config.json"):  # else it is refused for its sum
        for folder in (run / "checkpoints").glob("step-*"):
            (folder / "checksums.json").unlink(missing_ok=True)

    def load() -> None:
        checkpoint.clean_up(run)
        go_on(run)

    load()  # the run is good as it is, and what is imported late is now there
    rng, prepare, counts = random.Random(name), prepare_json(path), Counter[str]()
    for _ in range(15 * MANY):  # not `fuzz`: what is damaged may be gone by, as one checkpoint by the next
        counts[bounded(prepare(rng), lambda: outcome(load))] += 1
    assert counts["opened"]
    assert not counts["refused without a word"]


def test_metrics(run):
    path = run / "metrics.jsonl"
    good = path.read_text()
    for line in (
        "{}", '{"step": null}', '{"step": "1"}', '{"step": -1}', '{"step": 1.5}', "5", "[]", "null", '{"step": 1e999}',
        '{"step": 1, "loss": "x"}', '{"step": 1, "loss": [1]}', '{"step": true}', DEEP, '{"a":' * 100_000, "\ud800x",
        '{"step": 9' + "9" * 5000 + "}",
    ):  # fmt: skip
        path.write_bytes(f"{good}{line}\n{good}".encode(errors="surrogatepass"))
        assert len(read_metrics(path)) == 8
        go_on(run)
    path.write_text('{"step": 3, "loss": NaN, "lr": Infinity}\n')
    assert read_metrics(path) == [{"step": 3, "loss": None, "lr": None}]
    path.write_text('{"step": 1}\n{"step": 2, "loss": ' + "0" * METRICS_LINE + '}\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 1}]
    rng, prepare = random.Random(3), prepare_file(path)
    for _ in range(50 * MANY):
        rows = bounded(prepare(rng), lambda: read_metrics(path))
        assert all(type(row["step"]) is int and row["step"] >= 0 for row in rows)


CASES = {
    "index of numbers": ("checkpoints/index.json", '{"last": 1, "best": 2, "kept": [3]}'),
    "deep index": ("checkpoints/index.json", DEEP),
    "index of ten thousand": ("checkpoints/index.json", json.dumps({"kept": ["step-00000001"] * 10_001})),
    "state without a step": ("checkpoints/step-00000008/state.json", "{}"),
    "state that is a list": ("checkpoints/step-00000008/state.json", "[]"),
    "state of a text": ("checkpoints/step-00000008/state.json", '{"step": "8"}'),
    "state of no number": ("checkpoints/step-00000008/state.json", '{"step": 8, "seconds": NaN}'),
    "state of long pairs": ("checkpoints/step-00000008/state.json", '{"step": 8, "history": [[1, 2, 3]]}'),
    "negative step": ("checkpoints/step-00000008/state.json", '{"step": -1}'),
}


@pytest.mark.parametrize("case", CASES)
def test_cases_of_damaged_runs_go_by_what_is_whole(run, case):
    name, content = CASES[case]
    (run / name).write_text(content)
    assert checkpoint.newest_good(run)[0].name == ("step-00000004" if "state" in name else "step-00000008")
    (last(run) / "checksums.json").unlink()
    if "state" in name:  # found without its sum
        assert checkpoint.newest_good(run)[0].name == "step-00000004"
        (run / "checkpoints" / "step-00000004" / "checksums.json").unlink()
        (run / "checkpoints" / "step-00000004" / "state.json").write_text(content)
        with pytest.raises(ValueError, match="has no checkpoint that is whole"):
            checkpoint.newest_good(run)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.num_hidden_layers", 10**6, "1000000 layers are more than any model has"),
        ("model.num_hidden_layers", 50, "that says 50 layers"),
        ("model.hidden_size", "64", "it must be a whole number"),
        ("threads", 10**6, "threads is 1000000; more than 1,024 helps nobody"),
        ("threads", 1.5, "it must be a whole number or null"),
        ("steps", "many", "it must be a whole number"),
        ("batch_size", 10**12, "batch_size is 1000000000000"),
        ("minutes", float("inf"), "it must be a finite number or null"),
        ("optim.lr", None, "it must be a finite number"),
        ("optim.lr", float("nan"), "it must be a finite number"),
        ("optim", [], "it must be an object"),
        ("data.corpus", 5, "it must be a text or a list"),
        ("data.prefetch", 10**9, "data.prefetch is 1000000000"),
        ("on_nan", "explode", "it must be 'stop' or 'skip' or 'rewind'"),
        ("out", 5, "it must be a text"),
        ("timeout_minutes", 1e300, "timeout_minutes is 1e"),
        ("nonsense", 1, "unknown field"),
    ],
)
def test_configurations_are_checked_field_by_field(run, field, value, message):
    config = json.loads((run / "config.json").read_text())
    holder = config
    for part in field.split(".")[:-1]:
        holder = holder[part]
    holder[field.split(".")[-1]] = value
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        go_on(run)


def test_comparisons(tmp_path):
    row = Row("x", "y", 2.0, 2.1, 3.0, 10.0, 0.1, 0.0, 0.0, 0.0, 1.0, "native", layer_errors=[0.1, 0.2])
    write(tmp_path, Table("abc", 16, 64, [row, dataclasses.replace(row, name="z")]))
    assert fuzz(75, 21, prepare_json(tmp_path / "table.json"), lambda: load_record(tmp_path / "table.json", Table))


def test_folders_of_tokens(tmp_path):
    (tmp_path / "corpus.txt").write_text("words and words and more words\n\n" * 50)
    corpus = open_corpus(str(tmp_path / "corpus.txt"))
    folder = tokenize_corpus(corpus, byte_tokenizer(), tmp_path, progress=False, workers=1).folder

    def load() -> None:
        tokens = TokenizedCorpus.load(folder)
        for split in ("train", "val"):
            tokens.split(split).read(0, 5)

    assert fuzz(75, 22, prepare_json(folder / "meta.json"), load)["opened"]


def test_a_journal_cuts_only_its_own_files(tmp_path):
    from bitnet.data import tokens_write

    victim = tmp_path / "victim.bin"
    victim.write_bytes(bytes(100))
    work = tmp_path / "work"
    work.mkdir()
    for name in ("../victim.bin", str(victim), "../victim"):
        entry = {"documents": 1, "bytes": 1, "shards": [{"file": name, "tokens": 1}]}
        journal = {"documents": 1, "splits": {"train": entry, "val": entry}, "tokenizer": "t", "shard_tokens": 8}
        (work / "journal.json").write_text(json.dumps(journal))
        with contextlib.suppress(ValueError, OSError, KeyError):
            tokens_write._read_journal(work, {}, {"tokenizer": "t", "shard_tokens": 8})
        assert victim.stat().st_size == 100


def test_folders_of_conversations(tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    (tmp_path / "chats.jsonl").write_text((line + "\n") * 20)
    template = ChatTemplate(CHATML, byte_tokenizer())
    folder = tokenize_chats(str(tmp_path / "chats.jsonl"), template, tmp_path).folder
    assert fuzz(50, 23, prepare_json(folder / "meta.json"), lambda: TokenizedChats(folder).describe(32))["opened"]


# Templates


def test_templates(monkeypatch):
    monkeypatch.setattr(chat_worker, "SECONDS", 0.2)
    tokenizer, rng = byte_tokenizer(), random.Random(24)
    words = [
        "{%", "%}", "{{", "}}", " for ", " in ", "range(99999)", "*", "**", "~", "messages", "|join", "|tojson", "[",
        "]", "(", ")", " if ", " endfor ", " set ", "x", "=", "9999999", "'%s'", "%", ".items()", "loop", "-", "|e",
        "|length",
    ]  # fmt: skip
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]
    ChatTemplate(EVERYTHING, tokenizer).render(messages)  # the worker is there
    counts = Counter[str]()
    for number in range(300 * MANY):
        source = rng.choice([CHATML, LLAMA2, LLAMA3, EVERYTHING])
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(source))
            if rng.random() < 0.5:
                source = source[:place] + rng.choice(words) + source[place + rng.randint(0, 8) :]
            else:
                source = mutate(source.encode(), rng, 10**6).decode(errors="replace")
        render = partial(lambda *parts: ChatTemplate(*parts).render(messages), source, tokenizer, f"template {number}")
        counts[bounded(source, partial(outcome, render))] += 1
    assert 10 < counts["opened"] < 300 * MANY  # most damage shows
    assert not counts["refused without a word"]


# Tokenizer files


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    for name, content in byte_tokenizer().files().items():
        (tmp_path / name).write_bytes(content)
    extra = {"special_tokens_map.json": {"eos_token": {"content": "</s>", "special": True}, "bos_token": "<s>"}}
    extra["added_tokens.json"] = {"<extra>": byte_tokenizer().vocab_size}
    for name, value in extra.items():
        (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_tokenizer_files(tokenizer_folder, name):
    def load() -> None:
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.decode(tokenizer.encode("hello world 123 \u00e9"))

    load()
    rng, prepare, counts = random.Random(25), prepare_json(tokenizer_folder / name), Counter[str]()
    for _ in range(40 * MANY):
        counts[bounded(prepare(rng), lambda: outcome(load))] += 1
    assert counts["opened"]
    assert not counts["refused without a word"]
    for value in VALUES:
        (tokenizer_folder / name).write_text(json.dumps(value))
        assert bounded(value, lambda: outcome(load)) != "refused without a word"


def test_normalizers_that_explode_are_refused(tokenizer_folder):
    path = tokenizer_folder / "tokenizer.json"
    good = json.loads(path.read_text())
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    long = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 2000}
    nested = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace] * 6}] * 5}
    for normalizer in ({"type": "Sequence", "normalizers": [replace] * 30}, long, nested):
        path.write_text(json.dumps(good | {"normalizer": normalizer}))
        with pytest.raises(ValueError, match="times as long; it was made to do harm"):
            load_tokenizer(tokenizer_folder)
    usual = [{"type": "Prepend", "prepend": "\u2581"}, replace | {"pattern": {"String": " "}, "content": "\u2581"}]
    path.write_text(json.dumps(good | {"normalizer": {"type": "Sequence", "normalizers": usual}}))
    load_tokenizer(tokenizer_folder)


def test_configurations_there_and_back(run):
    config = trainer.parse(["--resume", str(run)]).config
    assert TrainConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
