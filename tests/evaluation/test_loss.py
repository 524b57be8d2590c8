"""Held-out loss by its definition, and the command that compares runs."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

from bitnet.__main__ import main
from bitnet.data.corpus import Corpus, open_corpus
from bitnet.data.feed import TextFeed
from bitnet.data.mixture import tokenize_mixture
from bitnet.data.tokens import TokenArray
from bitnet.evaluation.loss import Evaluation, evaluate, evaluate_feed, evaluate_model
from bitnet.evaluation.texts import open_held_out
from bitnet.inference.adapters import put_on
from bitnet.kernels import native_wanted
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.model.lora import projections
from bitnet.storage.adapters import Adapter
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.tokenizer.chat import PLAIN_TEMPLATE
from bitnet.training.checkpoint import save_checkpoint
from tests.conversations import chat

CONFIG = PRESETS["tiny"].replace(vocab_size=300, quantizer="none")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BitNetForCausalLM(CONFIG)


def tokens(count: int) -> TokenArray:
    return TokenArray([np.random.default_rng(0).integers(300, size=count).astype(np.uint16)])


@pytest.mark.parametrize(("count", "batch_size"), [(100, 2), (97, 3), (33, 4), (17, 8), (2, 8)])
def test_every_token_counts_once_whatever_the_batch(model, count, batch_size):
    array = tokens(count)
    result = evaluate(model, array, context=16, bytes_per_token=2.0, batch_size=batch_size)
    total = 0.0
    for start in range(0, count - 1, 16):
        window = torch.from_numpy(array.read(start, min(17, count - start)).astype(np.int64))
        with torch.no_grad():
            total += float(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
    assert result.tokens == count - 1
    assert result.loss == pytest.approx(total / (count - 1), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 2.0)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_the_standard_error_is_that_of_a_mean_of_windows(model):
    array = tokens(16 * 50 + 1)
    result = evaluate(model, array, context=16, bytes_per_token=2.0)
    means = []
    for start in range(0, 800, 16):
        window = torch.from_numpy(array.read(start, 17).astype(np.int64))
        with torch.no_grad():
            means.append(float(F.cross_entropy(model(window[None, :-1])[0], window[1:])))
    assert result.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(50), rel=1e-4)


def test_a_part_of_the_split_and_the_mode_of_the_model(model):
    model.train()
    result = evaluate(model, tokens(1000), context=16, bytes_per_token=2.0, batch_size=4, max_tokens=130)
    assert result.tokens == 128
    assert model.training
    model.eval()
    evaluate(model, tokens(20), context=16, bytes_per_token=2.0)
    assert not model.training


def test_bytes_are_those_of_the_tokens_that_were_predicted(model):
    array = tokens(1000)
    sizes = torch.from_numpy(np.random.default_rng(1).integers(0, 9, 300).astype(np.float64))
    whole = evaluate(model, array, context=16, bytes_per_token=sizes, batch_size=4)
    part = evaluate(model, array, context=16, bytes_per_token=sizes, batch_size=4, max_tokens=130)
    for result, count in ((whole, 999), (part, 128)):
        labels = torch.from_numpy(array.read(1, count).astype(np.int64))
        assert result.text_bytes == float(sizes[labels].sum())
        assert result.bits_per_byte == pytest.approx(result.loss * count / math.log(2) / result.text_bytes)
    nothing = evaluate(model, tokens(17), context=16, bytes_per_token=torch.zeros(300))
    assert nothing.bits_per_byte == math.inf


@pytest.mark.parametrize("kind", ["own", "prefixed"])
def test_bits_per_byte_of_a_part_of_a_split(tmp_path, model, kind):
    """A split whose beginning has other words than the rest: the bytes of a part are those of its text."""
    texts = [f"{'internationalization ' * 9}{i}" if i % 40 < 20 else f"1 2 3 {i} x y z\n" * 9 for i in range(400)]
    tokenizer = train_tokenizer(texts, 300)
    if kind == "prefixed":
        stream = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=stream, model_type="bpe", vocab_size=300, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=3,
        )  # fmt: skip
        tokenizer = Tokenizer(stream.getvalue())
    corpus = Corpus("two", lambda: texts, lambda: kind)
    feed = TextFeed(tokenize_mixture({"two": corpus}, (1.0,), tokenizer, tmp_path), tokenizer, None, 16)
    tokenized = feed.mixture.corpora["two"]
    entry, split = tokenized.meta["splits"]["val"], tokenized.split("val")
    (whole,) = feed.held_out(2)
    labels = torch.cat([label for _, label in whole.batches]).flatten()
    counted = whole.bytes_per_token[labels[labels != -100]].sum()
    assert float(counted) == pytest.approx(entry["bytes"], rel=1e-9)
    for limit in (64, 512):
        (part,) = feed.held_out(2, limit)
        ids = torch.cat([label for _, label in part.batches]).flatten()
        text = b"".join(tokenizer.surface_bytes(i) for i in ids[ids != -100].tolist())
        assert float(part.bytes_per_token[ids[ids != -100]].sum()) == pytest.approx(len(text), rel=0.02)
        if kind == "own":
            assert float(part.bytes_per_token[ids[ids != -100]].sum()) == len(text)
            assert len(text) != pytest.approx(len(ids) * entry["bytes"] / len(split), rel=0.02)
        result = evaluate_feed(model, feed, batch_size=2, max_tokens=limit)
        assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / result.text_bytes)


def test_perplexity_of_an_overflowing_loss_is_infinite():
    assert Evaluation(1e4, 0.0, 1.0, 1).perplexity == math.inf


def write_run(folder, tokenizer, quantizer="none", **data):
    """A run of one checkpoint, trained in windows of 32."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(CONFIG.replace(quantizer=quantizer))
    data |= {"max_bytes": None, "cache": str(folder.parent / "data")}
    save_checkpoint(
        folder, model=model, optimizer_state={}, state={"step": 1},
        config={"model": dataclasses.asdict(model.config), "context": 32, "data": data},
        tokenizer=tokenizer.model_proto, best=True,
    )  # fmt: skip


