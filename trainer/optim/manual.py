"""The tutorial's update by hand: `parameter -= lr * parameter.grad` under no_grad, and nothing else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from trainer import kernels
from trainer.errors import ConfigError
from trainer.optim.groups import check_options


class Manual(Optimizer):
    """Gradient descent without momentum, decay or state.

    It is an Optimizer so that groups, schedules and checkpoints treat it as any other; what it does is `update`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        if not lr >= 0:
            raise ConfigError(f"Manual: lr={lr} is not possible: it must be zero or more.")
        with kernels.without_compiler():
            super().__init__(params, {"lr": float(lr)})
        check_options(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """`parameter -= lr * parameter.grad` for each parameter that has a gradient.

        In two roundings, as the line is written: one pass with alpha=lr would fuse them.
        """
        with torch.no_grad():
            for group in self.param_groups:
                parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
                if not parameters:
                    continue
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_sub_(parameters, torch._foreach_mul(gradients, group["lr"]))
