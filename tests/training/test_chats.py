"""Fine-tuning on conversations: a run from the data to the answer."""

import dataclasses
from pathlib import Path

import pytest
import torch

import generate
import train as trainer
from bitnet.__main__ import main
from bitnet.data.tokens import IGNORE_INDEX
from bitnet.evaluation.texts import open_text
from bitnet.model import PRESETS
from bitnet.storage.safetensors import CheckpointError
from bitnet.storage.source import open_source
from bitnet.tokenizer.chat import PLAIN_TEMPLATE
from bitnet.training import config as recipes
from bitnet.training.processes import World
from bitnet.training.reporter import read_metrics
from bitnet.training.step import Trainer
from tests import oracles
from tests.builders import configuration, tensors
from tests.conversations import chat, write_chats
from tests.faults import stop_after
from tests.oracles import llama

OPPOSITES = {
    "hot": "cold", "big": "small", "day": "night", "up": "down", "left": "right", "old": "young", "fast": "slow",
    "wet": "dry",
}  # fmt: skip


def question(word: str) -> str:
    return f"What is the opposite of {word}?"


def answer(word: str) -> str:
    return f"It is {OPPOSITES[word]}."


@pytest.fixture(scope="module")
def opposites(tmp_path_factory):
    """A file of conversations of one to three questions, whose answers are a function of the question alone."""
    generator = torch.Generator().manual_seed(0)
    words, chats = sorted(OPPOSITES), []
    for _ in range(300):
        chosen = torch.randperm(len(words), generator=generator)[: 1 + int(torch.randint(3, (1,), generator=generator))]
        chats.append(chat(*(text for i in chosen for text in (question(words[i]), answer(words[i])))))
    path = tmp_path_factory.mktemp("opposites") / "opposites.jsonl"
    write_chats(path, chats)
    return path


def chat_configuration(tmp_path, chats, **changes) -> recipes.TrainConfig:
    defaults = {
        "model": PRESETS["tiny"].replace(vocab_size=400, max_position_embeddings=96, num_hidden_layers=1),
        "data": recipes.DataConfig(chat=str(chats), cache=str(tmp_path / "data")),
        "steps": 6, "eval_every": 3, "eval_tokens": recipes.TrainConfig.eval_tokens,
    }  # fmt: skip
    return configuration(tmp_path, chats, **{**defaults, **changes})


