"""Gradient centralisation: Yong, Huang, Hua and Zhang 2020, "Gradient Centralization: A New Optimization Technique for
Deep Neural Networks"."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.errors import GradientError
from trainer.gradient.report import Report
from trainer.gradient.transforms.patterns import Patterns


class Centralise:
    """Takes from the gradient of each output's incoming weights their mean, so that it sums to zero."""

    def __init__(self, match: str | Sequence[str] | None = None) -> None:
        self._match = Patterns("centralise", match)

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        self._match.find(parameters)

    def __call__(self, gradients: dict[str, Tensor], report: Report) -> None:
        chosen, means = [], []
        for name, gradient in gradients.items():
            if gradient.dim() < 2 or name not in self._match:
                continue
            if gradient.layout is not torch.strided:
                if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
                    raise GradientError(
                        f"centralise: the gradient of '{name}' is sparse in other dimensions than its first: leave it "
                        "out with match."
                    )
                gradient = gradient.values()
            chosen.append(gradient)
            means.append(gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True))
        if chosen:
            torch._foreach_sub_(chosen, means)


def centralise(match: str | Sequence[str] | None = None) -> Centralise:
    """Gradient centralisation of every parameter of two or more dimensions (outputs first), or of those that match.

    Args:
        match: names of parameters with wildcards; all by default.
    """
    return Centralise(match)
