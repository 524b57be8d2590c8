"""Keeping a run within its minutes: a machine that slows down, or becomes faster, changes how many steps there are.

What has a schedule over the steps (learning rate, strength of the quantizers) follows the share of the schedule that is
done. A decision (s, N), "from step s on there are to be N steps in all", leaves the share at s as it is and lets it
rise to 1 over the steps from s to N:

    p(t) = p_s + (1 - p_s) (t - s) / (N - s)      for s <= t, up to the next decision

The clock makes decisions and nothing else; they are part of the configuration, so a run that is resumed repeats the
uninterrupted one bit for bit.
"""

import statistics
from dataclasses import dataclass, field

Pace = tuple[tuple[int, int], ...]
"""Decisions (step, steps in all) in order; empty for a run whose steps were never changed, else the first is at 0."""
STEPS = 20
"""That a decision looks at, at least; of a short run a tenth."""
TOLERANCE = 0.03
"""Share of the steps that are left by which a plan may be wrong before it is changed."""


def place(step: int, steps: int, pace: Pace) -> tuple[float, int]:
    """Where a step stands in the schedule: at which place of how many."""
    share, begin, total = 0.0, 0, pace[0][1] if pace else steps
    for at, planned in pace[1:]:
        if at > step:
            break
        share += (1 - share) * (at - begin) / (total - begin)
        begin, total = at, planned
    if not begin:
        return step, total
    return (share + (1 - share) * (step - begin) / (total - begin)) * total, total


def decided(pace: Pace, steps: int, step: int, total: int) -> Pace:
    """The decisions of a run of so many `steps`, and that from `step` on there are to be `total`."""
    before = pace or ((0, steps),)
    return (*(each for each in before if each[0] < step), (step, total))


def check_pace(pace: Pace, steps: int) -> None:
    """Raise ValueError for decisions that no clock has made."""
    places = [at for at, _ in pace]
    good = not pace or (places[0] == 0 and places == sorted(set(places)) and all(at < total for at, total in pace))
    if not good or steps < 1:
        raise ValueError(f"pace is {pace}; it is written by --minutes, with steps in order and totals above them")


@dataclass
class Clock:
    """How a run with a deadline is doing. Seconds are those of `time.perf_counter`."""

    deadline: float
    step_seconds: float
    """As it was timed before the first step."""
    pause_seconds: float
    """Of a validation between the steps, as far as is known."""
    last_seconds: float
    """Of the last one, on a machine as fast as it was when that was timed."""
    interval: float
    """Between decisions."""
    last: float | None = None
    """When the step before ended, None before the first."""
    paused: float = 0.0
    """Seconds of pauses since then."""
    times: list[float] = field(default_factory=list)
    """Seconds of the steps since the last decision was thought of."""

    def pause(self, seconds: float) -> None:
        """A validation with what belongs to it took so long."""
        self.paused += seconds
        self.pause_seconds = seconds

    def decide(self, step: int, steps: int, eval_every: int, now: float) -> int | None:
        """Called before every step: how many there are to be in all, at least one more than are done; None where the
        plan is right. The median step counts: one that compiles, as behind the change to ternary, says nothing of those
        that come."""
        if self.last is not None:
            self.times.append(now - self.last - self.paused)
        self.last, self.paused = now, 0.0
        if len(self.times) < min(STEPS, max(1, steps // 10)) or sum(self.times) < self.interval:
            return None
        each = statistics.median(self.times)
        slower = max(1.0, each / self.step_seconds)
        self.times.clear()
        left = self.deadline - now - slower * self.last_seconds
        total = step + max(1, int(left / (each + self.pause_seconds / eval_every)))
        return None if abs(total - steps) <= max(1.0, TOLERANCE * (steps - step)) else total
