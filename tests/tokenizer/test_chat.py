"""Chat templates against transformers' apply_chat_template, and generate.py --chat."""

import dataclasses
import io
import json
import re
import sys

import pytest
import torch

import generate as cli
from bitnet.inference.generation import generate
from bitnet.inference.loading import open_model
from bitnet.inference.options import DEFAULTS
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.storage.source import open_source
from bitnet.tokenizer import ChatTemplate, HuggingFaceTokenizer, chat_template_of_gguf, find_chat_template
from bitnet.tokenizer.chat import require
from bitnet.training.checkpoint import save_checkpoint
from tests import oracles
from tests.conversations import CHATML, DEFAULT_SYSTEM, EVERYTHING, LLAMA2, LLAMA3, ZEPHYR
from tests.vocabularies import byte_tokenizer, spaced_tokenizer

TEMPLATES = {
    "chatml": CHATML, "smollm2": DEFAULT_SYSTEM, "llama-2": LLAMA2, "llama-3": LLAMA3, "zephyr": ZEPHYR,
    "everything": EVERYTHING,
}  # fmt: skip
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Brief."), ("user", "Is 2 < 3 & \"so\"?"), ("assistant", " Yes.\n"), ("user", "T\u00e9 \U0001f600")],
    [("user", "a"), ("assistant", "b"), ("user", "c\n\n"), ("assistant", ""), ("user", "skip")],
]  # fmt: skip


def conversation(pairs) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def oracle(tokenizer):
    transformers = oracles.require("transformers")
    import tokenizers

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = tokenizers.Tokenizer.from_str(tokenizer._json)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pairs", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(tokenizer, oracle, template, pairs, prompt):
    messages = conversation(pairs)
    ours = ChatTemplate(TEMPLATES[template], tokenizer)
    arguments = {"chat_template": TEMPLATES[template], "add_generation_prompt": prompt}
    assert ours.render(messages, prompt) == oracle.apply_chat_template(messages, tokenize=False, **arguments)
    ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    assert ours.encode(messages, prompt) == ids


def test_the_begin_of_text_token_comes_once():
    eager = byte_tokenizer(adds_bos=True)
    messages = conversation(CONVERSATIONS[0])
    for source in (CHATML, LLAMA2):
        ids = ChatTemplate(source, eager).encode(messages)
        assert ids[0] == eager.bos_id
        assert ids.count(eager.bos_id) == 1
    assert ChatTemplate(CHATML, byte_tokenizer()).encode(messages)[0] != eager.bos_id


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"single_word": True}])
@pytest.mark.parametrize("front", ["first", "always", "prepend"])
def test_a_special_token_as_text_changes_no_token_beside_it(front, flags, limited):
    """What stands between special tokens was encoded as a text of its own as soon as one of them was text."""
    tokenizer = spaced_tokenizer(front, flags, limited)
    template = ChatTemplate("{% for m in messages %}<|user|>\n{{ m.content }} <|end|>\n{% endfor %}", tokenizer)

    def pieces(*contents: str) -> list[str]:
        messages = [{"role": "user", "content": content} for content in contents]
        return [tokenizer.id_to_piece(i) for i in template.encode(messages)]

    plain, marked = pieces("ab", "cd"), pieces("ab</s>", "cd")
    assert plain.count("<|user|>") == plain.count("<|end|>") == 2
    at = plain.index("b") + 1
    assert marked == [*plain[:at], *"</s>", *plain[at:]]
    assert pieces("<|end|>")[:-3].count("<|end|>") == 0


def test_complaints_of_a_template_are_ours(tokenizer):
    template = ChatTemplate(LLAMA2, tokenizer, "the file")
    with pytest.raises(ValueError, match=r"the file does not take .*roles: user, user.*must alternate.*in turn"):
        template.render(conversation([("user", "a"), ("user", "b")]))
    with pytest.raises(ValueError, match=r'needs "role" and "content"'):
        template.render([{"content": "a"}])
    with pytest.raises(ValueError, match="division by zero"):
        ChatTemplate("{{ 1 / 0 }}", tokenizer).render([])
    with pytest.raises(ValueError, match=r"the file is not a Jinja template.*unknown tag"):
        ChatTemplate("{% nonsense %}", tokenizer, "the file").render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '%s' | format.__func__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_templates_run_no_code(tokenizer, source):
    messages = conversation([("user", "x")])
    try:
        text = ChatTemplate(source, tokenizer).render(messages)
    except ValueError:
        return
    assert text in ("", "None")
    assert messages == conversation([("user", "x")])


