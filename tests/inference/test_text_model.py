"""bitnet.load: the same texts as the decode loop, reasons to stop, counts, streams, conversations, and its errors."""

import dataclasses
import inspect
import shutil
import textwrap
import typing

import pytest
import torch

import bitnet
import generate as script
from bitnet.inference.generation import generate
from bitnet.inference.options import DEFAULTS, TextOptions
from bitnet.inference.text_model import TextArguments, TextModel
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.tokenizer import ChatTemplate, train_tokenizer
from bitnet.tokenizer.chat import PLAIN_TEMPLATE
from bitnet.training.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder whose model has random weights, with a chat template."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer([inspect.getsource(textwrap)], 512, threads=1)
    torch.manual_seed(0)
    model = BitNetForCausalLM(PRESETS["tiny"].replace(initializer_range=0.2)).eval()
    template = ChatTemplate(PLAIN_TEMPLATE, tokenizer)
    save_checkpoint(
        path,
        model=model.state_dict(),
        optimizer_state={},
        state={"step": 1},
        config={"model": dataclasses.asdict(model.config)},
        tokenizer=tokenizer.files() | template.files(),
        best=True,
    )
    return path


@pytest.fixture(scope="module")
def model(folder) -> TextModel:
    return bitnet.load(folder, device="cpu")


def ids_of(model: TextModel, prompt: list[int], count: int, seed: int) -> list[int]:
    """Token ids straight from the decode loop."""
    tokenizer = model.source.tokenizer
    steps = generate(
        model.model,
        torch.tensor([prompt]),
        max_new_tokens=count,
        sampling=DEFAULTS,
        seed=seed,
        eos_id=tokenizer.eos_ids,
        vocab_size=tokenizer.vocab_size,
    )
    return [int(step[0]) for step in steps]


def test_a_text_is_that_of_the_decode_loop(model):
    prompt = model.encode("def wrap(")
    completion = model.generate("def wrap(", max_new_tokens=20, seed=3)
    wanted = ids_of(model, prompt, 20, 3)
    assert completion.token_ids == wanted
    whole = model.source.tokenizer.decode(prompt + wanted)
    assert str(completion) == completion.text == whole.removeprefix("def wrap(")
    assert (completion.prompt_tokens, completion.new_tokens, completion.seed) == (len(prompt), len(wanted), 3)
    assert model.generate(prompt, max_new_tokens=20, seed=3) == completion
    assert model.generate("def wrap(", max_new_tokens=20, seed=4) != completion


def test_a_chosen_seed_gives_the_text_again(model):
    first = model.generate("x", max_new_tokens=12, temperature=1.5)
    assert model.generate("x", max_new_tokens=12, temperature=1.5, seed=first.seed) == first


def test_reasons_to_stop(model):
    full = model.generate("self", max_new_tokens=1000, seed=5, min_p=0)
    assert full.prompt_tokens + full.new_tokens == model.positions
    assert full.stop_reason == "context"
    assert model.generate("self", max_new_tokens=8, seed=5).stop_reason == "length"
    middle = full.text[20:23]
    stopped = model.generate("self", max_new_tokens=1000, seed=5, min_p=0, stop=[middle])
    assert stopped.stop_reason == "stop"
    assert stopped.text == full.text[: full.text.index(middle)]
    assert stopped.new_tokens < full.new_tokens


def test_an_end_of_text_token_stops(model, monkeypatch):
    tokens = model.generate("self", max_new_tokens=8, seed=5).token_ids
    monkeypatch.setattr(model.source.tokenizer, "eos_ids", (tokens[4],))
    ended = model.generate("self", max_new_tokens=8, seed=5)
    cut = tokens.index(tokens[4])
    assert (ended.stop_reason, ended.token_ids) == ("stop", tokens[: cut + 1])


def test_a_stream_is_the_text_in_pieces(model):
    whole = model.generate("self", max_new_tokens=30, seed=2, min_p=0)
    stream = model.stream("self", max_new_tokens=30, seed=2, min_p=0)
    assert stream.completion.stop_reason is None
    first = next(stream)
    assert first
    assert stream.completion.text == first
    assert first + "".join(stream) == whole.text
    assert stream.completion == whole
    assert stream.stats.new_tokens == 30


def test_a_batch_has_texts_of_their_own(model):
    batch = model.batch("self", TextOptions(max_new_tokens=12, seed=1, temperature=1.5), 3)
    pieces = list(batch)
    assert [c.text for c in batch.completions] == ["".join(column) for column in zip(*pieces, strict=True)]
    assert len({c.text for c in batch.completions}) == 3
    assert {c.stop_reason for c in batch.completions} == {"length"}


