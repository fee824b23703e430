"""ReLU written by hand as an autograd Function, in a net that learns digits. trainer train recipe=custom_relu"""

from typing import Any

import torch
from torch import Tensor, nn


class ReLU(torch.autograd.Function):
    """max(x, 0) with its own backward: the gradient passes where x > 0. At [-1, 2, 0.5] it is [0, 1, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient.masked_fill(x <= 0, 0.0)  # a product with (x > 0) would make NaN of an infinite gradient


class CustomReLU(nn.Module):
    """The function as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape; the result has the same."""
        result: Tensor = ReLU.apply(x)  # type: ignore[no-untyped-call]
        return result


def mlp(width: int = 64) -> nn.Sequential:
    """64 pixels, one hidden layer with the ReLU from above, ten logits."""
    return nn.Sequential(nn.Linear(64, width), CustomReLU(), nn.Linear(width, 10))
