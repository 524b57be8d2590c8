"""Which part of a stored ternary matrix a process holds, and its bytes.

vLLM gives the rows of q, k and v, and of gate and up, to one layer, and spreads the rows of those and the columns of
the others over processes. A stored byte holds four rows that lie a quarter of the matrix apart, and a byte in memory
four columns (`bitnet/storage/hf/read.py`, `bitnet/quant/packing.py`), so a part is cut from the codes and never from
bytes: any cut falls between two codes. Latent floats are quantized before they are cut, by the mean of the whole
matrix.

Letters: N out_features, K in_features of the whole matrix.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet import kernels
from bitnet.quant import pack_codes
from bitnet.storage.hf.config import Form
from bitnet.storage.hf.read import read_codes, read_scale


@dataclass(frozen=True)
class Part:
    """Rows and columns of a stored matrix `[N, K]`, and the first row that they have in a layer's own matrix."""

    first_row: int
    rows: int
    first_column: int
    columns: int
    at: int = 0

    def of(self, matrix: Tensor) -> Tensor:
        """This part of a matrix `[N, K]`. Raises ValueError where the matrix has no such part."""
        for dim, first, count in ((0, self.first_row, self.rows), (1, self.first_column, self.columns)):
            if first + count > matrix.shape[dim]:
                raise ValueError(
                    f"its weight is {list(matrix.shape)}, and config.json wants {'rows' if dim == 0 else 'columns'} "
                    f"{first} to {first + count} of it; the folder is damaged"
                )
        return matrix[self.first_row :][: self.rows, self.first_column :][:, : self.columns]

    def place(self, target: Tensor) -> Tensor:
        """The rows of a layer's own matrix, or of its scales, that this part fills."""
        return target[self.at : self.at + self.rows]


def packed_part(weight: Tensor, part: Part) -> Tensor:
    """Our packed layout uint8 `[rows, packed_width(columns, 2)]` of a part of stored codes. Raises ValueError for what
    is no ternary matrix."""
    return pack_codes(part.of(read_codes(weight)), 2, checked=False)


def quantized_part(weight: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """The same of latent floats `[N, K]`, with the scale float32 `[1, 1]` of the whole matrix."""
    codes, scale = _by_one_thread(lambda: kernels.quantize_weight(weight, "ternary"))
    return pack_codes(part.of(codes), 2, checked=False), scale


def _by_one_thread(call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What a call gives whose sums are added in one order, however many threads a process of vLLM has.

    vLLM binds those of its own thread to cores and replaces `torch.set_num_threads`; a thread of ours has a number of
    its own.
    """

    def run() -> tuple[Tensor, Tensor]:
        before = torch.get_num_threads()
        torch._C.set_num_threads(1)
        try:
            return call()
        finally:
            torch._C.set_num_threads(before)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def exact_bias(stored: Tensor, scale: Tensor, form: Form) -> Tensor:
    """The bias float64 `[rows]` of a stored one, which the form packed divided by the scale; both of the same rows."""
    return stored.double() * scale.view(-1).double() if form == "packed" else stored.double()


__all__ = ["Part", "exact_bias", "packed_part", "quantized_part", "read_scale"]
