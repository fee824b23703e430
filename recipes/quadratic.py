"""a·x² + b·x + c as an autograd Function, fitted to noisy points of a parabola. trainer train recipe=quadratic"""

import sys
from typing import Any

import torch
from torch import Tensor

from trainer.data import Split


class Quadratic(torch.autograd.Function):
    """a·x² + b·x + c for x of any shape and a, b, c of shape ().

    At x = 3, a = 2, b = 1, c = 4 it is 25, and its gradients by x, a, b and c are 13, 9, 3 and 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return a * x**2 + b * x + c

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, a, b = ctx.saved_tensors
        # One a serves every x, so its gradient is the sum over all of them; b's and c's likewise.
        return gradient * (2 * a * x + b), (gradient * x**2).sum(), (gradient * x).sum(), gradient.sum()


def gradcheck(dtype: torch.dtype = torch.float64) -> bool:
    """Whether backward agrees with finite differences of forward, taken with eps 1e-6 around the point above.

    In float32 it cannot: there 25, the value at that point, has neighbours at a distance of 1.9e-6. A difference of
    two values 2e-6 apart in x is then mostly rounding, whatever backward says.
    """
    point = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (3.0, 2.0, 1.0, 4.0)]
    return torch.autograd.gradcheck(Quadratic.apply, point, eps=1e-6, raise_exception=False)


class Parabola:
    """The parameters a, b and c, leaf tensors of shape () that start at zero."""

    def __init__(self) -> None:
        self.a, self.b, self.c = (torch.zeros((), requires_grad=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape; the result has the same."""
        result: Tensor = Quadratic.apply(x, self.a, self.b, self.c)  # type: ignore[no-untyped-call]
        return result


def points(
    a: float, b: float, c: float, noise: float = 0.5, rows: int = 320, held_out: int = 64, seed: int = 0
) -> Split:
    """Points of a parabola: x in [-2, 2) and y with normal noise of the standard deviation `noise`, of shape (rows, 1).

    They follow from `seed` alone, not from the seed of the run.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 1, generator=generator) * 4 - 2
    y = a * x**2 + b * x + c + noise * torch.randn(rows, 1, generator=generator)
    return Split(train=(x[held_out:], y[held_out:]), evaluation=(x[:held_out], y[:held_out]))


class Compare:
    """A logger that checks the gradient at the start, and shows at the end what was found beside the truth."""

    def __init__(self, a: float, b: float, c: float) -> None:
        self.truth = {"a": a, "b": b, "c": c}
        self.model: Any = None

    def start(self, event: Any) -> None:
        verdict = "agrees with" if gradcheck() else "DIFFERS FROM"
        sys.stdout.write(f"  gradcheck in float64, eps 1e-6: backward {verdict} finite differences\n")

    def evaluate(self, event: Any, model: Any) -> None:
        self.model = model

    def stop(self, event: Any) -> None:
        if self.model is not None:
            for name, true in self.truth.items():
                sys.stdout.write(f"  {name} = {getattr(self.model, name).item():.3f}, in truth {true:g}\n")
