"""Parameters narrower than float32: their window's gradient is accumulated in float32, and a float32 master of each may
be what the optimizer moves.

In bfloat16 a sum of k micro-batches rounds k times to three digits, and a step smaller than 1/512 of its parameter is
no step at all. A master stands in the optimizer's groups in its parameter's place, so that the optimizer's state is
float32 too; after each step it is rounded into the parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.errors import ConfigError
from trainer.gradient import norms
from trainer.gradient.report import Number
from trainer.settings import GradientSettings

NARROW = (torch.bfloat16, torch.float16)


def of_model(parameter: Tensor) -> Tensor:
    """The model's parameter that a master stands for; any other tensor stands for itself."""
    model_parameter: Tensor = getattr(parameter, "stands_for", parameter)
    return model_parameter


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """What the parameter's gradient is accumulated in."""
    return parameter.grad_dtype or parameter.dtype


class Narrow:
    """All narrow parameters of one step's optimizers."""

    def __init__(self, settings: GradientSettings) -> None:
        self._accumulates = settings.accumulate_in == "float32"
        self._wants_masters = settings.master_parameters
        self._masters: dict[int, list[Tensor]] = {}
        self._cast: dict[int, list[Tensor]] = {}
        self._versions: dict[int, int] = {}
        self._wide: list[tuple[Tensor, Tensor]] = []
        self.any = False
        """Whether there is one that needs something of this class; else none of it is called."""

    def take(self, optimizers: Sequence[Optimizer]) -> None:
        """Look through the groups, as one was added: put masters in, and let gradients be float32."""
        for optimizer in optimizers:
            masters, cast = [], []
            for group in optimizer.param_groups:
                for place, parameter in enumerate(group["params"]):
                    if self._wants_masters and parameter.dtype in NARROW:
                        parameter = group["params"][place] = _master(parameter, optimizer)
                    if hasattr(parameter, "stands_for"):
                        masters.append(parameter)
                        self._versions.setdefault(id(parameter), of_model(parameter)._version)
                    # A float16 parameter needs a master: cast back to its range, a sum in float32 could overflow.
                    elif not self._accumulates or parameter.dtype is not torch.bfloat16:
                        continue
                    else:
                        cast.append(parameter)
                    if self._accumulates:
                        _accumulate_wide(of_model(parameter))
            self._masters[id(optimizer)], self._cast[id(optimizer)] = masters, cast
        self.any = any(self._masters.values()) or any(self._cast.values())

    def follow(self) -> None:
        """A parameter that somebody else has written to since (a load, an edit by hand) is its master's new value."""
        for master in self._all() if self.any else ():
            parameter = of_model(master)
            if parameter._version != self._versions[id(master)]:
                with torch.no_grad():
                    master.copy_(parameter)
                self._versions[id(master)] = parameter._version

    def before(self, optimizer: Optimizer, factor: Number) -> Number:
        """Hand the gradients to the masters, or cast them to their parameter's dtype; what is left of the factor."""
        for master in self._masters[id(optimizer)]:
            master.grad = of_model(master).grad
        cast = [p for p in self._cast[id(optimizer)] if p.grad is not None and p.grad.dtype is not p.dtype]
        if not cast:
            return factor
        # In float32 still, so that the gradient is rounded once.
        norms.scale([p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None], factor)
        for parameter in cast:
            gradient = parameter.grad
            if gradient is not None:
                self._wide.append((parameter, gradient))
                _give(parameter, gradient.to(parameter.dtype))
        return torch.ones_like(factor) if isinstance(factor, Tensor) else 1.0

    def after(self, optimizer: Optimizer) -> None:
        """Round the masters into their parameters; `.grad` as it was before."""
        moved = [master for master in self._masters[id(optimizer)] if master.grad is not None]
        if moved:
            with torch.no_grad():
                torch._foreach_copy_([of_model(master) for master in moved], moved)
            for master in moved:
                self._versions[id(master)] = of_model(master)._version
                master.grad = None
        for parameter, gradient in self._wide:
            _give(parameter, gradient)
        self._wide = []

    def state_dict(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masters, by their parameters' names."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        return {names[id(of_model(master))]: master.detach().clone() for master in self._all()}

    def load_state_dict(self, state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Masters that were not saved take their parameters' values."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.follow()
        for master in self._all():
            saved = state.get(names[id(of_model(master))])
            if saved is not None:
                with torch.no_grad():
                    master.copy_(saved)
                    of_model(master).copy_(master)
                self._versions[id(master)] = of_model(master)._version

    def _all(self) -> list[Tensor]:
        return [master for masters in self._masters.values() for master in masters]


def _master(parameter: Tensor, optimizer: Any) -> Tensor:
    """A float32 copy that stands for the parameter, with its state where there is one."""
    if callable(getattr(optimizer, "eval", None)):
        raise ConfigError(
            f"{type(optimizer).__name__} writes other numbers into its parameters for evaluation, which masters would "
            "not pass on: set master_parameters=false."
        )
    master = parameter.detach().to(torch.float32).requires_grad_(True)
    master.stands_for = parameter  # type: ignore[attr-defined]
    state = getattr(optimizer, "state", {})
    if parameter in state:
        own = state.pop(parameter)
        state[master] = {
            name: value.float() if isinstance(value, Tensor) and value.dtype is parameter.dtype else value
            for name, value in own.items()
        }
    return master


def _accumulate_wide(parameter: Tensor) -> None:
    if parameter.grad_dtype is not torch.float32:
        gradient, parameter.grad = parameter.grad, None
        parameter.grad_dtype = torch.float32
        parameter.grad = None if gradient is None else gradient.float()


def _give(parameter: Tensor, gradient: Tensor) -> None:
    """Set a gradient of another dtype, which torch allows only where it was announced."""
    parameter.grad = None
    parameter.grad_dtype = gradient.dtype
    parameter.grad = gradient
