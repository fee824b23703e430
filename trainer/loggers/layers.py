"""What is in each parameter and its gradient, for whoever asks for it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.gradient import norms

BUCKETS = 30


def gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that there are, by the names of their parameters."""
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def histogram(tensor: Tensor) -> list[tuple[float, float, float]] | None:
    """Buckets of equal width as (left edge, right edge, count) over all numbers of the tensor, both parts of complex
    ones; None where it is empty or one of them is not finite."""
    values = norms.plain([tensor.detach()])[0].flatten()
    if values.dtype is not torch.float64:
        values = values.float()
    if not len(values):
        return None
    low, high = torch.stack(values.aminmax()).tolist()
    if not math.isfinite(high - low):
        return None
    if low == high:
        width = max(abs(low), 1.0) * 1e-3
        return [(low - width, high + width, float(len(values)))]
    counts = torch.histc(values, BUCKETS, low, high).tolist()
    edges = [low + (high - low) * index / BUCKETS for index in range(BUCKETS)] + [high]
    return list(zip(edges[:-1], edges[1:], counts, strict=True))
