"""What another thread can do between any two instructions of a function, done there."""

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


def between_instructions(call: Callable[[], object], code: CodeType, act: Callable[[], object]) -> int:
    """Make a call once for each instruction of `code` that it runs, with `act()` in front of that one. Returns how many
    they were; raises what a call raises."""
    count = 0
    while True:
        left = [count]

        def trace(frame: FrameType, event: str, argument: Any, left: list[int] = left) -> Any:
            if frame.f_code is not code:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if left[0] == 0:
                    act()
                left[0] -= 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
        if left[0] >= 0:
            return count
        count += 1
