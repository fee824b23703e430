"""The transforms of a step, run in the order they were given, on windows whose gradient was found finite."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.errors import CheckpointError, ConfigError, GradientError
from trainer.gradient.norms import nonfinite_names
from trainer.gradient.report import Number, Report

Gradients = dict[str, Tensor]


class Transform(Protocol):
    """A callable over (gradients, report).

    `gradients` are the true ones of the window, summed over ranks, by parameter name; those that are there. It changes
    them in place, puts others into the dict, or returns a mapping of those that it replaces. None in the place of a
    gradient means that the optimizer gets none for it, so that nothing moves the parameter. `report.clocks` are the
    counts before this step. Every rank must come to the same.

    It may also have:

    - `bind(parameters)`: called with the parameters by name before the first window, and when they are others.
    - `state_dict()`, `load_state_dict(state)`: numbers and tensors, saved with the step.
    """

    def __call__(self, gradients: Gradients, report: Report, /) -> Mapping[str, Tensor | None] | None: ...


class Transforms:
    """Transforms one after another, and their state. It runs for windows that become a step, and for no other."""

    def __init__(self, transforms: Sequence[Transform], parameters: Mapping[str, Tensor], allow: bool) -> None:
        for transform in transforms:
            if isinstance(transform, type) or not callable(transform):
                raise ConfigError(
                    f"the gradient transform {transform!r} cannot be called with (gradients, report): give a function "
                    "or an instance with __call__."
                )
        self._all = tuple(transforms)
        self._allow = allow
        self._bound: Mapping[str, Tensor] | None = None
        self._before: list[Any] | None = None
        self.taken: frozenset[str] = frozenset()
        """Parameters whose gradient was taken from the optimizer in the last step."""
        self._bind(parameters)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def names(self) -> list[str]:
        return [_name(transform) for transform in self._all]

    def _bind(self, parameters: Mapping[str, Tensor]) -> None:
        self._bound = parameters
        for transform in self._all:
            if hasattr(transform, "bind"):
                transform.bind(parameters)

    @torch.no_grad()
    def __call__(self, gradients: Gradients, parameters: Mapping[str, Tensor], report: Report) -> Gradients:
        """Run them; returns the gradients that there are then, which also lie in `.grad`.

        Raises GradientError for a gradient of another shape, dtype or device than its parameter's, or of no parameter.
        """
        if parameters is not self._bound:
            self._bind(parameters)
        self._before = self.state_dict()
        given = gradients
        for transform in self._all:
            shown = dict(gradients)
            changed = transform(shown, report)
            if changed is None:
                changed = {**dict.fromkeys(gradients), **shown}  # one that was taken out of the dict is there no more
            for name, gradient in changed.items():
                if gradient is not gradients.get(name):
                    _put(name, gradient, parameters, transform)
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        self.taken = frozenset(given.keys() - gradients.keys())
        return gradients

    def checked(self, norm: Number, gradients: Gradients) -> Number:
        """The norm of what they left. Raises GradientError where they made a finite gradient infinite or NaN."""
        if not self._allow and not math.isfinite(norm):
            bad = nonfinite_names(gradients)
            raise GradientError(
                f"the gradient was finite, and after its transforms ({', '.join(self.names)}) "
                f"{f'that of {bad[0]} is not' if bad else 'it is too large for its norm'}: the step was not taken."
            )
        return norm

    def put_back(self) -> None:
        """The window was cancelled: the states as they were before it."""
        if self._before is not None:
            self.load_state_dict(self._before)
            self._before = None

    def release(self) -> None:
        """The window has become a step."""
        self._before = None

    def state_dict(self) -> list[Any]:
        """[name, state] of each transform that has one: copies, as a checkpoint is written while the next step runs."""
        return [[_name(one), copy.deepcopy(one.state_dict())] for one in self._all if hasattr(one, "state_dict")]

    def adapted(self, state: Sequence[Any]) -> list[Any]:
        """The saved states for these transforms, where a run is to go on with others: what was not there begins."""
        left = [tuple(one) for one in state]
        found = []
        for name, own in self.state_dict():
            kept = next((one for one in left if one[0] == name), None)
            if kept is not None:
                left.remove(kept)
            found.append([name, own if kept is None else kept[1]])
        return found

    def check_fit(self, state: Sequence[Any]) -> None:
        """Raises CheckpointError where the saved states are those of other transforms."""
        saved = [name for name, _ in state]
        own = [_name(one) for one in self._all if hasattr(one, "state_dict")]
        if saved != own:
            raise CheckpointError(
                f"the checkpoint holds the state of the gradient transforms {_listed(saved)}, and this run's are "
                f"{_listed(own)}: give the transforms that it was saved with, in their order."
            )

    def load_state_dict(self, state: Sequence[Any]) -> None:
        self.check_fit(state)
        stateful: list[Any] = [one for one in self._all if hasattr(one, "state_dict")]
        for transform, (_, saved) in zip(stateful, state, strict=True):
            transform.load_state_dict(saved)


def _put(name: str, gradient: Any, parameters: Mapping[str, Tensor], transform: Transform) -> None:
    """Put what a transform made into `.grad`, if it fits."""
    parameter = parameters.get(name)
    who = f"the gradient transform {_name(transform)}"
    if parameter is None:
        raise GradientError(f"{who} returned a gradient for '{name}', which is no parameter under training.")
    if gradient is None:
        parameter.grad = None
        return
    if not isinstance(gradient, Tensor):
        raise GradientError(f"{who} returned {type(gradient).__name__} for '{name}': return a tensor or None.")
    fit = {"shape": parameter.shape, "dtype": parameter.grad_dtype or gradient.dtype, "device": parameter.device}
    for what, own in fit.items():
        given = getattr(gradient, what)
        if own != given:
            raise GradientError(
                f"{who} returned a gradient of {what} {_plain(given)} for '{name}', where it must be {_plain(own)}."
            )
    gradient = gradient.detach()
    parameter.grad = gradient if gradient.layout is torch.strided else gradient.coalesce()


def _name(transform: Any) -> str:
    return str(getattr(transform, "__name__", type(transform).__name__))


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
