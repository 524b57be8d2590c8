"""Fixtures of the kernels: every instruction set of this processor."""

from collections.abc import Iterator

import pytest

from bitnet.kernels.cpu import native
from tests.kernels.builders import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_instruction_set(request.param):
        yield request.param
