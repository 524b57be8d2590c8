"""The server against its own OpenAPI description, by schemathesis: a thousand requests, valid and not.

Run by `make conformance`.
"""

import subprocess
import sys
from pathlib import Path

from tests import oracles


def test_every_answer_is_as_described(address):
    oracles.require("schemathesis")
    # Whether a valid body is taken depends on the model (its tokens, its context), which no description can tell.
    options = ["--exclude-checks", "positive_data_acceptance", "--phases", "coverage,fuzzing", "--seed", "1"]
    command = [Path(sys.executable).parent / "st", "run", f"{address}/openapi.json", "--max-examples", "15", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
