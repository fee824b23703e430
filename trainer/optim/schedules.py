"""Schedules: pure functions from a count to the factor of each group's own learning rate.

A schedule is called with the number of ticks that its clock has behind it, so the first step sees 0. It takes a float,
or a 0-dim float64 tensor on a device where no read may wait, and answers with the same. It holds no state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.gradient.report import Number

_CLOCKS = ("steps", "rows", "tokens")


@dataclass(frozen=True)
class Schedule:
    """factor(count), following a clock of what was taken (steps, rows or tokens)."""

    shape: Callable[[Number], Number]
    clock: str = "steps"
    says: str = ""

    def __post_init__(self) -> None:
        if self.clock not in _CLOCKS:
            raise ConfigError(
                f"schedule.clock={self.clock!r} is not possible: a schedule follows what was taken, one of "
                f"{', '.join(_CLOCKS)}."
            )

    def __call__(self, count: Number) -> Number:
        return self.shape(count)

    def __repr__(self) -> str:
        return f"{self.says} over {self.clock}"


def constant(warmup: int = 0, clock: str = "steps") -> Schedule:
    """1, after a linear warm-up from 1 / warmup."""
    _check_count("warmup", warmup, 0)
    return Schedule(lambda count: _warm(count, warmup, 1.0), clock, f"constant, warm-up {warmup}")


def linear(total: int | None = None, warmup: int = 0, end: float = 0.0, clock: str = "steps") -> Schedule:
    """Warm-up, then a straight line from 1 at `warmup` to `end` at `total`."""
    total = _check(total, warmup, 0, end)

    def shape(count: Number) -> Number:
        return _warm(count, warmup, 1.0 - (1.0 - end) * _progress(count, warmup, total))

    return Schedule(shape, clock, f"linear to {end:g} at {total}, warm-up {warmup}")


def cosine(total: int | None = None, warmup: int = 0, end: float = 0.0, clock: str = "steps") -> Schedule:
    """Warm-up, then half a cosine from 1 at `warmup` to `end` at `total` (Loshchilov and Hutter 2017)."""
    total = _check(total, warmup, 0, end)

    def shape(count: Number) -> Number:
        half = 0.5 * (1.0 + _cos(_progress(count, warmup, total) * math.pi))
        return _warm(count, warmup, end + (1.0 - end) * half)

    return Schedule(shape, clock, f"cosine to {end:g} at {total}, warm-up {warmup}")


def wsd(total: int | None = None, warmup: int = 0, decay: int = 0, end: float = 0.0, clock: str = "steps") -> Schedule:
    """Warm-up, a stable 1, then a straight line to `end` over the last `decay` ticks (Hu et al. 2024)."""
    total = _check(total, warmup, decay, end)

    def shape(count: Number) -> Number:
        return _warm(count, warmup, 1.0 - (1.0 - end) * _progress(count, total - decay, total))

    return Schedule(shape, clock, f"stable, then to {end:g} in the last {decay} of {total}, warm-up {warmup}")


def _check_count(name: str, count: Any, least: int) -> None:
    if not isinstance(count, int | float) or not math.isfinite(count) or count != int(count):
        raise ConfigError(f"schedule.{name}={count!r} is not possible: it must be a whole number.")
    if count < least:
        raise ConfigError(f"schedule.{name}={count} is not possible: it must be {least or 'zero'} or more.")


def _check(total: int | None, warmup: int, decay: int, end: float) -> int:
    _check_count("warmup", warmup, 0)
    _check_count("decay", decay, 0)
    if total is None:
        raise ConfigError("schedule.total is not given, and no limit tells it: set schedule.total, or limits.steps.")
    _check_count("total", total, 1)
    if warmup + decay > total:
        raise ConfigError(
            f"schedule: warm-up and decay take {warmup + decay} of {total} ticks: total must be as long as they are."
        )
    if not isinstance(end, int | float) or not 0 <= end < math.inf:
        raise ConfigError(f"schedule.end={end!r} is not possible: it must be a number that is zero or more.")
    return total


def _progress(count: Number, start: int, stop: int) -> Number:
    """How far count is between start and stop, from 0 to 1."""
    if stop <= start:
        return _select(count, start, 0.0, 1.0)
    share = (count - start) / (stop - start)
    return share.clamp(0.0, 1.0) if isinstance(share, Tensor) else min(1.0, max(0.0, share))


def _warm(count: Number, warmup: int, after: Number) -> Number:
    """(count + 1) / warmup while count < warmup, then `after`."""
    return _select(count, warmup, (count + 1) / warmup, after) if warmup else after


def _select(count: Number, bound: float, below: Any, other: Any) -> Number:
    if isinstance(count, Tensor):
        # Numbers are filled in, not copied, so that a device need not be waited for.
        low, high = (x if isinstance(x, Tensor) else torch.full_like(count, x) for x in (below, other))
        return torch.where(count < bound, low, high)
    chosen: Number = below if count < bound else other
    return chosen


def _cos(value: Number) -> Number:
    return value.cos() if isinstance(value, Tensor) else math.cos(value)
