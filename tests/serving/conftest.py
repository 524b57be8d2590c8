"""One server for the tests of its answers."""

from collections.abc import Iterator

import pytest

from bitnet.inference.text_model import TextModel
from tests import oracles


@pytest.fixture(scope="session")
def model(tokenizer) -> TextModel:
    from tests.serving.builders import text_model

    return text_model(tokenizer)


@pytest.fixture(scope="session")
def served(model) -> Iterator:
    """Address and application."""
    from tests.serving.builders import running

    with running(model) as (address, application):
        yield address, application


@pytest.fixture(scope="session")
def address(served) -> str:
    return served[0]


@pytest.fixture(scope="session")
def client(address):
    """OpenAI's own client, which tries nothing twice."""
    openai = oracles.require("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client
