"""The paths that are certified: a step as it is configured, or a loop that somebody else wrote.

A path leaves its gradient for one window; what it changed is put back by whoever calls it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer import kernels
from trainer.activations.segments import verified
from trainer.certificate.batches import copied
from trainer.certificate.compare import UNIT
from trainer.certificate.reference import Gradient, read
from trainer.errors import ConfigError
from trainer.gradient.invariants import writes
from trainer.settings import GradientSettings, step_settings
from trainer.step import Step

Loop = Callable[[Any, Sequence[Any]], Any]


class Path(Protocol):
    """Something that computes a window's gradient."""

    settings: Mapping[str, str]
    """What can be switched off, by name, with its value."""
    takes_draws: bool
    """Whether it draws in the same order as the reference, so that the draws of both can be equal."""

    def __call__(self, window: Sequence[Any], off: frozenset[str], look: Callable[[], None]) -> Gradient:
        """The gradient by parameter name with some settings off; `look` is called while buffers are as it left them."""

    def back_off(self) -> bool:
        """After an overflow: try again with a lower loss scale? False where there is none."""

    def rounding(self, reference: Gradient) -> dict[str, float]:
        """What the way to read the gradient adds to its rounding, ‖error‖ per parameter."""


class StepPath:
    """A `Step` with its settings, up to the true gradient.

    Args:
        parameters: those under training, by name.
        settings: keywords of `Step`.
    """

    takes_draws = True

    def __init__(
        self, model: Any, objective: Any, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> None:
        self._model, self._objective, self._parameters = model, objective, parameters
        self._keywords = dict(settings)
        self._loss_scale: float | None = None
        self.writes: dict[str, int] = {}
        """How often the gradient of each parameter was written, as it is configured."""
        self.settings: Mapping[str, str] = {
            name: str(value) for name, value in settings.items() if name in _OFF and not _is_off(name, value)
        }

    def __call__(self, window: Sequence[Any], off: frozenset[str], look: Callable[[], None]) -> Gradient:
        keywords = {**self._keywords, **{name: _OFF[name] for name in off if name in _OFF}}
        if "activation_checkpointing" in keywords:
            keywords["activation_checkpointing"] = verified(keywords["activation_checkpointing"])
        if self._loss_scale is not None:
            gradient = replace(self._asked(), loss_scale=self._loss_scale)
            keywords = {n: value for n, value in keywords.items() if n not in GradientSettings.__dataclass_fields__}
            keywords["gradient"] = gradient
        with kernels.without_compiler():
            # Of the optimizer only its parameters matter, and the user's own must not be touched.
            optimizer = torch.optim.SGD(list(self._parameters.values()), lr=0.0)
        step = Step(self._model, self._objective, optimizer, **keywords)
        found = self._gradient(step, window, look)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        by_step = step.parameters.by_name
        return {names[id(by_step[name])]: gradient for name, gradient in found.items()}

    def back_off(self) -> bool:
        """After an overflow in fp16: a lower loss scale, as the steps of a run find it; False where there is none."""
        if self._keywords.get("precision") != "fp16" or self._loss_scale == 1.0:
            return False
        self._loss_scale = max(1.0, (self._loss_scale or self._asked().loss_scale) / 16)
        return True

    def _asked(self) -> GradientSettings:
        toggles = {n: value for n, value in self._keywords.items() if n in GradientSettings.__dataclass_fields__}
        return step_settings(self._keywords.get("gradient"), toggles)

    def _gradient(self, step: Step, window: Sequence[Any], look: Callable[[], None]) -> Gradient:
        try:
            with writes(self._parameters) as counts:
                for micro_batch in window:
                    step.accumulate(micro_batch, window)
            self.writes = self.writes or counts
            found = step.gradient(window)
            look()
            return found
        finally:
            step.cancel()

    def rounding(self, reference: Gradient) -> dict[str, float]:
        return {}


_OFF: dict[str, Any] = {"activation_checkpointing": None, "precision": "fp32", "ranks": None}


def _is_off(name: str, value: Any) -> bool:
    if name == "ranks":
        return value is None or value.world_size == 1
    return value == _OFF[name] or (name == "precision" and value == "fp64") or getattr(value, "mode", "") == "none"


class LoopPath:
    """A loop that is given a model and micro-batches, and leaves `.grad` or takes one SGD step.

    Args:
        lr: of the SGD step; the gradient is then (before - after) / lr.
    """

    settings: Mapping[str, str] = {}
    takes_draws = False

    def back_off(self) -> bool:
        return False

    def __init__(self, model: Any, loop: Loop, parameters: Mapping[str, Tensor], lr: float | None) -> None:
        self._model, self._loop, self._parameters, self._lr = model, loop, parameters, lr
        self._stepped: dict[str, float] = {}

    def __call__(self, window: Sequence[Any], off: frozenset[str], look: Callable[[], None]) -> Gradient:
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.grad = None
        self._loop(self._model, [copied(one) for one in window])
        look()
        moved = {n for n, parameter in self._parameters.items() if not torch.equal(parameter.detach(), before[n])}
        if self._lr is None:
            found = read(self._parameters)
            if not found:
                raise ConfigError(
                    "the loop left no .grad"
                    + (", but it moved parameters: give the lr of its SGD step (lr=)." if moved else ".")
                )
            return found
        found = {}
        for name, parameter in self._parameters.items():
            found[name] = (before[name].double() - parameter.detach().double()) / self._lr
            unit = UNIT.get(parameter.dtype, 0.0)
            self._stepped[name] = unit * float(before[name].double().norm()) / self._lr
        return found

    def rounding(self, reference: Gradient) -> dict[str, float]:
        return self._stepped
