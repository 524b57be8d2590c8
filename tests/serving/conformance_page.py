"""The page in a headless Chromium: a chat by keyboard, branches, tokens, a phone, the dark, no request elsewhere.

Run by `make conformance`. SCREENSHOTS=folder keeps what it looked like.
"""

import os
from pathlib import Path

import pytest

from tests.serving.builders import running, text_model


@pytest.fixture(scope="module")
def address(tokenizer):
    with running(text_model(tokenizer), api_keys=("secret",), max_new_tokens=40) as (address, _):
        yield address


@pytest.fixture(params=[(1200, 800, "light"), (390, 844, "light"), (1200, 800, "dark")], ids=["desk", "phone", "dark"])
def page(browser, address, request):
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" and "401" not in m.text else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(address) else page.wrong.append(r.url))
    page.goto(address)
    page.name = request.node.callspec.id
    yield page
    assert page.wrong == []
    context.close()


def shot(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{page.name}-{name}.png")


def written(page) -> None:
    """Wait until nothing is being written."""
    page.wait_for_selector("li.assistant")
    page.wait_for_selector("#stop", state="hidden")


def test_a_chat_with_branches_and_tokens(page):
    page.wait_for_selector("#error:not([hidden])")
    assert "API key" in page.inner_text("#error")
    page.click("#settings-button")
    page.fill("#key", "secret")
    page.fill("#seed", "3")
    page.fill("#system", "Be brief.")
    shot(page, "settings")
    page.keyboard.press("Escape")
    page.wait_for_selector("#model option", state="attached")
    assert page.get_attribute("#settings-button", "aria-expanded") == "false"

    page.focus("#prompt")
    page.keyboard.type("Hello <b>there</b>")
    page.keyboard.press("Enter")
    written(page)
    first = page.inner_text("li.assistant .text")
    assert page.inner_text("li.user .text") == "Hello <b>there</b>"
    assert "tokens/s" in page.inner_text("li.assistant .numbers")
    assert "of 512 tokens" in page.inner_text("#context-text")
    assert page.text_content("#status") == f"Answer: {page.text_content('li.assistant .text')}"

    page.get_by_role("button", name="Show tokens").click()
    page.locator(".token").nth(1).click()
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.endswith("%")
    assert page.locator(".alternatives tr").count() >= 5
    shot(page, "tokens")
    page.get_by_role("button", name="Show text").click()

    page.evaluate("document.getElementById('seed').value = '4'")
    page.get_by_role("button", name="Write again").click()
    written(page)
    assert "2 of 2" in page.inner_text("li.assistant .tools")
    assert page.inner_text("li.assistant .text") != first
    page.get_by_role("button", name="Earlier branch").click()
    assert page.inner_text("li.assistant .text") == first

    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("End")
    page.keyboard.type(" again")
    page.get_by_role("button", name="Send as a new branch").click()
    written(page)
    assert page.locator("li.user").count() == 1
    assert page.inner_text("li.user .text") == "Hello <b>there</b> again"
    assert "2 of 2" in page.inner_text("li.user .tools")
    shot(page, "branch")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"

    page.get_by_role("button", name="New chat").click()
    assert page.locator("#messages li").count() == 0


def test_everything_has_a_name_and_a_place_in_the_order_of_keys(page):
    page.wait_for_selector("#model")
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea')].filter(e => !e.closest('template')
        && !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map(e => e.id)"""
    )
    assert nameless == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(12):
        reached.add(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert "settings-button" in reached or "send" in reached


def test_stop_keeps_what_was_written(page, address):
    page.evaluate("sessionStorage.setItem('bitnet key', 'secret')")
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    page.evaluate("document.getElementById('max_tokens').value = '400'")
    page.fill("#prompt", "Go on")
    page.keyboard.press("Enter")
    while (
        not page.locator("li.assistant .text").all_inner_texts()[:1] or len(page.inner_text("li.assistant .text")) < 3
    ):
        page.wait_for_timeout(20)
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")
    assert page.inner_text("li.assistant .text")
    assert page.is_hidden("#error")


def test_a_base_model_writes_as_long_as_fits(browser, tokenizer):
    """200 tokens were asked for whatever the context had left, and refused."""
    model = text_model(tokenizer, positions=128)
    model.source.chat_template = None
    with running(model) as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        page.fill("#prompt", "a " * 30)
        page.keyboard.press("Enter")
        written(page)
        assert page.is_hidden("#error")
        page.close()
