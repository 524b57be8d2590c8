"""Fixtures of training."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No curve of the loss, which is drawn at every validation and takes longer than the few steps of a test."""

    def touch(rows: Any, path: Path, **options: Any) -> None:
        path.touch()

    monkeypatch.setattr("bitnet.training.reporter.draw_loss", touch)
