"""Terms whose weight is known only when the window ends, beside terms of another weight.

Their leftover divisors differ, so no one factor can make the sum right afterwards: such a term's gradient is held apart
and added with its own divisor when the window ends. It costs one copy of the gradient for each such term.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.gradient.report import Number
from trainer.gradient.zeroing import add


def backward_apart(value: Tensor, seed: Tensor, parameters: Mapping[str, Tensor], held: dict[str, Tensor]) -> None:
    """Add the gradient of one term to `held`; the graph is kept for the other terms."""
    wanted = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    found = torch.autograd.grad(value, list(wanted.values()), seed, retain_graph=True, allow_unused=True)
    for name, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            held[name] = add(held[name], gradient) if name in held else gradient


def add_apart(held: Mapping[str, Tensor], leftover: Number, parameters: Mapping[str, Tensor]) -> None:
    """Add a term's gradient, divided by its own leftover, to `.grad`."""
    for name, gradient in held.items():
        parameter = parameters[name]
        own = gradient / leftover
        parameter.grad = own if parameter.grad is None else add(parameter.grad, own)
