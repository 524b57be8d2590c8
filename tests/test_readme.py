"""README and docs: what they print runs, what they link to exists, what options they name there are.

The blocks of the README run in the order in which they stand, in one folder, as a reader would run them. They are
scaled by options that are printed in them (`SCALED`), and nothing else is changed.
"""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bitnet.__main__ as command
import generate
import train

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = (
    "--preset demo --model.vocab-size 360 --model.num-hidden-layers 1 --model.intermediate-size 256 --context 64 "
    "--data.max-bytes 200000 --steps 8 --batch-size 2 --compile off --optim.optimizer adamw "
    "--wandb off"
)
SCALED = {  # what is printed, and what stands for it in the test
    "--preset demo": SMALL,
    "--preset 700m": "--preset tiny",
    "--preset chat": "--preset chat --batch-size 2 --compile off --optim.optimizer adamw --wandb off",
    "--size 30m": SMALL.replace("--preset demo", "--size 30m"),
    "--preset convert": SMALL.replace("--preset demo", "--preset convert --layer-steps 2 --layer-tokens 512"),
    "--minutes 60": "",
    "--minutes 5": "",
    "--steps 500": "--steps 4",
    "--method gptq-4": "--method gptq-4 --calibration-tokens 512",
    "--methods all": "--methods rtn-int4 --no-speed --tokens 512 --calibration-tokens 512",
    "bitnet bench runs/demo": "bitnet bench runs/demo --quick",
}
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "python train.py": train.main,
    "python generate.py": generate.main,
    "bitnet": command.main,
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for language, text in blocks(README) if language == "bash" for line in text.splitlines() if line]


def run_line(line: str) -> None:
    """Run one printed command in this process, scaled."""
    for printed, small in SCALED.items():
        line = line.replace(printed, small)
    words = shlex.split(line, comments=True)
    program = "bitnet" if words[0] == "bitnet" else " ".join(words[:2])
    status = PROGRAMS[program](words[len(program.split()) :])
    assert status == 0, f"{line!r} ended with status {status}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands read."""
    monkeypatch.chdir(tmp_path)
    texts = [
        f"Fellow citizens, report {i} of the treaties and the revenue of the year 18{i % 90 + 10}." for i in range(900)
    ]
    (tmp_path / "my_texts").mkdir()
    for i in range(30):
        (tmp_path / "my_texts" / f"{i}.txt").write_text("\n".join(texts[30 * i : 30 * i + 30]))
    chat = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 40)
    return tmp_path


def test_every_block_runs_as_printed(folder, capsys):
    for language, text in blocks(README):
        if language == "bash":
            for line in filter(None, text.splitlines()):
                run_line(line)
        else:
            assert language == "python", f"a block of {language!r} is run by nobody"
            exec(compile(text, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "perplexity" in printed  # of bitnet evaluate
    assert re.search(r"^(stop|length|context) \d+ \d+$", printed, re.MULTILINE)  # of the Python block
    card = (folder / "demo-hf" / "README.md").read_text(encoding="utf-8")
    assert "8 steps of 2 sequences of 64 tokens" in card  # what the run knows of itself
    assert "nats a token" in card
    for made in ("runs/converted", "demo-packed", "demo-hf", "demo.gguf", "demo-gptq-hf", "comparison/table.md"):
        assert (folder / made).exists(), made


def test_what_is_scaled_is_printed():
    text = README.read_text(encoding="utf-8")
    assert not [printed for printed in SCALED if printed not in text]


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) == 1  # tables: the others are in docs/results.md
    assert text.count("![") == 2  # curves of training, and the page of the server


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def options_there_are() -> set[str]:
    """Every option that a command's --help names."""
    helps = io.StringIO()
    for main, words in [(train.main, []), (generate.main, []), *((command.main, [name]) for name in command.COMMANDS)]:
        with contextlib.redirect_stdout(helps), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    return set(re.findall(r"--[a-z][\w.-]*", helps.getvalue()))


FOREIGN = {"--nproc-per-node", "--max-restarts"}  # torchrun's
FOREIGN |= {
    "--additional-config",
    "--enforce-eager",
    "--model",
    "--pipeline-parallel-size",
    "--skip-tokenizer-init",
}  # vLLM's


def our_options(page: Path) -> Iterator[str]:
    """Options of our commands that a page names: not those in the first column of the tables of other projects."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if page.name == "coming-from.md" and line.startswith("| "):
            line = line.split("|")[2]
        for code in re.findall(r"`([^`]+)`", line) or [line] * line.startswith(
            ("    ", "python", "bitnet", "torchrun")
        ):
            if "benchmarks/" not in code:  # scripts with options of their own
                yield from re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code)


def test_options_in_the_pages_exist():
    known = options_there_are() | FOREIGN
    wrong = {(page.name, option) for page in PAGES for option in our_options(page) if option not in known}
    assert not wrong
