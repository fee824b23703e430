"""A vector-Jacobian product: y = [x0², x1³] is no scalar, so backward starts from a vector. trainer train recipe=vjp"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.data import Split
from trainer.errors import ConfigError
from trainer.gradient.objective import Cotangents


def two(key: str, numbers: Sequence[float]) -> list[float]:
    """Two numbers of the config. Raises ConfigError for anything else."""
    if not isinstance(numbers, list | tuple) or len(numbers) != 2 or not all(type(n) in (int, float) for n in numbers):
        raise ConfigError(f"{key}={numbers} is not possible: write two numbers, {key}=[1,0.5].")
    return [float(number) for number in numbers]


class Powers:
    """The leaf tensor x of shape (2,), and y = [x0², x1³] of shape (2,)."""

    def __init__(self, x: Sequence[float]) -> None:
        self.x = torch.tensor(two("model.x", x), requires_grad=True)

    def forward(self) -> Tensor:
        return torch.stack((self.x[0] ** 2, self.x[1] ** 3))


def vectors(v: Sequence[float]) -> Split:
    """The data are the vectors: one row, of shape (1, 2)."""
    rows = (torch.tensor([two("data.source.v", v)]),)
    return Split(train=rows, evaluation=rows)


def products(model: Powers, micro_batch: tuple[Tensor]) -> Cotangents:
    """vᵀJ for each row v of the micro-batch, each with weight 1: backward starts at y, from v."""
    (v,) = micro_batch
    return Cotangents(outputs=model.forward().expand_as(v), vector=v, weight=len(v))


class Product:
    """A logger that shows what the last step left in `x.grad`, and how it comes out by hand."""

    def __init__(self, v: Sequence[float]) -> None:
        self.v = list(v)
        self.model: Any = None

    def evaluate(self, event: Any, model: Any) -> None:
        self.model = model

    def stop(self, event: Any) -> None:
        if self.model is None or self.model.x.grad is None:
            return
        (x0, x1), (left, right) = self.model.x.tolist(), self.model.x.grad.tolist()
        sys.stdout.write(
            f"  at x = [{x0:g}, {x1:g}] the Jacobian of y = [x0², x1³] is [[{2 * x0:g}, 0], [0, {3 * x1 * x1:g}]]\n"
            f"  x.grad = vᵀJ = [{left:g}, {right:g}] for v = [{self.v[0]:g}, {self.v[1]:g}]\n"
        )
