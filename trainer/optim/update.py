"""How a finished gradient reaches the parameters: one number and one flag, whatever the optimizer is.

The number is what the gradient must still be multiplied with (divisor and clip folded into one), the flag says that the
step is not taken. Torch's fused optimizers take both inside their kernel; every other optimizer gets one foreach pass,
and the flag is read.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from trainer import kernels
from trainer.errors import ConfigError
from trainer.gradient import norms
from trainer.gradient.narrow import Narrow, of_model
from trainer.optim.builders import fit_for_fused
from trainer.optim.manual import Manual

_FUSED = (Adam, AdamW, SGD, Adagrad)


def as_optimizers(optimizer: Any) -> list[Optimizer]:
    """One optimizer or a sequence of them, checked. Raises ConfigError for what cannot take a step from gradients."""
    optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    if not optimizers:
        raise ConfigError("the sequence of optimizers is empty: give at least one.")
    for one in optimizers:
        if isinstance(one, type):
            raise ConfigError(f"the optimizer is the class {one.__name__}: give an instance of it.")
        if not callable(getattr(one, "step", None)) or not hasattr(one, "param_groups"):
            raise ConfigError(
                f"{type(one).__name__} is no optimizer: it needs param_groups and step() as torch.optim.Optimizer has."
            )
        wanted = _asks_for(one)
        if wanted is not None:
            raise ConfigError(
                f"{type(one).__name__} evaluates the window again inside its step (it asks for a {wanted}), which a "
                "window that is accumulated and checked once cannot serve: use one that steps from gradients alone."
            )
    return optimizers


def _asks_for(optimizer: Any) -> str | None:
    """What step() cannot do without, if anything."""
    # SAM as it is usually written takes closure=None and then refuses it; its two halves tell it apart.
    if isinstance(optimizer, LBFGS) or (hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")):
        return "closure"
    try:
        # Of the class: a scheduler of torch wraps the instance's, whose signature then has a self.
        _, *parameters = inspect.signature(type(optimizer).step).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return None
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return next((p.name for p in parameters if p.default is p.empty and p.kind not in optional), None)


def is_fused(optimizer: Optimizer) -> bool:
    """Whether `grad_scale` and `found_inf` are read by its kernel: the very class, and every group says fused."""
    return type(optimizer) in _FUSED and all(group.get("fused") for group in optimizer.param_groups)


def could_be_fused(optimizer: Optimizer) -> bool:
    """Whether torch has a fused kernel for it that its maker did not ask for."""
    groups = optimizer.param_groups
    return (
        type(optimizer) in _FUSED
        and not is_fused(optimizer)
        and not any(group.get("differentiable") for group in groups)
        and fit_for_fused(type(optimizer), (parameter for group in groups for parameter in group["params"]))
    )


class Update:
    """One optimizer, applied."""

    def __init__(self, optimizer: Optimizer, narrow: Narrow | None = None) -> None:
        self.optimizer = optimizer
        self._narrow = narrow
        self._scale = torch.ones(())

    def apply(self, factor: float) -> None:
        """Take the step with gradients times `factor`. Only called when the step is to be taken."""
        if self._narrow is None or not self._narrow.any:
            self._apply(factor)
            return
        try:
            self._apply(float(self._narrow.before(self.optimizer, factor)))
        finally:
            self._narrow.after(self.optimizer)

    def _apply(self, factor: float) -> None:
        optimizer = self.optimizer
        if type(optimizer) is Manual and not kernels.has_hooks(optimizer):
            if factor != 1.0:
                norms.scale(self.gradients(), factor)  # `.grad` is then what the parameters moved by, as everywhere
            optimizer.update()
            return
        # The kernel divides by the scale, a float32: below 1 it could overflow after the check.
        if 1e-38 < factor <= 1.0 and kernels.can_update_directly(optimizer):
            scale = None if factor == 1.0 else self._scale.fill_(1.0 / factor)
            if kernels.update_directly(optimizer, scale):
                return
        if factor != 1.0:
            norms.scale(self.gradients(), factor)
        self._step()

    def apply_if_finite(self, factor: Tensor, flag: Tensor) -> None:
        """The same where the flag (float32, exactly 0 or 1) lies on a device and is not to be read.

        Only where `defers` says so.
        """
        if self._narrow is None or not self._narrow.any:
            self._apply_if_finite(factor, flag)
            return
        try:
            self._apply_if_finite(torch.as_tensor(self._narrow.before(self.optimizer, factor)), flag)
        finally:
            self._narrow.after(self.optimizer)

    def _apply_if_finite(self, factor: Tensor, flag: Tensor) -> None:
        optimizer = self.optimizer
        optimizer.grad_scale = factor.reciprocal().to(torch.float32)  # type: ignore[attr-defined]
        optimizer.found_inf = flag  # type: ignore[attr-defined]
        try:
            self._step()
        finally:
            # Left in place, the next step of somebody else would be scaled by them.
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    def _step(self) -> None:
        """The optimizer's own step."""
        optimizer = self.optimizer
        if not is_fused(optimizer):
            kernels.step(optimizer)
            return
        apart = [group for group in optimizer.param_groups if self._beyond_fused(group)]
        for group in apart:
            group["fused"] = False
        try:
            kernels.step(optimizer)
        finally:
            for group in apart:
                group["fused"] = True
        for group in optimizer.param_groups:
            kernels.mark_changed([parameter for parameter in group["params"] if parameter.grad is not None])

    def _beyond_fused(self, group: dict[str, Any]) -> bool:
        """Whether torch's fused kernel would raise where the unfused one works: a sparse gradient, and in SGD momenta
        of which some are made and others are not, as when a parameter joins later; or would not move all of it."""
        with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
        if any(kernels.fused_skips_elements(type(self.optimizer), parameter) for parameter in with_gradient):
            return True
        if any(parameter.grad.layout is not torch.strided for parameter in with_gradient):
            return True
        if not group.get("momentum"):
            return False
        state = self.optimizer.state
        made = [state.get(parameter, {}).get("momentum_buffer") is not None for parameter in with_gradient]
        return any(made) and not all(made)

    def defers(self) -> bool:
        """Whether a step could be taken without reading the flag: the kernel reads it, and skipping in it is safe.

        On the step that makes the state it is not: fused SGD would keep uninitialised momentum, AdamW a state.
        """
        return is_fused(self.optimizer) and self._takes_both() and self._is_ready()

    def gradients(self) -> list[Tensor]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _takes_both(self) -> bool:
        # grad_scale is read as float32 only: it raises on float64 parameters.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kind = type(self.optimizer)
        return not any(p.dtype is torch.float64 or kernels.fused_skips_elements(kind, p) for p in parameters)

    def _is_ready(self) -> bool:
        for group in self.optimizer.param_groups:
            stateless = group.get("momentum") == 0
            for parameter in group["params"]:
                gradient = of_model(parameter).grad
                if gradient is None:
                    continue
                if gradient.layout is not torch.strided:
                    return False
                state = self.optimizer.state.get(parameter)
                if not stateless and (not state or ("momentum" in group and state.get("momentum_buffer") is None)):
                    return False
        return True