def test_a_conversation_is_encoded_by_the_template(model):
    messages = [{"role": "user", "content": "What is wrapped?"}]
    answer = model.chat(messages, max_new_tokens=10, seed=1)
    prompt = model.source.chat_template.encode(messages)
    assert answer.prompt_tokens == len(prompt)
    assert answer.token_ids == ids_of(model, prompt, 10, 1)
    assert answer.text == answer.text.strip()
    assert model.chat("What is wrapped?", max_new_tokens=10, seed=1) == answer
    assert "".join(model.stream(messages, max_new_tokens=10, seed=1)).strip() == answer.text


def test_options_are_those_of_generate_py(capsys, folder, model):
    assert typing.get_type_hints(TextArguments).keys() == {f.name for f in dataclasses.fields(TextOptions)}
    assert (
        script.main([str(folder), "--device", "cpu", "--prompt", "def ", "--seed", "7", "--max-new-tokens", "9"]) == 0
    )
    assert capsys.readouterr().out.rstrip("\n") == (
        "def " + model.generate("def ", max_new_tokens=9, seed=7).text
    ).rstrip("\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "stop string is empty"),
    ],
)
def test_options_out_of_range_are_refused_at_once(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.stream("x", **options)


def test_what_cannot_be_said_or_opened_is_named(model, tmp_path):
    with pytest.raises(TypeError, match="temprature"):
        model.generate("x", temprature=1)
    for prompt in ([1, 2.5], ["one"], {"role": "user"}, None):
        with pytest.raises(TypeError, match="a prompt is a text, token ids or messages"):
            model.generate(prompt)
    with pytest.raises(ValueError, match="leaves no room in a model of 128 positions"):
        model.generate("word " * 300)
    with pytest.raises(ValueError, match="nowhere"):
        bitnet.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype 'int3' is unknown"):
        bitnet.load(tmp_path, dtype="int3")
    with pytest.raises(ValueError, match="device 'nonsense'"):
        bitnet.load(tmp_path, device="nonsense")


def test_a_base_model_has_no_chat(model, tmp_path):
    shutil.copytree(model.source.path, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    base = bitnet.load(tmp_path / "base", device="cpu")
    with pytest.raises(ValueError, match="chat template"):
        base.chat("Hello")


def test_prompts_of_any_lengths_are_written_together_as_alone(model):
    prompts = ["self", "def wrap(self, text):", [5, 6, 7, 8], [{"role": "user", "content": "What is wrapped?"}]]
    options = [TextOptions(max_new_tokens=6 + i, seed=10 - i, temperature=0.7 * i) for i in range(4)]
    together = model.generate_many(prompts, options, logprobs=2)
    for prompt, how, text in zip(prompts, options, together, strict=True):
        alone = model.generate(
            prompt, logprobs=2, max_new_tokens=how.max_new_tokens, seed=how.seed, temperature=how.temperature
        )
        assert alone == text
        assert [drawn.token for drawn in text.drawn] == text.token_ids
        assert all(len(drawn.top) == 2 and drawn.top[0][1] >= drawn.logprob for drawn in text.drawn)
    numbered = model.generate_many(["self", "self"], seed=4, max_new_tokens=8)
    assert [text.seed for text in numbered] == [4, 5]
    assert numbered[1] == model.generate("self", seed=5, max_new_tokens=8)
    assert model.generate_many([]) == []
    with pytest.raises(ValueError, match="2 prompts and 1 options"):
        model.generate_many(["a", "b"], [TextOptions()])
    with pytest.raises(ValueError, match="logprobs is -1"):
        model.generate("self", logprobs=-1)


def test_a_conversation_is_not_read_again(model, monkeypatch):
    if not hasattr(model.model, "rows"):
        pytest.skip("rows of their own have only native engines")
    read, forward = [], model.model.forward

    def counted(rows, ids, wanted, logits):
        read.append(len(ids))
        forward(rows, ids, wanted, logits)

    monkeypatch.setattr(model.model, "forward", counted)
    messages = [{"role": "user", "content": "What is wrapped? " * 3}]
    fresh = TextModel(model.model, model.source)
    for turn in range(3):
        prompt = model.source.chat_template.encode(messages)
        read.clear()
        answer = fresh.chat(messages, max_new_tokens=5, seed=turn)
        if turn:
            assert read[0] < 25 < len(prompt)
        expected = TextModel(model.model, model.source).chat(messages, max_new_tokens=5, seed=turn)
        assert answer == expected
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]
    first = fresh.generate("self", seed=1, max_new_tokens=4)
    assert fresh.generate("self", seed=1, max_new_tokens=4) == first
    left = fresh.stream("self", seed=1, max_new_tokens=4)
    assert next(left)
    del left  # one that was not read to its end leaves a row that is right
    assert fresh.generate("self", seed=1, max_new_tokens=4) == first
