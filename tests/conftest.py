"""Fixtures of the suite. Every test starts from one seed, on one thread, and never asks the network for a model."""

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bitnet import kernels
from bitnet.data.chats import TokenizedChats, tokenize_chats
from bitnet.tokenizer import ChatTemplate, Tokenizer, train_tokenizer
from bitnet.tokenizer.chat import PLAIN_TEMPLATE
from tests import older, oracles
from tests.conversations import chat, write_chats
from tests.vocabularies import CHAT_TEXT, stdlib_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch.set_num_threads(1)
with contextlib.suppress(ImportError):  # a machine that is there for its GPU may have torch and little else
    import tyro._unsafe_cache

    # Where pytest is loaded, tyro makes a tenth of what it has cached anew, at random, for which it parses our sources.
    tyro._unsafe_cache.sys = SimpleNamespace(modules={})

gc.disable()  # half a million objects are imported and collected, and stay


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers here, so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def reference_backend() -> Iterator[None]:
    """The specification, whatever kernels this machine has."""
    with kernels.use_backend("reference"):
        yield


@pytest.fixture
def set_threads() -> Iterator[None]:
    """The test may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's headless Chromium, which only `make conformance` asks for."""
    playwright = oracles.require("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        oracles.missing("there is no Chromium; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def older_python() -> older.Python:
    return older.find()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return oracles.require("transformers")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """512 pieces, trained on Python's standard library."""
    return stdlib_tokenizer(512)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred short documents of a made-up but regular language."""
    generator = torch.Generator().manual_seed(0)
    nouns, verbs = ["cat", "dog", "bird", "fish", "horse"], ["sees", "likes", "hears", "follows"]
    lines = []
    for _ in range(1500):
        a, b = (nouns[int(torch.randint(5, (1,), generator=generator))] for _ in range(2))
        lines.append(f"The {a} {verbs[int(torch.randint(4, (1,), generator=generator))]} the {b}.")
    folder = tmp_path_factory.mktemp("corpus") / "animals"
    folder.mkdir()
    for start in range(0, 1500, 50):
        (folder / f"{start:04}.txt").write_text("\n".join(lines[start : start + 50]) + "\n")
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    """330 pieces, trained on the text of some conversations."""
    return train_tokenizer([CHAT_TEXT * 20], 330)


@pytest.fixture(scope="session")
def conversations() -> list[list[dict[str, str]]]:
    """A hundred conversations of any length; some end with a question."""
    generator = torch.Generator().manual_seed(1)

    def number(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    return [
        chat(*(f"{place} {i} " + "cat " * number(6) for i in range(1 + number(6))), system="S" if number(2) else None)
        for place in range(100)
    ]


@pytest.fixture(scope="session")
def chats(
    chat_tokenizer: Tokenizer, conversations: list[list[dict[str, str]]], tmp_path_factory: pytest.TempPathFactory
) -> TokenizedChats:
    """These conversations, tokenized; many.jsonl, which holds them, lies beside their folder."""
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "many.jsonl", conversations)
    return tokenize_chats(folder / "many.jsonl", ChatTemplate(PLAIN_TEMPLATE, chat_tokenizer), folder, val_fraction=0.1)
