"""What one launch of the kernels holds, known without Triton: a model beyond it runs in torch from the start.

Letters: H query heads, G key/value heads, D head_dim.
"""

MAX_WIDTH = 65_536
"""Values of a token, which one program quantizes."""
MAX_PROGRAMS = 65_535
"""Of a grid's second dimension."""
MAX_ROWS = 128 * MAX_PROGRAMS
"""Of a matrix, 128 to a program."""
MAX_HEAD_VALUES = 16_384
"""`head_values` of the largest tile of attention that was compiled; it fits the shared memory of every GPU of the
tests in every type."""


def attention_tile(heads: int, groups: int, width: int) -> tuple[int, int]:
    """Rows and columns that a program of `attention.attend` computes with for H, G and D; matrix instructions want 16
    rows at least. Raises ValueError for heads that cannot share keys."""
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key/value heads; give a multiple")
    rows, columns = (1 << (size - 1).bit_length() for size in (heads // groups, width))
    return 1 if rows == 1 else max(16, rows), max(16, columns)


def head_values(heads: int, groups: int, width: int) -> int:
    """Values of that tile, of 16 rows where there is one: keys and values come in tiles of as many positions."""
    rows, columns = attention_tile(heads, groups, width)
    return max(16, rows) * columns
