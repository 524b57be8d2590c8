"""Fixtures of the engines."""

from collections.abc import Iterator

import pytest

from bitnet import kernels
from bitnet.kernels.cpu import native


@pytest.fixture
def automatic_choices() -> Iterator[None]:
    """Backend and instruction set are chosen, whatever the environment variables say."""
    with kernels.use_backend("auto"), native.use_instruction_set("auto"):
        yield
