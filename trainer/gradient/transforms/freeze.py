"""Freezing and thawing: parameters that do not move for a while, by name and clock."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from trainer.errors import ConfigError, did_you_mean
from trainer.gradient.clocks import DRAWN, TAKEN
from trainer.gradient.report import Report
from trainer.gradient.transforms.patterns import Patterns


class Freeze:
    """Takes the gradient of parameters away from the optimizer while the clock stands in [start, until).

    Without a gradient nothing moves them, neither weight decay nor momentum, and their optimizer state stays as it is.
    Their gradient still counts in `report.grad_norm`, but not in the norm of `clip_norm`.
    """

    def __init__(self, match: str | Sequence[str], start: int, until: int | None, clock: str) -> None:
        if clock not in (*DRAWN, *TAKEN):
            raise ConfigError(f"freeze: clock={clock!r} is not possible: {did_you_mean(clock, (*DRAWN, *TAKEN))}")
        for name, count in (("start", start), ("until", until)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise ConfigError(f"freeze: {name}={count!r} is not possible: give a count of {clock}, 0 or more.")
        if until is not None and until <= start:
            raise ConfigError(f"freeze: until={until} is not after start={start}: nothing would be frozen.")
        self._match = Patterns("freeze", match)
        self._start, self._until, self._clock = start, until, clock

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        self._match.find(parameters)

    def __call__(self, gradients: dict[str, Tensor], report: Report) -> dict[str, Tensor | None]:
        now = report.clocks[self._clock]
        if now < self._start or (self._until is not None and now >= self._until):
            return {}
        return {name: None for name in gradients if name in self._match}


class Thaw:
    """Several freezes, each to an end of its own."""

    def __init__(self, until: Mapping[str, int], clock: str) -> None:
        if not isinstance(until, Mapping) or not until:
            raise ConfigError(f"thaw: until={until!r} is not possible: write {{pattern: count}}.")
        self._freezes = [Freeze(pattern, 0, count, clock) for pattern, count in until.items() if count != 0]

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        for one in self._freezes:
            one.bind(parameters)

    def __call__(self, gradients: dict[str, Tensor], report: Report) -> dict[str, Tensor | None]:
        frozen: dict[str, Tensor | None] = {}
        for one in self._freezes:
            frozen |= one(gradients, report)
        return frozen


def freeze(match: str | Sequence[str], start: int = 0, until: int | None = None, clock: str = "steps") -> Freeze:
    """Freezes the parameters that match from `start` on, `until` the clock stands there (None: to the end).

    Args:
        match: names of parameters with wildcards.
        start, until: counts of the clock; the first step sees 0.
        clock: any clock of the run.
    """
    return Freeze(match, start, until, clock)


def thaw(until: Mapping[str, int], clock: str = "steps") -> Thaw:
    """Gradual unfreezing (Howard and Ruder 2018, ULMFiT): `{pattern: count}` thaws each pattern at its count.

    A parameter that several patterns match is frozen as long as one of them says.
    """
    return Thaw(until, clock)
