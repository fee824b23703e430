"""XOR as the autograd tutorial trains it: a straight line, leaf tensors, no nn.Module. trainer train recipe=xor"""

import sys
from typing import Any

import torch
from torch import Tensor

from trainer.data import Split


class ManualLinear:
    """y = x @ w + b, with w of shape (inputs, outputs) and b of shape (outputs,) as plain leaf tensors."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.w = torch.randn(inputs, outputs, requires_grad=True)
        self.b = torch.zeros(outputs, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


def table() -> Split:
    """The four rows of XOR: inputs of shape (4, 2), targets of shape (4, 1). It is all there is: none is held out."""
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    targets = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    return Split(train=(inputs, targets), evaluation=(inputs, targets))


class Explain:
    """A logger that has one thing to say, at the end: what was predicted, and why."""

    def __init__(self) -> None:
        self.model: Any = None

    def evaluate(self, event: Any, model: Any) -> None:
        self.model = model

    def stop(self, event: Any) -> None:
        if self.model is None:
            return
        inputs, targets = table().train
        with torch.no_grad():
            predictions = self.model.forward(inputs)
        for (left, right), (wanted,), (said,) in zip(
            inputs.tolist(), targets.tolist(), predictions.tolist(), strict=True
        ):
            sys.stdout.write(f"  {left:.0f} xor {right:.0f} = {wanted:.0f}, predicted {said:.3f}\n")
        sys.stdout.write(
            "No straight line parts XOR's ones from its zeros. The best that one can do is to say 0.5 everywhere,\n"
            "with a loss of 0.25. One hidden layer is enough: trainer train recipe=xor_mlp\n"
        )
