"""Bounds on processor time that hold on any machine, however slow or busy it is."""

import gc
import json
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
UNIT = 0.07
"""Seconds that `_work` takes on the machine for which bounds are given (AMD EPYC, AVX2, otherwise idle)."""


def _work() -> float:
    """Seconds of processor time that a fixed piece of work takes here and now: half JSON, half the interpreter."""
    start = time.process_time()
    value = {str(i): [i, i * 0.5, "x" * (i % 50)] for i in range(3000)}
    for _ in range(6):
        value = json.loads(json.dumps(value))
    sum(i * i for i in range(600_000))
    return time.process_time() - start


def within(seconds: float, call: Callable[[], Result], what: object = "") -> Result:
    """What `call` returns, which must take less than this of the process' own time.

    A call that took longer is measured again: beside the fixed piece of work, which says how slow the machine is at the
    moment, and without the garbage of earlier tests. It fails where that is over the bound too.
    """
    start = time.process_time()
    result = call()
    first = time.process_time() - start
    if first < seconds:
        return result
    gc.collect()
    before = _work()
    start = time.process_time()
    result = call()
    second = time.process_time() - start
    bound = seconds * max(1.0, before / UNIT, _work() / UNIT)
    assert second < bound, f"{first:.2f} and {second:.2f} s, {bound:.2f} are allowed: {what!r:.2000}"
    return result
