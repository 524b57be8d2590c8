"""A missing oracle is skipped where it may be missing, and fails where BITNET_REQUIRE_ORACLES=1 wants every one."""

import json
import re
from pathlib import Path

import pytest

from tests import ROOT, oracles

ABSENT = {
    "module": lambda: oracles.require("no_such_package"),
    "part of one": lambda: oracles.require("json.no_such_part"),
    "folder": lambda: oracles.folder_of("no_such_package"),
}


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("wanted", ["1", "0", ""])
def test_a_missing_oracle(monkeypatch, absent, wanted):
    monkeypatch.setenv("BITNET_REQUIRE_ORACLES", wanted)
    with pytest.raises(pytest.fail.Exception if wanted == "1" else pytest.skip.Exception, match="no_such"):
        ABSENT[absent]()


def test_an_oracle_that_is_there(monkeypatch):
    monkeypatch.setenv("BITNET_REQUIRE_ORACLES", "1")
    assert oracles.require("json") is json
    assert oracles.folder_of("json") == Path(json.__file__).parent


def test_no_test_skips_over_a_missing_package_by_itself():
    by_itself = re.compile(r"importorskip\(|skipif\([^)]*find_spec")
    for path in (ROOT / "tests").rglob("*.py"):
        assert path.name == Path(__file__).name or not by_itself.search(path.read_text(encoding="utf-8")), path.name
