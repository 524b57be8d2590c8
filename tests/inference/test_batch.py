"""A file of prompts: the texts of `generate`, in whatever company; resuming; and what is refused."""

import dataclasses
import inspect
import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

import bitnet
import generate as script
from bitnet.inference.batch import write_answers
from bitnet.inference.lookup import PromptLookup
from bitnet.inference.options import TextOptions
from bitnet.inference.text_model import TextModel
from bitnet.kernels.cpu import native
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.tokenizer import ChatTemplate, train_tokenizer
from bitnet.tokenizer.chat import PLAIN_TEMPLATE
from bitnet.training.checkpoint import save_checkpoint
from tests.inference.builders import AlwaysDrafts
from tests.kernels.builders import NOT_BUILT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer([inspect.getsource(textwrap)], 512, threads=1)
    torch.manual_seed(0)
    model = BitNetForCausalLM(PRESETS["tiny"].replace(initializer_range=0.2)).eval()
    config = {"model": dataclasses.asdict(model.config)}
    files = tokenizer.files() | ChatTemplate(PLAIN_TEMPLATE, tokenizer).files()
    save_checkpoint(
        path, model=model.state_dict(), optimizer_state={}, state={"step": 1}, config=config, tokenizer=files, best=True
    )
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return bitnet.load(folder, device="cpu")


LINES = [
    {"prompt": "self", "id": "a"},
    {"prompt": "def wrap(", "max_new_tokens": 3, "temperature": 0},
    {"messages": [{"role": "user", "content": "What is wrapped?"}], "tag": [1, 2]},
    {"prompt": [5, 6, 7], "seed": 99, "frequency_penalty": 0.5},
    {"prompt": "the " * 40, "stop": ["e"]},
    {"prompt": "return", "top_k": 3},
    {"prompt": "x", "max_new_tokens": 20},
]


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def call(folder: Path, prompts: Path, out: Path, *more: str) -> int:
    options = ("--device", "cpu", "--max-new-tokens", "9", "--seed", "7", "--rows", "3")
    return script.main([str(folder), "--prompts", str(prompts), "--out", str(out), *options, *more])


def answers(path: Path) -> dict[int, dict]:
    return {answer["line"]: answer for answer in map(json.loads, path.read_text().splitlines())}


def test_answers_are_what_generate_gives(tmp_path: Path, folder: Path, model: TextModel) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", LINES), tmp_path / "answers.jsonl"
    assert call(folder, prompts, out) == 0
    found = answers(out)
    assert sorted(found) == list(range(1, len(LINES) + 1))
    names = {field.name for field in dataclasses.fields(TextOptions)}
    for line, asked in enumerate(LINES, 1):
        own = {name: value for name, value in asked.items() if name in names}
        alone = model.generate(
            asked.get("prompt") or asked["messages"], **{"max_new_tokens": 9, "seed": 6 + line, **own}
        )  # type: ignore[arg-type]
        answer = found[line]
        assert (answer["text"], answer["seed"], answer["stop_reason"]) == (alone.text, alone.seed, alone.stop_reason)
        assert (answer["prompt_tokens"], answer["new_tokens"]) == (alone.prompt_tokens, alone.new_tokens)
    assert found[1]["id"] == "a"
    assert found[3]["tag"] == [1, 2]
    many = model.generate_many([line["prompt"] for line in LINES[:2]], max_new_tokens=9, seed=7)  # type: ignore[misc]
    assert many[0].text == found[1]["text"]
    assert many[1].seed == 8


@pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT)
def test_drafts_change_no_answer(tmp_path: Path, model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    again = [{"prompt": word * 3, "max_new_tokens": 40, "temperature": 0.05} for word in ("self ", "x", "def ", "if a")]
    lines = [*LINES, *again, {**again[0], "stop": ["e"]}, {**again[1], "presence_penalty": 0.1}]
    prompts, read = write(tmp_path / "prompts.jsonl", lines), list[int]()
    drafting = TextModel(model.model, model.source, 7)
    monkeypatch.setattr(TextModel, "lookup", AlwaysDrafts(7))
    monkeypatch.setattr(AlwaysDrafts, "measured", lambda self, texts, drafted, seconds: read.append(drafted))
    for rows in (3, 16, 1):
        read.clear()
        write_answers(drafting, prompts, tmp_path / f"{rows}.jsonl", TextOptions(max_new_tokens=9), 7, rows)
    passes = len(read)
    monkeypatch.setattr(TextModel, "lookup", PromptLookup(0))
    write_answers(model, prompts, tmp_path / "plain.jsonl", TextOptions(max_new_tokens=9), 7, 3)
    assert len(read) == passes
    plain = answers(tmp_path / "plain.jsonl")
    assert all(answers(tmp_path / f"{rows}.jsonl") == plain for rows in (1, 3, 16))
    assert passes < sum(answer["new_tokens"] - 1 for answer in plain.values())  # one behind the other: some were right


def test_an_interrupted_file_is_gone_on_with(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", LINES), tmp_path / "answers.jsonl"
    assert call(folder, prompts, out) == 0
    whole = answers(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:25])
    capsys.readouterr()
    assert call(folder, prompts, out) == 0
    assert "has 3 of 7 answers; 4 are left" in capsys.readouterr().err
    assert answers(out) == whole
    before = out.read_bytes()
    assert call(folder, prompts, out) == 0
    assert out.read_bytes() == before
    # Other options, other prompts, another file: nothing is mixed, nothing is lost.
    for more, changed in ((("--temperature", "0.1"), LINES), ((), [*LINES[:2], {"prompt": "other"}, *LINES[3:]])):
        assert call(folder, write(prompts, changed), out, *more) == 2
        assert "give another --out" in capsys.readouterr().err
        assert out.read_bytes() == before
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\n")
    assert call(folder, prompts, foreign) == 2
    assert foreign.read_text() == "mine\n"


def test_whatever_is_copied_is_read_again(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "x", "id": "a\u2028b\x85c\ud83d", "seed": None}, {"prompt": "y", "stop": None}]
    prompts, out = write(tmp_path / "prompts.jsonl", lines), tmp_path / "answers.jsonl"
    assert call(folder, prompts, out) == 0
    before = out.read_bytes()
    found = {answer["line"]: answer for answer in map(json.loads, before.split(b"\n")[:-1])}
    assert (found[1]["id"], found[1]["seed"], found[2]["seed"]) == (lines[0]["id"], 7, 8)
    assert call(folder, prompts, out) == 0
    assert out.read_bytes() == before


def test_answers_of_another_seed_or_model_are_not_taken(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", LINES[:1]), tmp_path / "answers.jsonl"
    assert call(folder, prompts, out) == 0
    before = out.read_bytes()
    shutil.copytree(folder, tmp_path / "other")
    for model, more in ((folder, ("--seed", "8")), (tmp_path / "other", ())):
        capsys.readouterr()
        assert call(model, prompts, out, *more) == 2
        assert "with other options or by another model; give another --out" in capsys.readouterr().err
        assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", 'line 2: give an object with either "prompt" or "messages"'),
        ('{"text": "x"}', 'give an object with either "prompt" or "messages"'),
        ('{"prompt": 5}', '"prompt" is a text or token ids'),
        ('{"prompt": []}', '"prompt" is a text or token ids'),
        ('{"messages": "Hi"}', '"messages" a list of objects'),
        ('{"messages": [1, 2]}', '"messages" a list of objects'),
        ('{"messages": [{"role": "user", "content": "x"}, 5]}', '"messages" a list of objects'),
        ('{"prompt": "x", "line": 4}', '"line" is a field of the answers'),
        ('{"prompt": "x", "temperature": -1}', "line 2: temperature is -1"),
        ('{"prompt": "x", "top_k": "many"}', "line 2: "),
        ('{"prompt": "x", "top_k": 2.5}', "line 2: 'top_k' is 2.5; it must be a whole number"),
        ('{"prompt": "x", "max_new_tokens": 2.5}', "line 2: 'max_new_tokens' is 2.5; it must be a whole number"),
        ('{"prompt": "x", "max_new_tokens": true}', "line 2: 'max_new_tokens' is True"),
        ('{"prompt": "x", "temperature": "0.5"}', "line 2: 'temperature' is '0.5'"),
        ('{"prompt": "x", "stop": [1]}', r"line 2: 'stop\[0\]' is 1; it must be a text"),
        ('{"prompt": "x", "stop": "e"}', "line 2: 'stop' is 'e'; it must be a list"),
        ('{"prompt": "x", "id": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is not JSON .*too deeply"),
        ('{"prompt": [512]}', "line 2: token id 512"),
        (json.dumps({"prompt": "word " * 300}), "line 2: .*leaves no room"),
    ],
)
def test_bad_lines_are_named_before_anything_is_written(
    line: str, message: str, tmp_path: Path, folder: Path, model: TextModel
) -> None:
    from bitnet.inference.batch import write_answers

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        write_answers(model, prompts, out, TextOptions(max_new_tokens=2), 0, 4)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "x"], "--prompts and --out belong together"),
        (["--prompts", "x", "--out", "y", "--chat"], "leave out --chat"),
        (["--prompts", "x", "--out", "y", "--rows", "0"], "--rows is 0"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["nowhere", *options]) == 2
    assert message in capsys.readouterr().err