def test_where_templates_are_found(tokenizer, tmp_path):
    assert find_chat_template(tmp_path, tokenizer) is None
    config = tmp_path / "tokenizer_config.json"
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "third"}]
    for path, content, text in (
        (tmp_path / "chat_template.json", json.dumps({"chat_template": "first"}), "first"),
        (config, json.dumps({"chat_template": "second"}), "second"),
        (config, json.dumps({"chat_template": several}), "third"),
        (tmp_path / "chat_template.jinja", "fourth", "fourth"),
    ):
        path.write_text(content)
        assert find_chat_template(tmp_path, tokenizer).render([]) == text
    assert chat_template_of_gguf({"tokenizer.chat_template": "fifth"}, tokenizer).render([]) == "fifth"
    assert chat_template_of_gguf({}, tokenizer) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"{", "cannot be read"),
        ("tokenizer_config.json", b"[]", "holds a list"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "is a int"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.jinja", b"{{", "not a Jinja template"),
    ],
)
def test_damaged_templates_are_named(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        find_chat_template(tmp_path, tokenizer).render([])


def test_a_base_model_says_so():
    with pytest.raises(
        ValueError, match=r"runs/x has no chat template: it is a base model.*without|runs/x has no chat"
    ):
        require(None, "runs/x")


# generate.py --chat, with a model of random weights


@pytest.fixture(scope="module")
def run_folder(tokenizer, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "chatty"
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(initializer_range=0.2, vocab_size=tokenizer.vocab_size)
    model = BitNetForCausalLM(config)
    folder = save_checkpoint(
        run, model=model, optimizer_state={}, state={"step": 1}, config={"model": dataclasses.asdict(config)},
        tokenizer=b"", best=True,
    )  # fmt: skip
    (folder / "tokenizer.model").unlink()
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(CHATML)
    return run


@pytest.fixture
def call(capsys, monkeypatch, run_folder):
    def run_main(*arguments: str, stdin: str = ""):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape")), encoding="utf-8")
        )
        status = cli.main([str(run_folder), "--device", "cpu", "--backend", "reference", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_main


def answer(path, messages, n: int, seed: int) -> str:
    source = open_source(path)
    ids = torch.tensor([source.chat_template.encode(messages)])
    tokens = generate(
        open_model(source), ids, max_new_tokens=n, sampling=DEFAULTS, seed=seed,
        eos_id=source.tokenizer.eos_ids,
    )  # fmt: skip
    return source.tokenizer.decode(int(t[0]) for t in tokens)


def test_chat_answers_one_message(call, run_folder):
    from bitnet.kernels import use_backend

    with use_backend("reference"):
        expected = answer(run_folder, conversation([("system", "S"), ("user", "Hi")]), 8, seed=3)
    status, out, err = call("--chat", "--system", "S", "--prompt", "Hi", "--max-new-tokens", "8", "--seed", "3")
    assert (status, out.strip()) == (0, expected.strip())
    assert "seed 3" in err
    assert open_source(run_folder).kind == "run"
    assert open_source(run_folder).chat_template.where.endswith("chat_template.jinja")


@pytest.fixture
def seen(monkeypatch) -> list[list[tuple[str, str]]]:
    """The conversations that templates are asked to write, roles and contents, as they come."""
    seen: list[list[tuple[str, str]]] = []
    encode = ChatTemplate.encode

    def spy(self, messages, add_generation_prompt=True):
        seen.append([(m["role"], m["content"]) for m in messages])
        return encode(self, messages, add_generation_prompt)

    monkeypatch.setattr(ChatTemplate, "encode", spy)
    return seen


def test_a_conversation_is_kept_reset_and_forgotten(call, seen):
    options = ("--chat", "--interactive", "--system", "S", "--max-new-tokens", "4", "--seed", "1")
    status, out, err = call(*options, stdin="one\n\n/reset\ntwo\nthree\nfour\nfive\n")
    assert (status, err.count("a new conversation")) == (0, 1)
    assert out
    assert seen[0] == [("system", "S"), ("user", "one")]
    assert seen[1] == [("system", "S"), ("user", "two")]
    assert [pair[0] for pair in seen[2]] == ["system", "user", "assistant", "user"]
    assert seen[2][1] == ("user", "two")
    # 128 positions hold about two turns of this template, a byte a token: the oldest ones go, the system message stays.
    assert all(messages[0] == ("system", "S") for messages in seen)
    assert seen[-1][1] != ("user", "two")
    assert seen[-1][-1] == ("user", "five")
    assert "error" not in err


def test_a_message_that_is_too_long_ends_nothing(call):
    status, _, err = call("--chat", "--interactive", "--max-new-tokens", "4", stdin="x" * 200 + "\nshort\n")
    assert status == 0
    assert err.count("error: a prompt of ") == 1
    assert err.count("seed") == 1


def test_a_line_that_is_no_text_ends_nothing(call):
    status, _, err = call("--chat", "--interactive", "--max-new-tokens", "4", stdin="one\n\udcff\udcfe\ntwo\n")
    assert status == 0
    assert err.count("half of a surrogate pair") == 1
    assert len(re.findall("seed", err)) == 2


def test_an_interrupted_answer_stays_in_the_conversation(call, monkeypatch):
    add, calls = cli.Printer.add, iter(range(1000))

    def interrupted(self, pieces):
        if next(calls) == 2:
            raise KeyboardInterrupt
        add(self, pieces)

    monkeypatch.setattr(cli.Printer, "add", interrupted)
    status, _, err = call("--chat", "--interactive", "--max-new-tokens", "6", "--seed", "4", stdin="one\ntwo\n")
    assert (status, err.count("seed")) == (0, 2)


def test_bad_chat_arguments(call, run_folder):
    status, _, err = call("--system", "S", "--prompt", "x")
    assert status == 2
    assert "give --chat too" in err
    template = next(run_folder.rglob("chat_template.jinja"))
    template.unlink()
    status, out, err = call("--chat", "--prompt", "x")
    template.write_text(CHATML)
    assert (status, out) == (2, "")
    assert "has no chat template: it is a base model" in err


def test_a_message_that_does_not_fit_forgets_nothing(call, seen):
    options = ("--chat", "--interactive", "--max-new-tokens", "4", "--seed", "1")
    status, _, err = call(*options, stdin="one\n" + "x" * 200 + "\ntwo\n")
    assert (status, err.count("error: a prompt of")) == (0, 1)
    assert [role for role, _ in seen[-1]] == ["user", "assistant", "user"]
    assert seen[-1][0] == ("user", "one")
    assert seen[-1][-1] == ("user", "two")
