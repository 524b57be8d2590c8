"""What an older torch does otherwise, run there: gradients of compiled layers before all."""

import os

import pytest

LONG = os.environ.get("BITNET_LONG") == "1"
CAPTURED = ("tests/model/test_linear.py", "tests/model/test_lora.py", "-k", "captured")


def test_gradients_of_captured_layers_are_those_of_eager_ones_there(older_python) -> None:
    assert "skipped" not in older_python.test(*CAPTURED)


@pytest.mark.skipif(not LONG, reason="BITNET_LONG=1 runs the tests of numbers and layers there")
@pytest.mark.parametrize("tests", ["model", "quant", "kernels"])
def test_numbers_and_layers_are_right_there(older_python, tests: str) -> None:
    older_python.test(f"tests/{tests}", interpret=False)
