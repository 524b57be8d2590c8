"""The tests: folders mirror the package; what tests share lies beside this file."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
