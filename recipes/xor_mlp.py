"""XOR with one hidden layer, which learns all four rows. trainer train recipe=xor_mlp"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.gradient.objective import Sum


class MLP(nn.Module):
    """Two inputs, one hidden layer of tanh, one logit."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, width)
        self.output = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (rows, 2) to logits of shape (rows, 1)."""
        logits: Tensor = self.output(torch.tanh(self.hidden(x)))
        return logits


def accuracy(model: Any, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
    """How many rows are on the right side of a logit of zero."""
    inputs, targets = micro_batch
    right = (model(inputs) > 0) == (targets > 0.5)
    return {"accuracy": Sum(right.sum(), len(targets))}
