"""The gradient noise scale: how many rows a window needs before more of them stop to pay.

McCandlish, Kaplan, Amodei and others, "An Empirical Model of Large-Batch Training" (2018), appendix A: from the squared
norms of gradients over few and over many rows follow |G|², of the true gradient, and tr Σ, of one row's noise; the
scale is tr Σ / |G|². The micro-batches of a window are the few, the window the many. Both estimates scatter, and |G|²
may even come out negative, so it is their averages that are divided: the average of their ratios would be biased.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.diagnose.instrument import Instrument
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.report import Report
from trainer.gradient.weights import host_number

_REMEMBERED = 1_000
_NORMAL = 1.96


@dataclass(frozen=True)
class Scale:
    """An estimate in rows, with its 95 % interval; `high` is inf where |G|² may be zero as far as one can tell."""

    rows: float
    low: float
    high: float
    windows: int

    def __str__(self) -> str:
        high = f"{self.high:.0f}" if math.isfinite(self.high) else "any number"
        return f"noise scale {self.rows:.0f} rows (95 %: {self.low:.0f} to {high}, from {self.windows} windows)"


class NoiseScale(Instrument):
    """Called with the open window when one of its micro-batches is done; measures one of so many windows.

    It costs, in a window that is measured, a copy of the gradient and one pass over it for each micro-batch. Windows
    of one micro-batch, or of several terms, tell nothing and are left out.

    Args:
        step: whose parameters' gradients are looked at.
        every: one of so many windows is measured.
    """

    tags = ("gradient/noise_scale",)

    def __init__(self, step: Any, every: int) -> None:
        self._step = step
        self._every = every
        self._found: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        """(|G|², tr Σ) of each window that was measured."""
        self._before: list[Tensor] | None = None
        self._weight = self._rows = 0.0
        self._squares: list[tuple[float, float]] = []

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> list[str]:
        scale = self.scale()
        if scale is not None:
            report.measured["gradient/noise_scale"] = scale.rows
        return []

    def words(self) -> list[str]:
        scale = self.scale()
        return [] if scale is None else [f"{scale}: windows of fewer rows lose little"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "found": [list(pair) for pair in self._found],
            "window": {
                "before": self._before,
                "squares": [list(pair) for pair in self._squares],
                "weight": self._weight,
                "rows": self._rows,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._found = deque(((signal, noise) for signal, noise in state["found"]), maxlen=_REMEMBERED)
        window = state["window"]
        self._squares = [(square, rows) for square, rows in window["squares"]]
        self._weight, self._rows = window["weight"], window["rows"]
        before = window["before"]
        self._before = None if before is None else [one.to(self._step.device) for one in before]

    def __call__(self, window: OpenWindow, roots: list[Tensor]) -> None:
        drawn = window.drawn
        if drawn is None or len(drawn) < 2 or self._step.clocks.windows % self._every:
            return
        if window.micro_batches == 1:
            self._before, self._squares, self._weight, self._rows = None, [], 0.0, 0.0
        elif not self._squares:
            return  # the window was joined in its middle
        if len(window.terms) != 1 or not roots:
            self._squares = []
            return
        sums = next(iter(window.terms.values()))
        weight, rows = float(host_number(sums.weight)) - self._weight, window.rows - self._rows
        gradients = [one.grad.detach() for one in self._step.parameters.by_name.values() if one.grad is not None]
        same = self._before is not None and len(self._before) == len(gradients)
        if weight <= 0.0 or rows <= 0 or (window.micro_batches > 1 and not same):
            self._squares = []
            return
        own = gradients if self._before is None else list(torch._foreach_sub(gradients, self._before))
        unit = float(host_number(sums.divisor)) * float(host_number(window.loss_scale))
        self._squares.append((_square(own) * (unit / weight) ** 2, rows))
        self._weight, self._rows = self._weight + weight, self._rows + rows
        if window.micro_batches < len(drawn):
            self._before = [gradient.clone() for gradient in gradients]
            return
        self._add(_square(gradients) * (unit / self._weight) ** 2, self._rows)
        self._before = None

    def scale(self) -> Scale | None:
        """The estimate so far; None until two windows were measured, or while |G|² is not above zero."""
        count = len(self._found)
        if count < 2:
            return None
        signal = sum(pair[0] for pair in self._found) / count
        noise = sum(pair[1] for pair in self._found) / count
        if signal <= 0.0:
            return None
        rows = noise / signal
        # Fieller (1954): the interval of a ratio of means, which is open where the lower one may be zero.
        a, b, c = (sum(terms) / (count - 1) for terms in zip(*self._products(signal, noise), strict=True))
        unsure = _NORMAL**2 * a / (count * signal**2)
        if unsure >= 1.0:
            return Scale(rows, 0.0, math.inf, count)
        middle = rows - unsure * b / a if a else rows
        inside = c - 2 * rows * b + rows**2 * a - unsure * (c - b**2 / a if a else 0.0)
        half = _NORMAL / signal * math.sqrt(max(0.0, inside) / count)
        return Scale(rows, max(0.0, (middle - half) / (1 - unsure)), (middle + half) / (1 - unsure), count)

    def _products(self, signal: float, noise: float) -> list[tuple[float, float, float]]:
        away = [(pair[0] - signal, pair[1] - noise) for pair in self._found]
        return [(x * x, x * y, y * y) for x, y in away]

    def _add(self, whole: float, rows: float) -> None:
        """Solve the two equations E|g|² = |G|² + tr Σ / rows, over the micro-batches and over the window."""
        few = sum(square for square, _ in self._squares) / len(self._squares)
        inverse = sum(1.0 / count for _, count in self._squares) / len(self._squares)
        noise = (few - whole) / (inverse - 1.0 / rows)
        if math.isfinite(noise):
            self._found.append((whole - noise / rows, noise))


def _square(gradients: list[Tensor]) -> float:
    if not gradients:
        return 0.0
    parts = torch._foreach_norm([one.float() if one.dtype.itemsize < 4 else one for one in gradients])
    return float(torch.stack([part.double().to(parts[0].device) for part in parts]).square().sum())
