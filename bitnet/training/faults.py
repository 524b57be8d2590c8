"""What can go wrong in a step: a loss or gradient that is no number, a spike, a step that hangs; and what is done.

A bad step never touches the weights. The configuration says which remedy it has: `stop` raises Diverged; `skip` leaves
the update out and takes the next batch; `rewind` goes back to the last checkpoint and on with other batches, those
behind the bad one.
"""

import contextlib
import faulthandler
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.training.config import Remedy, TrainConfig

HISTORY = 64
"""Good steps that say what is usual; a spike is measured from a quarter of them on."""
MAX_FAULTS = 10
"""Skips or rewinds in a row, after which a run is beyond them."""


class Diverged(RuntimeError):
    """A step was bad and nothing can be done about it; the message says what was wrong and what to try."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step, and the remedy that the configuration has for it."""

    what: str
    remedy: Remedy


def find_fault(loss: float, norm: float, history: Sequence[tuple[float, float]], config: TrainConfig) -> Fault | None:
    """What is wrong with a step of this loss (nats a token) and gradient norm, after the last good ones."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return Fault(f"the loss is {loss} and the gradient norm {norm}", config.on_nan)
    if config.on_spike == "off" or len(history) < HISTORY // 4:
        return None
    usual_loss, usual_norm = (statistics.median(column) for column in zip(*history, strict=True))
    # A difference of losses is a ratio of perplexities.
    if loss - usual_loss > math.log(config.spike_factor) or norm > config.spike_factor * usual_norm:
        return Fault(
            f"the loss is {loss:.3f} and the gradient norm {norm:.3g}, usual are {usual_loss:.3f} and {usual_norm:.3g}",
            config.on_spike,
        )
    return None


def stop_if_hopeless(fault: Fault, in_a_row: int, step: int, config: TrainConfig, *, saved: bool) -> None:
    """Raise Diverged where a remedy is not wanted, has not helped, or has no checkpoint (`saved`) to go back to."""
    hopeless = in_a_row > MAX_FAULTS
    if not (fault.remedy == "stop" or hopeless or (fault.remedy == "rewind" and not saved)):
        return
    raise Diverged(
        f"step {step}: {fault.what}"
        + (f", after {MAX_FAULTS} remedies in a row" if hopeless else "")
        + f". Checkpoints are untouched; go on from the last one (--resume {config.out}), or begin anew if "
        f"there is none, with lower learning rates: --optim.lr {config.optim.lr / 2:g}"
        + (f" --optim.lr-rest {config.optim.lr_rest / 2:g}" if config.optim.lr_rest else "")
    )


def require_gradients(names: Mapping[Tensor, str], step: int, *, compiled: bool) -> None:
    """Raise Diverged where a backward pass left parameters, given with their names, without a gradient: they would stay
    as they are, silently."""
    lost = [name for parameter, name in names.items() if parameter.grad is None]
    if lost:
        raise Diverged(
            f"step {step}: no gradient reached {len(lost)} of {len(names)} parameters, {lost[0]} first"
            + (f"; torch {torch.__version__} compiles this model wrongly: train with --compile off" if compiled else "")
        )


@contextlib.contextmanager
def watchdog(minutes: float) -> Iterator[None]:
    """End the program, with the stack of every thread on stderr, if the block takes longer than this."""
    try:
        faulthandler.dump_traceback_later(minutes * 60, exit=True, file=sys.__stderr__ or 2)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