def gradient(run: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_the_loss_is_the_mean_over_all_answers_of_a_step(tmp_path, chats, micro_batches, processes):
    model = PRESETS["tiny"].replace(vocab_size=310, max_position_embeddings=96, num_hidden_layers=1, quantizer="none")
    path = chats.folder.parent / "many.jsonl"
    config = chat_configuration(tmp_path, path, model=model, micro_batches=micro_batches)
    losses, gradients = [], []
    for rank in range(processes):
        run = trainer.prepare(config)
        run.world = World(rank, processes)
        losses.append(float(run.forward_backward(1)))
        gradients.append(gradient(run))
    found = sum(losses) / processes, sum(gradients) / processes
    whole = trainer.prepare(dataclasses.replace(config, micro_batches=1))
    input_ids, labels, documents = whole.feed.batch(1)
    counts = (labels != IGNORE_INDEX).sum(1)
    assert counts.min() < counts.max()  # else any weighting would do
    loss = whole.model.loss(input_ids, labels, "none", documents).sum() / counts.sum()
    loss.backward()
    assert found[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(found[1], gradient(whole), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("quantizer", ["none", "ternary"])
def test_in_a_row_a_conversation_is_as_if_alone(tmp_path, opposites, quantizer):
    model = PRESETS["tiny"].replace(vocab_size=400, max_position_embeddings=96, quantizer=quantizer)
    run = trainer.prepare(chat_configuration(tmp_path, opposites, model=model))
    packed = run.feed.chats.rows("train", 96)
    input_ids, labels, documents = packed.read([len(packed) // 2])
    assert int(documents.max()) >= 2
    run.model.double()
    together = run.model.loss(input_ids, labels, "none", documents)
    for number in range(int(documents.max())):
        inside = documents[0] == number
        alone = run.model.loss(input_ids[:, inside], labels[:, inside], "none")
        torch.testing.assert_close(together[:, inside], alone, rtol=1e-5, atol=1e-6)


def test_an_interrupted_run_of_conversations_resumes_bit_for_bit(tmp_path, opposites, monkeypatch, capsys):
    config = chat_configuration(tmp_path, opposites, micro_batches=2, sample_every=5)
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "straight")))
    assert "What is the opposite of" in capsys.readouterr().out  # samples answer a held-out question
    stop_after(monkeypatch, 2)
    assert trainer.train(config).progress.step == 2
    monkeypatch.undo()
    trainer.train(config, resume=True)
    straight, broken = (tensors(tmp_path / name) for name in ("straight", "run"))
    for name, value in straight.items():
        assert torch.equal(value, broken[name]), name
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not any("bits_per_byte" in key for row in rows for key in row)
    with open(opposites) as file:
        (tmp_path / "fewer.jsonl").write_text("".join(file.readlines()[:-1]))
    changed = dataclasses.replace(config, data=recipes.DataConfig(chat=str(tmp_path / "fewer.jsonl")), steps=8)
    changed = dataclasses.replace(changed, data=dataclasses.replace(changed.data, cache=str(tmp_path / "data")))
    with pytest.raises(CheckpointError, match=r"fewer.jsonl.*has changed"):
        trainer.train(changed, resume=True)


def test_from_a_text_to_an_assistant(tmp_path, opposites, monkeypatch, capsys):
    """Pretraining, fine-tuning, asking, and the same template in every export."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"user {question(w)} assistant {answer(w)}\n" for w in OPPOSITES) * 40)
    common = ["--compile", "off", "--wandb", "off", "--device", "cpu", "--threads", "1", "--product", "float"]
    base = ["--preset", "tiny", "--data.corpus", "text.txt", "--model.vocab-size", "400", "--steps", "2", *common]
    assert trainer.main([*base, "--out", "base"]) == 0
    tuned = ["--preset", "chat", "--init", "base", "--data.chat", str(opposites), "--steps", "80", "--context", "96"]
    rates = ["--optim.lr", "2e-2", "--optim.lr-rest", "3e-2", "--batch-size", "8", "--eval-every", "40"]
    assert trainer.main([*tuned, *rates, *common, "--sample-every", "0", "--out", "chat"]) == 0
    assert "tokens of answers" in capsys.readouterr().out
    losses = [row["val_loss"] for row in read_metrics(tmp_path / "chat" / "metrics.jsonl") if "val_loss" in row]
    assert losses[-1] < 0.02, losses
    for word in ("hot", "day", "left"):
        assert asked(capsys, "chat", question(word)) == answer(word)
    assert main(["evaluate", "chat", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(" -")  # no bits per byte
    assert main(["evaluate", "chat", "--device", "cpu", "--text", "text.txt"]) == 0
    with pytest.raises(ValueError, match="give a text with --text"):
        open_text(open_source("chat"))

    exports = {"packed": [], "hf": ["--to", "hf"], "gguf": ["--to", "gguf", "--type", "F16"]}
    template = open_source("chat").chat_template
    messages = chat(question("hot"), answer("hot"), question("wet"), system="Be brief.")
    for name, arguments in exports.items():
        assert main(["export", "chat", f"chat.{name}", *arguments]) == 0
        opened = open_source(f"chat.{name}").chat_template
        assert opened.source == template.source == PLAIN_TEMPLATE
        assert opened.encode(messages) == template.encode(messages)
        assert asked(capsys, f"chat.{name}", question("wet")) == answer("wet")
    transformers = oracles.require("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained("chat.hf")
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == template.encode(
        messages
    )
    with llama.LlamaModel(Path("chat.gguf")) as theirs:
        assert theirs.chat_template == PLAIN_TEMPLATE
        assert theirs.tokenize(template.render(messages), parse_special=True) == template.encode(messages)

    # What was fine-tuned can be pretrained again and keeps its template.
    again = ["--init", "chat", *base, "--out", "again"]
    assert trainer.main(again) == 0
    assert open_source("again").chat_template.source == PLAIN_TEMPLATE


def asked(capsys, model: str, prompt: str) -> str:
    capsys.readouterr()
    assert generate.main([model, "--chat", "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "20"]) == 0
    return capsys.readouterr().out.strip()