def test_command_line_compares_runs(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {i} cats see the {i * 7 % 100} dogs." for i in range(400)))
    tokenizer = train_tokenizer(open_corpus(text).documents(), 300)
    for name, quantizer in (("ternary", "ternary"), ("twin", "none")):
        write_run(tmp_path / name, tokenizer, quantizer, corpus=str(text), val_fraction=0.1)
    picture = tmp_path / "loss.png"
    (tmp_path / "twin" / "metrics.jsonl").write_text('{"step": 1, "val_loss": 2.0}\n{"step": 2, "lo')
    assert main(["evaluate", str(tmp_path / "ternary"), str(tmp_path / "twin"), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "note" not in printed.err
    header, ternary, twin = printed.out.splitlines()
    assert "gap" in header
    assert "ternary" in ternary
    assert twin.endswith("+0.00%")
    gap = float(ternary.split()[-1].rstrip("%"))
    losses = [float(line.split()[2]) for line in (ternary, twin)]
    assert gap == pytest.approx(100 * (losses[0] / losses[1] - 1), abs=0.01)


def test_losses_of_other_texts_and_tokens_have_no_gap(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, noun in (("text.txt", "dogs"), ("more.txt", "mice")):
        Path(path).write_text("\n\n".join(f"The {i} cats see the {i * 7 % 100} {noun}." for i in range(200)))
    tokenizer, other = (train_tokenizer(open_corpus(path).documents(), 300) for path in ("text.txt", "more.txt"))
    own = {"corpus": "text.txt", "val_fraction": 0.05}
    changes = {"own": {}, "text": {"corpus": "more.txt"}, "held-out": {"val_fraction": 0.1}}
    for name, change in changes.items():
        write_run(tmp_path / name, tokenizer, **(own | change))
    write_run(tmp_path / "tokens", other, **own)

    def gaps(*arguments: str) -> tuple[list[str], str]:
        assert main(["evaluate", *arguments]) == 0
        printed = capsys.readouterr()
        return [line.split()[-1] for line in printed.out.splitlines()[1:]], printed.err

    shown, said = gaps("text", "held-out", "tokens", "own")
    assert shown == ["-", "-", "-", "+0.00%"]
    assert "note: gaps are of models that read the same text in the same tokens" in said
    # The tokens count, not the kind of their file; and other windows are said.
    gguf_write.write(open_source("own").model(), "own.gguf", "F32", tokenizer=tokenizer)
    shown, said = gaps("own.gguf", "own", "--text", "text.txt", "--dtype", "bfloat16")
    assert shown[0].startswith(("+", "-"))
    assert "note: windows differ, and in a longer one more of a text is known: 128 (own.gguf), 32 (own)" in said
    assert "gaps are" not in said
    if native_wanted(torch.device("cpu")):
        assert "note: dtype bfloat16 is of what runs in torch, and changes nothing for own.gguf\n" in said


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("kind", ["documents", "conversations"])
def test_borders_are_kept_on_every_machine(tmp_path, kind, with_adapter):
    """Of a float run too, which the native engine could run, and which knows no borders."""
    lines = [f"The {i} cats see the {i * 7 % 100} dogs." for i in range(200)]
    tokenizer = train_tokenizer(lines, 300)
    if kind == "documents":
        (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        data = {"corpus": str(tmp_path / "lines.jsonl"), "document_mask": True}
    else:
        turns = [{"messages": chat("one", line)} for line in lines]
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
        data = {"chat": str(tmp_path / "chats.jsonl")}
    write_run(tmp_path / "run", tokenizer, **data)
    source = open_source(tmp_path / "run")
    (source.path / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    feed = open_held_out(source)
    model = source.model()
    adapter = None
    if with_adapter:
        matrices = {name: (torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2) / 50)
                    for name, layer in projections(model)}  # fmt: skip
        adapter = Adapter(matrices, tmp_path, "run")
        put_on(model, adapter)
    crossed = evaluate_feed(model, feed).loss if kind == "documents" else None
    model.document_ids = feed.document_ids
    expected = evaluate_feed(model, feed).loss
    assert crossed != pytest.approx(expected, rel=1e-5)
    found = evaluate_model(str(tmp_path / "run"), torch.device("cpu"), torch.float32, lora=adapter)
    assert found.evaluation.loss == pytest.approx(expected, rel=1e-5)


def test_command_line_errors(tmp_path, capsys):
    assert main(["evaluate"]) == 2
    assert "no run was given" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "nothing does not exist" in capsys.readouterr().err
    torch.manual_seed(0)
    save_checkpoint(
        tmp_path / "foreign", model=BitNetForCausalLM(CONFIG), optimizer_state={}, state={"step": 1},
        config={"model": dataclasses.asdict(CONFIG)}, tokenizer=b"", best=True,
    )  # fmt: skip
    assert main(["evaluate", str(tmp_path / "foreign")]) == 2
    assert "no 'data' section" in capsys.readouterr().err
