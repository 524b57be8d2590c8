"""What the pages of the tests are made from."""

import re

from tests import ROOT

TABLE = ROOT / "benchmarks" / "results" / "compare_demo" / "table.json"
"""A comparison of every method, as it was measured with an earlier version."""


def self_contained(page: str) -> None:
    """Assert that a page asks nobody for anything, has no id twice, and is below 5 MB."""
    assert len(page.encode()) < 5e6
    assert not re.findall(r'(?:src|href|action)="(?!#|data:)[^"]+|@import|url[(](?!#)', page)
    # Names of XML's and no addresses.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
