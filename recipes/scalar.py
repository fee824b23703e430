"""The scalar workflow z = (w·x + b)² at x = 2, w = 3, b = 1, and its three derivatives. trainer train recipe=scalar"""

import sys
from typing import Any

import torch
from torch import Tensor

from trainer.data import Split


class Scalar:
    """Three numbers as leaf tensors of shape (), and what is computed from them."""

    def __init__(self, x: float, w: float, b: float) -> None:
        self.x = torch.tensor(float(x), requires_grad=True)
        self.w = torch.tensor(float(w), requires_grad=True)
        self.b = torch.tensor(float(b), requires_grad=True)

    def forward(self) -> Tensor:
        return (self.w * self.x + self.b) ** 2


def nothing() -> Split:
    """One row that nobody reads: z needs no data, but a step is taken on a micro-batch."""
    row = (torch.zeros(1),)
    return Split(train=row, evaluation=row)


def z(model: Scalar, micro_batch: Any) -> Tensor:
    """What is differentiated: z itself."""
    return model.forward()


class Derivatives:
    """A logger that shows what the last step left in `.grad`. Evaluation hands it the model, and changes no `.grad`."""

    def __init__(self) -> None:
        self.model: Any = None

    def evaluate(self, event: Any, model: Any) -> None:
        self.model = model

    def stop(self, event: Any) -> None:
        for name in ("x", "w", "b"):
            leaf = getattr(self.model, name, None)
            if leaf is not None and leaf.grad is not None:
                sys.stdout.write(f"  dz/d{name} = {leaf.grad.item():g}\n")
