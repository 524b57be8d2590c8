"""What this machine allows at most: reading memory, and integer multiply-adds on registers."""

import time
from collections.abc import Callable

from bitnet.kernels.cpu import native


def timed(function: Callable[..., int], *arguments: int) -> tuple[float, int]:
    """Seconds of one call, and its result."""
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def integer_peak(threads: int, seconds: float) -> float:
    """GOPS of multiply-adds on registers with the instruction set in force: best of five runs of `seconds` each."""
    peak, rounds = native.kernels().peak, 256
    # Long enough that starting the threads does not count.
    while timed(peak, rounds, threads)[0] < seconds:
        rounds *= 2
    return max(operations / elapsed for elapsed, operations in (timed(peak, rounds, threads) for _ in range(5))) / 1e9


def read_bandwidth(threads: int, size: int = 2**30) -> float:
    """GB/s of one read through `size` bytes, best of five; from some hundred megabytes on no cache holds them."""
    library = native.library()
    assert library is not None
    block = native.huge_pages(size).fill_(1)
    return size / min(timed(library.bn_read, block.data_ptr(), size, threads)[0] for _ in range(5)) / 1e9
