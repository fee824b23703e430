"""fp16's loss scale: what every seed of backward is multiplied with, so that small gradients stay above the smallest
numbers of float16. The step divides it out within the one number that it folds into the update anyway.

It follows torch's GradScaler: halved where a gradient overflows, doubled after so many steps without that. All its
values are powers of two, so that multiplying and dividing lose nothing. Unlike there it ends at 1: what overflows then
is the true gradient; and a loss that is not finite never changes it, as the scale has no part in that.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.gradient import skips
from trainer.gradient.norms import nonfinite_names
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.report import FREE_READS, Number, Report
from trainer.settings import GradientSettings

SMALLEST = 1.0
LARGEST = 2.0**64  # further than a gradient in float16 ever lets it come; what is folded with it stays a float32


class NoScale:
    """Where no loss scale is needed."""

    value: Number = 1.0
    shown: Number | None = None
    """The scale as a report says it."""

    def blame(self, window: OpenWindow, gradients: dict[str, Tensor]) -> str | None:
        """The sentence for a window that is skipped because of the scale; None where that is not why."""
        return None

    def blame_on(self, bad: Tensor, window: OpenWindow) -> Number:
        """The same as a flag (0 or 1) where the verdict `bad` lies on a device and is not to be read."""
        return 0.0

    def follow(self, taken: Number, overflowed: Number) -> None:
        """One window ended: `taken` and `overflowed` are 0 or 1, and both 0 where it was skipped for something else."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A state that was saved in another precision has nothing to say here."""


class LossScale(NoScale):
    """The scale and the steps since it last changed: floats on the CPU, elsewhere tensors that nobody reads.

    Args:
        initial: the first scale, a power of two.
        interval: steps without an overflow after which it is doubled.
    """

    def __init__(self, initial: float, interval: int, device: torch.device) -> None:
        self._interval = interval
        self._device = None if device.type in FREE_READS else device
        self.value = self._placed(initial)
        self._good = self._placed(0.0)

    @property
    def shown(self) -> Number:  # type: ignore[override]
        return self.value

    def blame(self, window: OpenWindow, gradients: dict[str, Tensor]) -> str | None:
        if not window.losses_are_finite or not all(math.isfinite(value) for _, _, value in window.losses()):
            return None
        if window.summed is not None and window.summed.has_bad_loss is not None and bool(window.summed.has_bad_loss):
            return None
        if float(self.value) <= SMALLEST or not any(window.weights().values()):
            return None
        bad = nonfinite_names(gradients)
        more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
        return _sentence(float(self.value), f" in the gradient of {bad[0]}{more}" if bad else " in the gradient's norm")

    def blame_on(self, bad: Tensor, window: OpenWindow) -> Number:
        if window.summed is not None and window.summed.has_bad_loss is not None:
            finite = 1.0 - window.summed.has_bad_loss
        else:
            losses = [torch.as_tensor(value, device=bad.device) for _, _, value in window.losses()]
            finite = torch.stack(losses).isfinite().all() if losses else torch.ones_like(bad)
        flag = bad * finite * (self.value > SMALLEST)
        nothing = window.weighs_nothing_on(bad.device)
        return flag if nothing is None else flag * (1.0 - nothing)

    def follow(self, taken: Number, overflowed: Number) -> None:
        good = (self._good + taken) * (1.0 - overflowed)
        value = self.value * (1.0 - 0.5 * overflowed)
        if isinstance(good, Tensor) and isinstance(value, Tensor):
            grows = good >= self._interval
            self.value = torch.where(grows, (value * 2.0).clamp(max=LARGEST), value)
            self._good = torch.where(grows, 0.0, good)
        elif good >= self._interval:
            self.value, self._good = min(float(value) * 2.0, LARGEST), 0.0
        else:
            self.value, self._good = value, good

    def state_dict(self) -> dict[str, float]:
        return {"scale": float(self.value), "good": float(self._good)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.value, self._good = self._placed(state["scale"]), self._placed(state["good"])

    def _placed(self, number: float) -> Number:
        if self._device is None:
            return float(number)
        return torch.full((), number, dtype=torch.float32, device=self._device)


def loss_scale_for(
    precision: str, settings: GradientSettings, parameters: Mapping[str, Tensor], device: torch.device
) -> NoScale:
    """A loss scale where the precision needs one. Raises ConfigError for what cannot go with it."""
    if precision != "fp16":
        return NoScale()
    if settings.nonfinite == "allow":
        raise ConfigError(
            "nonfinite=allow cannot go with precision=fp16, whose loss scale is found by what overflows: set skip or "
            "raise."
        )
    for name, parameter in parameters.items():
        if parameter.dtype is torch.float16 and parameter.grad_dtype is not torch.float32:
            raise ConfigError(
                f"precision=fp16, but the parameter '{name}' is float16 itself, and its gradient would vanish when the "
                "loss scale is taken out of it: leave the model in float32, or set master_parameters=true."
            )
    return LossScale(settings.loss_scale, settings.loss_scale_interval, device)


def reason_on_device(report: Report, bad_ranks: Tensor | None = None) -> str:
    """The sentence for a skip whose verdict was never read: what is still known when somebody asks."""
    if report.overflowed and report.loss_scale is not None:
        return _sentence(report.loss_scale)
    return skips.reason_on_device(report.weights, bad_ranks)


def _sentence(scale: float, where: str = "") -> str:
    return f"the loss scale {int(scale)} overflowed{where}, now {int(scale / 2)}"
