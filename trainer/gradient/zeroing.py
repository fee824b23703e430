"""What happens to `.grad` before a window: set to none, zeros, or never.

Under `never` gradients add up over windows. What stood in `.grad` is then set aside while the window is open and
added back at its end: so the window's own gradient can be divided and checked alone, and a skipped window puts back
what stood there, bit for bit, without a copy.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

Aside = list[tuple[Tensor, Tensor | None]]
"""Parameters with what stood in their `.grad`, None included."""


def zero(parameters: Iterable[Tensor], how: str) -> Aside:
    """Prepare `.grad` as `how` says; returns the gradients set aside (only under `never`)."""
    if how == "set_to_none":
        for parameter in parameters:
            parameter.grad = None
        return []
    if how == "zeros":
        standing = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if standing:
            for gradient in standing:
                gradient.detach_()
            torch._foreach_zero_(standing)
        return []
    aside: Aside = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in aside:
        parameter.grad = None
    return aside


def put_back(aside: Aside, flag: Tensor | None = None) -> None:
    """After a skip: `.grad` as it stood before the window. With a `flag` on a device: where it is 1, unread."""
    for parameter, gradient in aside:
        if flag is None or parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad = torch.where(flag.to(gradient.device) == 1, gradient, parameter.grad)


def can_put_back(aside: Aside) -> bool:
    """Whether `put_back` can follow a flag that is not read: a gradient cannot become None by it."""
    return all(gradient is not None or parameter.grad is None for parameter, gradient in aside)


def add(left: Tensor, right: Tensor) -> Tensor:
    """left + right as a new tensor; torch adds a dense to a sparse one only in the other order."""
    return left + right if left.layout is torch.strided else right + left


def add_back(aside: Aside) -> None:
    """After the window's own gradient is finished: what stood there, plus it. What stood there is left as it is."""
    for parameter, gradient in aside:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else add(gradient, parameter.grad)
