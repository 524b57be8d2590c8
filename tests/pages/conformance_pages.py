"""The pages that commands write, in a headless Chromium: nothing in the console, no request, nothing that axe objects
to, by pointer and by keyboard, at a desk and on a phone, light and dark.

Run by `make conformance`. SCREENSHOTS=folder keeps what they looked like.
"""

import os
from pathlib import Path

import pytest

from tests import oracles
from tests.pages.builders import TABLE

axe = oracles.require("axe_playwright_python.sync_playwright")


@pytest.fixture(params=[(1200, 800, "light"), (390, 844, "light"), (390, 844, "dark")], ids=["desk", "phone", "dark"])
def page(browser, request):
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda m: page.wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else page.wrong.append(r.url))
    page.name = request.node.callspec.id
    yield page
    assert page.wrong == []
    context.close()


def shot(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{page.name}-{name}.png")


def sound(page) -> None:
    """Nothing sticks out at the side, and axe finds nothing."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"][:200], len(each["nodes"])) for each in found] == []


@pytest.fixture(scope="module")
def report_file(tmp_path_factory) -> Path:
    from bitnet.pages.report import read_table, write_report

    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, read_table(TABLE))
    return path


def test_the_report_of_a_comparison(page, report_file):
    page.goto(report_file.as_uri())
    sound(page)
    shot(page, "report")
    first = page.inner_text("#choice strong")
    page.locator("#budget").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#choice strong") != first
    assert page.inner_text("#choice strong") == "b1.58", "the best of the smallest"
    page.keyboard.press("End")
    assert page.inner_text("#choice strong") in ("gguf-q8_0", "gptq-8", "rtn-int8", "bf16", "float32")

    chart = page.locator(".chart:visible svg").first
    chart.focus()
    page.keyboard.press("Home")
    tip = page.locator(".tip:visible")
    assert "perplexity" in tip.inner_text()
    before = tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != before
    shot(page, "point")
    page.keyboard.press("Escape")
    assert page.locator(".tip:visible").count() == 0
    point = chart.locator("[data-gid=point-1] use")
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "b1.58" in tip.inner_text()

    rows = page.locator("#table tbody tr:visible").count()
    page.get_by_label("gguf", exact=True).uncheck()
    assert page.locator("#table tbody tr:visible").count() < rows
    assert "gguf" not in page.inner_text("#table tbody")
    assert "gguf" not in page.inner_text("#choice strong")
    page.get_by_role("button", name="perplexity").click()
    values = [
        float(text.split()[0]) for text in page.locator("#table tbody tr:visible td:nth-child(5)").all_inner_texts()
    ]
    assert values == sorted(values)


@pytest.fixture(scope="module")
def guide_file(tmp_path_factory) -> Path:
    import torch

    from bitnet.model import BitNetForCausalLM
    from bitnet.pages.guide.guide import guide
    from bitnet.pages.guide.minima import TINY, measure_tiny
    from bitnet.pages.guide.subject import own_text, subject_of

    ids = torch.tensor(list(own_text(512).encode()))[:512].view(8, 64)
    subject = subject_of(BitNetForCausalLM(TINY.replace(intermediate_size=256)).eval(), ids, "a tiny model")
    path = tmp_path_factory.mktemp("guide") / "guide.html"
    path.write_text(guide(subject, measure_tiny(20, 5)), encoding="utf-8")
    return path


def test_the_guide(page, guide_file):
    page.goto(guide_file.as_uri())
    sound(page)
    for index, section in enumerate(page.locator("section").all()):
        section.scroll_into_view_if_needed()
        shot(page, f"guide-{index}")
    page.locator("#absmax-guide").focus()
    page.keyboard.press("Home")
    frames = page.locator(".frames:has(#absmax-guide)")
    assert frames.locator(".frame:visible").count() == 1
    assert "s = 1 / 10.8 = 0.09" in frames.inner_text()
    assert frames.locator("output").inner_text() == page.get_attribute("#absmax-guide", "aria-valuetext") == "2"
    page.keyboard.press("End")
    assert "s = 127 / 10.8 = 11.76" in frames.inner_text()
    sound(page)

    play = page.locator("[data-play=add-vector]")
    play.click()
    for _ in range(150):  # not wait_for_function, whose predicate the page's own policy refuses to evaluate
        if int(page.input_value("#add-vector")) >= 2:
            break
        page.wait_for_timeout(200)
    assert int(page.input_value("#add-vector")) >= 2
    if play.get_attribute("aria-pressed") == "true":
        play.click()
    assert play.get_attribute("aria-pressed") == "false"
    shown = int(page.input_value("#add-vector")) + 1
    assert page.locator(".frames:has(#add-vector) .term:visible").count() == shown
