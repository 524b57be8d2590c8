"""Hostile chat templates end, at once and in little memory, with an error; the next conversation is rendered."""

import os
import subprocess
import sys
import threading

import pytest

from bitnet.tokenizer import ChatTemplate, chat_render, chat_worker, find_chat_template
from tests.conversations import CHATML
from tests.timing import within
from tests.vocabularies import byte_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
GROWING = "{% set n = namespace(x=X) %}{% for i in range(60) %}{% set n.x = Y %}{% endfor %}"
# Templates that take time are ended by the clock of the processor, those that take memory as soon as they ask for it.
ENDLESS = {
    "power": "{{ 10 ** (10 ** 9) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text in loops": "{% for a in range(99999) %}{% for b in range(999) %}" + "x" * 99 + "{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "nested lists": GROWING.replace("X", "[1]").replace("Y", "[n.x, n.x]") + "{{ n.x }}",
    "nested tuples": GROWING.replace("X", "(1,)").replace("Y", "(n.x, n.x)") + "{{ {n.x: 1} }}",
    "equal lists": GROWING.replace("X", "[[1], [1]]").replace("Y", "[[n.x[0], n.x[0]], [n.x[1], n.x[1]]]")
    + "{{ n.x[0] == n.x[1] }}",
    "long source": "{{ " + "+".join("1" * 100_000) + " }}",
    "slices": "{{ [1] | slice(10 ** 9) | list }}",
    "digits": "{{ (('9' * 4000) | int) ** 99999 }}",
}
HUGE = {
    "format": "{{ '%999999999d' % 1 }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "format method": "{{ '{:9999999999}'.format(1) }}",
    "doubling +": GROWING.replace("X", "'x'").replace("Y", "n.x + n.x"),
    "doubling ~": GROWING.replace("X", "'x'").replace("Y", "n.x ~ n.x"),
    "doubling join": GROWING.replace("X", "'x'").replace("Y", "[n.x, n.x] | join"),
    "doubling lists": GROWING.replace("X", "[1]").replace("Y", "n.x + n.x"),
    "doubling dicts": GROWING.replace("X", "'x'").replace("Y", "{'a': n.x, 'b': n.x} | tojson"),
    "replace": GROWING.replace("X", "'x'").replace("Y", "n.x | replace('x', 'xxxx')"),
    "times": "{{ 'x' * 10 ** 10 }}",
    "list times": "{{ [0] * 10 ** 10 }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "zfill": "{{ 'x'.zfill(10 ** 10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 10) }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "range": "{{ range(10 ** 18) | list }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "tojson": "{{ {'a': [1]} | tojson(indent=10 ** 9) }}",
    "constant": "{{ 'x' | center(1000000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "depth": "{{" + "(" * 100_000,
    "ifs": "{% if 1 %}" * 20_000,
    "long text": "{{ 'x' * 20_000_000 }}",
    "long complaint": "{{ raise_exception('x' * 10_000_000) }}",
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def little_time():
    """A worker that ends templates sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_worker, "SECONDS", 0.1)
        yield


def fails(tokenizer, source: str) -> str:
    def complaint() -> str:
        with pytest.raises(ValueError, match="the file") as failure:
            ChatTemplate(source, tokenizer, "the file").render(MESSAGES)
        return str(failure.value)

    message = within(1, complaint)
    assert len(message) < 5000
    return message


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_end(tokenizer, name):
    assert "it does not end within 0.1 s of processor time and 192 MiB of memory" in fails(tokenizer, ENDLESS[name])
    assert ChatTemplate("{{ messages[0].content }}", tokenizer).render(MESSAGES) == "hello"


@pytest.mark.parametrize("name", HUGE)
def test_huge_texts_are_never_made(tokenizer, name):
    fails(tokenizer, HUGE[name])


def test_templates_see_nothing_of_the_program(tokenizer, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "very secret")
    for source in (
        "{{ messages | tojson(default=cycler.__init__.__globals__.os.environ.get) }}",
        "{{ messages | tojson(cls=1) }}",
        "{{ (messages | tojson).__class__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(messages) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
        "{{ lipsum.__globals__['os'].environ }}",
        "{% import 'os' as os %}{{ os.environ }}",
    ):
        try:
            text = ChatTemplate(source, tokenizer, "the file").render(MESSAGES)
        except ValueError as error:
            text = str(error)
        assert "very secret" not in text
        assert "built-in" not in text
    options = "(indent=1, sort_keys=true, separators=(',', ':'), ensure_ascii=true)"
    template = ChatTemplate("{{ {'b': '\u00e9', 'a': 1} | tojson" + options + " }}", tokenizer)
    assert template.render(MESSAGES) == '{\n "a":1,\n "b":"\\u00e9"\n}'


def test_a_model_with_a_hostile_template_opens(tokenizer, tmp_path):
    for source in ("{{ 10 ** (10 ** 9) }}", "{% nonsense"):
        (tmp_path / "chat_template.jinja").write_text(source)
        template = within(0.1, lambda: find_chat_template(tmp_path, tokenizer))
        assert template.files() == {"chat_template.jinja": source.encode()}
    (tmp_path / "chat_template.jinja").write_text("x" * (2**20 + 1))
    with pytest.raises(ValueError, match=r"has 1,048,577 bytes; a chat template has a few thousand"):
        find_chat_template(tmp_path, tokenizer)


def test_what_a_template_looks_at(tokenizer):
    template = ChatTemplate("{% set a = tools %}{{ a }}{% for b in c %}{{ b }}{% endfor %}", tokenizer)
    assert [template.reads(name) for name in ("tools", "c", "a", "b")] == [True, True, False, False]
    assert not ChatTemplate("{{ tools", tokenizer).reads("tools")


def test_what_json_cannot_say_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"what JSON can say: Object of type set"):
        ChatTemplate("x", tokenizer).render([{"role": "user", "content": {1}}])
    odd = [{"role": "user", "content": "\ud800 \x00 \u2028 \U0001f600\n"}]
    assert ChatTemplate("{{ messages[0].content }}", tokenizer).render(odd) == odd[0]["content"]


def test_threads_and_forked_children_render(tokenizer):
    template, wrong = ChatTemplate(CHATML, tokenizer), []

    def work(name: str) -> None:
        for i in range(20):
            text = template.render([{"role": "user", "content": f"{name} {i}"}], False)
            wrong.extend([text] if text != f"<|im_start|>user\n{name} {i}<|im_end|>\n" else [])

    threads = [threading.Thread(target=work, args=(f"thread {n}",)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []
    chat_render.PROCESS._process.kill()  # from outside: another one takes its place
    chat_render.PROCESS._process.wait()
    work("again")
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_worker_of_its_own():
    code = """
import os
from bitnet.tokenizer.chat_render import render
assert render("{{ x }}", {"x": 1}) == "1"
child = os.fork()
for i in range(50):
    assert render("{{ x }}", {"x": f"{child} {i}"}) == f"{child} {i}"
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
