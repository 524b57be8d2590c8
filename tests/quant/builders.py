"""Weights to quantize, and observers that have seen some data."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitnet.quant import (
    Observer,
    PerTensor,
)
from bitnet.quant.blocks import NEEDS_IMPORTANCE


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


DATA: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: torch.randn(8, 4096),
    "heavy tails": lambda: torch.randn(8, 4096) ** 3,
    "shifted": lambda: torch.randn(8, 4096) * 0.7 + 2,
    "relu": lambda: torch.randn(8, 4096).relu(),
    "outlier": lambda: torch.cat([torch.randn(8, 4095), torch.full((8, 1), -60.0)], dim=1),
}


def observe(*batches: Tensor, granularity: Any = None, bins: int = 4096) -> Observer:
    observer = Observer(granularity or PerTensor(), bins=bins)
    for batch in batches:
        observer.update(batch)
    return observer


def assert_same_statistics(a: Observer, b: Observer) -> None:
    assert (a.count, a.scale_shape) == (b.count, b.scale_shape)
    for name in ("minimum", "maximum", "exponent", "counts"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def weights_for(kind: str, importance: Tensor | None, columns: int = 512) -> Tensor | None:
    """The importance, or equal ones for a type that is refused without."""
    return torch.ones(columns) if importance is None and kind in NEEDS_IMPORTANCE else importance


def heavy_tailed(rows: int = 12, columns: int = 128) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02
