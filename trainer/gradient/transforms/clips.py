"""Clips as transforms, for where the toggles do not reach: of some parameters only, or before another transform."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from trainer.errors import ConfigError
from trainer.gradient import norms
from trainer.gradient.report import Report
from trainer.gradient.transforms.patterns import Patterns


class ClipByNorm:
    """Makes the gradients together smaller by one factor where their norm is larger than `largest`."""

    def __init__(self, largest: float, order: float, match: str | Sequence[str] | None) -> None:
        self._largest, self._order = above_zero("clip_by_norm", "largest", largest), float(order)
        if not self._order > 0:
            raise ConfigError(f"clip_by_norm: order={order!r} is not possible: give 2, any other above 0, or inf.")
        self._match = Patterns("clip_by_norm", match)

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        self._match.find(parameters)

    def __call__(self, gradients: dict[str, Tensor], report: Report) -> None:
        chosen = [gradient for name, gradient in gradients.items() if name in self._match]
        norms.scale(chosen, norms.clip_factor(norms.norm(chosen, self._order), self._largest))


class ClipByValue:
    """Clamps each element to ±`largest`."""

    def __init__(self, largest: float, match: str | Sequence[str] | None) -> None:
        self._largest = above_zero("clip_by_value", "largest", largest)
        self._match = Patterns("clip_by_value", match)

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        self._match.find(parameters)

    def __call__(self, gradients: dict[str, Tensor], report: Report) -> None:
        norms.clip_value([gradient for name, gradient in gradients.items() if name in self._match], self._largest)


def clip_by_norm(largest: float, order: float = 2.0, match: str | Sequence[str] | None = None) -> ClipByNorm:
    """Bounds the norm of the gradients that match, taken as one vector.

    Args:
        largest: the largest norm.
        order: of the norm; `inf` is the largest absolute value.
        match: names of parameters with wildcards; all by default.
    """
    return ClipByNorm(largest, order, match)


def clip_by_value(largest: float, match: str | Sequence[str] | None = None) -> ClipByValue:
    """Bounds each element of the gradients that match; of a complex one, both parts."""
    return ClipByValue(largest, match)


def above_zero(who: str, name: str, value: float) -> float:
    """Raises ConfigError for what is no finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{who}: {name}={value!r} is not possible: give a number above 0.")
    return float(value)
